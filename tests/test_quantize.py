"""Quantization: grids and clips against closed forms, lowering against its pure functions, engines against both."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from conftest import FAMILIES, tiny_model
from netweight.anatomy import blocks
from netweight.artifact import Tier
from netweight.data import Dataset
from netweight.encode import Tokens
from netweight.engine.cascade import tier_engine
from netweight.errors import ModelError, OptionError
from netweight.export import export, lowered
from netweight.lower import (
    TRANSLATIONS,
    DynamicLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    Signed,
    Unsigned,
    WeightOnlyLinear,
)
from netweight.lower import packed as nibbles
from netweight.lower import unpacked as bytes_of
from netweight.model import Model, Range, Weights
from netweight.quantizer import (
    affine,
    entropy_range,
    fake,
    grid,
    grouped,
    held_bytes,
    limits,
    mse_range,
    percentile_range,
    settled,
    ungrouped,
)
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import Half, Quantize, SwapActivation, Technique
from netweight.techniques.base import transformer
from netweight.techniques.quantize import Method, linears
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
SPECS = st.builds(
    Weights,
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["channel", "tensor"]),
    symmetric=st.booleans(),
    clip=st.sampled_from(["minmax", "mse"]),
)
GROUPED = st.builds(
    Weights, st.integers(2, 8), st.just("group"), st.sampled_from([16, 32, 64]), st.booleans(), st.just("minmax")
)


def some(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- grids ---


@settings(max_examples=30)
@given(st.one_of(SPECS, GROUPED), st.integers(0, 99))
def test_rounding_moves_no_weight_by_more_than_half_a_step(spec: Weights, seed: int) -> None:
    weight = some(5, 24, seed)
    scale, _ = grid(weight, spec)
    moved = grouped(fake(weight, spec) - weight, spec).abs()
    steps = 0.5 if spec.symmetric else 1.0  # a zero point is itself rounded, and may cost the end a half
    if spec.clip == "minmax":
        assert bool((moved <= steps * scale * (1.01 if spec.group else 1.0001)).all())
    else:
        plain = fake(weight, replace(spec, clip="minmax"))
        assert float((fake(weight, spec) - weight).square().sum()) <= float((plain - weight).square().sum()) + 1e-6
    # What is rounded stays where it is.
    held = set(torch.unique(grouped(fake(weight, spec), spec)[0]).tolist())
    assert len(held) <= 2**spec.bits


def test_clipping_by_squared_error_finds_nearly_the_best_scale() -> None:
    weight = some(8, 64)
    weight[:, 0] *= 3  # a weight far away, which extremes would reach for
    error = lambda made: (made - weight).square().sum(dim=1)  # noqa: E731
    near, found = (error(fake(weight, Weights(3, clip=clip))) for clip in ("minmax", "mse"))
    scales = [r * weight.abs().amax(dim=1, keepdim=True) / 3 for r in torch.linspace(0.05, 1, 300)]
    best = torch.stack([error((weight / s).round().clamp(-4, 3) * s) for s in scales]).amin(dim=0)
    assert float(found.sum()) < 0.8 * float(near.sum())
    assert float(found.sum()) <= 1.05 * float(best.sum())


def moments_of(seed: int, inputs: int) -> torch.Tensor:
    """Of inputs that hang together."""
    x = some(4 * inputs, inputs, seed) @ some(inputs, inputs, seed + 1)
    return (x.T @ x).double()


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 12), st.integers(0, 99))
def test_gptq_leaves_to_later_inputs_what_least_squares_has_them_do(bits: int, inputs: int, seed: int) -> None:
    """Frantar et al. 2023: with some inputs' weights on the grid, the others are the best for the outputs."""
    weight, moments = some(3, inputs, seed), moments_of(seed, inputs)
    scale, _ = grid(weight, Weights(bits))
    ridged = moments + 0.01 * moments.diagonal().mean() * torch.eye(inputs)
    left = weight.double().clone()
    order = moments.diagonal().argsort(descending=True).tolist()
    for at, i in enumerate(order):
        near = (left[:, i] / scale[:, 0].double()).round().clamp(*limits(bits)) * scale[:, 0].double()
        rest = order[at + 1 :]
        share = torch.linalg.solve(ridged[rest][:, rest], ridged[rest, i])
        left[:, rest] += torch.outer(left[:, i] - near, share)
        left[:, i] = near
    torch.testing.assert_close(settled(weight, scale, bits, moments), left.float(), atol=1e-5, rtol=1e-5)


def test_gptq_changes_outputs_less_than_rounding_to_the_nearest() -> None:
    for seed in range(5):
        weight, moments = some(8, 32, seed), moments_of(seed, 32)
        scale, _ = grid(weight, Weights(3, clip="mse"))
        both = fake(weight, Weights(3, clip="mse")), settled(weight, scale, 3, moments)
        change = [made.double() - weight.double() for made in both]
        near, gptq = (float((each @ moments * each).sum()) for each in change)
        assert gptq < 0.8 * near
        # Nothing to make up for where inputs are independent, nor where they are all zero.
        for apart in (torch.diag(torch.arange(1.0, 33.0)), torch.zeros(32, 32)):
            torch.testing.assert_close(settled(weight, scale, 3, apart), fake(weight, Weights(3, clip="mse")))


def test_gptq_leaves_pruned_weights_pruned() -> None:
    weight, moments = some(8, 32), moments_of(3, 32)
    weight[some(8, 32, 5) < 0] = 0
    scale, _ = grid(weight, Weights(4))
    made = settled(weight, scale, 4, moments)
    assert not made[weight == 0].any()
    # What they would have made up for is left to the others: worse than free weights, better than the nearest.
    change = [each.double() - weight.double() for each in (made, fake(weight, Weights(4)))]
    lost, near = (float((each @ moments * each).sum()) for each in change)
    assert lost < near


def test_groups_fill_up_and_come_back() -> None:
    weight = some(3, 40)
    rows = grouped(weight, Weights(4, "group", 32))
    assert rows.shape == (6, 32)
    assert torch.equal(ungrouped(rows, weight.shape), weight)
    assert held_bytes(weight.shape, Weights(4, "group", 32)) == 60 + 6 * 2
    assert held_bytes(weight.shape, Weights(3)) == 45 + 3 * 4
    assert held_bytes(weight.shape, Weights(8, "tensor")) == 120 + 4


def test_finer_grids_are_closer() -> None:
    weight = some(8, 64) * torch.logspace(-1, 1, 64)
    errors = [
        float((fake(weight, spec) - weight).square().mean())
        for spec in (Weights(4, "tensor"), Weights(4), Weights(4, "group", 16), Weights(8, "group", 16))
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_range_holds_zero_exactly(bits: int) -> None:
    scale, zero = affine(Range(-1.3, 2.9, bits))
    assert scale == pytest.approx(4.2 / (2**bits - 1))
    assert 0 <= zero < 2**bits
    rounding = Unsigned(Range(-1.3, 2.9, bits))
    x = torch.linspace(-3, 5, 999)
    assert len(torch.unique(rounding(x))) == 2**bits
    assert float(rounding(torch.zeros(1))) == 0
    assert float((rounding(x) - x.clamp(*sorted(((0 - zero) * scale, (2**bits - 1 - zero) * scale)))).abs().max()) < (
        0.5001 * scale
    )
    signed = Signed(Range(-1.0, 2.0, bits))
    assert len(torch.unique(signed(x))) == 2**bits
    assert signed.scale == pytest.approx(2 / (2 ** (bits - 1) - 1))


# --- where to clip ---


def gaussian(bins: int = 2048, reach: float = 8.0) -> torch.Tensor:
    edges = torch.linspace(-reach, reach, bins + 1, dtype=torch.float64)
    share: torch.Tensor = torch.special.ndtr(edges).diff()
    return share


@pytest.mark.parametrize(("bits", "best"), [(2, 1.71), (3, 2.15), (4, 2.55)])
def test_least_squared_error_clips_a_gaussian_where_theory_does(bits: int, best: float) -> None:
    # Optimal clips of a Gaussian: Banner, Nahshan and Soudry, NeurIPS 2019, table in section 3.
    low, high = mse_range(gaussian(), -8.0, 8.0, bits)
    assert (high - low) / 2 == pytest.approx(best, rel=0.12)


def test_a_search_is_no_worse_than_all_it_could_try() -> None:
    counts = torch.tensor([1.0, 9, 40, 5, 0, 0, 0, 1], dtype=torch.float64)

    def error(low: float, high: float) -> float:
        middle = -1 + (torch.arange(8) + 0.5) * 3 / 8
        scale, zero = affine(Range(low, high, 2))
        q = ((middle / scale).round() + zero).clamp(0, 3)
        return float((((q - zero) * scale - middle).square() * counts).sum())

    found = error(*mse_range(counts, -1.0, 2.0, 2))
    one_end = [error(-r, 2.0) for r in np.linspace(0.1, 1, 128)] + [
        error(-1.0, 2 * r) for r in np.linspace(0.1, 1, 128)
    ]
    assert found <= min(one_end) + 1e-9
    assert found < error(-1.0, 2.0)
    low, high = mse_range(counts, -1.0, 2.0, 2, around_zero=True)
    assert low == pytest.approx(-high / 2)


def slow_entropy(counts: list[float], high: float, bits: int) -> float:
    """Migacz's procedure, with loops."""
    half = len(counts) // 2
    size = [counts[half + i] + counts[half - 1 - i] for i in range(half)]
    levels, best, at = 2 ** (bits - 1), math.inf, half
    for kept in range(levels, half + 1):
        p, q = size[:kept], [0.0] * kept
        for level in range(levels):
            mine = [i for i in range(kept) if i * levels // kept == level]
            there = [i for i in mine if p[i] > 0]
            for i in there:
                q[i] = sum(p[j] for j in mine) / len(there)
        p[-1] += sum(size[kept:])
        if any(a > 0 and b == 0 for a, b in zip(p, q)):
            continue
        total = sum(q)
        found = sum(a / sum(p) * math.log(a / sum(p) / (b / total)) for a, b in zip(p, q) if a > 0)
        if found < best:
            best, at = found, kept
    return high * at / half


def test_least_divergence_is_that_of_the_loops() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=4000), rng.laplace(size=4000), rng.uniform(-1, 1, 4000), rng.exponential(size=4000)):
        reach = float(np.abs(values).max())
        counts, _ = np.histogram(values, 128, (-reach, reach))
        found = entropy_range(torch.from_numpy(counts).double(), -reach, reach, 4)
        assert found == pytest.approx((-found[1], slow_entropy(counts.tolist(), reach, 4)))
    # One value far away is not worth the levels that it would cost.
    values = np.append(rng.normal(size=4000), 12.0)
    counts, _ = np.histogram(values, 512, (-12, 12))
    assert entropy_range(torch.from_numpy(counts).double(), -12.0, 12.0, 5)[1] < 6


def test_percentiles_cut_both_ends() -> None:
    assert percentile_range(torch.ones(100), -1.0, 1.0, 0.9) == pytest.approx((-0.8, 0.8))


@pytest.mark.parametrize("constant", [0.0, 0.5])
@pytest.mark.parametrize("method", get_args(Method))
def test_a_constant_input_keeps_its_extremes(method: Any, constant: float, dataset: Dataset) -> None:
    run = Local(dataset)
    model = SwapActivation("relu", epochs=0)(tiny_model(layers=1), run, PLAN)
    up = model.network.get_submodule("backbone.encoder.layer.0.intermediate.dense")
    assert isinstance(up, nn.Linear)
    with torch.no_grad():
        # ReLU gives the same of every row: nothing, or the bias.
        up.weight.zero_()
        up.bias.fill_(constant or -1.0)
    made = Quantize(method=method, rows=40)(model, run, PLAN)
    assert made.ranges["backbone.encoder.layer.0.output.dense"] == Range(0.0, constant)
    tokens = model.encoder.encode(dataset.dev.text)
    found = tier_engine(Tier("small", "onnx", "", {}), export(made).plain, model.encoder.pad, 1).logits(tokens, 16)
    wanted = logits_of(model, tokens)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=0.05 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("method", get_args(Method))
def test_calibrations_end_within_the_extremes(method: Any, model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    wide = Quantize(method="minmax", rows=40)(model, run, PLAN)
    made = Quantize(method=method, rows=40, activation_bits=5)(model, run, PLAN)
    assert made.ranges.keys() == wide.ranges.keys()
    for name, found in made.ranges.items():
        assert found.bits == 5
        assert wide.ranges[name].low - 1e-6 <= found.low <= 0 <= found.high <= wide.ranges[name].high + 1e-6
    if method in ("mse", "entropy"):
        assert any(found.high < 0.99 * wide.ranges[name].high for name, found in made.ranges.items())


def test_ranges_are_those_of_the_values_that_layers_see(model: Model, dataset: Dataset) -> None:
    """Of each text alone: what fills up a batch is no value."""
    name = "backbone.encoder.layer.1.output.dense"
    seen: list[torch.Tensor] = []
    handle = model.network.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(args[0][0]))
    for text in dataset.train.text:
        logits_of(model, model.encoder.encode([text]))
    handle.remove()
    values = torch.cat(seen).flatten()
    run, rows = Local(dataset), len(dataset.train)
    whole = Quantize(method="minmax", smooth=0.0, rows=rows)(model, run, PLAN).ranges[name]
    assert (whole.low, whole.high) == pytest.approx((float(values.min()), float(values.max())), rel=1e-4)
    cut = Quantize(percentile=0.9, smooth=0.0, rows=rows)(model, run, PLAN).ranges[name]
    wanted = [float(values.quantile(share)) for share in (0.1, 0.9)]
    step = (whole.high - whole.low) / 100
    assert (cut.low, cut.high) == pytest.approx((min(wanted[0], 0.0), wanted[1]), abs=step)
    usual = Quantize(smooth=0.0, rows=rows, method="percentile")(model, run, PLAN).ranges[name]
    assert usual.high > cut.high + step, "the default keeps more"


# --- lowering ---


@settings(max_examples=30)
@given(SPECS)
def test_integer_layers_are_fake_ones(spec: Weights) -> None:
    linear, x = nn.Linear(24, 7), some(3, 24)
    layer = QuantizedLinear(linear, Range(-4, 4), None, spec)
    wanted = F.linear(Unsigned(Range(-4, 4))(x), fake(linear.weight, spec), linear.bias)
    torch.testing.assert_close(layer(x), wanted.detach(), atol=1e-5, rtol=1e-5)
    assert layer.weight.dtype == torch.int8  # type: ignore[union-attr]


def test_what_inputs_are_divided_by_their_weights_are_multiplied_by() -> None:
    linear, x, scale = nn.Linear(24, 7), some(3, 24), some(1, 24, 1).abs()[0] + 0.5
    given = Range(-8.0, 8.0, scale=tuple(scale.tolist()))
    wanted = F.linear(Unsigned(given)(x / scale), fake(linear.weight * scale, Weights()), linear.bias)
    torch.testing.assert_close(QuantizedLinear(linear, given, None, Weights())(x), wanted.detach())


def lowered_logits(model: Model, tokens: Tokens) -> torch.Tensor:
    """What an engine is to say of the tokens."""
    with torch.no_grad():
        said = lowered(model)(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad)))
    return cast(torch.Tensor, said)


def with_outliers() -> Model:
    """Of each norm one unit is thirty times as large, as in trained encoders."""
    model = tiny_model(layers=2)
    with torch.no_grad():
        for name, module in model.network.named_modules():
            if isinstance(module, nn.LayerNorm) and "layer" in name:
                module.weight[3] *= 30
    return model


def test_smoothing_moves_outliers_into_weights(dataset: Dataset) -> None:
    model, run = with_outliers(), Local(dataset)
    made = Quantize(rows=40)(model, run, PLAN)
    smoothed = {name for name, found in made.ranges.items() if found.scale}
    assert {name.rpartition(".")[2] for name in smoothed} == {"query", "key", "value", "dense"}
    assert all("intermediate" in name for name in smoothed if name.endswith("dense"))
    tokens = model.encoder.encode(dataset.train.text)
    plain = logits_of(model, tokens)

    def error(smooth: float) -> float:
        made = Quantize(rows=40, smooth=smooth)(model, run, PLAN)
        return float((lowered_logits(made, tokens) - plain).square().mean().sqrt())

    assert error(0.5) < 0.7 * error(0.0)


def test_smoothing_is_refused_where_layers_are_not_known(
    model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(network: nn.Module) -> None:
        raise ModelError("Netweight does not know the parts of the layers.")

    monkeypatch.setattr("netweight.techniques.quantize.blocks", unknown)
    usual, none = (one(model, Local(dataset), PLAN) for one in (Quantize(rows=8), Quantize(rows=8, smooth=0.0)))
    assert usual.ranges == none.ranges
    with pytest.raises(OptionError, match="smooth=0.4 is for layers that are known; leave it out. Netweight does not"):
        Quantize(rows=8, smooth=0.4)(model, Local(dataset), PLAN)


def test_layers_that_read_the_same_are_divided_by_the_same(dataset: Dataset) -> None:
    for family in FAMILIES:
        model = tiny_model(family=family, layers=1)
        made = Quantize(rows=40)(model, Local(dataset), PLAN)
        (block,) = blocks(transformer(model, "a test"))
        for names in (block.qkv, block.up):
            assert len({made.ranges[name].scale for name in names}) == 1
            assert np.log(made.ranges[names[0]].scale).mean() == pytest.approx(0, abs=1e-5)


def test_mixed_activations_round_what_the_feed_forward_network_made_token_by_token(dataset: Dataset) -> None:
    for family in FAMILIES:
        model = tiny_model(family=family, layers=2)
        static, mixed = (Quantize(activations=a, rows=40)(model, Local(dataset), PLAN) for a in ("static", "mixed"))
        down = {block.down for block in blocks(transformer(model, "a test"))}
        assert {name for name, spec in mixed.weights.items() if spec.dynamic} == set(mixed.weights) == down
        assert mixed.ranges == {name: found for name, found in static.ranges.items() if name not in down}


def test_mixed_activations_do_not_suffer_from_one_token_that_stands_out(dataset: Dataset) -> None:
    """One token drives one neuron far beyond all others: a range for all tokens leaves those few levels."""
    model, run = tiny_model(layers=1), Local(dataset)
    (block,) = blocks(transformer(model, "a test"))
    tokens = model.encoder.encode(dataset.train.text[:40])
    up, down = (cast(nn.Linear, model.network.get_submodule(name)) for name in (*block.up, block.down))
    seen: list[torch.Tensor] = []
    handle = up.register_forward_hook(lambda _, args, out: seen.append(args[0][0, 1]))
    logits_of(model, tokens)
    handle.remove()
    with torch.no_grad():
        up.weight[0], up.bias[0] = 300 * seen[0] / seen[0].square().sum(), -150
        down.weight[:, 0] = 0
    plain = logits_of(model, tokens)

    def error(activations: Literal["static", "mixed"]) -> float:
        made = Quantize("minmax", rows=40, activations=activations)(model, run, PLAN)
        return float((lowered_logits(made, tokens) - plain).square().mean().sqrt())

    assert error("mixed") < 0.7 * error("static")


@settings(max_examples=30)
@given(SPECS.filter(lambda spec: spec.symmetric))
def test_dynamic_layers_are_fake_ones_of_each_token(spec: Weights) -> None:
    linear, x = nn.Linear(24, 7), some(2, 24)[:, None] * torch.tensor([[1.0], [100.0], [0.0]])
    steps = x.abs().amax(-1, keepdim=True) / 127
    wanted = F.linear((x / steps).nan_to_num().round() * steps, fake(linear.weight, spec), linear.bias)
    torch.testing.assert_close(DynamicLinear(linear, spec)(x), wanted.detach(), atol=1e-4, rtol=1e-5)


@settings(max_examples=30)
@given(st.one_of(SPECS, GROUPED), st.sampled_from([16, 24, 40, 64]))
def test_weight_only_layers_are_fake_ones(spec: Weights, inputs: int) -> None:
    linear, x = nn.Linear(inputs, 7, bias=False), some(3, inputs)
    layer = WeightOnlyLinear(linear, spec)
    torch.testing.assert_close(layer(x), F.linear(x, fake(linear.weight, spec)).detach(), atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 15), min_size=1))
def test_nibbles_come_back(values: list[int]) -> None:
    held = nibbles(torch.tensor(values), 4)
    assert len(held) == (len(values) + 1) // 2
    assert bytes_of(held, 4)[: len(values)].tolist() == values


def test_tables_take_their_bits() -> None:
    table = nn.Embedding(9, 16)
    held = QuantizedEmbedding(table, Weights(4))
    assert int(held.rows.max()) <= 7  # type: ignore[operator,union-attr]
    torch.testing.assert_close(held(torch.arange(9)), fake(table.weight, Weights(4)).detach())


class Side(nn.Module):
    """Layers side by side, so that one export will do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


def sided(layer: nn.Module, x: torch.Tensor) -> tuple[bytes, list[str]]:
    """An ONNX file of it for any number of rows, and its operators."""
    made: Any = torch.onnx.export(
        layer,
        (x,),
        dynamo=True,
        verbose=False,
        opset_version=18,
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        custom_translation_table=TRANSLATIONS,
    )
    return made.model_proto.SerializeToString(), [node.op_type for node in made.model_proto.graph.node]


def check_engines(data: bytes, layer: nn.Module) -> None:
    """Both engines say what the layer says; ONNX Runtime of each row alone, too."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    many = some(33, 40, 1)
    np.testing.assert_allclose(session.run(None, {"x": many.numpy()})[0], layer(many), atol=1e-5)
    one = np.concatenate([session.run(None, {"x": row[None].numpy()})[0] for row in many])
    np.testing.assert_allclose(one, layer(many), atol=1e-5)
    ov = pytest.importorskip("openvino")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = ov.Core().compile_model(ov.Core().read_model(data), "CPU", hints)
    np.testing.assert_allclose(compiled(many.numpy())[0], layer(many), atol=1e-5)


def test_both_engines_round_each_token() -> None:
    # Sums of products of 8 bits overflow on x86 without VNNI; of 7 bits they do not, which is why the ladder has 7.
    bits = (8, 7, 4) if "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else (7, 4)
    layer = Side(*(DynamicLinear(nn.Linear(40, 24), Weights(b)) for b in bits)).eval()
    data, operators = sided(layer, some(4, 40))
    assert operators.count("MatMulInteger") == len(bits)
    check_engines(data, layer)


def test_both_engines_multiply_by_few_bits() -> None:
    specs = (Weights(4, "group", 32), Weights(3, "group", 16, False), Weights(4, "group", 16, False), Weights(6))
    layer = Side(*(WeightOnlyLinear(nn.Linear(40, 24), spec) for spec in specs)).eval()
    data, operators = sided(layer, some(4, 40))
    assert operators == [*4 * ["MatMulNBits", "Add"], "Concat"]
    check_engines(data, layer)


# --- the technique ---

FORMS = [
    Quantize(rows=40, weight_bits=4, weight_clip="mse", method="mse"),
    Quantize(activations="none", weight_bits=4, granularity="group", group=16, table_bits=4),
    Quantize(activations="dynamic"),
    Quantize(activations="mixed", rows=40),
    Half(),
    SwapActivation("relu6", epochs=1),
    Quantize(rows=40, weight_bits=3, rounding="gptq"),
]
MORE = [
    Quantize(rows=40, symmetric=False, granularity="tensor", weight_bits=6),
    Quantize(rows=40, weight_bits=2, activation_bits=6, method="entropy"),
    Quantize(activations="none", weight_bits=3),
    Quantize(activations="none", symmetric=False, granularity="group", group=64),
    Quantize(activations="dynamic", rows=40, weight_bits=4, granularity="tensor", rounding="gptq"),
]


def contract(technique: Technique, model: Model, dataset: Dataset, folder: Path) -> None:
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(folder)


@pytest.mark.parametrize(
    ("family", "activations"),
    [*((family, "static") for family in FAMILIES), ("bert", "mixed"), ("bert", "dynamic"), ("bert", "none")],
)
def test_gptq_of_any_family(family: str, activations: Any, dataset: Dataset) -> None:
    """What it chose is what is lowered, and it is nearer to the model than rounding to the nearest."""
    model, run = tiny_model(family=family), Local(dataset)
    near = Quantize(rows=200, weight_bits=3, activations=activations) if activations in ("static", "mixed") else None
    near = near or Quantize(weight_bits=3, activations=activations)
    made = replace(near, rows=200, rounding="gptq")(model, run, PLAN)
    assert made.ranges == near(model, run, PLAN).ranges
    held = dict(lowered(made).named_modules())
    for name, layer in linears(made.network).items():
        given = made.ranges.get(name)
        weight = layer.weight.detach() * torch.tensor(given.scale if given is not None and given.scale else 1.0)
        spec = made.weights[name]
        assert len(spec.steps) == layer.out_features
        steps = weight / torch.tensor(spec.steps)[:, None]
        torch.testing.assert_close(steps, steps.round().clamp(-4, 3), atol=1e-3, rtol=0)
        if isinstance(low := held[name], QuantizedLinear | DynamicLinear):
            assert torch.equal(low.weight.T, steps.round().to(torch.int8))
    tokens = model.encoder.encode(dataset.train.text)
    wanted = logits_of(model, tokens)

    def far(one: Model) -> float:
        network = lowered(one)
        with torch.no_grad():
            said = network(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad)))
        return float((said - wanted).square().mean())

    assert far(made) < far(near(model, run, PLAN))


@pytest.mark.slow
@pytest.mark.parametrize("technique", FORMS + MORE, ids=lambda t: str(t)[:60])
def test_contract(technique: Technique, dataset: Dataset, tmp_path: Path) -> None:
    contract(technique, tiny_model(layers=1), dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("technique", FORMS, ids=lambda t: str(t)[:60])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_contract_in_every_family(family: str, technique: Technique, dataset: Dataset, tmp_path: Path) -> None:
    contract(technique, tiny_model(family=family, layers=1), dataset, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_whole(family: str, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family, layers=1)
    made = Quantize(activations="none", weight_bits=4, granularity="group", group=16, table_bits=5)(
        model, Local(dataset), PLAN
    )
    tokens = model.encoder.encode(dataset.train.text)
    low = lowered(made)
    assert not any(isinstance(m, nn.Linear | nn.Embedding) for m in low.backbone.modules())  # type: ignore[union-attr]
    with torch.no_grad():
        padded = tuple(map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad)))
        few, plain = low(*padded), model.network(*padded)
    assert 0 < float((few - plain).abs().max()) < 0.5 * float(plain.abs().max())
    made.save(tmp_path)
    again = Model.load(tmp_path)
    assert (again.weights, again.digest) == (made.weights, made.digest)
    assert made.digest != model.digest


def test_the_default_notes_ranges_alone(model: Model, dataset: Dataset) -> None:
    made = Quantize(rows=40)(model, Local(dataset), PLAN)
    assert not made.weights
    assert set(made.ranges) > set(linears(model.network))
    assert "weights" not in made._header()
    assert made.with_network(model.network).ranges == {}


@pytest.mark.slow
def test_few_bits_make_small_files(dataset: Dataset) -> None:
    model = tiny_model(layers=1, more=[f"word{i}" for i in range(3000)])
    dense = len(export(model).data)
    few = Quantize(activations="none", weight_bits=4, granularity="group", group=32, table_bits=4)
    small = export(few(model, Local(dataset), PLAN))
    assert small.options == {"packed": True}
    assert len(small.data) < dense - 0.75 * model.bytes
    half = export(Half()(model, Local(dataset), PLAN))
    assert len(half.data) < dense - 0.45 * model.bytes


def test_half_rounds_and_saves_in_two_bytes(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    made = Half()(model, Local(dataset), PLAN)
    made.save(tmp_path / "half")
    model.save(tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.7 * sizes[1]
    tokens = model.encoder.encode(dataset.train.text)
    torch.testing.assert_close(logits_of(made, tokens), logits_of(model, tokens), atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        next(model.network.parameters())[0, 0] = 1e5
    with pytest.raises(ModelError, match="holds 100000; fp16 ends at 65504"):
        Half()(model, Local(dataset), PLAN)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "magic"}, "unknown calibration 'magic'; use minmax, percentile, mse, entropy"),
    ({"granularity": "row"}, "unknown granularity 'row' of Quantize; use channel or tensor or group"),
    ({"weight_clip": "percentile"}, "unknown weight_clip 'percentile'"),
    ({"activations": "bf16"}, "unknown activations 'bf16'; use static, mixed, dynamic or none"),
    ({"activations": "dynamic", "symmetric": False}, "with dynamic activations weights have no zero points"),
    ({"activations": "mixed", "symmetric": False}, "with mixed activations weights have no zero points"),
    ({"activations": "dynamic", "granularity": "group", "group": 32}, "no integer kernel has groups"),
    ({"activations": "dynamic", "method": "mse"}, "method does not apply to activations 'dynamic'"),
    ({"smooth": 1.0}, "smooth of Quantize is 1.0; use 0 to less than 1"),
    ({"percentile": 99.99}, "percentile of Quantize is 99.99; use a share of values, more than 0.5 and at most 1"),
    ({"percentile": 0.2}, "percentile of Quantize is 0.2"),
    ({"rows": 0}, "rows of Quantize is 0; use 1 or more"),
    ({"activations": "none", "smooth": 0.0}, "smooth does not apply to activations 'none'"),
    ({"weight_bits": 1}, "weight_bits of Quantize is 1; use 2 to 8"),
    ({"activation_bits": 16}, "activation_bits of Quantize is 16"),
    ({"group": 32}, "granularity 'channel' does not go with group 32"),
    ({"granularity": "group", "activations": "none"}, "granularity 'group' does not go with group None"),
    ({"granularity": "group", "group": 48, "activations": "none"}, "a group of 48 inputs has no kernel; use 16, 32"),
    ({"granularity": "group", "group": 32}, "no integer kernel has groups"),
    ({"method": "mse", "percentile": 0.9}, "percentile does not apply to calibration 'mse'"),
    ({"activations": "none", "rows": 5}, "rows does not apply to activations 'none'"),
    ({"rounding": "random"}, "unknown rounding 'random' of Quantize; use nearest or gptq"),
    ({"rounding": "gptq", "symmetric": False}, "rounding 'gptq' is for symmetric weights, per channel or tensor"),
    ({"rounding": "gptq", "granularity": "group", "group": 32, "activations": "none"}, "rounding 'gptq' is for symm"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=lambda v: str(v)[:50])
def test_what_does_not_apply_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Quantize(**options)


def test_training_in_fp16_is_refused() -> None:
    with pytest.raises(OptionError, match="precision fp16 needs its losses scaled"):
        Plan(precision="fp16")  # type: ignore[arg-type]
