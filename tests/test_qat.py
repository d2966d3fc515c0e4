"""Training with rounding in place: LSQ's gradients, what the export makes of it, and that it beats rounding afterwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import FAMILIES, tiny_dataset, tiny_model, tiny_rows
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import ModelError, OptionError
from netweight.export import lowered
from netweight.layers import Activate, Activation
from netweight.loss import matching
from netweight.model import Model, Range, Weights
from netweight.quantizer import affine, fake, held_bytes, learned
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import (
    Finetune,
    Half,
    MixedBits,
    Quantize,
    QuantizeAware,
    Static,
    SwapActivation,
    Technique,
    describe,
)
from netweight.techniques.activation import activating
from netweight.techniques.base import transformer
from netweight.techniques.mixed import Sensitivity, least_harm
from netweight.techniques.qat import FakeLinear, Rounding, Step, faked, unfaked
from netweight.techniques.quantize import OUT, linears, tables
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
START = Quantize(rows=40, weight_bits=3, activation_bits=6, table_bits=3)


def rows_of() -> Dataset:
    rows = tiny_rows()
    parts = (rows.take(range(80)), rows.take(range(80, 90)), rows.take(range(90, 100)))
    return Dataset(*parts, Sealed(rows.take(range(100, 120))))


def distance(model: Model, to: Model, dataset: Dataset) -> float:
    """KL of a quantized model's rows, as its engine computes them, to another's."""
    tokens = to.encoder.encode(dataset.train.text)
    wanted = logits_of(to, tokens)
    network = lowered(model)
    with torch.no_grad():
        said = network(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), to.encoder.pad)))
    return float(matching(to.task, said.double(), wanted.double(), torch.ones(len(wanted)), 1.0))


@pytest.fixture(scope="module")
def taught() -> Model:
    """One layer that knows the rows, so that its outputs lie apart and rounding costs something; without dropout, whose
    noise is larger than what rounding does to so small a model."""
    made = Finetune(epochs=4, learning_rate=2e-3)(tiny_model(layers=1), Local(rows_of()), PLAN)
    for module in made.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


# --- gradients ---


@settings(max_examples=30)
@given(st.integers(2, 8), st.booleans(), st.floats(0.05, 2.0), st.integers(0, 99))
def test_gradients_are_those_of_the_paper(bits: int, signed: bool, size: float, seed: int) -> None:
    """Esser et al. 2020, equations 3 to 5, and g = 1 / sqrt(N Q_P)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x = (3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    s = torch.tensor([size], requires_grad=True)
    up = torch.randn(50, generator=torch.Generator().manual_seed(seed + 1))
    learned(x, s, torch.zeros(1), (low, high), 50).backward(up)
    wanted_s, wanted_x = 0.0, []
    for v, g in zip((x.detach() / s.detach()).tolist(), up.tolist()):
        wanted_s += g * (low if v <= low else high if v >= high else round(v) - v)
        wanted_x.append(g if low < v < high else 0.0)
    assert s.grad is not None
    assert x.grad is not None
    assert float(s.grad) == pytest.approx(wanted_s / (50 * high) ** 0.5, rel=1e-4, abs=1e-4)
    assert x.grad.tolist() == pytest.approx(wanted_x)


def test_a_scale_learns_what_a_search_finds() -> None:
    """Gradient steps on the squared error end near the best scale."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    step = Step(x.abs().max()[None] / 3, True)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        (learned(x, step.scale(), torch.zeros(1), (-4, 3), 4000) - x).square().sum().backward()
        optimizer.step()

    def error(scale: float) -> float:
        return float(((x / scale).round().clamp(-4, 3) * scale - x).square().sum())

    best = min(error(scale) for scale in np.linspace(0.2, 1.5, 200))
    assert error(float(step.scale().detach())) < 1.05 * best


def test_a_rounding_gives_the_range_that_it_came_from() -> None:
    for wide, signed in ((Range(-1.3, 2.0, 5), False), (Range(0.0, 3.0), False), (Range(-2.0, 2.0, 4), True)):
        again = Rounding(wide, signed, True).range()
        assert again.bits == wide.bits
        assert again.high - again.low == pytest.approx(wide.high - wide.low, rel=1e-5)
        if not signed:
            assert affine(again)[1] == affine(wide)[1]


# --- the fit ---


def test_what_was_trained_is_what_is_lowered(dataset: Dataset) -> None:
    # GPT-2 has no layer whose output alone is a factor of attention: nothing but its layers is rounded.
    model = tiny_model(family="gpt2", layers=1)
    for ranges in ("learned", "fixed"):
        technique = QuantizeAware(START, ranges, epochs=1, learning_rate=1e-2)  # type: ignore[arg-type]
        made = technique(model, Local(dataset), PLAN)
        assert all(type(m) is nn.Linear for m in linears(made.network).values())
        start = START(model, Local(dataset), PLAN)
        assert (made.ranges == start.ranges) == (ranges == "fixed")
        assert made.ranges.keys() == start.ranges.keys()
        for name, table in tables(made.network).items():
            assert torch.equal(table.weight, tables(model.network)[name].weight), "the export alone rounds tables"
            assert torch.equal(tables(faked(made, False))[name].weight, fake(table.weight, start.weights[name]))
        assert all(len(made.weights[name].steps) == m.out_features for name, m in linears(made.network).items())
        tokens = model.encoder.encode(dataset.train.text)
        padded = tuple(map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad)))
        with torch.no_grad():
            trained, low = faked(made, False).eval()(*padded), lowered(made)(*padded)
        # A value that lies between two steps may round either way.
        assert float((trained - low).abs().median()) < 1e-5
        assert float((trained - low).abs().max()) < 0.02 * float(low.abs().max())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_beats_rounding_afterwards(bits: int, taught: Model, dataset: Dataset) -> None:
    start = Quantize(rows=40, weight_bits=bits, weight_clip="mse", method="mse", activation_bits=bits)
    after = start(taught, Local(dataset), PLAN)
    aware = QuantizeAware(start, epochs=10, learning_rate=3e-4, temperature=1.0, hard=0.0, token_dropout=0.0)
    made = aware(taught, Local(dataset), PLAN)
    assert distance(made, taught, dataset) < 0.7 * distance(after, taught, dataset)


def test_swapping_in_and_out_draws_nothing_and_changes_nothing(model: Model, dataset: Dataset) -> None:
    start = START(model, Local(dataset), PLAN)
    state = torch.random.get_rng_state()
    inside = start.with_network(faked(start, True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(isinstance(m, FakeLinear) for m in inside.network.modules()) == len(linears(model.network))
    back = unfaked(inside, start)
    tokens = model.encoder.encode(dataset.train.text)
    assert torch.equal(logits_of(back, tokens), logits_of(model, tokens))
    assert back.ranges[next(iter(linears(model.network)))].bits == 6
    assert any(name.endswith(OUT) for name in back.ranges)


def test_groups_and_zero_points_are_trained_with_scales_that_follow(dataset: Dataset) -> None:
    start = Quantize(activations="none", weight_bits=3, granularity="group", group=16, symmetric=False)
    made = QuantizeAware(start, "fixed", epochs=1)(tiny_model(layers=1), Local(dataset), PLAN)
    assert not made.ranges
    assert all(spec.steps == () for spec in made.weights.values())
    with pytest.raises(OptionError, match="scales are learned of symmetric weights"):
        QuantizeAware(start)(tiny_model(layers=1), Local(dataset), PLAN)


# --- mixed bit-widths ---


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 9)), min_size=2, max_size=3), min_size=1, max_size=4),
    st.integers(1, 90),
)
@example([[(100_001, 1.0), (200_000, 0.0)], [(7, 1.0), (9, 0.0)]], 100_008)
def test_the_choice_is_the_best_of_all(layers: list[list[tuple[int, float]]], budget: int) -> None:
    sizes, harms = [[s for s, _ in each] for each in layers], [[h for _, h in each] for each in layers]
    every = [
        sum(harms[i][c] for i, c in enumerate(chosen))
        for chosen in itertools.product(*(range(len(each)) for each in layers))
        if sum(sizes[i][c] for i, c in enumerate(chosen)) <= budget
    ]
    if not every:
        with pytest.raises(OptionError, match=f"{budget} bytes are less than the"):
            least_harm(sizes, harms, budget)
        return
    chosen = least_harm(sizes, harms, budget)
    assert sum(sizes[i][c] for i, c in enumerate(chosen)) <= budget
    assert sum(harms[i][c] for i, c in enumerate(chosen)) == pytest.approx(min(every))


def test_bits_go_where_they_matter(taught: Model, dataset: Dataset) -> None:
    model = taught
    run = Local(dataset)
    made = MixedBits(mean_bits=4.0, choices=(2, 4, 8), rows=40, quantize=Quantize(rows=40))(model, run, PLAN)
    layers = transformer(model, "the test").linears()
    assert len(layers) == len(linears(model.network)) - 1, "nothing reads BERT's pooler, so it lends no bits"
    bits = {name: made.weights[name].bits for name in layers}
    held = sum(layers[name].weight.numel() * b for name, b in bits.items())
    assert held <= 4.0 * sum(m.weight.numel() for m in layers.values())
    assert len(set(bits.values())) > 1
    # The harms that it went by, and that rounding left the network as it was.
    before = model.digest
    specs = tuple((name, tuple(Weights(b) for b in (2, 8))) for name in layers)
    harm = run.reduce(model, Sensitivity(model.task, specs), 40)
    assert replace(model).digest == before
    name = max(layers, key=lambda n: float(harm[f"{n}/2"]))
    assert float(harm[f"{name}/8"]) < float(harm[f"{name}/2"])
    alone = replace(model, weights={name: Weights(2)})
    assert float(harm[f"{name}/2"]) / 40 == pytest.approx(
        distance_over(alone, model, [dataset.train.text[i] for i in np.linspace(0, 79, 40).astype(int)]), rel=0.02
    )
    # Layers round what smoothing leaves of their weights.
    scale = torch.linspace(0.2, 5.0, layers[name].in_features)
    scales = ((name, tuple(scale.tolist())),)
    smoothed = run.reduce(model, Sensitivity(model.task, ((name, (Weights(2),)),), scales), 40)
    divided = model.copy()
    with torch.no_grad():
        held = divided.network.get_parameter(f"{name}.weight")
        held.copy_(fake(held * scale, Weights(2)) / scale)
    assert float(smoothed[f"{name}/2"]) / 40 == pytest.approx(
        distance_over(divided, model, [dataset.train.text[i] for i in np.linspace(0, 79, 40).astype(int)]), rel=0.02
    )
    assert float(smoothed[f"{name}/2"]) != pytest.approx(float(harm[f"{name}/2"]), rel=0.05)
    least = sum(held_bytes(layer.weight.shape, Weights(2)) for layer in layers.values())
    tight = MixedBits(budget=least, rows=20, quantize=Quantize(activations="none"))(model, run, PLAN)
    assert {tight.weights[name].bits for name in layers} == {2}
    small = MixedBits(budget=4000, rows=20, quantize=Quantize(activations="none"))(model, run, PLAN)
    assert sum(held_bytes(layer.weight.shape, small.weights[name]) for name, layer in layers.items()) <= 4000


def distance_over(model: Model, to: Model, texts: list[str]) -> float:
    tokens = to.encoder.encode(texts)
    with torch.no_grad():
        said = lowered(model)(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), to.encoder.pad)))
    return float(matching(to.task, said.double(), logits_of(to, tokens).double(), torch.ones(len(said)), 1.0))


# --- activation functions ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_function_is_swapped(family: str, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family)
    kind: Activation = "hardswish"
    made = SwapActivation(kind, epochs=0.2)(model, Local(dataset), PLAN)
    assert isinstance(made.network, type(model.network))
    names = activating(made.network)  # type: ignore[arg-type]
    assert len(names) == 2
    assert all(isinstance(made.network.get_submodule(name), Activate) for name in names)
    made.save(tmp_path)
    tokens = model.encoder.encode(dataset.train.text)
    assert torch.equal(logits_of(Model.load(tmp_path), tokens), logits_of(made, tokens))
    assert not torch.equal(logits_of(made, tokens), logits_of(model, tokens))


def test_the_same_function_under_its_other_name_changes_nothing(model: Model, dataset: Dataset) -> None:
    copied = model.copy()
    for name in activating(copied.network):  # type: ignore[arg-type]
        copied.network.replace(name, Activate("gelu"))  # type: ignore[operator]
    tokens = model.encoder.encode(dataset.train.text)
    torch.testing.assert_close(logits_of(copied, tokens), logits_of(model, tokens), atol=1e-6, rtol=1e-5)


# --- contracts ---

TECHNIQUES: list[Technique] = [
    QuantizeAware(START, epochs=1),
    QuantizeAware(Quantize(activations="dynamic", weight_bits=3), epochs=1),
    QuantizeAware(Quantize(activations="mixed", weight_bits=3, rows=40), epochs=1),
    MixedBits(mean_bits=5.0, rows=20, quantize=Quantize(rows=20)),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: type(t).__name__)
def test_contract_but_for_the_export(technique: Technique, family: str, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family, layers=1)
    contract = TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text)
    made = contract.returns_a_new_model()
    contract.survives_saving(made, tmp_path)
    if family == "bert":
        contract.repeats_itself(made)
    assert all(p.requires_grad for p in made.network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: type(t).__name__)
def test_exports_say_the_same(technique: Technique, family: str, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family, layers=1)
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


def test_recipes_describe_what_they_start_from() -> None:
    said = describe((QuantizeAware(MixedBits(mean_bits=3.0)),))
    assert said[0]["start"]["quantize"]["weight_clip"] == "mse"
    assert said[0]["start"]["mean_bits"] == 3.0


def test_refusals(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    wrong: list[tuple[Any, str]] = [
        (lambda: QuantizeAware(ranges="moving"), "unknown ranges 'moving' of QuantizeAware"),  # type: ignore[arg-type]
        (lambda: QuantizeAware(Half())(model, run, PLAN), "Half quantizes nothing; start from Quantize or MixedBits"),
        (MixedBits, "needs mean_bits or budget"),
        (lambda: MixedBits(mean_bits=4, budget=9), "needs mean_bits or budget, and not both"),
        (lambda: MixedBits(mean_bits=4, choices=(1, 4)), "choices of MixedBits are"),
        (lambda: MixedBits(mean_bits=4, quantize=Quantize(weight_bits=4)), "weight_bits are what MixedBits chooses"),
        (lambda: MixedBits(mean_bits=4, quantize=Quantize(rounding="gptq")), "rounding 'gptq' needs the bits"),
        (lambda: MixedBits(mean_bits=4, rows=0), "rows of MixedBits is 0; use 1 or more"),
        (lambda: MixedBits(budget=9, rows=5)(model, run, PLAN), "9 bytes are less than the"),
        (lambda: SwapActivation("sin"), "unknown activation 'sin'"),  # type: ignore[arg-type]
    ]
    for call, said in wrong:
        with pytest.raises(OptionError, match=said):
            call()
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    for technique in (QuantizeAware(), MixedBits(mean_bits=4.0), SwapActivation()):
        with pytest.raises(ModelError, match=f"{type(technique).__name__} works on a transformer"):
            technique(static, run, PLAN)
    bare = model.copy()
    for name in activating(bare.network):  # type: ignore[arg-type]
        parent, _, leaf = name.rpartition(".")
        setattr(bare.network.get_submodule(parent), leaf, nn.Tanh())
    with pytest.raises(ModelError, match="the layers of bert hold no activation function that is known"):
        SwapActivation()(bare, run, PLAN)


@pytest.mark.parametrize(
    "changed", [{"weight_bits": 3}, {"group": 32}, {"symmetric": False}, {"weight_clip": "mse"}], ids=str
)
def test_fits_that_round_otherwise_are_not_taken_for_the_same(changed: dict[str, Any]) -> None:
    model = tiny_model(layers=1)
    options: dict[str, Any] = {"activations": "none", "granularity": "group", "group": 16, "weight_bits": 4}
    digests = []
    for asked in (options, options | changed):
        start = Quantize(**asked)(model, Local(tiny_dataset()), PLAN)
        digests.append(start.with_network(faked(start, False)).digest)
    assert digests[0] != digests[1]


FUNCTIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations_are_the_functions_of_the_page(kind: Activation) -> None:
    x = torch.linspace(-8, 8, 321)
    torch.testing.assert_close(Activate(kind)(x), FUNCTIONS[kind](x), atol=1e-5, rtol=1e-5)
