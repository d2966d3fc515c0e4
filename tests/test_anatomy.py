"""Cutting heads and neurons: the same as silencing them, in every family; and a cut network is rebuilt from its spec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import FAMILIES, net, tiny_model
from netweight.anatomy import blocks, keep_heads, keep_neurons
from netweight.errors import ModelError
from netweight.export import export
from netweight.layers import Activate, FactoredEmbedding, LowRank, describe, make
from netweight.model import Model
from netweight.network import Transformer
from netweight.run.local import logits_of
from netweight.techniques.distill import shallower

TEXTS = ("the zip was broken", "lovely dress", "my parcel was late after a week and wrong", "soft")


def said(model: Model) -> torch.Tensor:
    return logits_of(model, model.encoder.encode(TEXTS))


def silence(network: Transformer, name: str, units: int, kept: torch.Tensor) -> None:
    """Zero the columns through which a layer reads the units that are not kept."""
    weight = network.get_submodule(name).weight
    mask = torch.zeros(units)
    mask[kept] = 1
    with torch.no_grad():
        weight.mul_(mask.repeat_interleave(weight.shape[1] // units))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_is_what_silencing_is(family: str, tmp_path: Path) -> None:
    model = tiny_model(family=family, layers=3)
    before = said(model)
    cut, silent = model.copy(), model.copy()
    first, _, last = blocks(net(cut))
    assert first.neurons == 64
    heads, neurons = torch.tensor([1]), torch.arange(5, 40)
    keep_heads(net(cut), first, heads)
    keep_neurons(net(cut), last, neurons)
    silence(net(silent), first.out, first.heads, heads)
    silence(net(silent), last.down, 64, neurons)
    assert not torch.allclose(said(cut), before, atol=1e-4)
    torch.testing.assert_close(said(cut), said(silent), atol=1e-5, rtol=1e-5)
    assert (blocks(net(cut))[0].heads, blocks(net(cut))[2].neurons) == (1, 35)

    cut.save(tmp_path)
    again = Model.load(tmp_path)
    assert torch.equal(said(again), said(cut))
    assert again.digest == cut.digest
    assert torch.equal(said(model), before), "the given model was changed"
    # Layers that are selected take their cuts with them.
    student = model.with_network(shallower(net(cut), 2))
    student.save(tmp_path / "student")
    assert torch.equal(said(Model.load(tmp_path / "student")), said(student))


@pytest.mark.parametrize(
    "family", [f if f in ("bert", "gpt2") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_cut_network_exports(family: str) -> None:
    from netweight.engine.onnx import OnnxEngine

    model = tiny_model(family=family)
    keep_heads(net(model), blocks(net(model))[0], torch.tensor([0]))
    keep_neurons(net(model), blocks(net(model))[1], torch.arange(16))
    engine = OnnxEngine(export(model).plain, model.encoder.pad, 1)
    np.testing.assert_allclose(engine.logits(model.encoder.encode(TEXTS), 3), said(model), atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 4, bias=False),
        LowRank(3, 2, 4, True),
        FactoredEmbedding(7, 2, 3),
        nn.Embedding(5, 3),
        Activate("relu6"),
        nn.LayerNorm(6, 1e-12),
        nn.LayerNorm(6, 1e-5, bias=False),
        nn.RMSNorm(6, 1e-6),
    ],
)
def test_descriptions_make_the_same_module(module: nn.Module) -> None:
    again = make(describe(module))
    assert describe(again) == describe(module)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}


def test_replaced_modules_come_back(tmp_path: Path) -> None:
    model = tiny_model()
    network = net(model)
    network.replace("backbone.encoder.layer.0.output.dense", LowRank(64, 4, 32, True))
    network.replace("backbone.encoder.layer.1.intermediate.intermediate_act_fn", Activate("relu"))
    network.replace("backbone.embeddings.word_embeddings", FactoredEmbedding(model.encoder.vocabulary, 8, 32))
    model.save(tmp_path)
    assert torch.equal(said(Model.load(tmp_path)), said(model))


def test_refusals() -> None:
    network = net(tiny_model())
    with pytest.raises(ModelError, match="a GroupNorm cannot be put into a network"):
        network.replace("backbone.encoder.layer.0.output.dense", nn.GroupNorm(1, 3))
    with pytest.raises(ModelError, match="unknown kind of layer 'tape'"):
        make({"kind": "tape"})
    with pytest.raises(ModelError, match="unknown activation 'sin'"):
        Activate("sin")  # type: ignore[arg-type]
    network.replace("backbone.encoder.layer.0.output.dense", LowRank(64, 4, 32, True))
    with pytest.raises(ModelError, match="cut heads and neurons before layers are factored"):
        keep_neurons(network, blocks(network)[0], torch.arange(3))
    layer = network.layers()[0]
    layer.attention.self.query_of_another = layer.attention.self.query  # type: ignore[union-attr]
    del layer.attention.self.query  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="does not know the parts of the layers of bert; it knows"):
        blocks(network)
