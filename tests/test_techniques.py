"""Every technique: the input model is unchanged, saving and exporting keep the outputs, the seed fixes the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Killed, Killer, tiny_model
from netweight.data import Dataset
from netweight.errors import ModelError, OptionError
from netweight.export import export
from netweight.loss import Supervised
from netweight.model import Model
from netweight.network import Network, build
from netweight.run import Local, Run
from netweight.techniques import Distill, Finetune, LinearFloor, Quantize, Static, Technique, describe
from netweight.techniques.finetune import Moments
from netweight.testing import RunContract, TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
ALL: list[Technique] = [
    Finetune(epochs=1, learning_rate=1e-3),
    Distill(layers=1, epochs=1),
    Static(width=8, buckets=64, epochs=2, batch_size=16),
    Static(width=8, buckets=0, hidden=6, epochs=1, batch_size=16),
    Static(width=8, buckets=64, filters=8, epochs=1, batch_size=16),
    LinearFloor(buckets=64),
    Quantize(rows=40),
    Quantize(method="minmax", rows=40),
]


@pytest.mark.parametrize("technique", ALL, ids=lambda t: repr(t)[:40])
def test_contract(technique: Technique, model: Model, dataset: Dataset, tmp_path: Path) -> None:
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


def test_contract_of_a_local_run(model: Model, dataset: Dataset) -> None:
    RunContract(lambda: Local(dataset), model, Supervised(model.task), PLAN, dataset.train.text).check()


def test_the_contract_sees_what_breaks_it(model: Model, dataset: Dataset) -> None:
    class Idle:
        def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
            return model

    class Thief:
        def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
            with torch.no_grad():
                next(model.network.parameters()).add_(1)
            return model.copy()

    class Gambler:
        def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
            new = model.copy()
            torch.nn.init.normal_(next(new.network.parameters()))
            return new

    def contract(technique: Technique) -> TechniqueContract:
        return TechniqueContract(technique, tiny_model(), lambda: Local(dataset), PLAN, dataset.train.text)

    with pytest.raises(AssertionError, match="nothing happened"):
        contract(Idle()).returns_a_new_model()
    with pytest.raises(AssertionError, match="given model was changed"):
        contract(Thief()).returns_a_new_model()
    gambler = contract(Gambler())
    with pytest.raises(AssertionError, match="the same seed"):
        gambler.repeats_itself(gambler.returns_a_new_model())


def test_finetuning_learns(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    trained = Finetune(epochs=4, learning_rate=2e-3)(model, run, PLAN)
    assert run.quality(trained) == 1.0


def test_a_killed_fit_resumes_to_the_same_weights(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    technique = Finetune(epochs=3, learning_rate=1e-3)
    whole = technique(model, Local(dataset), PLAN)
    killer = Killer(at=7)
    plan = Plan(batch_size=16, precision="fp32", checkpoint_every=0, reporter=killer)
    with pytest.raises(Killed):
        technique(model, Local(dataset, tmp_path), plan)
    killer.at = -1
    run = Local(dataset, tmp_path)
    assert technique(model, run, plan).digest == whole.digest
    assert killer.resumed_at == 6
    assert technique(model, run, plan).digest == whole.digest
    assert killer.resumed_at == 15, "nothing is trained again until its model is saved"
    run.forget()
    assert not list(tmp_path.glob("fit-*"))


def test_refusals(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    with pytest.raises(ModelError, match="Distill works on a transformer"):
        Distill(layers=1)(static, run, PLAN)
    with pytest.raises(OptionError, match="cannot keep 5 layers of 2"):
        Distill(layers=5)(model, run, PLAN)
    with pytest.raises(OptionError, match="unknown calibration"):
        Quantize(method="magic")(model, run, PLAN)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="a probe needs pooled features; Static has none"):
        run.reduce(static, Moments(static.task))
    with pytest.raises(ModelError, match="LinearFloor needs all rows in one place"):
        LinearFloor()(model, object(), PLAN)  # type: ignore[arg-type]
    for reach in (-1, 4, 257):
        with pytest.raises(OptionError, match=f"a window of {reach} tokens; use an odd number, .* up to 255"):
            Static(width=4, buckets=8, filters=4, reach=reach, epochs=1)(model, run, PLAN)
    for name in ("reach", "least"):
        with pytest.raises(OptionError, match=f"{name} is for filters; with none of them leave it out"):
            Static(**{name: 3})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no engine runs a Network"):
        export(model.with_network(Network()))
    with pytest.raises(ModelError, match="unknown network 'abacus'"):
        build({"network": "abacus"})


def test_layers_in_no_single_list_are_refused(model: Model) -> None:
    model.network.config.num_hidden_layers = 3  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="bert keeps its 3 layers in no single list"):
        model.network.layers()  # type: ignore[operator]


def test_recipes_describe_themselves() -> None:
    assert describe((Distill(layers=1),))[0]["layers"] == 1


def test_a_fit_that_trains_other_parts_is_another_fit(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    frozen = Finetune(epochs=2, probe=False)
    free, plan = replace(frozen, freeze_embeddings=False), replace(PLAN, checkpoint_every=0)
    with pytest.raises(Killed):
        frozen(model, Local(dataset, tmp_path), replace(plan, reporter=Killer(at=5)))
    assert free(model, Local(dataset, tmp_path), plan).digest == free(model, Local(dataset), plan).digest
