"""Hashed bigrams of token ids: the one formula that training and the static engine share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from netweight.encode import Tokens

# bucket(a, b) = (a * BIGRAM_A + b * BIGRAM_B) mod buckets. Odd primes, so that both tokens and their order count;
# ids below 2^31 keep the sum within int64.
BIGRAM_A = 1_000_003
BIGRAM_B = 7_919


def features(tokens: Tokens, vocabulary: int, buckets: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Table rows of every token and of every adjacent pair within a row, row by row, and where each row starts.

    Bigrams stand behind the vocabulary in the table. Without buckets there are only tokens.
    """
    ids = tokens.ids.astype(np.int64)
    if not buckets:
        return ids, tokens.offsets[:-1]
    lengths = tokens.lengths
    row = np.repeat(np.arange(len(tokens)), lengths)
    # A row of k tokens has 2k - 1 features: a token, the pair it begins, the next token, and so on.
    slot = 2 * np.arange(len(ids)) - row + np.cumsum(lengths == 0)[row]
    counts = (2 * lengths - 1).clip(min=0)
    index = np.empty(int(counts.sum()), np.int64)
    index[slot] = ids
    inside = np.flatnonzero(row[:-1] == row[1:])
    index[slot[inside] + 1] = vocabulary + (ids[inside] * BIGRAM_A + ids[inside + 1] * BIGRAM_B) % buckets
    return index, np.cumsum(counts) - counts
