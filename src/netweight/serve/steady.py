"""An engine that goes on with the tiers that work when one of them fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netweight.engine import Engine, Outputs
from netweight.engine.cascade import cascade
from netweight.task import Floats

log = logging.getLogger("netweight.serve")


@dataclass(frozen=True)
class Said:
    """Answers of n rows, and the names of tiers that failed on the way to them."""

    outputs: Outputs
    failed: tuple[str, ...] = ()

    def stretch(self, first: int, last: int) -> Said:
        """The rows from `first` up to, not including, `last`."""
        part, all_rows = slice(first, last), self.outputs
        return Said(Outputs(all_rows.logits[part], all_rows.confidence[part], all_rows.tier[part]), self.failed)


def answer(engine: Engine, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Said:
    """What the cascade says. Where a tier fails, its rows keep the answer of the tier before, or go on to the next.

    Raises what the last failing tier raised where no tier is left that answers.
    """
    tokens = engine.encoder.encode(texts, pairs)
    before = np.zeros((len(tokens), engine.task.outputs), np.float32)
    failed: list[str] = []
    last = len(engine.tiers) - 1
    answered = np.full(len(tokens), -1)

    def tier(i: int, rows: NDArray[np.int64]) -> Floats:
        try:
            before[rows] = engine.logits(i, tokens.take(rows))
            answered[rows] = i
        except Exception:
            log.exception("tier %s failed on %d rows", engine.tiers[i].name, len(rows))
            failed.append(engine.tiers[i].name)
            if i == last and (answered[rows] < 0).any():
                raise
        return np.asarray(before[rows])

    outputs = cascade(engine.task, engine.tiers, len(tokens), tier)
    if (answered < 0).any():  # handed on by nobody: a threshold below any confidence
        raise RuntimeError(f"{', '.join(failed)} failed, and no other tier was asked.")
    return Said(Outputs(outputs.logits, outputs.confidence, answered), tuple(failed))
