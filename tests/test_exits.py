"""Early exits: each stage is the network cut off there, rows leave where they should, and a tier of them ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_model
from netweight.artifact import Tier
from netweight.data import Dataset
from netweight.engine.cascade import tier_engine
from netweight.engine.exits import ExitsEngine, leaves, sure, thresholds
from netweight.errors import CorruptArtifact, ModelError, OptionError
from netweight.export import export
from netweight.loss import SoftTargets
from netweight.model import Model
from netweight.network import Exits
from netweight.packing import packed
from netweight.run import Local
from netweight.task import Score
from netweight.techniques import Distill, EarlyExit, Finetune, Prune, Quantize, QuantizeAware, Shrink, Technique
from netweight.techniques.exits import FAMILIES
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")


def with_exits(dataset: Dataset, family: str = "bert", after: tuple[int, ...] = (1,), layers: int = 2) -> Model:
    return EarlyExit(after, epochs=1)(tiny_model(family=family, layers=layers), Local(dataset), PLAN)


@pytest.mark.parametrize(
    "family",
    ["bert", pytest.param("roberta", marks=pytest.mark.slow), pytest.param("distilbert", marks=pytest.mark.slow)],
)
def test_contract(dataset: Dataset, tmp_path: Path, family: str) -> None:
    technique = EarlyExit((1,), epochs=1)
    model = tiny_model(family=family)
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.parametrize("quantized", [False, True])
def test_stages_of_the_file_are_those_of_the_network(dataset: Dataset, quantized: bool) -> None:
    from netweight.export import lowered

    model = with_exits(dataset, after=(1, 2), layers=4)
    if quantized:
        model = Quantize(rows=40)(model, Local(dataset), PLAN)
    exported = export(model)
    engine = ExitsEngine(exported.data, exported.options, model.encoder.pad, 1)
    tokens = model.encoder.encode(dataset.train.text)
    network = lowered(model)
    assert isinstance(network, Exits)
    with torch.no_grad():
        wanted = network.stages(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad)))
    found = engine.stages(tokens, 16)
    assert len(found) == len(wanted) == 3
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=0.02 * float(other.abs().max()) if quantized else 1e-5)


def test_rows_leave_where_they_are_sure(dataset: Dataset) -> None:
    model = with_exits(dataset)
    exported = export(model)
    tokens = model.encoder.encode(dataset.train.text)
    whole = ExitsEngine(exported.data, exported.options, model.encoder.pad, 1)
    first, last = whole.stages(tokens, 16)
    assert (whole.logits(tokens, 16) == last).all(), "without fitted thresholds nothing leaves early"
    middle = float(np.median(sure(first)))
    tier = Tier("exits", "exits", "", {"thresholds": [middle]})
    wanted = np.where((sure(first) >= middle)[:, None], first, last)
    assert (leaves([first, last], [middle]) == (sure(first) < middle)).all()
    for batch, threads in ((1, 1), (7, 1), (64, 1), (64, 3)):
        engine = tier_engine(tier, exported.data, model.encoder.pad, threads)
        np.testing.assert_allclose(engine.logits(tokens, batch), wanted, atol=1e-5)


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_all_exits_together_keep_the_tolerance(seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    last = rng.normal(size=(80, 3)) * 3
    stages = [np.round(last + rng.normal(size=(80, 3)) * k, 1).astype(np.float32) for k in (3, 1, 0)]
    found = thresholds(stages, tolerance)
    inside, spent, label = np.ones(80, bool), 0, stages[-1].argmax(1)
    for logits, threshold in zip(stages, found):
        leaves = inside & (sure(logits) >= threshold)
        if leaves.any() and not leaves[inside].all():
            assert sure(logits)[inside & ~leaves].max() < threshold <= sure(logits)[leaves].min()
        spent += (logits.argmax(1) != label)[leaves].sum()
        assert spent <= tolerance * 80
        # The next row that might leave would break it.
        rest = np.sort(sure(logits)[inside & ~leaves])[::-1]
        if len(rest):
            more = inside & ~leaves & (sure(logits) >= rest[0])
            assert spent + (logits.argmax(1) != label)[more].sum() > tolerance * 80
        inside &= ~leaves


def test_the_loss_weighs_later_exits_more(dataset: Dataset) -> None:
    model = with_exits(dataset, after=(1, 2), layers=3)
    batch_of = Local(dataset)
    seen = {}

    class Sum:
        combine = "sum"

        def __call__(self, network: Exits, batch: object) -> dict[str, torch.Tensor]:
            from dataclasses import replace

            teacher = torch.randn(len(batch), 2, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
            batch = replace(batch, teachers=(teacher,))  # type: ignore[type-var]
            stages = network.stages(batch.ids, batch.mask, batch.types)  # type: ignore[attr-defined]

            def alone(logits: torch.Tensor) -> torch.Tensor:
                return SoftTargets(model.task, (), 2.0, 0.1)(lambda *_: logits, batch)  # type: ignore[arg-type]

            wanted = sum(i * alone(logits) for i, logits in enumerate(stages, 1)) / 6
            torch.testing.assert_close(SoftTargets(model.task, (), 2.0, 0.1)(network, batch), wanted)  # type: ignore[arg-type]
            seen["yes"] = True
            return {}

    batch_of.reduce(model, Sum(), limit=16)  # type: ignore[arg-type]
    assert seen


@pytest.mark.parametrize(
    "technique",
    [
        Finetune(epochs=1, probe=False),
        Finetune(epochs=1, probe=False, train="head"),
        Finetune(epochs=1, probe=False, train="lora", rank=2),
        Prune(0.5, epochs=1),
        QuantizeAware(epochs=1),
        Distill(layers=None, epochs=1, splice=0.0, match="hidden", teachers=(tiny_model(seed=1),)),
    ],
    ids=lambda technique: f"{type(technique).__name__} {getattr(technique, 'train', '')}",
)
def test_what_trains_a_model_with_exits_trains_all_of_them(technique: Technique, dataset: Dataset) -> None:
    model = with_exits(dataset)
    made = technique(model, Local(dataset), PLAN)
    for name in ("heads.0.weight", "head.weight"):
        assert not torch.equal(made.network.get_parameter(name), model.network.get_parameter(name)), name
    assert all(parameter.requires_grad for parameter in made.network.parameters())


def test_refusals(dataset: Dataset) -> None:
    run = Local(dataset)
    with pytest.raises(ModelError, match=f"EarlyExit works in {', '.join(FAMILIES)}; the layers of gpt2"):
        EarlyExit()(tiny_model(family="gpt2"), run, PLAN)
    with pytest.raises(ModelError, match="a score has no confidence to exit by"):
        EarlyExit()(tiny_model(Score()), run, PLAN)
    assert EarlyExit(1) == EarlyExit((1,))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="an exit after layer 2 of 2 is none"):
        EarlyExit((2,))(tiny_model(), run, PLAN)
    with pytest.raises(OptionError, match=r"exits after layers \(\): name some"):
        EarlyExit(())(tiny_model(), run, PLAN)
    model = with_exits(dataset)
    with pytest.raises(OptionError, match="r-drop compares one answer of two passes, and exits give several"):
        Finetune(regularizer="r-drop")(model, run, PLAN)
    with pytest.raises(ModelError, match="has exits already"):
        EarlyExit()(model, run, PLAN)
    with pytest.raises(ModelError, match="a model with exits cannot lose layers"):
        Distill(layers=1)(model, run, PLAN)
    with pytest.raises(ModelError, match="a model with exits cannot lose layers"):
        Shrink(layers=1, rows=16, epochs=0)(model, run, PLAN)
    with pytest.raises(ModelError, match="a model with exits keeps its hidden width"):
        Shrink(hidden=0.5, rows=16, epochs=0)(model, run, PLAN)
    with pytest.raises(CorruptArtifact, match="1 stages need one threshold less, not 1"):
        ExitsEngine(packed({"0": np.zeros(3, np.uint8)}), {"thresholds": [0.5]}, 0, 1)
