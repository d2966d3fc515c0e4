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
from netweight.features import features

Floats = NDArray[np.float32]


class StaticEngine:
    """The tables that `export` wrote. Every row is summed by itself, so no row's result depends on its batch."""

    def __init__(self, data: bytes, options: Mapping[str, Any]) -> None:
        try:
            held = load(data)
            table, scale, norm = held["table"], held["scale"], held["norm"]
            layers = sum(name.startswith("bias.") for name in held)
            self._head = [(held.get(f"matrix.{i}"), held[f"bias.{i}"]) for i in range(layers)]
            self._buckets = int(options["buckets"])
            self._squared = options["norm"] == "l2"
            self._segments = bool(options["segments"])
        except (SafetensorError, KeyError) as problem:
            raise CorruptArtifact(f"a static tier's file lacks what its engine needs: {problem!r}.") from problem
        self._vocabulary = len(table) - self._buckets
        # The divisor of each row is a sum over the same features, so it rides along as the last column.
        self._table = np.zeros((len(table), table.shape[1] + 1), np.float32)
        np.multiply(table, scale[:, None], out=self._table[:, :-1])
        self._table[: len(norm), -1] = norm**2 if self._squared else norm

    def logits(self, tokens: Tokens, batch: int) -> Floats:
        if len(tokens) <= batch:
            return self._chunk(tokens)
        starts = range(0, len(tokens), batch)
        return np.concatenate([self._chunk(tokens.stretch(i, min(i + batch, len(tokens)))) for i in starts])

    def _chunk(self, tokens: Tokens) -> Floats:
        if not self._segments:
            return self._finish(self._pool(tokens))
        u, v = (self._pool(tokens.segment(kind)) for kind in (0, 1))
        return self._finish(np.concatenate([u, v, np.abs(u - v), u * v], axis=1))

    def _pool(self, tokens: Tokens) -> Floats:
        index, starts = features(tokens, self._vocabulary, self._buckets)
        out = np.zeros((len(tokens), self._table.shape[1]), np.float32)
        full = np.flatnonzero(tokens.lengths)  # an empty row sums to zero
        if len(full):
            out[full] = np.add.reduceat(self._table[index], starts[full], axis=0)
        divisor = np.sqrt(out[:, -1:]) if self._squared else out[:, -1:]
        return np.asarray(out[:, :-1] / np.maximum(divisor, 1e-6))

    def _finish(self, x: Floats) -> Floats:
        for i, (matrix, bias) in enumerate(self._head):
            if i:
                x = np.maximum(x, 0)
            x = (x if matrix is None else x @ matrix) + bias
        return x
