"""Self-training: which rows count and how much, the guard against collapse, and that it helps where it can."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import FAMILIES, tiny_model, tiny_rows
from netweight.data import Dataset, Rows
from netweight.errors import ModelError, OptionError
from netweight.loss import Batch, PseudoLabels
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Local
from netweight.task import Classify, Score
from netweight.techniques import Finetune, Quantize, SelfTrain, Static, describe
from netweight.techniques.selftrain import Sure, capped
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
QUICK = SelfTrain(floor=0.5, epochs=1, learning_rate=1e-3, drift=1.0)


@pytest.fixture
def pooled(dataset: Dataset) -> Dataset:
    """Few labelled rows, and a pool."""
    rows = tiny_rows(200)
    return replace(dataset, train=rows.take(range(0, 24)), pool=rows.take(range(130, 190)).unlabelled())


def sure_model(bias: float = 0.0) -> Model:
    """A model that says "bad" or "good" by chance, and surely; `bias` pushes it to "good"."""
    model = tiny_model()
    assert isinstance(model.network, Transformer)
    with torch.no_grad():
        model.network.head.weight.mul_(20)
        model.network.head.bias.copy_(torch.tensor([-bias, bias]))
    return model


def test_the_loss_by_hand() -> None:
    task = Classify(("a", "b"))
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0]])
    said = torch.tensor([[0.0, 9.0], [0.0, 3.0], [0.1, 0.0], [2.0, 0.0]])
    batch = Batch(*(torch.zeros(4, 1),) * 3, torch.tensor([0, -1, -1, -1]), torch.tensor([1.0, 2.0, 1.0, 1.0]), (said,))

    def loss(**options: Any) -> float:
        return float(PseudoLabels(task, (), 0.8, (1.0, 0.5), **options)(lambda *_: logits, batch))  # type: ignore[arg-type]

    # Labelled row 0; row 1 is surely b, whose rows weigh half; row 2 is unsure; row 3 is surely a.
    own, one, three = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2)), math.log(2)
    assert loss() == pytest.approx((own + 2 * 0.5 * one + three) / 3)
    p = 1 / (1 + math.exp(-3))
    soft = p * one + (1 - p) * (one + 2)
    assert loss(soft=True) == pytest.approx((own + 2 * 0.5 * soft + three) / 3)
    assert loss(temperature=2.0) == pytest.approx((own + 2 * 0.5 * one) / 2), "row 3 is not that sure when calibrated"


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500)), min_size=2, max_size=6), st.floats(1, 3))
def test_no_class_weighs_more_than_its_cap(counts: list[tuple[int, int]], balance: float) -> None:
    pseudo, labels = (torch.tensor(column).double() for column in zip(*counts))
    weights = torch.tensor(capped(pseudo, labels, balance)).double()
    cap = balance * labels / labels.sum() * pseudo.sum()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights * pseudo <= cap * (1 + 1e-6) + 1e-9).all()
    assert (weights[pseudo <= cap] == 1)[pseudo[pseudo <= cap] > 0].all(), "only what is above its cap is held down"


def test_what_is_counted(pooled: Dataset) -> None:
    model = sure_model()
    counts = Local(pooled).reduce(model, Sure(2, 0.5, 1.0), unlabelled=True)
    assert counts["labels"].tolist() == [12, 12]
    assert counts["unlabelled"] == 60
    assert counts["pseudo"].sum() == 60, "the largest of two probabilities is never below a half"
    fewer = Local(pooled).reduce(model, Sure(2, 0.9, 1.0), unlabelled=True)["pseudo"].sum()
    assert Local(pooled).reduce(model, Sure(2, 0.9, 4.0), unlabelled=True)["pseudo"].sum() < fewer < 60


def test_contract(pooled: Dataset, tmp_path: Path) -> None:
    contract = TechniqueContract(replace(QUICK, rounds=2), tiny_model(), lambda: Local(pooled), PLAN, pooled.train.text)
    contract.check(tmp_path)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_other_families(family: str, pooled: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family)
    contract = TechniqueContract(replace(QUICK, soft=True), model, lambda: Local(pooled), PLAN, pooled.train.text)
    made = contract.returns_a_new_model()
    contract.repeats_itself(made)
    contract.survives_saving(made, tmp_path)


@pytest.mark.parametrize("student", [False, True])
def test_what_quantization_knew_is_dropped(student: bool, pooled: Dataset) -> None:
    run = Local(pooled)
    before = Quantize(rows=16, weight_bits=4)(sure_model(), run, PLAN)
    assert before.ranges
    assert before.weights
    made = replace(QUICK, student=before if student else None)(before, run, PLAN)
    assert not made.ranges
    assert not made.weights


def test_the_pool_is_what_it_learns_from(pooled: Dataset) -> None:
    """The labelled rows show two words of each side; the pool shows the others, beside those two."""
    known = Rows(
        ("my great zip", "the lovely coat", "my broken zip", "the late coat") * 4, ("good", "good", "bad", "bad") * 4
    )
    texts, truth = [], []
    for i in range(160):
        good = i % 2 == 0
        sides = (
            (("great", "lovely"), ("soft", "perfect", "comfortable"))
            if good
            else (("broken", "late"), ("torn", "wrong", "cheap"))
        )
        texts.append(f"my {sides[0][i // 2 % 2]} {sides[1][i // 2 % 3]} zip")
        truth.append("good" if good else "bad")
    unseen = Rows(
        tuple(t.replace(w, "the") for t in texts for w in t.split() if w in ("great", "lovely", "broken", "late")),
        tuple(truth),
    )
    data = replace(pooled, train=known, select=unseen, pool=Rows(tuple(texts)))
    run = Local(data)
    teacher = Finetune(epochs=40, learning_rate=2e-3, freeze_embeddings=False)(tiny_model(), run, PLAN)
    technique = SelfTrain(floor=0.8, epochs=12, learning_rate=2e-3, token_dropout=0.4, freeze_embeddings=False)
    student = technique(teacher, run, PLAN)
    before, after = run.quality(teacher), run.quality(student)
    assert after > before + 0.1, (before, after)
    assert after > 0.9


def test_a_student_starts_from_what_is_given(pooled: Dataset) -> None:
    run, other = Local(pooled), tiny_model(seed=4)
    made = replace(QUICK, student=other)(sure_model(), run, PLAN)
    plain = QUICK(sure_model(), run, PLAN)
    assert made.digest != plain.digest
    tables = [m.network.backbone.embeddings.word_embeddings.weight for m in (made, other)]  # type: ignore[union-attr]
    assert torch.equal(*tables), "frozen, so still those of the given student"  # type: ignore[arg-type]
    assert describe((replace(QUICK, student=other),))[0]["student"] == other.digest


def test_collapse_is_refused_or_ends_it(pooled: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ModelError, match=r"cannot start: .* total variation of 0\.50, more than drift=0\.3; 'good' is 100%"
    ):
        replace(QUICK, drift=0.3)(sure_model(bias=9.0), Local(pooled), PLAN)

    class Notes:
        def __init__(self) -> None:
            self.said: list[str] = []

        def start(self, label: str, steps: int, done: int) -> None:
            pass

        def step(self, step: int, loss: float, rate: float) -> None:
            pass

        def note(self, message: str) -> None:
            self.said.append(message)

    class Collapsing(Local):
        """Each model that it fits says "good" from then on."""

        def fit(self, *given: Any) -> Model:
            return sure_model(bias=9.0)

    technique = replace(QUICK, rounds=3, drift=0.49)
    start, notes = sure_model(), Notes()
    assert Local(pooled).reduce(start, Sure(2, 0.5, 1.0), unlabelled=True)["pseudo"].min() > 6
    for rounds in (1, 3):
        notes.said.clear()
        made = replace(technique, rounds=rounds)(start, Collapsing(pooled), replace(PLAN, reporter=notes))
        assert made.digest == start.digest
        assert len(notes.said) == 1
        assert notes.said[0].startswith("self-training keeps the model from before round 1: pseudo-labels differ")

    class Unsure(Local):
        """Each model that it fits is sure of nothing."""

        def fit(self, *given: Any) -> Model:
            model = sure_model()
            assert isinstance(model.network, Transformer)
            torch.nn.init.zeros_(model.network.head.weight)
            return model

    notes.said.clear()
    made = replace(technique, rounds=1, floor=0.6)(start, Unsure(pooled), replace(PLAN, reporter=notes))
    assert made.digest == start.digest, "a student that is sure of nothing takes no teacher's place"
    (said,) = notes.said
    assert said.endswith("none reaches floor 0.6; lower it.")


def test_refusals(pooled: Dataset, dataset: Dataset) -> None:
    model = sure_model()
    with pytest.raises(
        ModelError, match="cannot start: the run showed no rows without labels; give the dataset a pool"
    ):
        QUICK(model, Local(dataset), PLAN)
    with pytest.raises(ModelError, match=r"of 60 rows without labels none reaches floor 0\.999999"):
        replace(QUICK, floor=0.999999, temperature=50.0)(model, Local(pooled), PLAN)
    with pytest.raises(OptionError, match="self-training needs labels; a task of kind score"):
        QUICK(tiny_model(Score(0.0, 1.0)), Local(pooled), PLAN)
    for name, value in {"floor": 1.0, "rounds": 0, "temperature": 0.0, "balance": 0.5, "drift": 0.0}.items():
        with pytest.raises(OptionError, match=f"{name} of SelfTrain is {value}; use "):
            replace(QUICK, **{name: value})(model, Local(pooled), PLAN)
    with pytest.raises(ModelError, match="the student has another task"):
        replace(QUICK, student=tiny_model(Classify(("good", "bad"))))(model, Local(pooled), PLAN)
    static = Static(width=4, buckets=8, epochs=1)(model, Local(dataset), PLAN)
    with pytest.raises(ModelError, match="SelfTrain works on a transformer"):
        QUICK(static, Local(pooled), PLAN)


@pytest.mark.parametrize("page", ["distill", "semi-supervised"])
def test_the_code_of_the_pages_runs(
    page: str, pooled: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "techniques" / f"{page}.md").read_text(encoding="utf-8")
    few = replace(pooled, train=pooled.train.take(range(16)))
    model = Finetune(epochs=20, learning_rate=2e-3)(tiny_model(), Local(few), PLAN)
    names = {"data": few, "run": Local(few), "plan": PLAN, "model": model}
    names |= {"teacher": tiny_model(layers=3), "other": tiny_model(seed=5, layers=1)}
    # One name space for a page: its later blocks go on from the first.
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert ("small" in names) == (page == "distill")
    assert (tmp_path / "todo.csv").exists() == (page == "semi-supervised")
