"""Rows on their way through a cascade, one tier at a time, which goes on with the tiers that work when one fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from netweight.encode import Tokens
from netweight.engine import Engine, Outputs
from netweight.engine.cascade import heard

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


@dataclass(frozen=True)
class Work:
    """n rows before tier `tier` is asked: what earlier tiers said, which rows are still `open` (n,), and what the tier
    before this one raised, where it failed."""

    tokens: Tokens
    said: Said
    open: NDArray[np.bool_]
    tier: int = 0
    raised: Exception | None = None

    def stretch(self, first: int, last: int) -> Work:
        """The rows from `first` up to, not including, `last`."""
        part = self.said.stretch(first, last)
        return Work(self.tokens.stretch(first, last), part, self.open[first:last], self.tier)

    def joined(self, other: Work) -> Work:
        """These rows, and the other ones, which are before the same tier, behind them. Which tiers failed is not the
        same for both, and left out."""
        one, two = self.said.outputs, other.said.outputs
        outputs = Outputs(
            np.concatenate([one.logits, two.logits]),
            np.concatenate([one.confidence, two.confidence]),
            np.concatenate([one.tier, two.tier]),
        )
        is_open = np.concatenate([self.open, other.open])
        return Work(self.tokens.joined(other.tokens), Said(outputs), is_open, self.tier)


def begin(engine: Engine, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Work:
    """Encoded rows, before the first tier."""
    tokens = engine.encoder.encode(texts, pairs)
    n = len(tokens)
    nothing = Outputs(np.zeros((n, engine.task.outputs), np.float32), np.zeros(n), np.full(n, -1))
    return Work(tokens, Said(nothing), np.ones(n, bool))


def step(engine: Engine, work: Work) -> Work:
    """What is known after the next tier has seen the rows that are open.

    Where it fails, its rows go on to the tier after it; behind the last one they keep what an earlier tier said, or
    are of tier -1 where none said anything.
    """
    i, tier, last = work.tier, engine.tiers[work.tier], work.tier == len(engine.tiers) - 1
    rows = np.flatnonzero(work.open)
    outputs = work.said.outputs
    logits, sure, answered = outputs.logits.copy(), outputs.confidence.copy(), outputs.tier.copy()
    still = np.zeros(len(work.open), bool)
    failed = work.said.failed
    raised: Exception | None = None
    try:
        own = engine.logits(i, work.tokens if len(rows) == len(still) else work.tokens.take(rows))
        logits[rows], sure[rows], on = heard(engine.task, tier, own, logits[rows])
        answered[rows], still[rows] = i, on & (not last)
    except Exception as problem:
        log.exception("tier %s failed on %d rows", tier.name, len(rows))
        failed, raised = (*failed, tier.name), problem
        still[rows] = not last
    said = Said(Outputs(logits, sure, answered), failed)
    return replace(work, said=said, open=still, tier=i + 1, raised=raised)
