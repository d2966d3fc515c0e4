"""One exported file, two engines: both equal the lowered torch reference, whatever the batch, padding and order."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load

from conftest import tiny_encoder, tiny_model, tiny_rows
from netweight.artifact import Tier
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.encode import Tokens
from netweight.engine.base import TierEngine
from netweight.engine.cascade import tier_engine
from netweight.engine.onnx import OnnxEngine
from netweight.export import Exported, _int8, export, lowered, work
from netweight.model import Model
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import Quantize, Static
from netweight.train import Plan

FAMILIES = ("bert", "roberta", "distilbert")
ENGINES = ("onnx", "openvino")


class Padded(Tokens):
    """Rows padded by seven tokens more than they need."""

    def padded(self, rows: NDArray[np.int64], pad: int) -> tuple[NDArray[np.int32], ...]:  # type: ignore[override]
        ids, mask, types = super().padded(rows, pad)
        wide = ((0, 0), (0, 7))
        return np.pad(ids, wide, constant_values=pad), np.pad(mask, wide), np.pad(types, wide)


@cache
def given(family: str, quantized: bool) -> tuple[Model, Exported]:
    """A model and its file. Exporting takes seconds, so each is made once."""
    model = tiny_model(family=family)
    if quantized:
        rows = tiny_rows(60)
        data = Dataset(rows.take(range(40)), rows.take(range(40, 50)), rows.take(range(50, 60)), Sealed(rows))
        model = Quantize(rows=40)(model, Local(data), Plan(precision="fp32"))
    return model, export(model)


def engine_of(family: str, quantized: bool, name: Literal["onnx", "openvino"]) -> TierEngine:
    if name == "openvino":
        pytest.importorskip("openvino")
    model, exported = given(family, quantized)
    return tier_engine(Tier("t", name, "f", exported.options), exported.data, model.encoder.pad, 1)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_equal_the_reference(family: str, quantized: bool, name: Literal["onnx", "openvino"]) -> None:
    model, _ = given(family, quantized)
    engine = engine_of(family, quantized, name)
    tokens = model.encoder.encode(tiny_rows().text)
    with torch.no_grad():
        padded = tokens.padded(np.arange(len(tokens)), model.encoder.pad)
        reference = lowered(model)(*map(torch.from_numpy, padded)).numpy()
    logits = engine.logits(tokens, 32)
    # A value that lies between two steps may round either way.
    assert np.abs(logits - reference).max() < (0.02 * np.abs(reference).max() if quantized else 1e-5)
    for other in (engine.logits(tokens, 1), engine.logits(Padded(tokens.ids, tokens.types, tokens.offsets), 32)):
        assert np.abs(other - logits).max() < 1e-5
        assert (other.argmax(1) == logits.argmax(1)).all()
    order = np.random.default_rng(0).permutation(len(tokens))
    assert np.abs(engine.logits(tokens.take(order), 7) - logits[order]).max() < 1e-5


@pytest.mark.parametrize("most", [4, 6])
def test_texts_may_be_shorter_than_usual(most: int) -> None:
    model = replace(tiny_model(), encoder=tiny_encoder().reading(most))
    exported, tokens = export(model), model.encoder.encode(tiny_rows().text)
    assert int(tokens.lengths.max()) == most
    logits = OnnxEngine(exported.plain, model.encoder.pad, 1).logits(tokens, 8)
    assert np.abs(logits - logits_of(model, tokens).numpy()).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_lowering_without_ranges_changes_nothing_but_the_graph(family: str) -> None:
    model = tiny_model(family=family)
    before = model.network.config._attn_implementation
    tokens = model.encoder.encode(tiny_rows(30).text)
    plain = lowered(model)
    with torch.no_grad():
        padded = tokens.padded(np.arange(len(tokens)), model.encoder.pad)
        found = plain(*map(torch.from_numpy, padded))
    assert torch.allclose(found, logits_of(model, tokens), atol=1e-6)
    assert model.network.config._attn_implementation == before


def test_the_graph_is_plain() -> None:
    proto = onnx.load_from_string(given("bert", True)[1].plain)
    kinds = {node.op_type for node in proto.graph.node}
    # Masks built by index and guards against NaN hide attention from both engines.
    assert not kinds & {"GatherND", "IsNaN", "Range", "Expand"}


def test_layers_run_on_integers_in_openvino() -> None:
    pytest.importorskip("openvino")
    engine = engine_of("bert", True, "openvino")
    ran = [
        (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
        for info in (op.get_rt_info() for op in engine._compiled.get_runtime_model().get_ops())  # type: ignore[attr-defined]
    ]
    assert sum(kind == "FullyConnected" and precision in ("u8", "i8") for kind, precision in ran) == 12
    assert sum(kind == "MatMul" and precision in ("u8", "i8") for kind, precision in ran) == 4


def test_layers_run_on_integers_in_onnx_runtime(tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(given("bert", True)[1].plain, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sum(kind in ("MatMulIntegerToFloat", "QLinearMatMul") for kind in kinds) == 16
    assert "MatMul" not in kinds


def test_a_pruned_network_is_a_smaller_file_and_says_the_same() -> None:
    model = tiny_model()
    dense = export(model)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.ndim == 2 and parameter.numel() > 500:
                parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 0
    exported = export(model)
    assert exported.options == {"packed": True}
    assert len(exported.data) < len(dense.data) - 0.7 * model.bytes
    engine = tier_engine(Tier("tier", exported.kind, "file", exported.options), exported.data, model.encoder.pad, 1)
    tokens = model.encoder.encode(["the zip was broken", "lovely"])
    np.testing.assert_allclose(engine.logits(tokens, 2), logits_of(model, tokens), atol=1e-5)


def test_tables_are_packed_and_say_the_same() -> None:
    rows = tiny_rows(60)
    data = Dataset(rows.take(range(40)), rows.take(range(40, 50)), rows.take(range(50, 60)), Sealed(rows))
    technique = Static(width=8, buckets=4096, filters=8, epochs=1, learning_rate=2e-3)
    model = technique(tiny_model(), Local(data), Plan(precision="fp32"))
    exported = export(model)
    assert exported.options["packed"] is True
    # 7 bits of each value of the table, 6 of what windows read; the filters' taps keep 8.
    assert len(exported.data) < 0.9 * len(exported.plain)
    tokens = model.encoder.encode(rows.text)
    rest = {name: value for name, value in exported.options.items() if name != "packed"}
    found = [
        tier_engine(Tier("t", "static", "f", options), file, model.encoder.pad, 1).logits(tokens, 16)
        for options, file in ((exported.options, exported.data), (rest, exported.plain))
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("options", [{}, {"buckets": 0}, {"filters": 8, "reach": 3}, {"hidden": 5}, {"width": 1}])
def test_work_of_a_table_is_what_its_engine_adds_up_for_a_token(options: dict[str, int], dataset: Dataset) -> None:
    shape = {"width": 8, "buckets": 64, "epochs": 0.1, "splice": 0.0} | options
    model = Static(**shape)(tiny_model(), Local(dataset), Plan())  # type: ignore[arg-type]
    exported = export(model)
    held = load(exported.plain)
    features, filters = (2 if shape["buckets"] else 1), held.get("windows.bias", np.zeros(0))
    assert work(model) == features * held["table"].shape[1] + len(filters) * options.get("reach", 0)


def test_a_graph_does_not_say_where_it_comes_from() -> None:
    """`torch.onnx.export` writes stack traces into it: paths of the machine that made it."""
    data = given("bert", True)[1].plain
    for word in (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "netweight", "stack_trace", ".py"):
        assert word.encode() not in data


@pytest.mark.parametrize("largest", [1e-30, 3e-6, 0.4, 31.0, 1e5, 3e7])
def test_scales_of_tables_are_fp16_and_hold_the_largest_value(largest: float) -> None:
    values = largest * torch.linspace(-1, 1, 64).outer(torch.linspace(0.1, 1, 8)).T
    held = _int8(values)
    table, scale = held["table"].astype(np.float32), held["scale"]
    assert np.abs(table).max() <= 63
    if 1e-6 < largest < 1e6:
        assert (scale == scale.astype(np.float16)).all()
    error = np.abs(table * scale[:, None] - values.numpy()).max(axis=1)
    assert (error <= scale / 2 * 1.001).all()
    # No coarser than needed, but for what fp16 cannot say.
    exact = np.maximum(values.abs().amax(dim=1).numpy(), 1e-12) / 63
    assert (scale < exact * 1.001 + 6e-8).all()
