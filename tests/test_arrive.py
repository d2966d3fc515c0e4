"""What is asked of a technique arrives: in the loss, the plan, the rows that a statistic reads, and where a fit starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Asked, tiny_model, tiny_rows
from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.loss import Penalized, SoftTargets
from netweight.matching import Matching
from netweight.model import Model
from netweight.network import Exits, Transformer
from netweight.network import Static as StaticNetwork
from netweight.objectives import Adversarial, Contrastive, MaskedLM, RDrop
from netweight.run import Local
from netweight.task import Score
from netweight.techniques import (
    Distill,
    EarlyExit,
    Factor,
    Finetune,
    MixedBits,
    Pretrain,
    Prune,
    Quantize,
    QuantizeAware,
    SelfTrain,
    Shrink,
    Static,
    SwapActivation,
    Technique,
)
from netweight.techniques.selftrain import Sure, capped
from netweight.techniques.static import principal, token_vectors
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32", seed=5)
COMMON: dict[str, Any] = {"epochs": 0.7, "learning_rate": 3e-4}
SOFT: dict[str, Any] = {**COMMON, "temperature": 1.3, "hard": 0.35, "token_dropout": 0.27, "splice": 1.5}
# What heals or distils: with the options that it has.
HEALING: dict[str, tuple[Callable[..., Technique], dict[str, Any]]] = {
    "Distill": (lambda **o: Distill(layers=1, **o), SOFT),
    "SwapActivation": (lambda **o: SwapActivation("relu", **o), SOFT),
    "EarlyExit": (lambda **o: EarlyExit((1,), **o), SOFT),
    "QuantizeAware": (lambda **o: QuantizeAware(Quantize(weight_bits=4, rows=8), **o), SOFT),
    "Factor": (lambda **o: Factor(rank=4, rows=8, **o), {**COMMON, "temperature": 1.3}),
    "Prune": (lambda **o: Prune(0.5, **o), {**COMMON, "temperature": 1.3}),
    "Shrink": (lambda **o: Shrink(neurons=0.5, rows=8, **o), {**COMMON, "token_dropout": 0.27, "splice": 1.5}),
    "Static": (
        lambda **o: Static(width=8, buckets=8, batch_size=7, **o),
        {**COMMON, "temperature": 1.3, "token_dropout": 0.27, "splice": 1.5},
    ),
}


@pytest.mark.parametrize("name", HEALING)
def test_options_of_healing(name: str, model: Model, dataset: Dataset) -> None:
    make, options = HEALING[name]
    run = Asked(dataset)
    make(**options)(model, run, PLAN)
    ((_, loss, plan),) = run.fits
    assert isinstance(loss, SoftTargets)
    assert loss.teachers[0].digest == model.digest
    assert loss.unlabelled
    for option, value in options.items():
        holder = loss if option in ("temperature", "hard") else plan
        assert getattr(holder, option) == value, option
    if name == "Shrink":
        assert loss.hard == 0.1
    assert plan.batch_size == (7 if name == "Static" else PLAN.batch_size)


@pytest.mark.parametrize("name", [name for name in HEALING if name not in ("EarlyExit", "Shrink")])
def test_a_temperature_of_scores_is_refused_before_rows_are_read(name: str, dataset: Dataset) -> None:
    make, options = HEALING[name]
    numbers = tuple(str(i % 5) for i in range(len(dataset.train)))
    model, run = tiny_model(Score(2.0, 1.5)), Asked(replace(dataset, train=replace(dataset.train, label=numbers)))
    with pytest.raises(OptionError, match="temperature=1.3 is for classification; this model predicts scores"):
        make(**options)(model, run, PLAN)
    assert [*run.limits, *run.fits] == []
    make(**options | {"temperature": 2.0})(model, run, PLAN)
    assert len(run.fits) == 1


def test_options_of_matching(model: Model, dataset: Dataset) -> None:
    run = Asked(dataset)
    Distill(1, match=("logits", "hidden", "relations"), match_weight=2.5, layer_map="last", relation_heads=4)(
        model, run, PLAN
    )
    ((_, loss, _),) = run.fits
    assert isinstance(loss, Matching)
    assert (loss.match, loss.scale, loss.heads, loss.layers) == (("logits", "hidden", "relations"), 2.5, 4, (1,))


@pytest.mark.parametrize(
    ("technique", "kind", "held"),
    [
        (Pretrain(share=0.3), MaskedLM, {"share": 0.3}),
        (Pretrain(), MaskedLM, {"share": 0.15}),
        (Pretrain("contrastive", temperature=0.2), Contrastive, {"temperature": 0.2}),
        (Pretrain("contrastive"), Contrastive, {"temperature": 0.05}),
        (Finetune(regularizer="r-drop", kl_weight=0.4), RDrop, {"kl_weight": 0.4}),
        (Finetune(regularizer="r-drop"), RDrop, {"kl_weight": 1.0}),
        (Finetune(regularizer="adversarial", epsilon=0.4), Adversarial, {"epsilon": 0.4}),
        (Finetune(regularizer="adversarial"), Adversarial, {"epsilon": 1.0}),
        (Finetune(penalty="l2", strength=0.2), Penalized, {"penalty": "l2", "strength": 0.2}),
    ],
)
def test_options_of_other_losses(technique: Any, kind: type, held: dict[str, Any], dataset: Dataset) -> None:
    model, run = tiny_model(more=("[MASK]",)), Asked(dataset)
    replace(technique, epochs=0.7, learning_rate=3e-4)(model, run, PLAN)
    ((_, loss, plan),) = run.fits
    assert isinstance(loss, kind)
    assert {name: getattr(loss, name) for name in held} == held
    assert (plan.epochs, plan.learning_rate) == (0.7, 3e-4)
    if kind is Penalized:
        assert isinstance(model.network, Transformer)
        assert loss.names == tuple(f"{name}.weight" for name in model.network.linears())


def test_defaults_of_adapters_and_stages(model: Model, dataset: Dataset) -> None:
    stated = Finetune(epochs=0.5, learning_rate=1e-2, train="lora", rank=8, alpha=16.0)
    ways = (stated, replace(stated, rank=None, alpha=None), replace(stated, rank=4, alpha=8.0))
    first, same, other = (way(model, Local(dataset), PLAN).digest for way in ways)
    assert first == same != other
    assert len(Prune(0.5, schedule="cubic").goals(0.0)) == 4


@pytest.mark.parametrize(
    "technique",
    [
        Quantize(rows=7),
        Quantize(rows=7, method="minmax"),
        Quantize(rows=7, weight_bits=4, rounding="gptq"),
        Prune(0.5, importance="fisher", rows=7, epochs=0),
        Factor(rank=4, rows=7, epochs=0),
        Shrink(neurons=0.5, rows=7, epochs=0),
        MixedBits(mean_bits=5.0, rows=7, quantize=Quantize(rows=7)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_statistics_read_as_many_rows_as_were_asked_for(technique: Technique, model: Model, dataset: Dataset) -> None:
    run = Asked(dataset)
    technique(model, run, PLAN)
    assert set(run.limits) == {7}


@pytest.mark.parametrize("technique", [Prune(0.5, importance="fisher", epochs=0), Factor(rank=4, epochs=0)])
def test_statistics_read_300_rows_where_none_are_asked_for(
    technique: Technique, model: Model, dataset: Dataset
) -> None:
    run = Asked(dataset)
    technique(model, run, PLAN)
    assert run.limits == [300]


class Learning(Asked):
    """Each fit gives another model: one whose head leans a little."""

    def fit(self, model: Model, loss: Any, plan: Plan, label: str = "fit") -> Model:
        super().fit(model, loss, plan, label)
        made = model.copy()
        assert isinstance(made.network, Transformer)
        with torch.no_grad():
            made.network.head.bias += torch.tensor([1e-3, 0.0])
        return made


def test_a_student_is_the_teacher_of_the_next_round(model: Model, dataset: Dataset) -> None:
    pooled = replace(dataset, pool=tiny_rows(60).unlabelled())
    run = Learning(pooled)
    options: dict[str, Any] = {"floor": 0.5, "temperature": 0.8, "soft": True, "token_dropout": 0.3}
    made = SelfTrain(rounds=2, balance=1.0, drift=1.0, **COMMON, **options)(model, run, PLAN)
    (_, first, plan), (_, second, _) = run.fits
    assert first.teachers[0].digest == model.digest
    assert second.teachers[0].digest not in (model.digest, made.digest)
    counts = Asked(pooled).reduce(model, Sure(2, 0.5, 0.8), unlabelled=True)
    assert first.weights == pytest.approx(capped(counts["pseudo"], counts["labels"], 1.0))
    assert min(first.weights) < 1, "the cap must show"
    assert (first.floor, first.temperature, first.soft) == (0.5, 0.8, True)
    assert (plan.epochs, plan.learning_rate, plan.token_dropout) == (0.7, 3e-4, 0.3)


def test_exits_start_as_copies_of_the_last_one(model: Model, dataset: Dataset) -> None:
    made = EarlyExit((1,))(model, Asked(dataset), PLAN)
    assert isinstance(made.network, Exits)
    assert isinstance(model.network, Transformer)
    with torch.no_grad():
        model.network.head.bias += 1.0
    again = EarlyExit((1,))(replace(model), Asked(dataset), PLAN)
    assert isinstance(again.network, Exits)
    for name, value in again.network.head.state_dict().items():
        assert torch.equal(again.network.heads[0].state_dict()[name], value)
        assert name == "weight" or not torch.equal(made.network.heads[0].state_dict()[name], value)


def test_what_a_static_student_starts_from(model: Model, dataset: Dataset) -> None:
    made = Static(width=8, buckets=16, filters=4, least=3, sif=1e-2)(model, Asked(dataset), PLAN)
    network, old = made.network, model.network
    assert isinstance(network, StaticNetwork)
    assert isinstance(old, Transformer)
    tokens = model.encoder.encode(dataset.train.text)
    counts = np.bincount(tokens.ids, minlength=model.encoder.vocabulary)
    share = (counts + 1) / (counts + 1).sum()
    # Smooth inverse frequency, of which only ratios matter.
    wanted = np.log(1e-2 / (1e-2 + share))
    n = len(counts)
    np.testing.assert_allclose(network.weight[:n].detach(), wanted - wanted.mean(), atol=1e-5)
    assert network.windows.known.tolist() == (counts >= 3).astype(int).tolist()
    # Principal components under these shares keep the most of the products that 8 columns can.
    vectors = token_vectors(model, old).double().numpy()
    centred = vectors - share @ vectors
    scaled = np.sqrt(share)[:, None] * centred
    v = np.linalg.svd(scaled, full_matrices=False)[2]
    best = centred @ v[:8].T
    found = network.table[:n].detach().double().numpy()
    factor = np.linalg.norm(best) / np.linalg.norm(found)
    np.testing.assert_allclose(
        (factor * found) @ (factor * found).T, best @ best.T, atol=1e-3 * np.abs(best @ best.T).max()
    )
    assert np.linalg.norm(found, axis=1).mean() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(network.windows.words.detach(), principal(token_vectors(model, old), torch.from_numpy(share), 8))
