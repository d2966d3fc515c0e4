// Rows of texts, what the model says of each, and the choice of one.

import { breakable, find, make, say, styled } from "./dom.js";
import { count, fixed, percent, significant, t } from "./language.js";

// Draw `asked` = {rows, reply, ms, chosen}; `choose(i)` is called with the row that a person picks.
export function showAnswers(asked, choose) {
  find("answers").hidden = !asked;
  if (!asked) {
    say("said", t("nothing"));
    return;
  }
  const { rows, reply, ms, chosen } = asked;
  const texts = rows.length === 1 ? t("row") : t("rows", { n: count(rows.length) });
  const failed = reply.degraded.length ? ` ${t("degraded", { tiers: reply.degraded.join(", ") })}` : "";
  say("said", t("said", { rows: texts, ms: ms < 10 ? fixed(ms, 1) : count(ms) }) + failed);
  const scored = reply.predictions.some((one) => one.value !== undefined);
  const names = ["text", ...(scored ? ["value"] : ["label", "confidence"]), "tier"];
  const buttons = () => [...find("answers").querySelectorAll("tbody button")];
  const focused = buttons().indexOf(document.activeElement);
  // Roles are spelled out: a style sheet that lays rows out anew on a phone would take them away.
  find("answers").replaceChildren(
    make("table", { role: "table", "aria-labelledby": "answers-title" },
      make("thead", { role: "rowgroup" },
        make("tr", { role: "row" }, names.map((name) => make("th", { role: "columnheader", scope: "col" }, t(name))))),
      make("tbody", { role: "rowgroup" },
        rows.map((row, i) => line(row, reply.predictions[i], i === chosen, () => choose(i))))),
  );
  buttons()[focused]?.focus({ preventScroll: true });
}

function line(row, said, chosen, pick) {
  const cell = (kind, ...children) => make("td", { role: "cell", class: kind }, ...children);
  const button = make("button", { type: "button", "aria-pressed": String(chosen), dir: "auto", onclick: pick, onkeydown: step }, make("span", {}, row.join(" ⇥ ")));
  const answer = said.value !== undefined
    ? [cell("answer", significant(said.value))]
    : [cell("answer", breakable(said.label)), cell("sure", bar(said.confidence), percent(said.confidence))];
  return make("tr", { role: "row", class: chosen ? "chosen" : null }, cell("asked", button), answer, cell("tier", said.tier));
}

export function bar(share) {
  return make("span", { class: "bar", "aria-hidden": "true" }, styled(make("span"), "--share", String(share)));
}

// Arrows go from row to row.
function step(event) {
  const way = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  const next = way && event.currentTarget.closest("tr")[way];
  if (!next) return;
  event.preventDefault();
  next.querySelector("button").focus();
}
