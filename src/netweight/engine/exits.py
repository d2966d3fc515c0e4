"""An encoder with early exits: a row leaves after the first stretch of layers that is sure of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight.encode import Tokens
from netweight.engine.onnx import Index, Sessions
from netweight.errors import CorruptArtifact
from netweight.packing import unpacked, unpacked_file

Floats = NDArray[np.float32]


class ExitsEngine:
    """ONNX Runtime over the stages that `export` wrote.

    A row leaves at stage i where the largest of its softmax shares is at least `thresholds[i]`. Stages see each row
    with fixed ranges and its own mask, so where it leaves does not depend on its batch.
    """

    def __init__(self, data: bytes, options: Mapping[str, Any], pad: int, threads: int) -> None:
        stages, _ = unpacked(data)
        try:
            self._thresholds = [float(t) for t in options["thresholds"]]
            names = sorted(stages, key=int)
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise CorruptArtifact(f"exits need thresholds, and stages that are numbered: {problem!r}.") from None
        if len(stages) != len(self._thresholds) + 1:
            raise CorruptArtifact(f"{len(stages)} stages need one threshold less, not {len(self._thresholds)}.")
        files = [unpacked_file(stages[name].tobytes()) for name in names]
        self._sessions = Sessions(files, threads)
        self._pad = pad
        self._width = self._sessions.together[-1].get_outputs()[0].shape[-1]

    def logits(self, tokens: Tokens, batch: int) -> Floats:
        """(n, outputs) in the order of `tokens`, each row from the exit that it took."""
        out = np.zeros((len(tokens), self._width), np.float32)
        # Later exits of a row supersede earlier ones.
        self._fill([out] * len(self._sessions.together), tokens, batch, self._thresholds)
        return out

    def stages(self, tokens: Tokens, batch: int) -> list[Floats]:
        """What every exit says of every row: (n, outputs) for each."""
        out = [np.zeros((len(tokens), self._width), np.float32) for _ in self._sessions.together]
        self._fill(out, tokens, batch, [np.inf] * len(self._thresholds))
        return out

    def _fill(self, out: list[Floats], tokens: Tokens, batch: int, thresholds: list[float]) -> None:
        """Put into `out[i]` what stage i says of the rows that it is asked about."""

        def answer(sessions: list[Any], rows: Index) -> None:
            given = tokens.named(rows, self._pad)
            for i, stage in enumerate(sessions):
                takes = {x.name for x in stage.get_inputs()}
                logits, *hidden = stage.run(None, {name: value for name, value in given.items() if name in takes})
                out[i][rows] = logits
                if not hidden:
                    break
                on = np.flatnonzero(sure(logits) < thresholds[i])
                if not len(on):
                    break
                rows = rows[on]
                given = {"hidden": hidden[0][on], "mask": given["mask"][on]}

        self._sessions.each(tokens, batch, answer)


def sure(logits: Floats) -> NDArray[np.float64]:
    """Largest softmax share of each row (n,)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(1 / shifted.sum(axis=1))


def leaves(stages: list[Floats], thresholds: list[float]) -> NDArray[np.int64]:
    """The exit that each row takes (n,), of what every exit says of every row."""
    early = [sure(stage) >= least for stage, least in zip(stages, thresholds, strict=False)]
    return np.asarray(np.argmax([*early, np.ones(len(stages[-1]), bool)], axis=0))


def between(above: float, below: float) -> float:
    """Halfway; never `below` itself, which two neighbours among the numbers of a computer may round to."""
    middle = (above + below) / 2
    return middle if middle > below else above


def thresholds(stages: list[Floats], tolerance: float) -> list[float]:
    """For each exit but the last, a threshold at which rows that leave there or before and say something else than the
    last exit are at most the share `tolerance` of all rows: the lowest, halfway to the next row that stays, since sums
    of another batch, a last bit away, must not decide; 2.0 where no row may leave."""
    n, last = len(stages[-1]), stages[-1].argmax(axis=1)
    inside, spent, found = np.ones(n, bool), 0, []
    for logits in stages[:-1]:
        confidence, wrong = sure(logits), logits.argmax(axis=1) != last
        order = np.flatnonzero(inside)[np.argsort(-confidence[inside], kind="stable")]
        errors = spent + np.cumsum(wrong[order])
        allowed = np.flatnonzero(errors <= tolerance * n)
        # Rows of equal confidence leave together or stay together.
        count = int(allowed[-1]) + 1 if len(allowed) else 0
        while 0 < count < len(order) and confidence[order[count]] == confidence[order[count - 1]]:
            count -= 1
        if count:
            spent = int(errors[count - 1])
        leaves, *stays = [float(confidence[row]) for row in order[max(0, count - 1) : count + 1]] or [2.0]
        found.append(between(leaves, stays[0] if stays else leaves) if count else 2.0)
        inside &= confidence < found[-1]
    return found
