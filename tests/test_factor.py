"""Factoring against numpy's SVD and brute force; with inputs never worse on them; quantized and exported afterwards."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import FAMILIES, net, tiny_model
from netweight.data import Dataset
from netweight.engine.onnx import OnnxEngine
from netweight.errors import ModelError, OptionError
from netweight.export import QuantizedLinear, Signed, export, lowered
from netweight.layers import LowRank
from netweight.model import Model
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import Factor, Finetune, Prune, Quantize, Static
from netweight.techniques.factor import SecondMoments, Split, factorable, low_rank, spent, split
from netweight.techniques.quantize import OUT, points
from netweight.testing import TechniqueContract, fresh_digest
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def ranks(model: Model) -> dict[str, int]:
    return {n: m.down.out_features for n, m in model.network.named_modules() if isinstance(m, LowRank)}


def matrix(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def product(given: Split, rank: int) -> Tensor:
    return given.left[:, :rank] @ given.right[:rank]


def test_contract(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    technique = Factor(budget=0.5, rows=20, epochs=1, learning_rate=1e-3)
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_contract_in_every_family(family: str, dataset: Dataset, tmp_path: Path) -> None:
    technique = Factor(rank=6, rows=20, epochs=1)
    TechniqueContract(technique, tiny_model(family=family), lambda: Local(dataset), PLAN, dataset.train.text).check(
        tmp_path
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_factored_and_saved(family: str, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family)
    made = Factor(energy=0.8, epochs=0.2)(model, Local(dataset), PLAN)
    assert set(ranks(made)) <= set(net(model).linears())
    assert parameters(made.network) < parameters(model.network)
    made.save(tmp_path)
    tokens = model.encoder.encode(dataset.train.text)
    assert torch.equal(logits_of(Model.load(tmp_path), tokens), logits_of(made, tokens))


# --- the decomposition ---


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**31))
def test_plain_is_the_best_of_its_rank(outputs: int, inputs: int, seed: int) -> None:
    w = matrix(seed, outputs, inputs)
    values = np.linalg.svd(w.numpy(), compute_uv=False)
    given = split(w)
    np.testing.assert_allclose(given.energies, values**2, rtol=1e-9)
    for rank in range(1, len(values) + 1):
        # Eckart and Young: what is cut off is the sum of the squares of the rest.
        error = float((w - product(given, rank)).square().sum())
        assert error == pytest.approx(float((values[rank:] ** 2).sum()), abs=1e-9)


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 30), st.integers(0, 2**31))
def test_aware_is_never_worse_on_its_inputs(outputs: int, inputs: int, n: int, seed: int) -> None:
    w, scale = matrix(seed, outputs, inputs), matrix(seed + 1, inputs, inputs)
    x = matrix(seed + 2, n, inputs) @ scale
    plain, aware = split(w), split(w, x.T @ x)
    for rank in range(1, min(outputs, inputs) + 1):
        errors = [float(((w - product(s, rank)) @ x.T).square().sum()) for s in (aware, plain)]
        # The ridge prefers small W', which plain beats nobody at: so it never turns this round.
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-9


def test_aware_finds_what_descent_finds() -> None:
    w, x = matrix(0, 6, 5), matrix(1, 40, 5) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    a, b = matrix(2, 6, 2).requires_grad_(), matrix(3, 2, 5).requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = ((w - a @ b) @ x.T).square().sum()
        error.backward()
        return error

    optimizer.step(closure)  # type: ignore[arg-type]
    aware = split(w, x.T @ x)
    error = float(((w - product(aware, 2)) @ x.T).square().sum())
    assert error == pytest.approx(closure().item(), rel=1e-4)
    assert error == pytest.approx(float(aware.energies[2:].sum() * x.square().sum() / 5), rel=1e-3)


def test_full_rank_says_the_same(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    layers = factorable(net(model))
    moments = run.reduce(model, SecondMoments(tuple(layers)))
    tokens = model.encoder.encode(dataset.train.text)
    for known in ({}, moments):
        made = model.copy()
        for name, layer in layers.items():
            s = split(layer.weight.detach(), known.get(name))
            net(made).replace(name, low_rank(s, len(s.energies), layer.bias))
        torch.testing.assert_close(logits_of(made, tokens), logits_of(model, tokens), atol=1e-5, rtol=1e-4)


def test_moments_equal_a_sum_over_tokens(model: Model, dataset: Dataset) -> None:
    name = "backbone.encoder.layer.1.output.dense"
    found = Local(dataset).reduce(model, SecondMoments((name,)))[name]
    seen: list[Tensor] = []
    handle = model.network.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(args[0][0]))
    for text in dataset.train.text:
        logits_of(model, model.encoder.encode([text]))
    handle.remove()
    x = torch.cat(seen).double()
    torch.testing.assert_close(found, x.T @ x, rtol=1e-5, atol=1e-6)


# --- ranks ---


def test_a_rank_for_every_layer_that_it_saves(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    made = Factor(rank=18, epochs=0)(model, run, PLAN)
    # 32 x 32 takes 1,024 parameters, more than rank 18 (1,152) would not; 32 x 64 takes 2,048 against 1,728.
    assert set(ranks(made).values()) == {18}
    assert len(ranks(made)) == 4
    assert parameters(model.network) - parameters(made.network) == 4 * (2048 - 1728)
    with pytest.raises(OptionError, match="no layer would have fewer parameters at rank 22; ask for less"):
        Factor(rank=22)(model, run, PLAN)
    with pytest.raises(OptionError, match="no layer would have fewer parameters at energy 0.9999; ask for less"):
        Factor(energy=0.9999)(model, run, PLAN)
    # What is factored already stays.
    assert set(factorable(net(made))) == set(net(model).linears()) - set(ranks(made))
    again = Factor(rank=4, epochs=0)(made, run, PLAN)
    assert sorted(ranks(again).values()) == [4] * 8 + [18] * 4


@pytest.mark.parametrize("aware", [False, True])
def test_energy_is_the_share_that_is_kept(aware: bool, model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    made = Factor(energy=0.7, aware=aware, epochs=0)(model, run, PLAN)
    layers = factorable(net(model))
    moments = run.reduce(model, SecondMoments(tuple(layers)))
    for name, rank in ranks(made).items():
        new = made.network.get_submodule(name)
        w, c = layers[name].weight.detach().double(), moments[name] if aware else torch.eye(layers[name].in_features)
        change = w - new.up.weight.detach().double() @ new.down.weight.detach().double()  # type: ignore[union-attr,operator]
        kept = 1 - float((change @ c.double() * change).sum() / (w @ c.double() * w).sum())
        assert kept >= 0.7 - 1e-4
        fewer = split(w, c if aware else None)
        assert float(fewer.energies[: rank - 1].sum() / fewer.energies.sum()) < 0.7


@given(st.floats(0.2, 0.95), st.integers(0, 2**31))
def test_a_budget_is_kept_and_spent_where_it_brings_most(budget: float, seed: int) -> None:
    shapes = {"a": (12, 12), "b": (12, 20), "c": (20, 8)}
    splits = {name: split(matrix(seed + i, *shape) ** 3) for i, (name, shape) in enumerate(shapes.items())}
    whole = sum(s.whole for s in splits.values())
    try:
        found = spent(splits, budget)
    except OptionError:
        assert sum(s.per_rank for s in splits.values()) > int(budget * whole)
        return
    cost = {n: min(r * splits[n].per_rank, splits[n].whole) for n, r in found.items()}
    assert sum(cost.values()) <= budget * whole
    # No last rank is worth less than another layer's next one that its price would have paid for.
    gains = {n: s.energies / s.energies.sum() / s.per_rank for n, s in splits.items()}
    for one, two in itertools.permutations(found, 2):
        if 1 < found[one] <= splits[one].most and found[two] < splits[two].most:
            assert budget * whole - sum(cost.values()) < splits[two].per_rank
            cheaper = splits[two].per_rank <= splits[one].per_rank
            assert not cheaper or gains[one][found[one] - 1] >= gains[two][found[two]] - 1e-12


def test_a_budget_leaves_layers_whole_where_that_pays() -> None:
    flat, steep = torch.eye(10), torch.diag(torch.tensor([1.0] + [1e-4] * 9))
    found = spent({"flat": split(flat), "steep": split(steep)}, 0.62)
    assert found["steep"] == 1
    assert found["flat"] > split(flat).most


def test_a_budget_that_is_too_small_says_what_is_the_least(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    with pytest.raises(OptionError, match="budget 0.01 is less than rank 1 takes everywhere; ask for 0.055 or more"):
        Factor(budget=0.01)(model, run, PLAN)
    made = Factor(budget=0.055, epochs=0)(model, run, PLAN)
    assert set(ranks(made).values()) == {1}
    assert len(ranks(made)) == 12


# --- with the rest ---


def test_the_pages_code_runs(model: Model, dataset: Dataset) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "techniques" / "factor.md"
    scope: dict[str, Any] = {"model": model, "run": Local(dataset), "plan": PLAN}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), scope)
    assert parameters(scope["half"].network) < parameters(model.network)
    assert scope["int8"].ranges


@pytest.mark.parametrize("family", ["bert", pytest.param("distilbert", marks=pytest.mark.slow)])
def test_a_factored_network_is_quantized_and_exported(family: str, dataset: Dataset) -> None:
    run = Local(dataset)
    made = Factor(rank=8, epochs=0)(tiny_model(family=family), run, PLAN)
    made = Quantize(rows=40)(made, run, PLAN)
    assert len([p for p in points(made.network) if p.endswith(".up" + OUT)]) == 6
    network = lowered(made)
    rounded = [m for m in network.modules() if isinstance(m, QuantizedLinear)]
    assert len(rounded) >= 24
    assert sum(isinstance(m.out, Signed) for m in rounded) == 6
    tokens = made.encoder.encode(dataset.train.text)
    with torch.no_grad():
        wanted = network(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), made.encoder.pad))).numpy()
    logits = OnnxEngine(export(made).plain, made.encoder.pad, 1).logits(tokens, 16)
    # A value that lies between two steps may round either way.
    assert np.abs(logits - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.abs(wanted - logits_of(made, tokens).numpy()).max() < 0.2 * np.abs(wanted).max()


def test_attention_of_factored_layers_rounds_its_shares_as_that_of_whole_ones_does(
    model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = Local(dataset)
    tokens = model.encoder.encode(dataset.train.text[:4])
    for made in (model, Factor(rank=8, epochs=0)(model, run, PLAN)):
        network = lowered(Quantize(rows=40)(made, run, PLAN))
        monkeypatch.setattr("netweight.export._SHARES", lambda x: calls.append(1) or x)
        with torch.no_grad():
            network(*map(torch.from_numpy, tokens.padded(np.arange(4), 0)))
    assert len(calls) == 4


def test_pruned_after_it_was_factored(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    made = Prune(0.5, epochs=0.2)(Factor(rank=8, epochs=0)(model, run, PLAN), run, PLAN)
    assert len(ranks(made)) == 12
    linear = net(made).linears()
    assert (
        sum(int((m.weight == 0).sum()) for m in linear.values()) == sum(m.weight.numel() for m in linear.values()) / 2
    )


def test_healing_brings_the_model_closer(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    model = Finetune(epochs=3, learning_rate=2e-3)(model, run, PLAN)
    tokens = model.encoder.encode(dataset.train.text)
    hurt = Factor(rank=1, epochs=0, aware=False)(model, run, PLAN)
    healed = Factor(rank=1, epochs=4, learning_rate=3e-3, aware=False)(model, run, PLAN)
    wanted, *found = (logits_of(m, tokens).diff(dim=1) for m in (model, hurt, healed))
    gap = [float((said - wanted).square().mean()) for said in found]
    assert gap[1] < 0.5 * gap[0], gap
    assert all(p.requires_grad for p in healed.network.parameters())


def test_nothing_outside_is_touched(model: Model, dataset: Dataset) -> None:
    before = fresh_digest(model)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    Factor(rank=4, epochs=0.5)(model, Local(dataset), PLAN)
    assert torch.equal(torch.rand(1), wanted)
    assert fresh_digest(model) == before
    assert not any(m._forward_pre_hooks for m in model.network.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "rank is None, energy None and budget None; give exactly one of them"),
        ({"rank": 4, "budget": 0.5}, "rank is 4, energy None and budget 0.5; give exactly one of them"),
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"energy": 1.0}, "energy is 1.0; it must lie between 0 and 1"),
        ({"budget": 0.0}, "budget is 0.0; it must lie between 0 and 1"),
        ({"rank": 4, "aware": False, "rows": 10}, "rows does not apply where no inputs are read"),
        ({"rank": 4, "rows": 0}, "rows is 0; an aware factoring must see one row or more"),
        ({"rank": 4, "epochs": -1}, "epochs of healing are -1; use 0 for none, or more"),
    ],
)
def test_options_that_do_not_apply_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Factor(**options)


def test_other_networks_are_refused(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    with pytest.raises(ModelError, match="Factor works on a transformer; this model's network is Static"):
        Factor(rank=4)(static, run, PLAN)
