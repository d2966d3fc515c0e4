// What was proved of a model, and measured, in plain words.

import { draw, find, make, styled } from "./dom.js";
import { count, fixed, percent, significant, size, t } from "./language.js";

const KINDS = { certified: "good", "not certified": "warn", worse: "bad" };

// Draw what `GET v1/models` says of one.
export function showCertificate(model) {
  find("certificate").replaceChildren(
    make("div", { class: "proof" }, make("h3", {}, t("certificate")), model.certificate ? proof(model.certificate) : make("p", {}, t("certificateNone"))),
    make("div", { class: "measured" }, make("h3", {}, t("measurements")), model.measurements ? measured(model) : make("p", {}, t("measurementsNone"))),
  );
}

// How one job's quality is written. A mean absolute error is stored negative, since higher is better.
function scale(metric, reference) {
  const score = metric === "spearman" || metric === "mae";
  const unit = metric === "mae" ? Math.abs(reference) / 100 || 1 : 0.01;
  const value = {
    accuracy: (v) => percent(v, 2),
    "macro-f1": (v) => fixed(100 * v, 2),
    spearman: (v) => fixed(v, 4),
    mae: (v) => significant(-v),
  }[metric];
  const digits = (v) => (Math.abs(v / unit - Math.round((10 * v) / unit) / 10) < 1e-9 ? 1 : 2);
  const points = (v, n = 2) => t((Number((v / unit).toFixed(n)) === 1 ? "point" : "points") + (score ? "Score" : ""), { n: fixed(v / unit, n) });
  return {
    value,
    points,
    margin: (v) => points(v, digits(v)),
    bare: (v) => fixed(v / unit, 2),
    estimate: ({ value: v, low, high }) => {
      const [from, to] = metric === "mae" ? [high, low] : [low, high];
      return t("range", { value: value(v), low: value(from), high: value(to) });
    },
  };
}

function proof(certificate) {
  const { registration, verdict, shipped, reference, tested } = certificate;
  const metric = registration.task.metric;
  const final = tested.find((one) => one.candidate.digest === shipped.digest) ?? tested[tested.length - 1];
  const say = scale(metric, reference.value);
  const sure = percent(registration.confidence, 1).replace(/[.,]0\u00a0/, "\u00a0");
  const sentence = t(`sentence:${verdict}`, {
    metric: t(`metric:${metric}`), falls: t(metric === "mae" ? "rises" : "drops"), margin: say.margin(final.margin),
    confidence: sure, rows: count(registration.rows), reference: registration.reference.name,
  });
  const drop = { value: say.points(final.drop.value), low: say.bare(final.drop.low), high: say.bare(final.drop.high) };
  return [
    make("p", {}, make("span", { class: `badge ${KINDS[verdict]}` }, t(`verdict:${verdict}`))),
    make("p", { class: "lead" }, sentence[0].toUpperCase() + sentence.slice(1)),
    plot(final, say, drop),
    facts([
      [t("ofReference", { name: registration.reference.name }), `${say.estimate(reference)}`],
      [t("ofShipped", { name: shipped.name }), say.estimate(final.quality)],
      [t("drop"), t("range", drop)],
      [t("margin"), t("marginFixed", { margin: say.margin(final.margin) })],
      [t("certifyRows"), t("looks", { rows: count(registration.rows), confidence: sure, look: registration.look })],
    ]),
    make("p", { class: "hint" }, `${t(`point:${metric}`)}${t("stop")}`),
  ];
}

const facts = (pairs) => make("dl", {}, pairs.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

// The interval of the drop against the margin; it passes where all of it lies left of the margin.
function plot(final, say, drop) {
  const { value, low, high } = final.drop;
  const from = Math.min(low, 0), to = Math.max(high, final.margin), span = to - from || 1;
  const x = (v) => 12 + (376 * (v - from + 0.06 * span)) / (1.2 * span);
  const colour = final.passed ? "pass" : "fail";
  const mark = (at, text, kind) => [draw("line", { x1: x(at), x2: x(at), y1: 18, y2: 46, class: kind }), draw("text", { x: x(at), y: 12, "text-anchor": "middle" }, text)];
  const label = t("plot", { ...drop, margin: say.margin(final.margin) });
  return draw("svg", { viewBox: "0 0 400 64", class: "plot", role: "img", "aria-label": label },
    draw("rect", { x: x(final.margin), y: 18, width: 400 - x(final.margin), height: 28, class: "beyond" }),
    draw("line", { x1: 0, x2: 400, y1: 46, y2: 46, class: "axis" }),
    mark(0, "0", "zero"), mark(final.margin, `${t("plotMargin")} ${say.bare(final.margin)}`, "margin"),
    draw("line", { x1: x(low), x2: x(high), y1: 32, y2: 32, class: `interval ${colour}` }),
    draw("circle", { cx: x(value), cy: 32, r: 5, class: `dot ${colour}` }),
    draw("text", { x: x(value), y: 60, "text-anchor": "middle", class: "strong" }, say.bare(value)));
}

function measured(model) {
  const { shipped, reference, machine } = model.measurements;
  const [mine, theirs] = [shipped.timing ?? {}, reference.timing ?? {}];
  const ms = (v) => (v === undefined ? "–" : `${significant(v)}\u00a0ms`);
  const commit = machine.commit ? t("commit", { commit: machine.commit }) : "";
  return [
    make("ul", { class: "cards" },
      card(t("rate"), mine.rows_per_second, theirs.rows_per_second, count, "faster", "slower", true),
      card(t("p50"), mine.p50, theirs.p50, ms, "faster", "slower"),
      card(t("p99"), mine.p99, theirs.p99, ms, "faster", "slower"),
      card(t("bytes"), shipped.bytes, reference.bytes, size, "smaller", "larger")),
    tiersBar(shipped, model.tiers),
    facts([
      [t("agreement"), percent(shipped.agreement)],
      [t("memory"), `${size(shipped.memory)}, ${shipped.cold_start ? `${significant(shipped.cold_start)} s` : "–"}`],
    ]),
    make("p", { class: "hint" }, t("measuredOn", { cpu: machine.cpu, threads: machine.threads, date: machine.date, commit })),
  ];
}

function card(name, mine, theirs, say, better, worse, up = false) {
  const gain = up ? mine / theirs : theirs / mine;
  const than = gain > 0 && Number.isFinite(gain) ? t(gain >= 1 ? better : worse, { n: significant(gain >= 1 ? gain : 1 / gain) }) : "";
  return make("li", {}, make("span", {}, name), make("b", {}, say(mine)),
    make("span", { class: gain >= 1 ? "good" : "bad" }, than), make("span", { class: "hint" }, t("against", { value: say(theirs) })));
}

// One bar, divided by the share of dev rows that each tier answered.
function tiersBar(shipped, tiers) {
  const shares = shipped.answered.map((share, i) => `${tiers[i] ?? shipped.tiers[i]} ${percent(share, 0)}`);
  return make("figure", {},
    make("div", { class: "stack", "aria-hidden": "true" }, shipped.answered.map((share, i) => styled(make("span", { class: `t${i % 4}` }), "--share", String(share)))),
    make("figcaption", { class: "hint" }, t("tiersBar", { shares: shares.join(" · ") })));
}
