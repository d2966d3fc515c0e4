"""The parts of docs/results.md that come from `make bench`, roofline.py and scaling.py: tables, and plots as SVG."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from netweight.report.html import join
from netweight.report.svg import Axis, around, circle, line, polyline, text

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DRIVER = RESULTS.parent / "bench.py"
TITLES = {
    "netweight": "**Netweight**",
    "teacher": "the teacher, PyTorch fp32",
    "onnx_int8": "the teacher, ONNX Runtime dynamic int8",
    "openvino_int8": "the teacher, OpenVINO + NNCF int8",
    "openvino_accuracy": "the teacher, NNCF with accuracy control",
    "torch_pruning": "the teacher, Torch-Pruning, fine-tuned, int8",
    "olive": "the teacher, Olive's search",
    "setfit": "SetFit",
    "model2vec": "model2vec classifier",
    "fasttext": "fastText",
    "tfidf": "TF-IDF + logistic regression",
}
NOT_RUN = "not run"
TO_DO = "still to be done"
APART = "†"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _FOOT = 640.0, 380.0, 60.0, 480.0, 20.0, 330.0
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#57606a}.grid{stroke:#d0d7de;stroke-width:.5}.axis{stroke:#57606a}"
    ".mark{fill:#57606a}.first{fill:#0969da}.fail{fill:none;stroke:#57606a}.curve{fill:none;stroke:#0969da}"
)

Cell = dict[str, Any]


def names_in(variable: str) -> list[str]:
    """The words of a tuple in bench.py, which is what decides about sets and peers."""
    found = re.search(rf"^{variable} = \((.*?)\)", DRIVER.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, variable
    return re.findall(r'"([^"]+)"', found[1])


def cells() -> dict[tuple[str, int, str], Cell]:
    """Stored cells by set, seed and peer; trials (`--quick`) do not count."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("cells/*.json"))]
    return {(c["set"], c["seed"], c["peer"]): c for c in found if not c["quick"]}


def where(machine: Cell) -> str:
    """The machine, the day, and the code."""
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}, commit {machine['commit']}"


def apart(cell: Cell, own: Cell) -> str:
    """How what a cell took turns with differs from what its job's Netweight cell is of; empty where it does not.

    Cells of before d0a9639 name no artifact. There another teacher tells that it was another one, and an earlier day
    that Netweight's cell was made anew after it. One that was timed again later is no case: that artifact still lay
    there, and since then the driver refuses any other.
    """
    here, there = cell.get("machine", {}), own.get("machine", {})
    known = all(one.get("artifact") for one in (cell, own))
    said = []
    if cell["artifact"] != own["artifact"] if known else _teacher(cell, own):
        said.append("another artifact")
    elif not known and here.get("commit") != there.get("commit") and "" < here.get("date", "") < there.get("date", ""):
        said.append("the artifact of an earlier day")
    # Before f48978e a processor with AVX2 alone had no more than its name.
    if len({m["cpu"].removesuffix(" with avx2") for m in (here, there) if "cpu" in m}) > 1:
        said.append("another machine")
    return ", ".join(said)


def _teacher(cell: Cell, own: Cell) -> bool:
    """Whether both were certified against teachers, and these do not have the same quality."""
    found = [one["certificate"] for one in (cell, own) if "certificate" in one]
    return len({(c.get("reference"), c.get("dev", {}).get("reference")) for c in found}) > 1


def row(name: str, peer: str, cell: Cell | None, own: Cell) -> str:
    """One line of a set's table; `own` is Netweight's cell there: a peer that failed may be within what that was allowed."""
    title = TITLES.get(peer, peer) + (f" {APART}" if cell and apart(cell, own) else "")
    if cell is None or "error" in cell:
        said = _not_run(name, peer) if cell is None else _failed(cell["error"])
        return f"| {title} | {said} |" + " |" * 9
    allowed = own.get("certificate", {}).get("margin", 0.0)
    c, t, made = cell["certificate"], cell["timing"][peer], cell["made"]
    seconds = "" if made["seconds"] is None else f"{made['seconds']:,.0f} s"
    verdict = c["verdict"]
    if verdict != "certified" and 100 * c["drop"]["high"] < allowed:
        verdict += f"; would be at {allowed:.1f}"
    ratio = "1" if peer == "netweight" else f"{t['ratio']:.3g}"
    return (
        f"| {title} | {100 * c['quality']['value']:.2f} | {100 * c['drop']['value']:.2f}, at most "
        f"{100 * c['drop']['high']:.2f} | {c['margin']:.1f} | {verdict} | {t['rows_per_second']:,.0f} | {ratio} | "
        f"{t['p50']:.2f} ms | {t['p99']:.2f} ms | {made['bytes'] / 1e6:.1f} MB | {seconds} |"
    )


def _not_run(name: str, peer: str) -> str:
    """With the reason that was written down, for this set or for all of them."""
    path = RESULTS / "not-run.json"
    why: dict[str, str] = json.loads(path.read_text(encoding="utf-8")).get(peer, {}) if path.exists() else {}
    return f"{NOT_RUN}: {why.get(name) or why.get('') or TO_DO}"


def _failed(error: str) -> str:
    why = error[:160].replace("|", "/").replace("\n", " ")
    # `--hours` is ours, and the peer is not to blame for it.
    return f"stopped by us: {why}" if "not done after" in error else f"failed: {why}"


def tables() -> tuple[list[str], dict[str, str]]:
    """The section, and plots by file name."""
    found, peers = cells(), names_in("PEERS")
    parts = [
        "## Beside its peers\n\n    make bench SET=banking77 PEER=tfidf SEED=0\n",
        "Every peer has the rows, the teacher and the threads of one Netweight job, and is timed in rounds that take turns with its "
        "artifact, each at its best batch size, tokenization included. `speed` is Netweight's rows per second divided by the "
        "peer's, the median over rounds of pairs: above 1, Netweight is faster. Netweight's own rows per second are of rounds by "
        "itself, so they are no numerator of these. The verdict is Netweight's own test against the "
        "teacher, at the larger of 1.0 point and the margin that dev says has 80 % power, and where that fails at the one that Netweight was allowed; `trained in` is what making it took, "
        "given the teacher where it needs one. A peer that failed, or that a limit of ours stopped, has a row that says so.\n",
    ]
    plots: dict[str, str] = {}
    for name in names_in("SETS"):
        parts.append(f"### {name}\n")
        seeds = sorted({seed for set_, seed, _ in found if set_ == name})
        if not seeds:
            parts.append(f"{NOT_RUN}\n")
        for seed in seeds:
            here = {peer: found.get((name, seed, peer)) for peer in peers}
            some = next((c for c in here.values() if c and "certificate" in c), None)
            if some:
                c, of = some["certificate"], TITLES.get(some["peer"], some["peer"])
                parts.append(
                    f"Seed {seed}; {c['metric']}, {c['rows']:,} certify rows, teacher {100 * c['reference']:.2f}; "
                    f"{of}: {where(some['machine'])}.\n"
                )
            own = here.get("netweight") or {}
            lines = ["| | quality | drop, points | margin | verdict | rows/s | speed | p50 | p99 | size | trained in |"]
            lines += ["|---|---|---|---|---|---|---|---|---|---|---|", *(row(name, p, c, own) for p, c in here.items())]
            parts.append("\n".join(lines) + "\n")
            parts += _apart(here, own)
            if shown := {p: c for p, c in here.items() if c and "timing" in c}:
                file = plot(name, seed)
                plots[file] = scatter(f"{name}: quality against speed", shown)
                parts.append(f"![Quality against speed of Netweight and its peers on {name}]({file})\n")
    return parts, plots


def _apart(here: dict[str, Cell | None], own: Cell) -> list[str]:
    """What the sign in a table means; nothing where no row has it."""
    each = [
        f"{TITLES.get(peer, peer)} ({why}: {where(c['machine'])})"
        for peer, c in here.items()
        if c and (why := apart(c, own))
    ]
    if not each:
        return []
    return [
        f"{APART} belongs to another artifact than Netweight's row, or to another machine: {'; '.join(each)}. Drop and verdict are "
        "against the teacher of that job, and of the times only `speed`, a ratio within one run, stands beside those of other rows.\n"
    ]


def plot(name: str, seed: int) -> str:
    """The file of a set's plot, in docs/."""
    return f"peers-{name}-seed{seed}.svg"


def scatter(title: str, shown: dict[str, Cell]) -> str:
    """Quality against speed relative to Netweight's; hollow where the certificate was not given."""
    points = [
        (peer, 1 / c["timing"][peer]["ratio"], 100 * c["certificate"]["quality"]["value"], c["certificate"]["verdict"])
        for peer, c in shown.items()
    ]
    x, y = across([p[1] for p in points], log=True), upward([p[2] for p in points])
    shapes = frame(x, y, "rows per second, Netweight = 1, log scale", "quality on certify rows")
    # Names go to the right, pushed apart from top to bottom.
    free = -math.inf
    for peer, speed, reached, verdict in sorted(points, key=lambda p: y(p[2])):
        kind = ("first" if peer == "netweight" else "mark") if verdict == "certified" else "fail"
        at = max(y(reached), free + 14)
        free = at
        shapes += [circle(x(speed), y(reached), 5, kind, f"{peer}: {reached:.2f}, {speed:.2g}x")]
        shapes += [line(x(speed) + 6, y(reached), _RIGHT + 8, at, "grid"), text(_RIGHT + 12, at + 4, peer)]
    shapes.append(text(_LEFT, _HEIGHT - 6, "filled: certified; hollow: not"))
    return picture(title, shapes)


def curve(title: str, steps: list[Cell]) -> str:
    """Seconds against rows, with the straight line through the largest and the origin."""
    x = Axis(0, 1.05 * max(s["rows"] for s in steps), _LEFT, _RIGHT)
    y = Axis(0, 1.1 * max(s["seconds"] for s in steps), _FOOT, _TOP)
    last = max(steps, key=lambda s: s["rows"])
    shapes = frame(x, y, "rows", "seconds")
    shapes.append(line(x(0), y(0), x(last["rows"]), y(last["seconds"]), "axis"))
    places = [(x(s["rows"]), y(s["seconds"])) for s in sorted(steps, key=lambda s: s["rows"])]
    return picture(title, [*shapes, polyline(places, "curve"), *(circle(*place, 5, "first") for place in places)])


def across(values: list[float], *, log: bool = False) -> Axis:
    """The horizontal axis of a plot around these values."""
    return around(values, _LEFT, _RIGHT, log=log)


def upward(values: list[float]) -> Axis:
    """The vertical axis of a plot around these values."""
    return around(values, _FOOT, _TOP)


def frame(x: Axis, y: Axis, below: str, beside: str) -> list[Any]:
    """Grid, axes and their names."""
    shapes: list[Any] = []
    for value, label in y.labels():
        shapes += [line(_LEFT, y(value), _RIGHT, y(value), "grid"), text(_LEFT - 6, y(value) + 4, label, anchor="end")]
    for value, label in x.labels(5):
        shapes += [line(x(value), _TOP, x(value), _FOOT, "grid"), text(x(value), _FOOT + 16, label, anchor="middle")]
    shapes += [line(_LEFT, _FOOT, _RIGHT, _FOOT, "axis"), line(_LEFT, _TOP, _LEFT, _FOOT, "axis")]
    shapes.append(text((_LEFT + _RIGHT) / 2, _FOOT + 32, below, anchor="middle"))
    return [*shapes, text(14, (_TOP + _FOOT) / 2, beside, anchor="middle", turn=-90)]


def picture(title: str, shapes: list[Any]) -> str:
    """An SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img">'
        f"<title>{title}</title><style>{_STYLE}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{join(shapes)}</svg>\n'
    )


def roofline() -> str:
    """How much of the int8 peak the encoders reach."""
    head = "## How much of the machine's int8 peak the encoder reaches\n\n    .venv/bin/python benchmarks/roofline.py ARTIFACT\n\n"
    path = RESULTS / "roofline.json"
    if not path.exists():
        return f"{head}{NOT_RUN}\n"
    found = json.loads(path.read_text(encoding="utf-8"))
    m, peak = found["machine"], found["peak"]
    lines = [
        f"Peak: {peak['operations'] / 1e9:,.0f} billion int8 operations a second ({peak['name']}), the best of "
        f"{len(found['peaks'])} large products in ONNX Runtime ({where(m)}). {found['rows']} dev rows of "
        f"{found['tokens']:.1f} tokens; operations are 2 x multiply-adds of the int8 matrices.\n",
        "| tier | operations a row | rows/s | billion operations a second | of the peak | batch | padding |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {t['operations_per_row'] / 1e6:,.0f} million | {t['rows_per_second']:,.0f} | {t['operations'] / 1e9:,.0f} | "
        f"{100 * t['share']:.0f} % | {t['batch']} | {100 * t['padding']:.0f} % |"
        for name, t in found["tiers"].items()
    ]
    return head + "\n".join(lines) + "\n"


def scaling() -> tuple[list[str], dict[str, str]]:
    """Growth of cost with rows, and its plots."""
    parts = ["## From 1x to 10x rows\n\n    .venv/bin/python benchmarks/scaling.py predict|optimize ...\n"]
    plots = {}
    for what in ("predict", "optimize"):
        path = RESULTS / f"scaling-{what}.json"
        if not path.exists():
            parts.append(f"`{what}`: {NOT_RUN}\n")
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        steps, m = sorted(found["steps"], key=lambda s: int(s["rows"])), found["machine"]
        first, last = steps[0], steps[-1]
        parts.append(
            f"`{what}` on {found['set']} ({where(m)}): {last['rows'] / first['rows']:.1f} times the rows take "
            f"{last['seconds'] / first['seconds']:.1f} times the seconds and {last['memory'] / first['memory']:.2f} times the memory.\n"
        )
        lines = ["| rows | seconds | milliseconds a row | peak memory |", "|---|---|---|---|"]
        lines += [
            f"| {s['rows']:,} | {s['seconds']:,.1f} | {1000 * s['seconds'] / s['rows']:.2f} | {s['memory'] / 1e6:,.0f} MB |"
            for s in steps
        ]
        parts.append("\n".join(lines) + "\n")
        file = f"scaling-{what}.svg"
        plots[file] = curve(f"{what}: seconds against rows", steps)
        parts.append(f"![Seconds of {what} against rows]({file})\n")
    return parts, plots
