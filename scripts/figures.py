"""What `make bench` has to show, from its cells: ratios to the best certified peers, against their targets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

import peers
from scipy.stats import t

LIGHT = ("model2vec", "fasttext", "tfidf")
_HEAD = (
    "## Figures\n\nA peer counts where it is certified at its own margin, or loses at most what Netweight was allowed.\n\n"
    "| figure, at the certified margin | target | reached | |\n|---|---|---|---|"
)

Cell = dict[str, Any]
# One set and seed: Netweight's cell, and those of the peers that were certified, by name: at their own margin, or within
# the one that Netweight was held to.
Shop = tuple[str, Cell, dict[str, Cell]]


def shops(found: dict[tuple[str, int, str], Cell]) -> list[Shop]:
    """Every set and seed that Netweight was measured on."""
    made = []
    for (name, seed, peer), own in sorted(found.items()):
        if peer != "netweight" or "timing" not in own:
            continue
        here = {p: c for (n, s, p), c in found.items() if (n, s) == (name, seed) and p not in ("netweight", "teacher")}
        certified = {p: c for p, c in here.items() if "timing" in c and _holds(c, own["certificate"]["margin"])}
        made.append((f"{name} {seed}", own, certified))
    return made


def _holds(cell: Cell, points: float) -> bool:
    """Whether a peer was certified, or would have been had it been allowed so many points."""
    found = cell["certificate"]
    return bool(found["verdict"] == "certified" or 100 * found["drop"]["high"] < points)


def speed(shop: Shop) -> float:
    """Rows per second over those of the fastest certified transformer peer; 0 where none was certified."""
    return fastest(shop)[0]


def fastest(shop: Shop) -> tuple[float, str]:
    """That ratio, and the peer."""
    _, _, certified = shop
    return min(((float(c["timing"][p]["ratio"]), p) for p, c in _transformers(certified).items()), default=(0.0, ""))


def _against(cell: Cell, peer: str, key: str) -> float:
    """Netweight's figure over the peer's, of one run."""
    return float(cell["timing"]["netweight"][key] / cell["timing"][peer][key])


def _transformers(certified: dict[str, Cell]) -> dict[str, Cell]:
    return {p: c for p, c in certified.items() if p not in LIGHT}


def _by_set(values: Mapping[str, float]) -> list[list[float]]:
    """Seeds of each set; names are "SET SEED"."""
    sets: dict[str, list[float]] = {}
    for name, value in values.items():
        sets.setdefault(name.partition(" ")[0], []).append(value)
    return list(sets.values())


def _mean(values: Mapping[str, float]) -> float:
    """Over sets, each with the mean of its seeds, so that one with more seeds weighs no more."""
    return fmean(fmean(seeds) for seeds in _by_set(values))


def _geometric(values: Mapping[str, float]) -> tuple[float, tuple[float, float] | None]:
    """The mean, and the 95 % interval that other seeds and timings of the same sets would give: Student's, with one
    variance of the logarithms for all sets; None where no set has two seeds."""
    logs = {name: math.log(value) for name, value in values.items()}
    mean, sets = _mean(logs), _by_set(logs)
    if not (free := len(logs) - len(sets)):
        return math.exp(mean), None
    one = sum((value - fmean(seeds)) ** 2 for seeds in sets for value in seeds) / free
    half = float(t.ppf(0.975, free)) * math.sqrt(sum(one / len(seeds) for seeds in sets)) / len(sets)
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def _line(figure: str, target: str, least: float, values: dict[str, float], form: str = "{:.2f}x") -> str:
    """A row of the table; `least` is negative where smaller is better. What misses it by itself is named beside the
    verdict on the geometric mean."""
    if not values:
        return f"| {figure} | {target} | {peers.NOT_RUN} | |"
    (mean, interval), short = _geometric(values), [name for name, value in values.items() if not _fine(value, least)]
    each = ", ".join(f"{name} {form.format(v)}" for name, v in values.items())
    if interval:
        each += f"; {' to '.join(map(form.format, interval))} with 95 % confidence over seeds"
    said = form.format(mean) if len(values) == 1 else f"{form.format(mean)} in the geometric mean ({each})"
    verdict = "**missed**" if not _fine(mean, least) else "reached" + (f", not by {', '.join(short)}" if short else "")
    return f"| {figure} | {target} | {said} | {verdict} |"


def _fine(value: float, least: float) -> bool:
    return value >= least if least > 0 else value <= -least


def table() -> str:
    """The figures, each with what it is for every set and seed."""
    found = shops(peers.cells())
    heavy, light, p50, p99, least, size = ({} for _ in range(6))
    for name, own, certified in found:
        if own["certificate"]["verdict"] != "certified":
            continue
        others = _transformers(certified)
        speeds = {p: float(c["timing"][p]["ratio"]) for p, c in certified.items()}
        if len(others) < len(certified):
            light[name] = min(speeds.values())
        elif others:
            heavy[name] = min(speeds.values())
        if others:
            quick = min(others, key=lambda p: others[p]["timing"][p]["p50"])
            p50[name], p99[name] = (_against(others[quick], quick, key) for key in ("p50", "p99"))
            least[name] = max(_against(c, p, "p99") for p, c in others.items())
            size[name] = own["made"]["bytes"] / min(c["made"]["bytes"] for c in others.values())
    held = {name: value for name, value in heavy.items() if name not in _wider(found)}
    lost = [name for name, own, _ in found if own["certificate"]["verdict"] != "certified"]
    lines = [
        _HEAD,
        _line("throughput / best certified transformer peer, where no light peer certifies", "10x", 10, heavy),
        _line("the same on sets where one point was allowed", "10x", 10, held),
        _line("on the other sets: throughput / fastest certified peer of any kind", "1.0x", 1, light),
        _line(
            "p50 of single requests / that of the certified transformer peer with the least",
            "0.20",
            -0.2,
            p50,
            "{:.2f}",
        ),
        _line("p99 / that peer's p99", "1.0", -1, p99, "{:.2f}"),
        _line("the same, whichever certified transformer peer it is worst against", "1.0", -1, least, "{:.2f}"),
        _line("bytes / smallest certified transformer peer", "0.25", -0.25, size, "{:.2f}"),
        _gap(
            "static tier's gap to the teacher on dev, mean; the better of `static` and `conv`", found, "static", "conv"
        ),
        _gap("the same, `static` alone", found, "static"),
        _small(found),
        _smallest(),
        _standard(),
        *_growth(),
    ]
    said = f"\nNot certified, and so in none of the first seven rows: {', '.join(lost)}.\n" if lost else ""
    return "\n".join(lines) + "\n" + said + _wide(found, heavy) + _left_out(found)


def _gap(figure: str, found: list[Shop], *tiers: str) -> str:
    """How far the best of these tiers is from the teacher on dev, in points: the mean over sets."""
    gaps = {}
    for name, own, _ in found:
        points = own["made"].get("points", {})
        if best := max((points[tier] for tier in tiers if tier in points), default=None):
            gaps[name] = 100 * (own["certificate"]["dev"]["reference"] - best)
    if not gaps:
        return f"| {figure} | 2.0 points or less | {peers.NOT_RUN} | |"
    mean, each = _mean(gaps), ", ".join(f"{name} {v:.2f}" for name, v in gaps.items())
    return f"| {figure} | 2.0 points or less | {mean:.2f} ({each}) | {'reached' if mean <= 2 else '**missed**'} |"


def _wider(found: list[Shop]) -> dict[str, Cell]:
    """Certificates that allow more than a point."""
    return {name: own["certificate"] for name, own, _ in found if own["certificate"]["margin"] > 1}


def _wide(found: list[Shop], heavy: dict[str, float]) -> str:
    """Where more than a point was allowed in the first row."""
    held = {name: certificate for name, certificate in _wider(found).items() if name in heavy}
    if not held:
        return ""
    each = "; ".join(
        f"{name}: {c['margin']:g} points (lost {100 * c['drop']['value']:.2f}, at most {100 * c['drop']['high']:.2f})"
        for name, c in held.items()
    )
    return f"\nAllowed in the first row, where `auto` asked for more than one point: {each}.\n"


def _left_out(found: list[Shop]) -> str:
    """What some rows lack, and which peers that might have been the best were not there to be."""
    said = []
    jobs = [f"{name} {seed}" for name in peers.names_in("SETS") for seed in range(3)]
    if missing := sorted(set(jobs) - {name for name, _, _ in found}):
        said.append(f"Not measured at all: {', '.join(missing)}.")
    if alone := [name for name, _, certified in found if not _transformers(certified)]:
        said.append(f"No transformer peer is certified, so that rows against one lack it: {', '.join(alone)}.")
    if floor := [name for name, own, _ in found if not {"static", "conv"} & set(own["made"].get("points", ()))]:
        said.append(f"The linear floor won and no static tier was made: {', '.join(floor)}.")
    held = [(name, p) for name, own, certified in found for p, c in certified.items() if peers.apart(c, own)]
    if each := [f"{peers.TITLES[p]} ({name})" for name, p in held]:
        said.append(
            f"Timed beside another artifact, or on another machine ({peers.APART} in the tables), and counted all the same, since "
            f"the best of more peers is no weaker rival: {', '.join(each)}."
        )
    cells = peers.cells()
    for peer, title in (("torch_pruning", "Torch-Pruning"), ("olive", "Olive"), ("setfit", "SetFit")):
        without = [name for name, _, _ in found if "timing" not in cells.get((*_split(name), peer), {})]
        if without and len(without) < len(found):
            said.append(f"{title} was not measured on {', '.join(without)}.")
    return "\nWhat the figures lack:\n\n" + "".join(f"- {one}\n" for one in said) if said else ""


def _split(shop: str) -> tuple[str, int]:
    name, _, seed = shop.rpartition(" ")
    return name, int(seed)


def _small(found: list[Shop]) -> str:
    """The artifact of BANKING77."""
    sizes = {name: own["made"]["bytes"] / 1e6 for name, own, _ in found if name.startswith("banking77 ")}
    return _line("bytes on BANKING77", "6 MB or less", -6, sizes, "{:.1f} MB")


def _smallest() -> str:
    """The certified artifacts of BANKING77 where bytes are what is minimised."""
    stored = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted(peers.RESULTS.glob("banking77-size-seed*.json"))
    ]
    held = {f"seed {r['seed']}": r["inspect"] for r in stored}
    sizes = {name: r["bytes"] / 1e6 for name, r in held.items() if r["certificate"]["verdict"] == "certified"}
    return _line("the same with `--minimise size`", "6 MB or less", -6, sizes, "{:.1f} MB")


def _growth() -> list[str]:
    """Ten times the rows: times the seconds."""
    lines = []
    for what in ("predict", "optimize"):
        path = peers.RESULTS / f"scaling-{what}.json"
        grown, beyond = dict[str, float](), dict[str, float]()
        if path.exists():
            steps = sorted(json.loads(path.read_text(encoding="utf-8"))["steps"], key=lambda s: int(s["rows"]))
            first, last = steps[0], steps[-1]
            # Above 1 where a row of many costs more than one of few.
            grown = {what: last["seconds"] * first["rows"] / (first["seconds"] * last["rows"])}
            # Without what every run pays: a row more among many over a row more among few.
            more = [(b["seconds"] - a["seconds"]) / (b["rows"] - a["rows"]) for a, b in pairwise(steps)]
            beyond = {what: more[-1] / more[0]} if len(more) > 1 else {}
        lines.append(_line(f"seconds a row in `{what}`, ten times the rows / few", "1.0, below is better", -1, grown))
        lines.append(_line("the same of each row more, last step / first", "1.0, below is better", -1, beyond))
    return lines


def _standard() -> str:
    """`--effort standard` beside an ordinary fine-tune of six epochs of the same rows."""
    name = "`optimize --effort standard` wall time / an ordinary full fine-tune of 6 epochs"
    path = peers.RESULTS / "finetune.json"
    if not path.exists():
        return _line(name, "3x", -3, {})
    usual = json.loads(path.read_text(encoding="utf-8"))
    if usual["epochs"] < 6:
        name += f", of which {usual['epochs']:g} timed"
    name += " (in a time limit that decides it: see the notes)"
    stored = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted(peers.RESULTS.glob("banking77-standard-seed*.json"))
    ]
    six = 6 * usual["seconds"] / usual["epochs"]
    return _line(name, "3x", -3, {f"seed {r['seed']}": r["seconds"] / six for r in stored if r["seconds"]})
