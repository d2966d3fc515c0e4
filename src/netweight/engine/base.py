"""What one tier does: token ids in, logits out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from netweight.encode import Tokens


class TierEngine(Protocol):
    """One model, ready to run. Threads may share it."""

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        """(n, outputs) in the order of `tokens`, at most `batch` rows at a time."""
        ...


@dataclass(frozen=True)
class Short:
    """A tier that reads less of a text than others of its artifact do: `most` tokens, the `closing` last ones among
    them."""

    engine: TierEngine
    most: int
    closing: int

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        """Those of the tier."""
        return self.engine.logits(tokens.cut(self.most, self.closing), batch)


@dataclass(frozen=True)
class Outputs:
    """What a cascade says of n rows: logits (n, outputs), confidence (n,), and the number of the tier that answered."""

    logits: NDArray[np.float32]
    confidence: NDArray[np.float64]
    tier: NDArray[np.int64]
