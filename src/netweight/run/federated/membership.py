"""What a model gives away of its training rows: can one tell them from others by their loss?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from netweight.data import Rows
from netweight.errors import DataError
from netweight.model import Model
from netweight.run.local import logits_of
from netweight.task import Classify

_Z = 1.959963984540054  # 95 % of a normal distribution, two-sided
_LEAST = 10  # rows of each kind


@dataclass(frozen=True)
class Membership:
    """The loss-threshold attack (Yeom et al., CSF 2018) on one model.

    `auc` is the chance that a training row has a smaller loss than a held-out one: 0.5 tells nothing, 1 all. `low` and
    `high` are its 95 % interval. `advantage` is the share of training rows that an attacker takes for such less the
    share of others, when it takes rows whose loss is below the mean loss of training.
    """

    auc: float
    low: float
    high: float
    advantage: float
    seen: int
    unseen: int


def membership(model: Model, seen: Rows, unseen: Rows, limit: int = 2000) -> Membership:
    """Attack a model with rows that it was trained on and rows that it was not; of each `limit` are taken, evenly.

    Raises DataError where there are fewer than ten labelled rows of a kind.
    """
    return attack(row_losses(model, _some(seen, limit)), row_losses(model, _some(unseen, limit)))


def attack(seen: NDArray[np.float64], unseen: NDArray[np.float64]) -> Membership:
    """The attack, of losses (n,) and (m,). The interval is that of DeLong, DeLong and Clarke-Pearson (1988); where
    it has no width, since one kind lies wholly below the other, it is widened as 3 rows in the smaller kind tell
    (Hanley and Lippman-Hand, 1983)."""
    few = min(len(seen), len(unseen))
    if few < _LEAST:
        raise DataError(
            f"{len(seen)} training rows and {len(unseen)} held-out ones; a membership check needs {_LEAST} of each."
        )
    # For each row the share of the other kind on its right side; ties count half.
    above = _above(np.sort(unseen), seen)
    below = 1 - _above(np.sort(seen), unseen)
    auc = float(above.mean())
    deviation = math.sqrt(above.var(ddof=1) / len(seen) + below.var(ddof=1) / len(unseen))
    half = _Z * deviation if deviation else 3 / few
    bound = float(seen.mean())
    advantage = float((seen <= bound).mean() - (unseen <= bound).mean())
    return Membership(auc, max(0.0, auc - half), min(1.0, auc + half), advantage, len(seen), len(unseen))


def row_losses(model: Model, rows: Rows) -> NDArray[np.float64]:
    """Cross entropy, or squared error in units of the scale, of each labelled row (n,)."""
    if not len(rows) or rows.label is None:
        return np.zeros(0)
    targets = model.task.targets(rows.label)
    logits = logits_of(model, model.encoder.encode(rows.text, rows.pair)).double()
    if isinstance(model.task, Classify):
        wanted = torch.from_numpy(targets)
        known = wanted >= 0
        return np.asarray(torch.nn.functional.cross_entropy(logits[known], wanted[known], reduction="none").numpy())
    scaled = (torch.from_numpy(targets).double() - model.task.mean) / model.task.scale
    return np.asarray((logits[:, 0] - scaled).square()[scaled.isfinite()].numpy())


def _some(rows: Rows, limit: int) -> Rows:
    return rows if len(rows) <= limit else rows.take(np.linspace(0, len(rows) - 1, limit).astype(int).tolist())


def _above(sorted_: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value the share of `sorted_` that is above it."""
    left, right = (np.searchsorted(sorted_, values, side) for side in ("left", "right"))
    return np.asarray(1 - (left + right) / (2 * len(sorted_)))
