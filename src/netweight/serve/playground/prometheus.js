// Prometheus' text format, and what happened between two readings of it.

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

// [{name, labels, value}] of one model, or of none.
export function parse(text, model) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[n"\\]/g, (pair) => ESCAPED[pair]);
    }
    if (labels.model === model) found.push({ name: match[1], labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return found;
}

// What one reading says: requests, rows of each tier, and requests by upper bound of their seconds.
export function reading(text, model) {
  const lines = parse(text, model);
  const only = (name) => lines.filter((line) => line.name === name);
  return {
    process: only("netweight_request_seconds_created")[0]?.value, // when it first counted: no two agree to a microsecond
    requests: only("netweight_requests_total").reduce((sum, line) => sum + line.value, 0),
    tiers: new Map(only("netweight_rows_total").map((line) => [line.labels.tier, line.value])),
    bounds: only("netweight_request_seconds_bucket")
      .map((line) => [Number(line.labels.le.replace("Inf", "Infinity")), line.value])
      .sort((one, other) => one[0] - other[0]),
  };
}

// Rates between two readings that lie `seconds` apart; null where another process answered, or counters went back.
// p50 and p95 in milliseconds, the share of rows that the first tier handed on; NaN where nothing was asked.
export function between(before, after, seconds, firstTier) {
  const passed = (tier) => (after.tiers.get(tier) ?? 0) - (before.tiers.get(tier) ?? 0);
  const rows = [...after.tiers.keys()].map(passed);
  const earlier = new Map(before.bounds);
  const bounds = after.bounds.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  const requests = after.requests - before.requests;
  if (before.process !== undefined && before.process !== after.process) return null;
  if (requests < 0 || rows.some((n) => n < 0) || bounds.some(([, n]) => n < 0)) return null;
  const all = rows.reduce((sum, n) => sum + n, 0);
  return {
    requests: requests / seconds,
    rows: all / seconds,
    p50: 1000 * quantile(bounds, 0.5),
    p95: 1000 * quantile(bounds, 0.95),
    handed: all ? 1 - passed(firstTier) / all : NaN,
  };
}

// Linear within the bucket, as Prometheus' own histogram_quantile.
export function quantile(bounds, share) {
  const total = bounds.length ? bounds[bounds.length - 1][1] : 0;
  if (!total) return NaN;
  let low = 0, below = 0;
  for (const [bound, count] of bounds) {
    if (count >= share * total) {
      return bound === Infinity ? low : low + ((bound - low) * (share * total - below)) / (count - below || 1);
    }
    [low, below] = [bound, count];
  }
  return low;
}
