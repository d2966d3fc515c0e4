"""Structured pruning: gates against differences, what is kept, what a cut stream computes, the latency table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from conftest import FAMILIES, net, tiny_model
from netweight import bench, measure
from netweight.active import select
from netweight.anatomy import blocks, keep_hidden, stream
from netweight.data import Dataset, Rows
from netweight.encode import Tokens
from netweight.errors import ModelError, OptionError
from netweight.export import Exported
from netweight.layers import LowRank
from netweight.loss import Batch, matching
from netweight.model import Model
from netweight.network import Transformer
from netweight.quantizer import Weights
from netweight.run import Local, Run
from netweight.run.local import _Source, logits_of
from netweight.task import Classify, Score
from netweight.techniques import (
    Distill,
    EarlyExit,
    Factor,
    FactorEmbedding,
    Finetune,
    LatencyTable,
    Quantize,
    Shrink,
    Static,
    Technique,
)
from netweight.techniques.distill import with_layers
from netweight.techniques.factor import SecondMoments
from netweight.techniques.finetune import Moments
from netweight.techniques.mixed import Sensitivity
from netweight.techniques.prune import Gradients
from netweight.techniques.quantize import Extremes, points
from netweight.techniques.shrink import GateGradients, Worth, cheapest, magnitude, ranked, top
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
QUICK = Shrink(heads=0.5, neurons=0.5, rows=20, epochs=0)


def losses(model: Model, data: Dataset, rows: int) -> Callable[[], Tensor]:
    """The supervised loss of each of the first rows, alone (rows,)."""
    tokens = model.encoder.encode(data.train.text)
    source = _Source(tokens, data.train, model, ())
    batches = [source.batch(torch.tensor([i]).numpy(), None, 0.0) for i in range(rows)]  # type: ignore[arg-type]

    def loss(b: Batch) -> Tensor:
        # In doubles: differences need the digits.
        return torch.nn.functional.cross_entropy(model.network(b.ids, b.mask, b.types), b.targets)

    return lambda: torch.stack([loss(b) for b in batches])


def slope(parts: list[Tensor], loss: Callable[[], Tensor], step: float = 2e-2) -> Tensor:
    """Central difference of each row's loss when these weights are multiplied by 1 + e (rows,)."""
    kept = [part.clone() for part in parts]
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            for part, was in zip(parts, kept):
                part.copy_(was * (1 + sign * step))
            found.append(loss())
        for part, was in zip(parts, kept):
            part.copy_(was)
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_have_the_slopes_that_differences_show(family: str, dataset: Dataset) -> None:
    """Multiplying a head by 1 + e is multiplying the columns that read it."""
    model = tiny_model(family=family)
    model.network.double()
    data = replace(dataset, train=dataset.train.take(range(3)))
    loss, network = losses(model, data, 3), net(model)
    fisher = Local(data).reduce(model, GateGradients(model.task, "fisher"))
    taylor = Local(data).reduce(model, GateGradients(model.task, "taylor"))
    parts = blocks(network)
    first, last = parts[0], parts[-1]

    def columns(name: str, units: int, unit: int) -> Tensor:
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.data.unflatten(1, (units, -1))[:, unit]

    def close(name: str, unit: int, slopes: Tensor) -> None:
        assert float(slopes.abs().max()) > 1e-9
        torch.testing.assert_close(fisher[name][unit], slopes.square().sum().double(), rtol=3e-3, atol=1e-12)
        torch.testing.assert_close(taylor[name][unit], slopes.abs().sum().double(), rtol=3e-3, atol=1e-9)

    close("heads.0", 1, slope([columns(first.out, first.heads, 1)], loss))
    close("neurons.1", 7, slope([columns(last.down, 64, 7)], loss))
    whole = [network.get_submodule(name).weight.data for name in (first.out, first.down)]
    close("layers", 0, slope(whole, loss))  # type: ignore[arg-type]
    norms = [network.get_submodule(name) for name in stream(network).norms]
    unit = [p.data[5:6] for norm in norms for p in norm.parameters()]
    close("hidden", 5, slope(unit, loss))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules()), "a hook was left behind"


NAME = "backbone.encoder.layer.0.output.dense"
ADDED: dict[str, Callable[[Any], Any]] = {
    "gates": lambda task: GateGradients(task, "fisher"),
    "moments": Moments,
    "second moments": lambda _: SecondMoments((NAME,)),
    "sensitivity": lambda task: Sensitivity(task, ((NAME, (Weights(2),)),)),
}


@pytest.mark.parametrize("kind", ADDED)
def test_rows_count_by_their_weight(kind: str, model: Model, dataset: Dataset) -> None:
    rows = dataset.train.take([0, 1])
    one, other = (replace(dataset, train=rows.take([i])) for i in (0, 1))
    both = replace(dataset, train=replace(rows, weight=(2.0, 0.5)))
    statistic = ADDED[kind](model.task)
    a, b, sums = (Local(data).reduce(model, statistic) for data in (one, other, both))
    for name, value in sums.items():
        torch.testing.assert_close(value, 2.0 * a[name] + 0.5 * b[name], rtol=1e-4, atol=1e-12)


def copies(network: Transformer, apart: float) -> Tensor:
    """Make each second hidden unit a copy of the one before it that nobody reads, with values that lie so far apart;
    returns the others."""
    kept, where = torch.arange(0, 32, 2), stream(network)
    with torch.no_grad():
        for name in (*where.tables, *where.norms, *where.writes):
            for value in network.get_submodule(name).parameters():
                if name in where.tables:
                    value[:, kept + 1] = value[:, kept]
                else:
                    value.add_(torch.linspace(0, apart, 32).view(-1, *[1] * (value.ndim - 1)))
                    value[kept + 1] = value[kept]
        for name in where.reads:
            network.get_submodule(name).weight[:, kept + 1] = 0  # type: ignore[index]
    return kept


def halves(rows: Rows, model: Model) -> tuple[list[int], list[int]]:
    """Rows whose targets lie above the mean, and the others."""
    above = model.task.targets(rows.label or ()) >= model.task.mean  # type: ignore[union-attr]
    return [i for i, one in enumerate(above) if one], [i for i, one in enumerate(above) if not one]


def test_units_that_nobody_reads_are_those_that_go(model: Model, dataset: Dataset) -> None:
    copies(net(model), 0.0)
    wanted = logits_of(model, model.encoder.encode(dataset.train.text))
    cut = Shrink(hidden=0.5, multiple=1, importance="magnitude", epochs=0)(model, Local(dataset), PLAN)
    found = logits_of(cut, cut.encoder.encode(dataset.train.text))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_gates_of_scores(dataset: Dataset) -> None:
    model = tiny_model(Score(mean=1.0, scale=2.0))
    rows = replace(dataset.train, label=tuple(str(i % 3) for i in range(len(dataset.train))))
    statistic, data = GateGradients(model.task, "fisher"), replace(dataset, train=rows)
    whole = Local(data).reduce(model, statistic)
    assert whole["layers"].all()
    # Targets below the mean are negative, and count as all others.
    parts = [Local(replace(data, train=rows.take(at))).reduce(model, statistic) for at in halves(rows, model)]
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[0][name] + parts[1][name], rtol=1e-3, atol=1e-12)
        assert parts[1][name].any()


@pytest.mark.parametrize("task", [None, Score(mean=1.0, scale=2.0)])
def test_rows_without_labels_count_by_what_the_model_says(task: Score | None, dataset: Dataset) -> None:
    """Targets that are a model's own labels, or a score one away from its own, give what they give as labels."""
    model = tiny_model(task) if task else tiny_model()
    rows = Rows(dataset.train.text[:20])
    logits = logits_of(model, model.encoder.encode(rows.text))
    if isinstance(model.task, Classify):
        said = tuple(model.task.labels[i] for i in logits.argmax(dim=1))
    else:
        said = tuple(str(float(value)) for value in (logits[:, 0] - 1) * model.task.scale + model.task.mean)
    bare, labelled = (Local(replace(dataset, train=Rows(rows.text, label=label))) for label in (None, said))
    own = bare.reduce(model, GateGradients(model.task, "fisher", own=True))
    for name, value in labelled.reduce(model, GateGradients(model.task, "fisher")).items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-12)
    cut = [QUICK(model, run, PLAN).digest for run in (bare, labelled)]
    assert cut[0] == cut[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_whose_other_half_is_a_copy_can_lose_it(family: str, tmp_path: Path) -> None:
    """Copied units change no mean and no variance; nobody reads them; so without them all is the same."""
    model = tiny_model(family=family)
    kept = copies(net(model), 0.1)
    texts = ("the zip was broken", "lovely dress", "my parcel was late after a week and wrong")
    before = logits_of(model, model.encoder.encode(texts))
    cut = model.copy()
    keep_hidden(net(cut), kept)
    after = logits_of(cut, cut.encoder.encode(texts))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, before[:1], atol=1e-4)
    assert net(cut).head.in_features == 16
    cut.save(tmp_path)
    assert torch.equal(logits_of(Model.load(tmp_path), cut.encoder.encode(texts)), after)


@pytest.mark.parametrize("uniform", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_contract(uniform: bool, model: Model, dataset: Dataset, tmp_path: Path) -> None:
    technique = replace(QUICK, layers=1 if uniform else None, hidden=0.5, multiple=16, uniform=uniform, epochs=0.5)
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_contract_of_every_family(family: str, dataset: Dataset, tmp_path: Path) -> None:
    technique = replace(QUICK, layers=1, hidden=0.5, multiple=16, epochs=0.2)
    model = tiny_model(family=family)
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text[:16]).check(tmp_path)


def test_what_matters_least_goes_first(dataset: Dataset) -> None:
    """A head, neurons and a layer that nobody reads are what is removed, whatever the importance."""
    model = tiny_model(layers=3)
    network = net(model)
    parts = blocks(network)
    gone = torch.arange(64) % 2 == 0
    with torch.no_grad():
        for name in (parts[1].out, parts[1].down):
            network.get_submodule(name).weight.zero_()  # type: ignore[operator]
        for part in parts[::2]:
            network.get_submodule(part.out).weight[:, :8] = 0  # type: ignore[index]
            network.get_submodule(part.down).weight[:, gone] = 0  # type: ignore[index]
        for part in parts:
            # Magnitude looks at what makes a unit, too.
            for name in (*part.qkv, *part.up):
                network.get_submodule(name).weight[:8] *= 1e-3  # type: ignore[index]
            network.get_submodule(part.up[0]).weight[gone] *= 1e-3  # type: ignore[index]
    wanted = logits_of(model.with_network(with_layers(network, [0, 2])), model.encoder.encode(dataset.train.text))
    for importance in ("fisher", "taylor", "magnitude"):
        rows = {} if importance == "magnitude" else {"rows": 30}
        cut = Shrink(0.75, 0.5, layers=2, importance=importance, epochs=0, **rows)(model, Local(dataset), PLAN)  # type: ignore[arg-type]
        assert [(b.heads, b.neurons) for b in blocks(net(cut))] == [(3, 32)] * 2
        torch.testing.assert_close(logits_of(cut, cut.encoder.encode(dataset.train.text)), wanted, atol=1e-5, rtol=1e-4)


def test_even_layers(dataset: Dataset) -> None:
    model = tiny_model(layers=4)
    cut = Shrink(layers=2, spacing="even", importance="magnitude", epochs=0)(model, Local(dataset), PLAN)
    assert cut.digest == model.with_network(with_layers(net(model), [0, 2])).digest
    # Nothing is ranked, so that nothing is read.
    assert Shrink(layers=2, spacing="even", epochs=0)(model, cast(Run, None), PLAN).digest == cut.digest


def test_healing_brings_it_closer(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    model = Finetune(epochs=12, learning_rate=3e-3, probe=False)(model, run, PLAN)
    technique = replace(QUICK, layers=1, hidden=0.5, multiple=16, learning_rate=2e-3, splice=0)
    raw, healed = (replace(technique, epochs=epochs)(model, run, PLAN) for epochs in (0, 6))
    wanted, even = run.outputs(model), torch.ones(len(dataset.train))
    before, after = (float(matching(model.task, run.outputs(m), wanted, even, 1.0)) for m in (raw, healed))
    assert after < 0.8 * before
    tables = [n for n, m in net(raw).named_modules() if isinstance(m, torch.nn.Embedding)]
    for name in tables:
        assert torch.equal(net(healed).get_submodule(name).weight, net(raw).get_submodule(name).weight)  # type: ignore[arg-type]


def test_magnitude_counts_what_goes(model: Model) -> None:
    """The squares that a cut takes away are what magnitude says."""
    network = net(model)
    worth = magnitude(network, True)
    weights = sum(float(p.detach().double().square().sum()) for p in network.parameters() if p.ndim == 2)
    cut = model.copy()
    dropped = torch.tensor([3, 11])
    keep_hidden(net(cut), torch.tensor([i for i in range(32) if i not in dropped]))
    left = sum(float(p.detach().double().square().sum()) for p in net(cut).parameters() if p.ndim == 2)
    # The pooler's corner is in two of the removed units, in rows and in columns.
    corner = float(network.backbone.pooler.dense.weight.detach()[dropped][:, dropped].double().square().sum())  # type: ignore[union-attr, index, operator]
    assert weights - left == pytest.approx(float(worth.hidden[dropped].sum()) - corner, rel=1e-6)
    part = blocks(network)[0]
    query = network.get_submodule(part.qkv[0]).weight
    assert isinstance(query, Tensor)
    assert float(worth.heads[0][1]) > float(query.detach()[8:16].double().square().sum())
    assert float(worth.layers[0]) == pytest.approx(float(worth.heads[0].sum() + worth.neurons[0].sum()))


# --- what is kept ---

scores = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=4)


@given(scores, st.floats(0.01, 1.0), st.integers(1, 4), st.booleans())
def test_ranking(given: list[list[int]], share: float, step: int, uniform: bool) -> None:
    worths = [torch.tensor(w, dtype=torch.float64) for w in given]
    kept = ranked(worths, share, step, uniform)
    for w, k in zip(worths, kept):
        assert 1 <= len(k) <= len(w)
        assert k.tolist() == sorted(set(k.tolist()))
        if len(k) < len(w):
            gone = [i for i in range(len(w)) if i not in k]
            assert w[k].min() >= w[gone].max(), "something kept is worth less than something removed"
            assert len(k) % (step if step < len(w) else 1) == 0
    if share == 1:
        assert [len(k) for k in kept] == [len(w) for w in worths]
    if uniform and step == 1:
        assert [len(k) for k in kept] == [max(1, round(share * len(w))) for w in worths]
    if not uniform and step == 1:
        total = sum(map(len, worths))
        assert sum(map(len, kept)) == max(len(worths), round(share * total))
        # No unit kept beyond a layer's one is worth less than one that another layer lost.
        free = [float(w[k].min()) for w, k in zip(worths, kept) if len(k) > 1]
        gone_most = [
            max((float(x) for i, x in enumerate(w.tolist()) if i not in k), default=0.0) for w, k in zip(worths, kept)
        ]
        assert not free or min(free) >= max(gone_most)


def test_layers_of_other_sizes_are_ranked_by_their_units() -> None:
    small, large = ranked([torch.ones(32), torch.ones(128)], 0.5, 32, False)
    assert abs(len(small) + len(large) - 80) <= 16, "half of the units, to half a block"
    small, large = ranked([torch.full((32,), 2.0), torch.ones(128)], 0.4, 32, False)
    assert (len(small), len(large)) == (32, 32), "what is worth more stays, however its blocks are cut"


@pytest.mark.parametrize("before", [Factor(rank=4, epochs=0), FactorEmbedding(rank=8), EarlyExit((1,), epochs=0.1)])
def test_what_is_not_ranked_is_not_looked_at(before: Technique, dataset: Dataset) -> None:
    run = Local(dataset)
    model = before(tiny_model(layers=2), run, PLAN)
    exits, factored = isinstance(before, EarlyExit), isinstance(before, Factor)
    if not exits:
        for options in ({"spacing": "even"}, {"importance": "magnitude"}):
            made = Shrink(layers=1, epochs=0, **options)(model, run, PLAN)  # type: ignore[arg-type]
            assert made.depth == 1
    if not factored:
        made = Shrink(neurons=0.5, importance="magnitude", epochs=0)(model, run, PLAN)
        assert {b.neurons for b in blocks(net(made))} == {32}


def table_of(heads: tuple[int, ...], neurons: tuple[int, ...], outside: float = 0.0) -> LatencyTable:
    """A made-up one: a head takes 10, a neuron 1."""
    return LatencyTable(heads, neurons, tuple(tuple(10.0 * h + n for n in neurons) for h in heads), outside)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=2),
    st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=2, max_size=2),
    st.floats(1.0, 4.0),
    st.integers(2, 3),
)
def test_the_pair_that_loses_least(heads: list[Any], neurons: list[Any], speedup: float, depth: int) -> None:
    """Brute force over all pairs, with importance summed over what is removed."""
    table = table_of((1, 2, 3, 4), (2, 4, 6), outside=3.0)
    worth = Worth([torch.tensor(h) for h in heads], [torch.tensor(n) for n in neurons], torch.ones(2), torch.ones(1))
    before = 3 + depth * 46
    costs = {}
    for h in table.heads:
        for n in table.neurons:
            if before / (3 + 2 * (10 * h + n)) >= speedup:
                lost = sum(sum(sorted(w)[: 4 - h]) for w in heads) + sum(sum(sorted(w)[: 6 - n]) for w in neurons)
                costs[(h, n)] = lost
    if not costs:
        with pytest.raises(OptionError, match="times faster; the fastest pair is"):
            cheapest(worth, table, speedup, depth)
        return
    assert costs[cheapest(worth, table, speedup, depth)] == min(costs.values())


def test_a_speedup_chooses_the_same_for_each_layer(model: Model, dataset: Dataset) -> None:
    table = table_of((1, 2, 3, 4), (16, 32, 48, 64))
    cut = Shrink(speedup=2.0, table=table, rows=30, epochs=0)(model, Local(dataset), PLAN)
    ((heads, neurons),) = {(b.heads, b.neurons) for b in blocks(net(cut))}
    assert 10 * heads + neurons <= (10 * 4 + 64) / 2
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@dataclass(frozen=True)
class Timed:
    """Stands for an engine; takes what the made-up table says."""

    model: Model

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        raise AssertionError("nothing is timed here")

    @property
    def seconds(self) -> float:
        return 3 + sum(10.0 * b.heads + b.neurons for b in blocks(net(self.model)))


def test_a_latency_table(model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def seconds(engines: Mapping[str, Timed], tokens: Tokens) -> dict[str, float]:
        assert tokens.lengths.tolist() == [16] * 8
        seen.extend(engines.values())
        return {name: engine.seconds for name, engine in engines.items()}

    monkeypatch.setattr(bench, "export", lambda model: Exported("onnx", model, {}))  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "tier_engine", lambda tier, data, pad, threads: Timed(data))
    monkeypatch.setattr(measure, "seconds", seconds)
    table = bench.block_latency(model, (2,), (16, 32), length=16, batch=8)
    assert table == table_of((2, 4), (16, 32, 64), outside=3.0)
    assert all(not timed.model.ranges for timed in seen)
    bench.block_latency(Quantize(rows=8)(model, Local(dataset), PLAN), (2,), (16,), length=16, batch=8)
    assert all(timed.model.ranges.keys() == set(points(timed.model.network)) for timed in seen[-4:])
    # Learned scales belong to channels that may be gone, and some layers round their inputs token by token.
    few = Quantize(rows=8, weight_bits=4, rounding="gptq", activations="mixed")(model, Local(dataset), PLAN)
    bench.block_latency(few, (2,), (16,), length=16, batch=8)
    for timed in seen[-4:]:
        down = {block.down for block in blocks(net(timed.model))}
        assert timed.model.ranges.keys() == set(points(timed.model.network)) - down
        assert not any(spec.steps for spec in timed.model.weights.values())
    with pytest.raises(OptionError, match="a block has 1 to 4 heads and 1 to 64 neurons, not"):
        bench.block_latency(model, (5,), (16,))
    with pytest.raises(OptionError, match="a latency table needs at least two layers of one size"):
        bench.block_latency(tiny_model(layers=1), (2,), (16,))


@pytest.mark.slow
def test_a_latency_table_is_measured(model: Model) -> None:
    table = bench.block_latency(model, (2,), (64,), length=8, batch=4)
    assert (table.heads, table.neurons) == ((2, 4), (64,))
    assert all(seconds > 0 for row in table.seconds for seconds in row)


def test_refusals(model: Model, dataset: Dataset) -> None:
    run, table = Local(dataset), table_of((1, 4), (32, 64))

    def refused(text: str, **options: Any) -> None:
        with pytest.raises(OptionError, match=text):
            Shrink(**options)(model, run, PLAN)

    refused("heads is 0; it is the share to keep", heads=0)
    refused("hidden is 1.5; it is the share to keep", hidden=1.5)
    refused("cannot keep 3 layers of 2; choose 1 to 2", layers=3)
    refused("unknown importance 'luck'; use fisher, taylor, magnitude", importance="luck", heads=0.5)
    refused("unknown spacing 'random'", spacing="random", layers=1)
    refused("rows=50 does not apply to importance 'magnitude'", importance="magnitude", rows=50, heads=0.5)
    refused("spacing says which layers stay; give layers", spacing="even", heads=0.5)
    refused("uniform=False ranks heads and neurons of all layers together", uniform=False, layers=1)
    refused("multiple is 0, rows 1000 and epochs 6.0", multiple=0, heads=0.5)
    refused("nothing to remove")
    refused("nothing to remove", layers=2)
    refused("heads=0.9 of 4, in steps of 1, rounds to all of them", heads=0.9, rows=10)
    refused("neurons=0.8 of 64, in steps of 32, rounds to all", neurons=0.8, rows=10)
    refused("speedup and table go together", speedup=2.0)
    refused("speedup and table go together", table=table, heads=0.5)
    for name, value in {"heads": 0.5, "neurons": 0.5, "hidden": 0.5, "uniform": False, "multiple": 8}.items():
        said = "speedup takes heads and neurons of its table; leave heads, neurons, hidden, uniform, multiple out"
        refused(said, speedup=2.0, table=table, **{name: value})
    refused("speedup is 1.0; use more than 1", speedup=1.0, table=table)
    refused(
        "nothing in the table is 9.0 times faster; the fastest pair is 2.48 times", speedup=9.0, table=table, rows=10
    )
    refused("against layers of one size that the table has", speedup=2.0, table=table_of((1, 2), (64,)), rows=10)
    with pytest.raises(OptionError, match="a latency table of 1 numbers of heads and 2 of neurons needs"):
        LatencyTable((1,), (1, 2), ((0.1,),))
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    with pytest.raises(ModelError, match="Shrink works on a transformer"):
        QUICK(static, run, PLAN)
    with pytest.raises(ModelError, match="gates stand in a transformer; this network is Static"):
        run.reduce(static, GateGradients(static.task, "fisher"))
    silent = model.copy()
    torch.nn.init.zeros_(net(silent).head.weight)
    with pytest.raises(ModelError, match="no row gave a gradient"):
        QUICK(silent, run, PLAN)


def test_a_stream_that_is_not_known_is_refused(model: Model) -> None:
    net(model).replace("backbone.encoder.layer.0.output.dense", LowRank(64, 4, 32, True))
    with pytest.raises(ModelError, match="output.dense.down holds hidden units in a way"):
        keep_hidden(net(model), torch.arange(8))
    narrow = tiny_model()
    net(narrow).backbone.embeddings.word_embeddings = torch.nn.Embedding(20, 8)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="word_embeddings holds hidden units in a way that Netweight cannot cut"):
        keep_hidden(net(narrow), torch.arange(8))
    qwen = tiny_model(family="qwen3")

    class OneMoreRMSNorm(torch.nn.Module):
        weight = torch.nn.Parameter(torch.full((32,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x, (32,), 1 + self.weight, 1e-6)

    net(qwen).backbone.norm = OneMoreRMSNorm()
    with pytest.raises(ModelError, match="OneMoreRMSNorm, which is no plain RMSNorm"):
        keep_hidden(net(qwen), torch.arange(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layers_alone_are_built_again(family: str, tmp_path: Path) -> None:
    """ModernBERT's first layer lacks a norm that the others have."""
    model = tiny_model(family=family, layers=4)
    made = model.with_network(with_layers(net(model), [1, 3]))
    made.save(tmp_path)
    tokens = model.encoder.encode(["my dress was late", "soft"])
    again = Model.load(tmp_path)
    assert again.digest == made.digest
    torch.testing.assert_close(logits_of(again, tokens), logits_of(made, tokens))
    # Cut once more, the layer that has become the first keeps what it has.
    last = again.with_network(with_layers(net(again), [1]))
    last.save(tmp_path / "last")
    assert Model.load(tmp_path / "last").digest == last.digest


def test_layers_that_know_their_number_stay_in_place() -> None:
    model = tiny_model(family="gpt2", layers=4)
    net(model).config.scale_attn_by_inverse_layer_idx = True
    with_layers(net(model), [0, 1])
    with pytest.raises(ModelError, match="attention in this model is scaled by the number of its layer"):
        with_layers(net(model), [0, 2])


def test_a_cut_width_is_the_width(dataset: Dataset, tmp_path: Path) -> None:
    """What adds modules, or looks at hidden states, goes by what there is and not by the config."""
    model, run = tiny_model(), Local(dataset)
    narrow = Shrink(hidden=0.5, multiple=8, rows=16, epochs=0)(model, run, PLAN)
    assert net(narrow).width == 16
    options = {"teachers": (model,), "match": ("logits", "hidden"), "splice": 0.0}
    taught = Distill(layers=None, epochs=1, **options)(narrow, run, PLAN)  # type: ignore[arg-type]
    technique = EarlyExit((1,), epochs=1, splice=0.0)
    TechniqueContract(technique, taught, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)
    assert len(select(technique(taught, run, PLAN), dataset.train, 3)) == 3


def test_equal_units_keep_their_order() -> None:
    assert top(torch.ones(5), 2).tolist() == [0, 1]


def test_a_speedup_is_against_layers_of_one_size() -> None:
    table = LatencyTable((2, 4), (8,), ((1.0,), (2.0,)))
    worth = Worth([torch.ones(4), torch.ones(2)], [torch.ones(8)] * 2, torch.ones(2), torch.ones(32))
    with pytest.raises(OptionError, match=r"layers of one size that the table has.* and others\."):
        cheapest(worth, table, 1.5, 2)


@pytest.mark.parametrize("kind", [*ADDED, "extremes", "gradients"])
def test_statistics_see_which_text_a_token_is_of(kind: str, model: Model, dataset: Dataset) -> None:
    more = {"extremes": lambda _: Extremes(), "gradients": lambda task: Gradients(task, (NAME,), True)}
    rows = dataset.train.take(range(8))
    run, statistic = Local(replace(dataset, train=replace(rows, pair=rows.text))), (ADDED | more)[kind](model.task)
    before = run.reduce(model, statistic)
    with torch.no_grad():
        net(model).backbone.embeddings.token_type_embeddings.weight[1] += 1.0
    after = run.reduce(model, statistic)
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_layers_that_go_count_towards_a_speedup(model: Model, dataset: Dataset) -> None:
    table = table_of((1, 2, 3, 4), (16, 32, 48, 64))
    cut = Shrink(speedup=2.0, table=table, layers=1, rows=30, epochs=0)(model, Local(dataset), PLAN)
    assert [(b.heads, b.neurons) for b in blocks(net(cut))] == [(4, 64)], "half of the layers is twice as fast"
