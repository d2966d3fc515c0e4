// Which words moved a decision: the text with each word tinted, underlined and numbered, and the strongest in a list.

import { find, make, styled } from "./dom.js";
import { percent, significant, signed, t } from "./language.js";

const SHOWN = 8; // of the strongest words
const FAINT = 0.02; // of the strongest: what is less carries no number
const FLAT = 0.0005; // half of a tenth of a point: what is less is shown as nothing

// Draw an explanation of texts; null while it is on its way, undefined where none was asked.
export function showWords(texts, explained) {
  const place = find("words");
  place.hidden = explained === undefined;
  place.setAttribute("aria-busy", String(explained === null));
  if (explained === undefined) return;
  const title = make("h3", {}, t("words"));
  if (explained === null) {
    place.replaceChildren(title, make("p", { class: "hint" }, t("wordsLooking")));
    return;
  }
  const { prediction, words } = explained;
  const scored = prediction.value !== undefined;
  const most = Math.max(0, ...words.map((word) => Math.abs(word.weight)));
  const nothing = scored ? 1e-9 : FLAT;
  const flat = most < nothing;
  const say = (weight) => (scored ? (weight > 0 ? "+" : "") + significant(weight) : signed(100 * weight, Math.abs(weight) < 0.1 ? 1 : 0));
  const lead = scored
    ? t("wordsLeadScore", { value: significant(prediction.value) })
    : t("wordsLead", { label: prediction.label, confidence: percent(prediction.confidence) });
  place.replaceChildren(
    title,
    make("p", {}, lead),
    ...texts.map((text, side) => marked(text, words.filter((word) => word.side === side), flat ? 0 : most, nothing, say)),
    ...note(words, flat),
    flat ? "" : strongest(words.filter((word) => Math.abs(word.weight) >= nothing), prediction, most, say),
  );
}

function note(words, flat) {
  const runs = words.some((word) => word.count > 1);
  const keys = [!words.length ? "wordsNone" : flat ? "wordsFlat" : null, runs ? "wordsRuns" : null].filter(Boolean);
  return keys.map((key) => make("p", { class: "hint" }, t(key)));
}

// Offsets count code points, which strings of JavaScript do not.
function marked(text, words, most, flat, say) {
  const points = Array.from(text);
  const line = make("p", { class: "words", dir: "auto" });
  let at = 0;
  for (const word of words) {
    line.append(points.slice(at, word.start).join(""), most ? tinted(word, most, flat, say) : word.text);
    at = word.end;
  }
  line.append(points.slice(at).join(""));
  return line;
}

function tinted(word, most, flat, say) {
  const share = Math.abs(word.weight) / most;
  const title = t("wordsTitle", { word: word.text, weight: say(word.weight) });
  if (share < FAINT || Math.abs(word.weight) < flat) return make("span", { title }, word.text);
  const kind = `${word.weight > 0 ? "for" : "against"}${word.text.length < 20 ? " short" : ""}`; // its number stays beside it
  const mark = make("mark", { class: kind, title }, word.text, make("small", {}, say(word.weight)));
  return styled(mark, "--share", share.toFixed(3));
}

function strongest(words, prediction, most, say) {
  const first = [...words].sort((one, other) => Math.abs(other.weight) - Math.abs(one.weight))
    .filter((word) => Math.abs(word.weight) / most >= FAINT).slice(0, SHOWN);
  const legend = make("p", { class: "legend hint" },
    make("span", { class: "for" }, `+ ${t("wordsFor")}`), make("span", { class: "against" }, `− ${t("wordsAgainst")}`));
  return make("div", { class: "strongest" },
    make("h4", {}, t("wordsTop")),
    legend,
    make("ol", {}, first.map((word) => {
      const flips = word.label !== undefined && word.label !== prediction.label;
      const beam = make("span", { class: "beam", "aria-hidden": "true" }, styled(make("span"), "--share", String(Math.abs(word.weight) / most)));
      return make("li", { class: word.weight > 0 ? "for" : "against" },
        make("span", { class: "word", dir: "auto" }, word.text), beam, make("span", { class: "n" }, say(word.weight)),
        flips ? make("span", { class: "flip" }, t("wordsFlip", { label: word.label })) : null);
    })));
}
