"""Losses against torch's own and against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.errors import OptionError
from netweight.loss import Batch, SoftTargets, Supervised, matching, supervised
from netweight.task import Classify, Score

TASK, SCORE = Classify(("a", "b", "c")), Score()


def batch_of(targets: Tensor, weight: Tensor | None = None, teachers: tuple[Tensor, ...] = ()) -> Batch:
    n = len(targets)
    ids = torch.zeros(n, 2)
    return Batch(ids, ids, ids, targets, torch.ones(n) if weight is None else weight, teachers)


class Says(nn.Module):
    """A network that says what it is told to."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_matching_equals_torchs_divergence(temperature: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(7, 3), torch.randn(7, 3)
    wanted = F.kl_div(F.log_softmax(logits / temperature, 1), F.softmax(target / temperature, 1), reduction="batchmean")
    found = matching(TASK, logits, target, torch.ones(7), temperature)
    assert float(found) == pytest.approx(float(wanted) * temperature**2, rel=1e-5)


def test_matching_weights_rows_and_is_zero_only_where_both_agree() -> None:
    torch.manual_seed(1)
    logits, target = torch.randn(4, 3), torch.randn(4, 3)
    weight = torch.tensor([2.0, 0.0, 1.0, 0.0])
    rows = [float(matching(TASK, logits[i : i + 1], target[i : i + 1], torch.ones(1), 2.0)) for i in range(4)]
    assert float(matching(TASK, logits, target, weight, 2.0)) == pytest.approx((2 * rows[0] + rows[2]) / 3, rel=1e-5)
    assert float(matching(TASK, logits + 5, logits, torch.ones(4), 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(matching(TASK, logits, target, torch.zeros(4), 2.0)) == 0
    assert float(matching(SCORE, logits[:, :1], logits[:, :1] + 3, weight, 2.0)) == pytest.approx(9, rel=1e-5)


def test_supervised_equals_a_hand_computation() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    batch = batch_of(torch.tensor([0, 2, -1]), torch.tensor([1.0, 3.0, 100.0]))
    first = math.log(math.exp(2) + 2) - 2
    second = math.log(math.exp(1) + 2)
    assert float(supervised(TASK, logits, batch, 0.0)) == pytest.approx((first + 3 * second) / 4, rel=1e-6)
    smooth = float(supervised(TASK, logits[:1], batch_of(torch.tensor([0])), 0.3))
    assert smooth == pytest.approx(0.7 * first + 0.1 * (first + 2 * (first + 2)), rel=1e-6)


def test_supervised_scores_leave_unlabelled_rows_out() -> None:
    logits = torch.tensor([[1.0], [4.0], [9.0]])
    batch = batch_of(torch.tensor([0.0, 2.0, float("nan")]), torch.tensor([1.0, 3.0, 9.0]))
    assert float(supervised(SCORE, logits, batch, 0.0)) == pytest.approx((1 + 3 * 4) / 4)
    nothing = batch_of(torch.tensor([float("nan")]))
    assert float(supervised(SCORE, logits[:1], nothing, 0.0)) == 0


def test_scores_of_mae_are_trained_for_the_median() -> None:
    task, row = Score(metric="mae"), torch.ones(5, 1)
    batch = batch_of(torch.tensor([0.0, 1.0, 2.0, 9.0, float("nan")]), torch.tensor([1.0, 1.0, 3.0, 1.0, 7.0]))
    assert float(supervised(task, 4 * row, batch, 0.0)) == pytest.approx((4 + 3 + 3 * 2 + 5) / 6)
    # The weighted median is 2, the mean 8 / 3.
    found = {at: float(Supervised(task).of(at * row, batch)) for at in (1.5, 2.0, 2.5, 8 / 3)}
    assert min(found, key=found.__getitem__) == 2.0
    # What a teacher says is matched as it is.
    assert float(matching(task, row, row + 3, torch.ones(5), 1.0)) == pytest.approx(9)


def test_soft_targets_mix_and_average_teachers() -> None:
    torch.manual_seed(2)
    logits, one, two = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    targets = torch.tensor([0, 1, -1, 2, -1])
    batch = batch_of(targets, teachers=(one, two))
    soft = matching(TASK, logits, (one + two) / 2, batch.weight, 3.0)
    hard = supervised(TASK, logits, batch, 0.0)
    assert hard > 0
    cases = [
        (SoftTargets(TASK, (), 3.0, 0.25), 0.75 * soft + 0.25 * hard),
        (SoftTargets(TASK, (), 3.0), soft),
        (Supervised(TASK), hard),
    ]
    for loss, wanted in cases:
        assert loss(Says(logits), batch).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert SoftTargets(TASK, ()).unlabelled
    assert not Supervised(TASK).unlabelled


def test_numbers_that_would_turn_a_loss_over_are_refused() -> None:
    with pytest.raises(OptionError, match="temperature of a distillation is 0; use more than 0"):
        SoftTargets(TASK, (), 0)
    for hard in (-0.5, 1.5):
        with pytest.raises(OptionError, match=f"hard of a distillation is {hard}; use a share, 0 to 1"):
            SoftTargets(TASK, (), hard=hard)
    with pytest.raises(OptionError, match="smoothing of a loss is 1.5; use 0 or more, and less than 1"):
        Supervised(TASK, smoothing=1.5)


def test_what_scores_have_no_use_for_is_refused() -> None:
    for name, given in {"temperature": 3.0, "combine": "confidence"}.items():
        with pytest.raises(OptionError, match=f"^{name}={given!r} is for classification; this model predicts scores: "):
            SoftTargets(SCORE, (), **{name: given})  # type: ignore[arg-type]
    for name, given in {"smoothing": 0.1, "class_weights": (1.0,)}.items():
        with pytest.raises(OptionError, match=f"^{name}=.* is for classification; this model predicts scores: leave"):
            Supervised(SCORE, **{name: given})  # type: ignore[arg-type]
    assert SoftTargets(SCORE, (), 2.0, 0.3).temperature == SoftTargets.temperature == 2.0
    assert Supervised(SCORE, 0.0).smoothing == 0.0


def test_the_gradient_of_unlabelled_rows_is_zero() -> None:
    network = Says(torch.randn(3, 3))
    Supervised(TASK)(network, batch_of(torch.tensor([1, -1, 0]))).backward()
    assert network.logits.grad is not None
    assert network.logits.grad[1].abs().sum() == 0
    assert network.logits.grad[0].abs().sum() > 0
