"""Hashed bigrams of token ids: the one formula that training and the static engine share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from netweight.encode import Tokens

# bucket(a, b) = (a * BIGRAM_A + b * BIGRAM_B) mod buckets. Odd primes, so that both tokens and their order count;
# ids below 2^31 keep the sum within int64.
BIGRAM_A = 1_000_003
BIGRAM_B = 7_919


def bigrams(tokens: Tokens, buckets: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bucket of every adjacent pair within a row, flat, and the row each belongs to."""
    ids = tokens.ids.astype(np.int64)
    row = np.repeat(np.arange(len(tokens)), tokens.lengths)
    inside = row[:-1] == row[1:]
    return ((ids[:-1] * BIGRAM_A + ids[1:] * BIGRAM_B) % buckets)[inside], row[:-1][inside]
