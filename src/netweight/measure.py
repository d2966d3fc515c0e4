"""The only source of numbers.

Speeds of several engines are measured in one run: the rounds are interleaved, each engine works at its own best batch
size, rows are distinct and tokenization counts. No answer is kept between requests; an engine does keep the tokens of
words that it has seen (`netweight.words`), in a benchmark as in production.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from netweight.data import Rows
from netweight.encode import TextEncoder, Tokens
from netweight.engine import Engine, Outputs
from netweight.engine.base import TierEngine
from netweight.errors import ArtifactError, OptionError
from netweight.quiet import cores as cores
from netweight.task import Floats, Ints, Prediction, ScorePrediction, Task

# What an hour of one virtual core costs in US dollars: a round figure for general-purpose cloud machines, stated
# wherever money is shown, and an option everywhere.
VCPU_HOUR = 0.04

BATCHES = (1, 8, 32, 128)
COST_BATCH = 32  # rows that `tier_costs` gives a tier at a time
_PILOT = 0.15  # seconds of each batch size in a look of the pilot
_LOOKS = 3
_ROUND = 0.5  # seconds of each engine in each round
_ROUNDS = 5
_SINGLES = 300
_PACKAGES = ("netweight", "numpy", "tokenizers", "onnxruntime", "openvino", "torch", "transformers", "nncf")


@dataclass(frozen=True)
class Machine:
    """Where numbers were measured."""

    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    versions: Mapping[str, str]
    commit: str
    date: str


@dataclass(frozen=True)
class Timing:
    """Speed of one engine on distinct rows, tokenization included.

    `rows_per_second` is the median over rounds at the best batch size (`batch`), with the rounds' spread; p50, p95
    and p99 are milliseconds of single requests.
    """

    rows_per_second: float
    slowest: float
    fastest: float
    batch: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Measurement:
    """Everything known of one candidate on one set of labelled rows.

    quality: the task's metric. agreement: share of rows with the reference's label (scores: Spearman). distance: mean
    over rows of ||F0(x) - F1(x)||_2 on the logits. answered: share of rows that each tier answered. bytes: what must
    travel to serve it. memory: peak resident bytes of a fresh process that loads it and predicts; cold_start: seconds
    from its start to the first prediction, imports included.
    """

    name: str
    tiers: tuple[str, ...]
    rows: int
    quality: float
    agreement: float
    distance: float
    answered: tuple[float, ...]
    bytes: int
    timing: Timing | None = None
    memory: int | None = None
    cold_start: float | None = None

    def dollars_per_million(self, vcpu_hour: float, threads: int) -> float | None:
        """Price of a million rows in batches, at `vcpu_hour` for an hour of one core."""
        if self.timing is None:
            return None
        return 1e6 / self.timing.rows_per_second / 3600 * threads * vcpu_hour


@dataclass(frozen=True)
class Measurements:
    """What a job measured: the reference, what ships, and the candidates around it (all on dev, but where said)."""

    machine: Machine
    reference: Measurement
    shipped: Measurement
    candidates: tuple[Measurement, ...]
    vcpu_hour: float


class Answering(Protocol):
    """What a speed is measured of: an artifact's engine, or a baseline of the same shape."""

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, batch: int | None = None
    ) -> list[Prediction] | list[ScorePrediction]: ...


def machine(threads: int) -> Machine:
    """This machine, the versions of what runs on it, and the commit of the code."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=cpu(),
        cores=cores(),
        threads=threads,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def cpu() -> str:
    """The processor, with what makes integer arithmetic fast on it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    name = re.search(r"model name\s*:\s*(.+)", text)
    # 64-bit ARM says numbers in place of a name.
    part = "".join(f" {what} {number}" for what, number in re.findall(r"CPU (implementer|part)\s*:\s*(\w+)", text)[:2])
    wanted = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "i8mm", "asimddp", "bf16")
    able = [flag for flag in wanted if re.search(rf"\b{flag}\b", text)] or re.findall(r"\bavx2\b", text)[:1]
    return f"{name[1].strip() if name else platform.machine() + part}{' with ' + ', '.join(able) if able else ''}"


def _commit() -> str:
    """The commit of a source checkout, with "-dirty" where this package differs from it; empty for an installed one."""
    folder = Path(__file__).resolve().parent
    if not (folder.parents[1] / ".git").exists():
        return ""

    def said(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        # Not `describe --dirty`: a benchmark that has just written its results would count.
        changed = said("status", "--porcelain", "--", ".").strip()
        return said("describe", "--always").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def quality(task: Task, logits: Floats, reference: Floats, targets: Ints | Floats | None) -> tuple[float, float, float]:
    """Quality (NaN without targets), agreement with the reference, and mean ||F0(x) - F1(x)||_2 of the logits."""
    if len(logits) == 0:
        raise OptionError("quality needs at least one row.")
    distance = np.linalg.norm(np.asarray(logits, np.float64) - reference, axis=1).mean()
    known: Ints | Floats = np.zeros(len(logits)) if targets is None else targets
    outcomes = task.outcomes(logits, known)
    return (
        float("nan") if targets is None else float(task.quality(outcomes)),
        task.agreement(outcomes, task.outcomes(reference, known)),
        float(distance),
    )


def measured(
    task: Task,
    name: str,
    engine: Engine,
    said: Outputs,
    reference: Floats,
    targets: Ints | Floats | None,
    size: int,
    timing: Timing,
) -> Measurement:
    """What an engine said of some rows, whose `reference` are another model's logits (n, outputs)."""
    found = quality(task, said.logits, reference, targets)
    answered = tuple(float((said.tier == i).mean()) for i in range(len(engine.tiers)))
    return Measurement(name, tuple(t.name for t in engine.tiers), len(said.tier), *found, answered, size, timing)


def speed(engines: Mapping[str, Answering], rows: Rows, *, rounds: int = _ROUNDS) -> dict[str, Timing]:
    """Timing of each engine, interleaved, on the distinct texts of `rows` (at most 4,000 are used)."""
    rows = _distinct(rows, 4000)
    batches = {name: _best_batch(engine, rows) for name, engine in engines.items()}
    sizes = {name: max(batches[name], int(_ROUND * _rate(e, rows, batches[name]))) for name, e in engines.items()}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        for name, engine in engines.items():
            part = _window(rows, turn * sizes[name], sizes[name])
            began = time.perf_counter()
            engine.predict(part.text, part.pair, batches[name])
            rates[name].append(len(part) / (time.perf_counter() - began))
    singles = _singles(engines, rows)
    return {
        name: Timing(
            statistics.median(rates[name]),
            min(rates[name]),
            max(rates[name]),
            batches[name],
            *(float(q) for q in np.percentile(singles[name], (50, 95, 99))),
        )
        for name in engines
    }


def _distinct(rows: Rows, most: int) -> Rows:
    return rows.take(np.random.default_rng(0).permutation(rows.distinct())[:most])


def _window(rows: Rows, start: int, count: int) -> Rows:
    """`count` rows from `start` on, going round; never more than there are."""
    n = len(rows)
    return rows.take((start + np.arange(min(count, n))) % n)


def _rate(engine: Answering, rows: Rows, batch: int) -> float:
    """Rows a second, roughly."""
    count, spent, done = max(batch, 8), 0.0, 0
    engine.predict(rows.text[:1], rows.pair[:1] if rows.pair else None)
    while spent < _PILOT:
        part = _window(rows, done, count)
        began = time.perf_counter()
        engine.predict(part.text, part.pair, batch)
        spent += time.perf_counter() - began
        done += len(part)
        count = min(4 * count, len(rows))
    return done / spent


def _best_batch(engine: Answering, rows: Rows) -> int:
    # One look each would let a moment in which the machine was busy decide.
    looks = [[_rate(engine, rows, batch) for batch in BATCHES] for _ in range(_LOOKS)]
    return BATCHES[int(np.median(looks, axis=0).argmax())]


def _singles(engines: Mapping[str, Answering], rows: Rows) -> dict[str, list[float]]:
    """Milliseconds of single requests."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(min(_SINGLES, len(rows))):
        text, pair = rows.text[i : i + 1], rows.pair[i : i + 1] if rows.pair else None
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.predict(text, pair)
            found[name].append(1000 * (time.perf_counter() - began))
    return found


@dataclass(frozen=True)
class Cost:
    """Seconds that one tier takes: a row in batches, and a request of one row; tokenization not included."""

    row: float
    single: float


def tier_costs(tiers: Mapping[str, TierEngine], encoder: TextEncoder, rows: Rows) -> dict[str, Cost]:
    """What each tier adds to a cascade, interleaved; the key "" is tokenization."""
    rows = _distinct(rows, 1500)
    tokens = encoder.encode(rows.text, rows.pair)
    spent: dict[str, list[float]] = {name: [] for name in ("", *tiers)}
    single: dict[str, list[float]] = {name: [] for name in ("", *tiers)}
    counts = dict.fromkeys(tiers, 64)
    for turn in range(_ROUNDS + 1):
        began = time.perf_counter()
        encoder.encode(rows.text, rows.pair)
        spent[""].append((time.perf_counter() - began) / len(rows))
        for name, tier in tiers.items():
            part = tokens.take((turn * 64 + np.arange(min(counts[name], len(rows)))) % len(rows))
            began = time.perf_counter()
            tier.logits(part, COST_BATCH)
            each = (time.perf_counter() - began) / len(part)
            counts[name] = max(64, int(_ROUND / 2 / each))
            spent[name].append(each)
        for i in range(20):
            row = np.array([(20 * turn + i) % len(rows)])
            one = rows.take(row)
            for name in ("", *tiers):
                began = time.perf_counter()
                if name:
                    tiers[name].logits(tokens.take(row), 1)
                else:
                    encoder.encode(one.text, one.pair)
                single[name].append(time.perf_counter() - began)
    # The first turn warms up.
    return {name: Cost(statistics.median(spent[name][1:]), statistics.median(single[name][20:])) for name in spent}


def seconds(engines: Mapping[str, TierEngine], tokens: Tokens) -> dict[str, float]:
    """Median seconds that each engine takes for all of these tokens as one batch; rounds are interleaved."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(10 * _ROUNDS + 1):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.logits(tokens, len(tokens))
            spent[name].append(time.perf_counter() - began)
    # The first round warms up.
    return {name: statistics.median(taken[1:]) for name, taken in spent.items()}


_FRESH = """
import json, re, sys, time
import netweight
engine = netweight.load(sys.argv[1], int(sys.argv[2]))
pairs = ["ok"] if sys.argv[3] == "pair" else None
engine.warm()
engine.predict(["does it answer?"], pairs)
ready = time.time()
rows = json.load(sys.stdin)
engine.predict(rows["text"], rows["pair"])
# Not getrusage: what the parent held before the exec counts there. Not every kernel keeps a peak (gVisor does not).
held = re.search(r"Vm(?:HWM|RSS):\\s*(\\d+)", open("/proc/self/status").read())
print(json.dumps([ready, held and int(held[1]) * 1024, "torch" in sys.modules]))
"""


@dataclass(frozen=True)
class Fresh:
    """A fresh process: seconds from its start to the first answer with all tiers loaded, and its peak resident bytes
    after some hundred rows; those of that moment where the kernel keeps no peak, None where it says neither."""

    cold_start: float
    memory: int | None


def fresh(folder: Path, rows: Rows, threads: int, rounds: int = 3) -> Fresh:
    """Cold start and memory of an artifact, medians of `rounds`. Raises ArtifactError where the process fails."""
    rows = rows.take(range(min(512, len(rows))))
    given = json.dumps({"text": rows.text, "pair": rows.pair})
    starts, peaks = [], []
    for _ in range(rounds):
        began = time.time()
        done = subprocess.run(
            # -P: what lies in this folder, such as a random.py, is not imported.
            [sys.executable, "-P", "-c", _FRESH, str(folder), str(threads), "pair" if rows.pair else "text"],
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ArtifactError(f"{folder} cannot be loaded in a fresh process: {done.stderr.strip()[-500:]}")
        ready, peak, torch_imported = json.loads(done.stdout)
        if torch_imported:
            raise ArtifactError("loading an artifact imported torch; that must never happen.")
        starts.append(ready - began)
        peaks.append(peak)
    return Fresh(statistics.median(starts), None if None in peaks else int(statistics.median(peaks)))


def to_dict(measurements: Measurements) -> dict[str, Any]:
    """For a JSON file; `from_dict` reads it back."""
    return asdict(measurements)


def from_dict(stored: Mapping[str, Any]) -> Measurements:
    """Inverse of `to_dict`. Raises ArtifactError where something is missing."""
    try:
        return Measurements(
            Machine(**stored["machine"]),
            _measurement(stored["reference"]),
            _measurement(stored["shipped"]),
            tuple(_measurement(m) for m in stored["candidates"]),
            stored["vcpu_hour"],
        )
    except (KeyError, TypeError) as problem:
        raise ArtifactError(f"measurements cannot be read: {problem!r}.") from problem


def _measurement(stored: Mapping[str, Any]) -> Measurement:
    values = {f.name: stored[f.name] for f in fields(Measurement)}
    timing = values.pop("timing")
    for name in ("tiers", "answered"):
        values[name] = tuple(values[name])
    return Measurement(**values, timing=Timing(**timing) if timing else None)
