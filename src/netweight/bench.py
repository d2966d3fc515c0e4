"""Measure an artifact again, with baselines beside it in the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from netweight import artifact, measure
from netweight.baselines import baseline
from netweight.build import TEACHER
from netweight.data import Columns
from netweight.engine import Engine, load
from netweight.measure import Machine, Measurement
from netweight.model import Model
from netweight.store import Store, rows_of, store_of


@dataclass(frozen=True)
class Bench:
    """The artifact first, then each baseline; `quality` of the rows where labels were given."""

    machine: Machine
    metric: str
    labelled: bool
    measured: tuple[Measurement, ...]

    def to_json(self) -> str:
        """All of it."""
        shown = [asdict(m) | {"dollars_per_million": m.dollars_per_million(*self._price)} for m in self.measured]
        return json.dumps({"machine": asdict(self.machine), "metric": self.metric, "measured": shown}, indent=1)

    @property
    def _price(self) -> tuple[float, int]:
        return measure.VCPU_HOUR, self.machine.threads

    def rows(self) -> list[list[str]]:
        """The figures for people: a head, a line for each figure, and the artifact's ratios to each baseline."""
        lines = [["", *(m.name for m in self.measured)]]
        if self.labelled:
            lines.append([self.metric, *(f"{100 * m.quality:.2f}" for m in self.measured)])
        lines.append([f"agreement with {self.reference}", *(f"{100 * m.agreement:.2f} %" for m in self.measured)])
        timed = [m.timing for m in self.measured if m.timing]
        lines += [
            ["rows/s, median", *(f"{t.rows_per_second:,.0f}" for t in timed)],
            ["slowest to fastest round", *(f"{t.slowest:,.0f} to {t.fastest:,.0f}" for t in timed)],
            ["at batch size", *(str(t.batch) for t in timed)],
            *([f"{p} of single requests", *(f"{getattr(t, p):.2f} ms" for t in timed)] for p in ("p50", "p95", "p99")),
            ["dollars per million", *(f"{m.dollars_per_million(*self._price) or 0:.4f}" for m in self.measured)],
            ["size", *(f"{m.bytes / 1e6:.1f} MB" for m in self.measured)],
            ["cold start", *("" if m.cold_start is None else f"{m.cold_start:.2f} s" for m in self.measured)],
            ["peak memory", *("" if m.memory is None else f"{m.memory / 1e6:,.0f} MB" for m in self.measured)],
        ]
        if len(timed) > 1:
            mine, rest = timed[0], timed[1:]
            lines += [
                ["throughput ratio", "", *(f"{mine.rows_per_second / t.rows_per_second:.1f}x" for t in rest)],
                ["p50 ratio", "", *(f"{mine.p50 / t.p50:.2f}" for t in rest)],
                ["p99 ratio", "", *(f"{mine.p99 / t.p99:.2f}" for t in rest)],
            ]
        return lines

    @property
    def reference(self) -> str:
        """What agreement is counted against: the first baseline, or the artifact itself."""
        return self.measured[1 if len(self.measured) > 1 else 0].name

    @property
    def sentence(self) -> str:
        """How it was measured."""
        m = self.machine
        return (
            f"{self.measured[0].rows:,} rows, rounds interleaved in one run, each at its best batch size; {m.cpu}; "
            f"{m.cores} cores, {m.threads} threads; a vCPU hour at ${measure.VCPU_HOUR}; {m.date}; {m.commit}"
        )


def bench(
    folder: Path,
    source: str | None,
    *,
    text: str = "text",
    label: str | None = None,
    pair: str | None = None,
    against: Sequence[str] = (),
    threads: int | None = None,
) -> Bench:
    """Time the artifact on the rows of `source` (of its own dev rows without one), beside the baselines `against`.

    Baselines are made from the teacher in DIR.run. Raises StoreError where that is needed and absent.
    """
    engine = load(folder, threads)
    manifest = artifact.read_manifest(folder)
    count = threads or measure.cores()
    rows = rows_of(folder, source, Columns(text, label, pair))
    engines: dict[str, tuple[Engine, int]] = {folder.name: (engine, artifact.size(folder, manifest))}
    if against:
        with Store(store_of(folder), None) as store:
            teacher = Model.load(store.model_folder(TEACHER))
        calibration = rows_of(folder, None, Columns())
        for name in against:
            engines[name] = baseline(name, teacher, calibration, count)
    timings = measure.speed({name: e for name, (e, _) in engines.items()}, rows)
    fresh = measure.fresh(folder, rows, count)
    task = engine.task
    tokens = engine.encoder.encode(rows.text, rows.pair)
    said = {name: e.run(tokens) for name, (e, _) in engines.items()}
    base = said[against[0] if against else folder.name].logits
    targets = task.targets(rows.label) if rows.label else None
    measured = []
    for name, (e, size) in engines.items():
        out = said[name]
        quality, agreement, distance = measure.quality(task, out.logits, base, targets)
        answered = tuple(float((out.tier == i).mean()) for i in range(len(e.tiers)))
        mine = name == folder.name
        measured.append(
            Measurement(
                name,
                tuple(t.name for t in e.tiers),
                len(rows),
                quality,
                agreement,
                distance,
                answered,
                size,
                timings[name],
                fresh.memory if mine else None,
                fresh.cold_start if mine else None,
            )
        )
    return Bench(measure.machine(count), task.metric, targets is not None, tuple(measured))
