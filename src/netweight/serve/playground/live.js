// Charts of what the server does now, from /metrics, for as long as somebody looks.

import { draw, find, make, say as write } from "./dom.js";
import { count, fixed, percent, problem, significant, t } from "./language.js";
import { between, reading } from "./prometheus.js";
import { hasKey, request } from "./server.js";

const POINTS = 60;
const WIDE = 300, HIGH = 80;

let model = null; // as GET v1/models says it
let before = null; // {at, reading}
let points = []; // what `between` said, newest last
let trouble = "";
let paused = false, timer = 0;

// With a key, looking costs its requests.
const pause = () => (hasKey() ? 10_000 : 2_000);

// Begin anew, with another model.
export function follow(chosen) {
  [model, before, points, trouble] = [chosen, null, [], ""];
  show();
  go();
}

export function start() {
  document.addEventListener("visibilitychange", go);
  find("pause").addEventListener("click", () => {
    paused = !paused;
    show();
    go();
  });
}

function go() {
  clearTimeout(timer);
  before = null; // a pause is no interval
  if (model && !paused && !document.hidden) look();
}

async function look() {
  const of = model;
  let wait = pause();
  try {
    const text = await (await request("metrics")).text();
    if (of !== model) return;
    const now = { at: performance.now(), reading: reading(text, of.name) };
    const point = before && between(before.reading, now.reading, (now.at - before.at) / 1000, of.tiers[0]);
    if (point) points = [...points, point].slice(-POINTS);
    [before, trouble] = [now, ""];
  } catch (refused) {
    if (of !== model) return;
    [before, trouble] = [null, problem(refused)];
    wait = Math.max(wait, 1000 * (refused.wait ?? 0));
  }
  show();
  clearTimeout(timer);
  if (!paused && !document.hidden) timer = setTimeout(look, wait);
}

// Draw everything that is known, in the language that is chosen now.
export function show() {
  find("pause").textContent = t(paused ? "resume" : "pause");
  find("pause").setAttribute("aria-pressed", String(paused));
  find("live-hint").textContent = t(hasKey() ? "liveHintSlow" : "liveHint");
  write("live-problem", trouble);
  const many = (model?.tiers.length ?? 0) > 1;
  const last = points[points.length - 1] ?? { requests: NaN, rows: NaN, p50: NaN, p95: NaN, handed: NaN };
  const of = (name) => points.map((point) => point[name]);
  find("live").replaceChildren(
    chart(t("throughput"), [of("requests")], significant, significant(last.requests), t("throughputMore", { n: significant(last.rows) })),
    chart(t("latency"), [of("p50"), of("p95")], significant, significant(last.p50), t("latencyMore", { n: significant(last.p95) })),
    chart(t("handover"), [of("handed")], (v) => percent(v, 0), percent(last.handed, 0), t(many ? "handoverMore" : "handoverNone"), 1),
  );
}

// One series, or two of which the second is dashed, with the newest value in letters above.
function chart(name, series, say, now, more, top = 0) {
  const most = Math.max(0, ...series.flat().filter(Number.isFinite));
  const high = top || nice(most);
  const x = (i) => WIDE - ((series[0].length - 1 - i) * WIDE) / (POINTS - 1);
  const y = (v) => HIGH - 4 - (v / high) * (HIGH - 8);
  const lines = series.flatMap((values, k) => [
    draw("path", { d: path(values, x, y), class: k ? "second" : "first" }),
    draw("path", { d: path(values.map((v, i) => (i === values.length - 1 ? v : NaN)), x, y), class: `now ${k ? "second" : "first"}` }),
  ]);
  return make("figure", { class: "chart" },
    make("figcaption", {}, make("span", {}, name), make("b", {}, now), make("span", { class: "hint" }, more)),
    make("span", { class: "top hint", "aria-hidden": "true" }, say(high)),
    draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img", "aria-label": t("chart", { name, now, most: say(most) }) },
      draw("path", { d: `M0 ${y(high)}H${WIDE}M0 ${y(0)}H${WIDE}`, class: "grid" }), lines));
}

// Gaps where nothing was asked; a point alone is a line without length, which a round cap makes a dot.
function path(values, x, y) {
  let d = "", drawing = false;
  values.forEach((value, i) => {
    const place = `${fix(x(i))} ${fix(y(value))}`;
    if (Number.isFinite(value)) d += drawing ? `L${place}` : `M${place}h0`;
    drawing = Number.isFinite(value);
  });
  return d;
}

const fix = (value) => value.toFixed(1);

// The next of 1, 2, 5, 10, ... that is no smaller.
function nice(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((n) => n * unit >= value) * unit;
}
