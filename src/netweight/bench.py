"""Measure an artifact again, with baselines beside it in the same run; and what one block of a model takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from netweight import artifact, measure
from netweight.anatomy import blocks, keep_heads, keep_neurons
from netweight.artifact import Tier
from netweight.baselines import baseline
from netweight.build import TEACHER
from netweight.data import Columns
from netweight.encode import Tokens
from netweight.engine import Engine, load
from netweight.engine.base import TierEngine
from netweight.engine.cascade import tier_engine
from netweight.errors import OptionError
from netweight.export import export
from netweight.measure import Machine, Measurement
from netweight.model import Model, Range, Weights
from netweight.report.format import quality, significant
from netweight.store import Store, rows_of, store_of
from netweight.task import Score
from netweight.techniques import LatencyTable
from netweight.techniques.base import transformer
from netweight.techniques.distill import with_layers
from netweight.techniques.quantize import points
from netweight.techniques.vocab import token_table


@dataclass(frozen=True)
class Bench:
    """The artifact first, then each baseline; `quality` of the rows where labels were given. `note` says which rows of
    the table could not be used."""

    machine: Machine
    metric: str
    labelled: bool
    measured: tuple[Measurement, ...]
    note: str = ""

    def to_json(self) -> str:
        """All of it."""
        unknown = {} if self.labelled else {"quality": None}
        price = self._price
        shown = [asdict(m) | unknown | {"dollars_per_million": m.dollars_per_million(*price)} for m in self.measured]
        about = {"machine": asdict(self.machine), "metric": self.metric, "reference": self.reference, "note": self.note}
        return json.dumps(about | {"measured": shown}, indent=1)

    @property
    def _price(self) -> tuple[float, int]:
        return measure.VCPU_HOUR, self.machine.threads

    def rows(self) -> list[list[str]]:
        """The figures for people: a head, a line for each figure, and the artifact's ratios to each baseline."""
        lines = [["", *(m.name for m in self.measured)]]
        if self.labelled:
            lines.append([self.metric, *(quality(self.metric, m.quality) for m in self.measured)])
        lines.append([f"agreement with {self.reference}", *(self._agreement(m) for m in self.measured)])
        timed = [m.timing for m in self.measured if m.timing]
        lines += [
            ["rows/s, median", *(f"{t.rows_per_second:,.0f}" for t in timed)],
            ["slowest to fastest round", *(f"{t.slowest:,.0f} to {t.fastest:,.0f}" for t in timed)],
            ["rows given at a time", *(str(t.batch) for t in timed)],
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

    def _agreement(self, measured: Measurement) -> str:
        correlated = self.metric in Score.metrics
        return significant(measured.agreement) if correlated else f"{100 * measured.agreement:.2f} %"

    @property
    def reference(self) -> str:
        """What agreement is counted against: the first baseline, or the artifact itself."""
        return self.measured[1 if len(self.measured) > 1 else 0].name

    @property
    def sentence(self) -> str:
        """How it was measured."""
        m, note = self.machine, f" {self.note}" if self.note else ""
        when = "; ".join(filter(None, (m.date, m.commit)))
        return (
            f"{self.measured[0].rows:,} rows, rounds interleaved in one run, each given as many at a time as suit it "
            f"best; {m.cpu}; {m.cores} cores, {m.threads} threads; a vCPU hour at ${measure.VCPU_HOUR}; {when}.{note}"
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
    manifest = artifact.read_manifest(folder)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    if folder.name in against:
        raise OptionError(f"the artifact is called {folder.name!r}, as a baseline is; rename its folder.")
    count = threads or measure.cores()
    engine = load(folder, count)
    loaded = rows_of(folder, source, Columns(text, label, pair))
    rows, task = loaded.rows, engine.task
    targets = task.targets(rows.label) if rows.label else None  # other labels are told of before hours of timing
    engines: dict[str, tuple[Engine, int]] = {folder.name: (engine, artifact.size(folder, manifest))}
    if against:
        with Store(store_of(folder), None) as store:
            teacher = Model.load(store.model_folder(TEACHER))
        calibration = rows_of(folder, None, Columns()).rows
        for name in against:
            engines[name] = baseline(name, teacher, calibration, count)
    timings = measure.speed({name: e for name, (e, _) in engines.items()}, rows)
    fresh = measure.fresh(folder, rows, count)
    said = {name: e.outputs(rows.text, rows.pair) for name, (e, _) in engines.items()}
    base = said[against[0] if against else folder.name].logits
    measured = []
    for name, (e, size) in engines.items():
        found = measure.measured(task, name, e, said[name], base, targets, size, timings[name])
        mine = name == folder.name
        measured.append(replace(found, memory=fresh.memory, cold_start=fresh.cold_start) if mine else found)
    return Bench(measure.machine(count), task.metric, targets is not None, tuple(measured), loaded.note)


# Tokens that a timed table has: a gather takes as long from a few rows, and the files are written sooner.
_TIMED_ROWS = 64


def block_latency(
    model: Model, heads: Sequence[int], neurons: Sequence[int], *, length: int = 32, batch: int = 32, threads: int = 1
) -> LatencyTable:
    """Time one block with each number of `heads` and `neurons` in ONNX Runtime, on a batch of rows of `length` tokens.

    ONNX Runtime gets the rows as an artifact does, in small batches. In int8 where the model was quantized, else in
    fp32. What is outside of the blocks comes from one layer against two. The model's own numbers are measured too.
    Raises OptionError for more heads or neurons than there are, for layers of several sizes, and for a single layer.
    """
    whole = transformer(model, "a latency table")
    sizes = {(block.heads, block.neurons) for block in blocks(whole)}
    if len(sizes) > 1 or len(whole.layers()) < 2:
        raise OptionError(
            f"a latency table needs at least two layers of one size; these are {len(whole.layers())}: {sizes}."
        )
    ((most_heads, most_neurons),) = sizes
    heads, neurons = (tuple(sorted({*heads, most_heads})), tuple(sorted({*neurons, most_neurons})))
    if heads[0] < 1 or neurons[0] < 1 or heads[-1] > most_heads or neurons[-1] > most_neurons:
        raise OptionError(
            f"a block has 1 to {most_heads} heads and 1 to {most_neurons} neurons, not {heads} and {neurons}."
        )
    engines = {f"{h} x {n}": _timed(model, [0], h, n, threads) for h in heads for n in neurons}
    engines["two"] = _timed(model, [0, 1], most_heads, most_neurons, threads)
    ids = np.arange(batch * length, dtype=np.int32) % min(_TIMED_ROWS, model.encoder.vocabulary)
    tokens = Tokens(ids, np.zeros(len(ids), np.uint8), np.arange(batch + 1) * length)
    taken = measure.seconds(engines, tokens)
    outside = max(0.0, 2 * taken[f"{most_heads} x {most_neurons}"] - taken["two"])
    rows = tuple(tuple(max(1e-9, taken[f"{h} x {n}"] - outside) for n in neurons) for h in heads)
    return LatencyTable(heads, neurons, rows, outside)


def _timed(model: Model, layers: Sequence[int], heads: int, neurons: int, threads: int) -> TierEngine:
    """An engine of some of the model's layers, cut to these sizes."""
    network = with_layers(transformer(model, "a latency table"), layers)
    name, table = token_table(network)
    network.replace(name, nn.Embedding.from_pretrained(table.weight.detach()[:_TIMED_ROWS]))
    for block in blocks(network):
        if heads < block.heads:
            keep_heads(network, block, torch.arange(heads))
        if neurons < block.neurons:
            keep_neurons(network, block, torch.arange(neurons))
    # How long integers take does not depend on what they stand for: learned scales, one for each channel of the whole
    # layer, need not be cut. Where a layer has no range, its inputs are rounded token by token, or not at all.
    weights = {name: replace(spec, steps=()) for name, spec in model.weights.items()}
    taken = [point for point in points(network) if model.ranges and not weights.get(point, Weights()).dynamic]
    ranges = dict.fromkeys(taken, Range(-1.0, 1.0))
    exported = export(replace(model, network=network, ranges=ranges, weights=weights))
    tier = Tier("timed", exported.kind, "timed", exported.options)
    return tier_engine(tier, exported.data, model.encoder.pad, threads)
