// The page: a model, texts, answers, words. Everything that is shown follows from these variables.

import { showAnswers } from "./answers.js";
import { showCertificate } from "./certificate.js";
import { find, make, say } from "./dom.js";
import { count, problem, speak, t } from "./language.js";
import * as live from "./live.js";
import { model as place, request, useKey } from "./server.js";
import { showWords } from "./words.js";

let models = [];
let asked = null; // {name, rows, reply, ms, chosen}
let explained = new Map(); // by row; null on its way
let busy = false;
const wrong = { door: null, ask: null, words: null }; // () => words, so that they follow the language

const chosen = () => models.find((one) => one.name === find("model").value) ?? models[0];

function show() {
  speak();
  const model = chosen();
  if (model) {
    const said = { labels: count(model.labels.length), tiers: model.tiers.join(" → "), version: model.version };
    find("model-hint").textContent = t(model.task === "score" ? "modelHintScore" : "modelHint", said);
    showCertificate(model);
    // Older artifacts do not say whether they answer pairs; then who asks does.
    const known = typeof model.pairs === "boolean";
    find("pairs-line").hidden = known && !model.pairs;
    find("pairs").disabled = known;
    if (known) find("pairs").checked = model.pairs;
  }
  const closed = !find("door").hidden && !models.length;
  for (const part of document.querySelectorAll("[data-with-key]")) part.hidden = closed;
  const pairs = find("pairs").checked;
  find("texts-label").textContent = t(pairs ? "textsPairs" : "texts");
  find("tab").hidden = !pairs;
  for (const [name, words] of Object.entries(wrong)) say(`${name}-problem`, words ? words() : "");
  showAnswers(asked, choose);
  showWords(asked?.rows[asked.chosen] ?? [], asked ? explained.get(asked.chosen) : undefined);
  live.show();
}

// Do something that the server may refuse; what it says is shown at `where`.
async function attempt(where, doing) {
  wrong[where] = null;
  say(`${where}-problem`, "");
  try {
    await doing();
  } catch (refused) {
    wrong[where] = () => problem(refused);
    if (refused.code === "no-key") {
      find("door").hidden = false;
      find("key").focus();
    }
  }
  show();
}

async function load() {
  await attempt("door", async () => {
    ({ models } = await (await request("v1/models")).json());
    find("door").hidden = true;
    find("model").replaceChildren(...models.map((one) => make("option", { value: one.name }, one.name)));
    if (models.length) live.follow(chosen());
  });
  // Before anybody gave a key, that one is missing is no fault; other problems are shown with the texts.
  if (!find("door").hidden && !find("key").value) wrong.door = null;
  if (find("door").hidden) [wrong.ask, wrong.door] = [wrong.door, null];
  show();
}

// [[text]] or [[text, other]]; throws {message} in words where a line is no pair.
function rows() {
  const lines = find("texts").value.toWellFormed().split("\n").filter((line) => line.trim());
  if (!lines.length) return fail("wrong:empty");
  if (!find("pairs").checked) return lines.map((line) => [line]);
  const pairs = lines.map((line) => line.split("\t"));
  const bad = pairs.findIndex((pair) => pair.length !== 2);
  return bad < 0 ? pairs : fail("wrong:pairs", { line: bad + 1 });
}

function fail(key, values) {
  wrong.ask = () => t(key, values);
  find("texts").focus();
  return null;
}

async function ask() {
  if (busy) return;
  const given = rows();
  if (!given) return show();
  const name = find("model").value;
  const body = find("pairs").checked ? { pairs: given } : { texts: given.map(([text]) => text) };
  work(true);
  say("said", t("asking"));
  await attempt("ask", async () => {
    const began = performance.now();
    const reply = await (await request(place(name, "predict"), body)).json();
    [asked, explained] = [{ name, rows: given, reply, ms: performance.now() - began, chosen: 0 }, new Map()];
  });
  if (!asked || wrong.ask) return work(false);
  const title = find("answers-title");
  if (title.getBoundingClientRect().bottom > innerHeight) title.scrollIntoView(); // a phone
  await choose(0);
  work(false);
}

function work(now) {
  busy = now;
  find("results").setAttribute("aria-busy", String(now));
}

async function choose(row) {
  asked.chosen = row;
  const [of, known] = [asked, explained];
  wrong.words = null;
  if (!known.has(row)) known.set(row, null);
  show();
  if (known.get(row)) return;
  const [text, other] = of.rows[row];
  await attempt("words", async () => {
    try {
      const reply = await request(place(of.name, "explain"), other === undefined ? { text } : { pair: [text, other] });
      known.set(row, await reply.json());
    } catch (refused) {
      known.delete(row);
      if (asked === of && asked.chosen === row) throw refused;
    }
  });
}

function insertTab() {
  const texts = find("texts");
  texts.setRangeText("\t", texts.selectionStart, texts.selectionEnd, "end");
  texts.focus();
}

function wire() {
  find("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  find("texts").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  });
  find("door").addEventListener("submit", (event) => { event.preventDefault(); useKey(find("key").value); load(); });
  find("model").addEventListener("change", () => { [asked, explained] = [null, new Map()]; live.follow(chosen()); show(); });
  find("pairs").addEventListener("change", show);
  find("tab").addEventListener("click", insertTab);
  find("examples").addEventListener("click", () => {
    find("texts").value = t(find("pairs").checked ? "examplePairs" : "exampleTexts");
    find("texts").focus();
  });
  for (const button of document.querySelectorAll("[data-language]")) {
    button.addEventListener("click", () => { speak(button.dataset.language); show(); });
  }
  live.start();
}

wire();
show();
load();
