"""The built-in sample data: what customers of an online shop write, and the one thing that each of them wants.

All of it is synthetic and was written for this project: a seeded grammar, no person's words. Texts are English, from
chat, mail and app, and many mention a second aspect (as solved, as past, as ruled out), so that single words do not
tell the intent. About 2.5 % of labels are wrong, as in real tables; accuracy against these labels ends near 97.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from netweight.data import Rows, normalise
from netweight.errors import OptionError
from netweight.samples.compose import Message, messages

__all__ = ["Sample", "sample"]

# The grammar has far more texts than this, but drawing would begin to repeat itself.
_MOST = 1_000_000


@dataclass(frozen=True)
class Sample:
    """Labelled rows and an unlabelled pool; no normalised text occurs twice in the two together.

    Both have the slices `channel` (chat, mail, app) and `form`, which says how a second aspect is mentioned: not at all
    (plain), in passing (aside), or as contrast, negation, history or correction.
    """

    labelled: Rows
    pool: Rows


def sample(seed: int = 0, rows: int = 24_000, pool: int = 12_000) -> Sample:
    """The sample data of a seed: the same on every platform; more rows of a seed begin with the fewer.

    Raises OptionError where `rows` is not positive, `pool` is negative, or both together exceed a million.
    """
    if rows < 1 or pool < 0 or rows + pool > _MOST:
        raise OptionError(
            f"sample data of {rows:,} rows and a pool of {pool:,} cannot be made; ask for at least 1 row, a pool of 0 "
            f"or more, and at most {_MOST:,} in all."
        )
    # Streams of their own: a larger table must not take texts out of the pool's order, nor the reverse.
    seen: set[str] = set()
    labelled = _distinct(Random(f"netweight labelled {seed}"), rows, seen)
    unlabelled = _distinct(Random(f"netweight pool {seed}"), pool, seen)
    return Sample(_rows(labelled, True), _rows(unlabelled, False))


def _distinct(rng: Random, count: int, seen: set[str]) -> list[Message]:
    """That many messages whose normalised texts are not in `seen`, which grows by them."""
    drawn: list[Message] = []
    source = messages(rng)
    while len(drawn) < count:
        message = next(source)
        key = normalise(message.text)
        if key not in seen:
            seen.add(key)
            drawn.append(message)
    return drawn


def _rows(drawn: list[Message], labelled: bool) -> Rows:
    return Rows(
        text=tuple([m.text for m in drawn]),
        label=tuple([m.label for m in drawn]) if labelled else None,
        slices={"channel": tuple([m.channel for m in drawn]), "form": tuple([m.form for m in drawn])},
    )
