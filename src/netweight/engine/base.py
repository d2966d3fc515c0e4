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
class Outputs:
    """What a cascade says of n rows: logits (n, outputs), confidence (n,), and the number of the tier that answered."""

    logits: NDArray[np.float32]
    confidence: NDArray[np.float64]
    tier: NDArray[np.int64]
