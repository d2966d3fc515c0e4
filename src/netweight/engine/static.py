"""Static students and the linear floor, in numpy: gather, add, divide, and sometimes a small head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from netweight.encode import Tokens
from netweight.errors import CorruptArtifact
from netweight.features import bigrams

Floats = NDArray[np.float32]


class StaticEngine:
    """The tables that `export` wrote. Every row is summed by itself, so no row's result depends on its batch."""

    def __init__(self, data: bytes, options: Mapping[str, Any]) -> None:
        try:
            held = load(data)
            table, scale = held["table"], held["scale"]
            self._norm: Floats = held["norm"]
            layers = sum(name.startswith("bias.") for name in held)
            self._head = [(held.get(f"matrix.{i}"), held[f"bias.{i}"]) for i in range(layers)]
        except (SafetensorError, KeyError) as problem:
            raise CorruptArtifact(f"a static tier's file lacks what its engine needs: {problem!r}.") from problem
        self._table = table.astype(np.float32) * scale[:, None]
        self._buckets = int(options["buckets"])
        self._vocabulary = len(table) - self._buckets
        self._squared = options["norm"] == "l2"
        self._segments = bool(options["segments"])

    def logits(self, tokens: Tokens, batch: int) -> Floats:
        parts = [self._chunk(tokens.take(rows)) for rows in _chunks(len(tokens), batch)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self._head[-1][1])), np.float32)

    def _chunk(self, tokens: Tokens) -> Floats:
        if not self._segments:
            return self._finish(self._pool(tokens))
        u, v = (self._pool(_segment(tokens, kind)) for kind in (0, 1))
        return self._finish(np.concatenate([u, v, np.abs(u - v), u * v], axis=1))

    def _pool(self, tokens: Tokens) -> Floats:
        total = _sums(self._table, tokens.ids, tokens.offsets)
        norm = self._norm[tokens.ids]
        if self._buckets:
            pairs, rows = bigrams(tokens, self._buckets)
            pairs += self._vocabulary
            offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(tokens)))])
            total += _sums(self._table, pairs, offsets)
        if self._squared:
            squares = _sums((self._norm**2)[:, None], tokens.ids, tokens.offsets)
            if self._buckets:
                squares += _sums((self._norm**2)[:, None], pairs, offsets)
            return total / np.maximum(np.sqrt(squares), 1e-6)
        return total / np.maximum(_sums(norm[:, None], np.arange(len(norm)), tokens.offsets), 1e-6)

    def _finish(self, x: Floats) -> Floats:
        for i, (matrix, bias) in enumerate(self._head):
            if i:
                x = np.maximum(x, 0)
            x = (x if matrix is None else x @ matrix) + bias
        return x


def _chunks(n: int, batch: int) -> list[NDArray[np.int64]]:
    return [np.arange(start, min(start + batch, n)) for start in range(0, n, batch)]


def _sums(table: Floats, index: NDArray[Any], offsets: NDArray[np.int64]) -> Floats:
    """Sum of `table[index]` over each row's stretch of `index`; an empty stretch gives zero."""
    out = np.zeros((len(offsets) - 1, table.shape[1]), np.float32)
    full = np.flatnonzero(np.diff(offsets))
    if len(full):
        out[full] = np.add.reduceat(table[index], offsets[:-1][full], axis=0)
    return out


def _segment(tokens: Tokens, kind: int) -> Tokens:
    """The tokens of one text of each pair."""
    keep = tokens.types == kind
    rows = np.repeat(np.arange(len(tokens)), tokens.lengths)[keep]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(tokens)))])
    return Tokens(tokens.ids[keep], tokens.types[keep], offsets)
