"""Static students and the linear floor, in numpy: gather, add, divide or compare, and sometimes a small head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from netweight.encode import Tokens
from netweight.errors import CorruptArtifact
from netweight.features import features

Floats = NDArray[np.float32]

# What the table of windows is made from.
FACTORS = ("windows.words", "windows.word_scale", "windows.taps", "windows.tap_scale")
# Terms of a sum of products of int8 that fp32 holds exactly.
_EXACT = 2**24 // 128**2
_CHUNK = 2048  # tokens whose windows are added up at a time, in the processor's cache


class StaticEngine:
    """The tables that `export` wrote. Every row is summed by itself, so no row's result depends on its batch."""

    def __init__(self, data: bytes, options: Mapping[str, Any]) -> None:
        try:
            held = load(data)
            table, scale, norm = held["table"], held["scale"], held["norm"]
            layers = sum(name.startswith("bias.") for name in held)
            self._head = [(held.get(f"matrix.{i}"), held[f"bias.{i}"]) for i in range(layers)]
            self._buckets = int(options["buckets"])
            if not 0 <= self._buckets < len(table):
                raise ValueError(f"buckets are {self._buckets}, of {len(table)} rows")
            self._squared = options["norm"] == "l2"
            self._segments = bool(options["segments"])
            self._vocabulary = len(table) - self._buckets
            self._windows = _Windows(held, self._vocabulary) if "reach" in options else None
            # The divisor of each row is a sum over the same features, so it rides along as the last column.
            self._table = np.zeros((len(table), table.shape[1] + 1), np.float32)
            np.multiply(table, scale[:, None], out=self._table[:, :-1])
            self._table[: len(norm), -1] = norm**2 if self._squared else norm
        except (SafetensorError, KeyError, IndexError, TypeError, ValueError, OverflowError) as problem:
            raise CorruptArtifact(f"a static tier's file lacks what its engine needs: {problem!r}.") from problem

    def logits(self, tokens: Tokens, batch: int) -> Floats:
        starts = range(0, max(len(tokens), 1), batch)
        parts = [tokens.stretch(i, min(i + batch, len(tokens))) for i in starts] if len(tokens) > batch else [tokens]
        logits = np.concatenate([self._finish(self._texts(self._pool, part)) for part in parts])
        if self._windows is None:
            return logits
        return logits + self._windows.answers(self._texts(self._windows, tokens))

    def _texts(self, pool: Callable[[Tokens], Floats], tokens: Tokens) -> Floats:
        """What a pooling says of each row; of pairs, of both texts and how they differ."""
        if not self._segments:
            return pool(tokens)
        u, v = (pool(tokens.segment(kind)) for kind in (0, 1))
        return np.concatenate([u, v, np.abs(u - v), u * v], axis=1)

    def _pool(self, tokens: Tokens) -> Floats:
        index, starts = features(tokens, self._vocabulary, self._buckets)
        out = np.zeros((len(tokens), self._table.shape[1]), np.float32)
        full = np.flatnonzero(tokens.lengths)  # an empty row sums to zero
        if len(full):
            out[full] = np.add.reduceat(self._table.take(index, axis=0), starts[full], axis=0)
        divisor = np.sqrt(out[:, -1:]) if self._squared else out[:, -1:]
        return np.asarray(out[:, :-1] / np.maximum(divisor, 1e-6))

    def _finish(self, x: Floats) -> Floats:
        for i, (matrix, bias) in enumerate(self._head):
            if i:
                x = np.maximum(x, 0)
            x = (x if matrix is None else x @ matrix) + bias
        return x


def window_table(held: Mapping[str, NDArray[Any]]) -> NDArray[np.int8]:
    """What each known token adds to each filter at each place of a window (reach, known, filters), in units of the
    filter's `windows.scale`, from the factors that `export` wrote.

    A sum of products of whole numbers has no rounding, so every machine makes the same table.
    """
    words, taps = held["windows.words"], held["windows.taps"]
    exact = np.float32 if words.shape[1] <= _EXACT else np.float64
    words, scale = words.astype(exact), held["windows.tap_scale"] / held["windows.scale"]
    table = np.zeros((len(taps), len(words), taps.shape[2]), np.int8)
    for place, tap in zip(table, taps, strict=True):
        place[:] = np.rint((words @ tap.astype(exact)) * held["windows.word_scale"] * scale)
    return table


class _Windows:
    """A convolution by its tables: whole numbers are added and compared, so that every order gives the same bits."""

    def __init__(self, held: Mapping[str, NDArray[Any]], vocabulary: int) -> None:
        known = held["windows.known"]
        table = held["windows.table"] if "windows.table" in held else window_table(held)
        # One row more, of zeros: tokens that are not known, and what lies beside a text.
        self._table = np.concatenate([table, np.zeros_like(table[:, :1])], axis=1)
        self._nothing = len(known)
        self._place = np.full(vocabulary, self._nothing, np.int32)
        self._place[known] = np.arange(len(known))
        self._scale, self._bias = held["windows.scale"], held["windows.bias"]
        self._matrix, self._offset = held["windows.matrix"], held["windows.offset"]

    def answers(self, found: Floats) -> Floats:
        """Logits of the filters' largest values."""
        return np.asarray(found @ self._matrix + self._offset, np.float32)

    def __call__(self, tokens: Tokens) -> Floats:
        """The largest value of each filter in each row (n, filters), 0 at least."""
        out = np.zeros((len(tokens), len(self._scale)), np.float32)
        # Rows of one length are a box of numbers, whose largest is found 15 times as fast as that of ragged stretches
        # (numpy 2.4: `maximum.reduceat` of int16).
        order = np.argsort(tokens.lengths, kind="stable")
        lengths = tokens.lengths[order]
        start = int(np.searchsorted(lengths, 1))  # an empty row has no window
        while start < len(order):
            length = int(lengths[start])
            alike = int(np.searchsorted(lengths, length, "right"))
            rows = order[start : min(alike, start + max(1, _CHUNK // length))]
            out[rows] = self._largest(tokens.ids[tokens.offsets[rows][:, None] + np.arange(length)])
            start += len(rows)
        return out

    def _largest(self, ids: NDArray[np.int32]) -> Floats:
        """Of rows (n, length)."""
        n, length = ids.shape
        reach = len(self._table)
        side = reach // 2
        # Blanks before and behind each row, so that no window looks into another one.
        places = np.full((n, length + 2 * side), self._nothing, np.int32)
        places[:, side : side + length] = self._place[ids]
        total = self._table[0].take(places[:, :length], axis=0).astype(np.int16)
        for k in range(1, reach):
            total += self._table[k].take(places[:, k : k + length], axis=0)
        return np.asarray(np.maximum(total.max(axis=1) * self._scale + self._bias, 0), np.float32)
