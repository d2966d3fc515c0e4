"""The part of docs/results.md that comes from `make bench-runs`."""

from __future__ import annotations

from typing import Any

import peers
from serving import row, stored

from netweight.report.svg import circle, line, polyline, text

_HEAD = "| figure | target | reached | |\n|---|---|---|---|"
_SETS = {"banking77": "BANKING77, ten clients, Dirichlet(0.3)", "amazon": "Amazon reviews, four shops by category"}
_WAYS = {
    "pooled": "all rows in one place",
    "alone": "each client alone",
    "fedavg": "FedAvg, all weights but the embeddings",
    "lora-int8": "FedAvg, adapters of rank 6 and head, int8",
    "head-int8": "FedAvg, head alone, int8",
    "private-off": "FedAvg, head alone, batches of 128, without noise",
    "private-8": "the same at epsilon 8 for a row, secure sums",
    "private-3": "the same at epsilon 3",
    "private-1": "the same at epsilon 1",
}
_APART = "speed-up without a word"
_WITHIN, _SMALL = 1.0, 50  # points; times


def section() -> tuple[str, dict[str, str]]:
    """Tables of parallel and of federated runs, and plots by file name."""
    parts = [
        "## Runs of many processes and places\n\n    make bench-runs\n",
        "One thread a process, each on a core of its own; "
        "[parallel.md](parallel.md), [federated.md](federated.md) and [scaling.md](scaling.md) say what they are.\n",
        _HEAD,
        *_parallel(stored("runs") or {}),
    ]
    cells = {cell["name"]: cell for cell in (stored("runs-federated") or {}).get("cells", [])}
    parts += [*_targets(cells), "", *_planned(stored("runs") or {})]
    plots = {}
    for kind, title in _SETS.items():
        parts += _table(kind, title, cells)
        if picture := _price(kind, title, cells):
            file = f"private-{kind}.svg"
            plots[file] = picture
            parts.append(f"![Accuracy against epsilon, {title}]({file})\n")
    return "\n".join(parts), plots


def _missing(figure: str, target: str) -> str:
    return f"| {figure} | {target} | {peers.NOT_RUN} | |"


def _parallel(found: dict[str, Any]) -> list[str]:
    rows = []
    for key, figure, target in (
        ("parallel", "data parallel, two processes / one", 1.7),
        ("heterogeneous", "shares by measured speed / equal ones, half of one core taken", 1.25),
    ):
        if key not in found:
            rows.append(_missing(figure, f"{target}x"))
            continue
        one = found[key]
        apart = f"; {one[_APART]:.2f}x where they never speak" if _APART in one else ""
        about = f"{one['speed-up']:.2f}x (batch {one['batch']}, {one['trained parameters'] / 1e6:.1f} M trained{apart})"
        rows.append(row(figure, f"{target}x", about, one["speed-up"] >= target))
    figure = "fsdp, two processes: parameters, gradients and optimizer state of each / of one process"
    if "fsdp" in found:
        one, each = (sum(found["fsdp"][k].values()) / 1e6 for k in ("bytes of one", "bytes of each of two"))
        ratio = found["fsdp"]["ratio"]
        rows.append(row(figure, "0.6", f"{ratio:.2f} ({each:.0f} of {one:.0f} MB)", ratio <= 0.6))
    else:
        rows.append(_missing(figure, "0.6"))
    figure = "pipeline of two stages: idle part of a step, measured / in theory"
    if "pipeline" in found:
        said = "; ".join(
            f"{b['micro-batches']} micro-batches {100 * b['measured']:.0f} % / {100 * b['theory']:.0f} %"
            for b in found["pipeline"]["bubbles"]
        )
        rows.append(row(figure, "stated", said, None))
    else:
        rows.append(_missing(figure, "stated"))
    figure = (
        "`netweight plan`: bytes of tensors at the peak of a step, predicted / allocated, the cell that is most off"
    )
    if "planner" in found:
        ratios = [cell["total"] / max(cell["allocated"]) for cell in found["planner"]["cells"]]
        worst = max(ratios, key=lambda ratio: abs(ratio - 1))
        rows.append(row(figure, "0.85 to 1.15", f"{worst:.2f} of {len(ratios)} cells", 0.85 <= worst <= 1.15))
    else:
        rows.append(_missing(figure, "0.85 to 1.15"))
    return rows


def _planned(found: dict[str, Any]) -> list[str]:
    """What the planner says beside what was measured."""
    if "planner" not in found:
        return []
    one = found["planner"]
    lines = [
        f"Memory of the process that needs most, predicted by `netweight plan` and measured: {one['model']}, "
        f"{one['batch']} rows of {one['length']} tokens, {one['precision']}, {one['optimizer']}, two processes (local: "
        "one). `benchmarks/runs_planner.py` says what is counted.\n",
        "| strategy | activations computed again | predicted, MB | allocated, MB | predicted / allocated | resident, MB |",
        "|---|---|---|---|---|---|",
    ]
    for cell in one["cells"]:
        allocated, resident = max(cell["allocated"]), max(cell["resident"])
        lines.append(
            f"| {cell['strategy']} | {'yes' if cell['checkpointing'] else 'no'} | {cell['total'] / 1e6:,.0f} "
            f"| {allocated / 1e6:,.0f} | {cell['total'] / allocated:.2f} | {resident / 1e6:,.0f} |"
        )
    return [*lines, ""]


def _seeds(kind: str, way: str, cells: dict[str, Any]) -> dict[str, Any]:
    """Cells of a way by seed."""
    found = (name.split("/") for name in cells)
    return {seed: cells[f"{kind}/{way}/{seed}"] for k, w, seed in found if (k, w) == (kind, way)}


def _targets(cells: dict[str, Any]) -> list[str]:
    rows = []
    for kind, title in _SETS.items():
        pooled, together, alone, small = (_seeds(kind, w, cells) for w in ("pooled", "fedavg", "alone", "lora-int8"))
        gaps = {s: 100 * (pooled[s]["accuracy"] - together[s]["accuracy"]) for s in pooled if s in together}
        rows += _by_seed(
            f"{title}: points below pooled rows", "1.0", gaps, "{:.2f}", all(g <= _WITHIN for g in gaps.values())
        )
        worst = {
            s: (
                min(together[s]["clients"], key=together[s]["clients"].get),
                together[s]["clients"],
                alone[s]["clients"],
            )
            for s in together
            if s in alone
        }
        gains = {s: 100 * (a[name] - b[name]) for s, (name, a, b) in worst.items()}
        rows += _by_seed(
            f"{title}: the worst client, points above that client alone",
            "above 0",
            gains,
            "{:.1f}",
            all(g > 0 for g in gains.values()),
        )
        both = [s for s in small if s in together]
        less = {s: sent(together[s]) / sent(small[s]) for s in both}
        lost = {s: 100 * (together[s]["accuracy"] - small[s]["accuracy"]) for s in both}
        figure, target = f"{title}: bytes of a round, FedAvg / adapters in int8 (points lost)", "50, within 1.0 point"
        if not both:
            rows.append(_missing(figure, target))
            continue
        said = "; ".join(f"seed {s} {less[s]:.0f} ({lost[s]:.2f})" for s in both)
        fine = all(less[s] >= _SMALL and lost[s] <= _WITHIN for s in both)
        rows.append(row(figure, target, said, fine))
    many = cells.get("banking77/many/0")
    figure = "50 clients in one process: resident memory beyond model, rows and libraries"
    if many is None:
        rows.append(_missing(figure, "stated"))
    else:
        more = many["peak_mb"] - many["base_mb"]
        rows.append(row(figure, "stated", f"{more:.0f} MB (peak {many['peak_mb']:.0f} MB)", None))
    return rows


def _price(kind: str, title: str, cells: dict[str, Any]) -> str | None:
    """Accuracy against epsilon: a mark for each seed, a line through the means; the level line is without noise."""
    there = {way.removeprefix("private-"): _accuracies(_seeds(kind, way, cells)) for way in _WAYS if "private" in way}
    private = {float(epsilon): there[epsilon] for epsilon in there if epsilon != "off" and there[epsilon]}
    if len(private) < 2:
        return None
    x = peers.across(list(private), log=True)
    y = peers.upward([value for found in there.values() for value in found])
    shapes = peers.frame(x, y, "epsilon (delta 1e-5), log scale", "accuracy")
    means = sorted((x(epsilon), y(sum(found) / len(found))) for epsilon, found in private.items())
    shapes.append(polyline(means, "curve"))
    shapes += [circle(x(e), y(v), 5, "first", f"epsilon {e:g}: {v:.1f}") for e, found in private.items() for v in found]
    if without := there["off"]:
        level = y(sum(without) / len(without))
        shapes += [line(x.start, level, x.end, level, "axis"), text(x.end + 12, level + 4, "without noise")]
    return peers.picture(f"{title}: accuracy against epsilon", shapes)


def _accuracies(found: dict[str, Any]) -> list[float]:
    """In per cent."""
    return [100 * cell["accuracy"] for cell in found.values()]


def _by_seed(figure: str, target: str, found: dict[str, float], form: str, fine: bool) -> list[str]:
    if not found:
        return [_missing(figure, target)]
    return [row(figure, target, "; ".join(f"seed {s} {form.format(v)}" for s, v in found.items()), fine)]


def sent(cell: dict[str, Any]) -> int:
    """Bytes of a round, both ways."""
    return int(cell["up"]) + int(cell["down"])


def _table(kind: str, title: str, cells: dict[str, Any]) -> list[str]:
    there = {way: _seeds(kind, way, cells) for way in _WAYS}
    if not any(there.values()):
        return []
    lines = [
        f"{title}. Accuracy on rows cut from train; means over the seeds that were run.\n",
        "| way | seeds | epochs | accuracy | worst client | MB of a round |",
        "|---|---|---|---|---|---|",
    ]
    for way, found in there.items():
        if found:
            n, each = len(found), list(found.values())
            accuracy = sum(c["accuracy"] for c in each) / n
            worst = sum(min(c["clients"].values()) for c in each) / n
            megabytes = f"{sent(each[0]) / 1e6:,.3g}" if sent(each[0]) else ""
            lines.append(
                f"| {_WAYS[way]} | {', '.join(found)} | {each[0]['epochs']:g} "
                f"| {100 * accuracy:.1f} | {100 * worst:.1f} | {megabytes} |"
            )
    return [*lines, ""]
