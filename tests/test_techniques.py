"""Every technique: the input model is unchanged, saving and exporting keep the outputs, the seed fixes the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_model
from netweight.artifact import Tier
from netweight.data import Dataset
from netweight.engine.cascade import tier_engine
from netweight.errors import ModelError, OptionError
from netweight.export import export, lowered
from netweight.model import Model
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import Distill, Finetune, LinearFloor, Quantize, Static, Technique, describe
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
ALL: list[Technique] = [
    Finetune(epochs=1, learning_rate=1e-3),
    Distill(layers=1, epochs=1),
    Static(width=8, buckets=64, epochs=2, batch_size=16),
    Static(width=8, buckets=0, hidden=6, epochs=1, batch_size=16),
    LinearFloor(buckets=64),
    Quantize(rows=40),
    Quantize(method="minmax", rows=40),
]


@pytest.mark.parametrize("technique", ALL, ids=lambda t: repr(t)[:40])
def test_contract(technique: Technique, model: Model, dataset: Dataset, tmp_path: Path) -> None:
    before = tiny_model().digest
    new = technique(model, Local(dataset), PLAN)
    assert Model(**vars_of(model)).digest == before, "the given model was changed"
    assert new.digest != before, "nothing happened"
    assert technique(model, Local(dataset), PLAN).digest == new.digest, "the same seed gave another result"
    tokens = new.encoder.encode(dataset.train.text)
    wanted = logits_of(new, tokens)
    new.save(tmp_path)
    again = Model.load(tmp_path)
    assert torch.equal(logits_of(again, tokens), wanted)
    assert again.digest == new.digest
    exported = export(new)
    engine = tier_engine(Tier("t", exported.kind, "f", exported.options), exported.data, new.encoder.pad, 1)
    network = lowered(new) if new.ranges else new.network
    with torch.no_grad():
        reference = network(*map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), new.encoder.pad))).numpy()
    # int8 tables round each row by half a step at most; ONNX Runtime's integer kernels round as ours do.
    spread = np.abs(reference).max()
    assert np.abs(engine.logits(tokens, 16) - reference).max() < 0.02 * spread + 1e-3
    one, many = engine.logits(tokens, 1), engine.logits(tokens, 64)
    assert (one.argmax(1) == many.argmax(1)).all()


def vars_of(model: Model) -> dict[str, object]:
    """Fields only: the cached digest must be computed anew."""
    return {name: getattr(model, name) for name in ("network", "encoder", "task", "base", "ranges")}


def test_finetuning_learns(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    trained = Finetune(epochs=4, learning_rate=2e-3)(model, run, PLAN)
    assert run.quality(trained) == 1.0


def test_a_killed_fit_resumes_to_the_same_weights(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Killer:
        def __init__(self) -> None:
            self.at = 7

        def start(self, label: str, steps: int, done: int) -> None:
            self.resumed_at = done

        def step(self, step: int, loss: float, rate: float) -> None:
            if step == self.at:
                raise Stop

        def note(self, message: str) -> None:
            pass

    technique = Finetune(epochs=3, learning_rate=1e-3)
    whole = technique(model, Local(dataset), PLAN)
    killer = Killer()
    plan = Plan(batch_size=16, precision="fp32", checkpoint_every=0, reporter=killer)
    with pytest.raises(Stop):
        technique(model, Local(dataset, tmp_path), plan)
    killer.at = -1
    assert technique(model, Local(dataset, tmp_path), plan).digest == whole.digest
    assert killer.resumed_at == 6
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
    with pytest.raises(OptionError, match="epochs of a plan is 0"):
        Plan(epochs=0)


def test_recipes_describe_themselves() -> None:
    assert describe((Distill(layers=1),))[0]["layers"] == 1
