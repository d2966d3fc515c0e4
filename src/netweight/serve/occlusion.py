"""Which words moved a decision: the answer with each of them left out, compared with the answer to the whole.

Occlusion (Zeiler and Fergus, 2014; for words: Li, Monroe and Jurafsky, "Understanding Neural Networks through
Representation Erasure", 2016) needs nothing of a model but its answers, so it is true of cascades and int8 tiers too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netweight.engine import Outputs
from netweight.task import Classify, Task, softmax

MOST_PIECES = 64
# Scripts without spaces between words, where a character says much: Thai, Lao, Myanmar, Khmer, kana but katakana (whose
# runs are words), and Han.
_DENSE = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3041, 0x309F), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
_INSIDE = frozenset("'’-_.@")  # part of a word where letters stand on both sides: don't, t-shirt, 3.5
_JOINERS = ("Cf", "Mc", "Me", "Mn", "Sk")  # accents, vowel signs, variation selectors, joiners and skins of emoji


@dataclass(frozen=True)
class Piece:
    """A word, or `count` of them in a long text: characters `start` up to, not including, `end` (Unicode code points)
    of the first (0) or second (1) text."""

    side: int
    start: int
    end: int
    count: int = 1


def words(text: str) -> list[tuple[int, int]]:
    """Start and end of every word. Each character that is no space belongs to exactly one; signs are words of their
    own, and so is each character of a script without spaces."""
    found: list[tuple[int, int]] = []
    start, last = 0, "space"
    for at, character in enumerate(text):
        kind = _kind(character)
        if kind == "joiner":  # continues whatever it follows
            kind = last if last != "space" else "sign"
        elif kind == "sign" and last == "letter" and character in _INSIDE and _kind(text[at + 1 : at + 2]) == "letter":
            kind = "letter"
        elif kind != last or kind == "dense":
            if last != "space":
                found.append((start, at))
            start = at
        if last == "space" and kind != "space":
            start = at
        last = kind
    if last != "space":
        found.append((start, len(text)))
    return found


def _kind(character: str) -> str:
    """What a character (or nothing) is to `words`."""
    if not character or character.isspace():
        return "space"
    if unicodedata.category(character) in _JOINERS:
        return "joiner"
    if any(first <= ord(character) <= last for first, last in _DENSE):
        return "dense"
    return "letter" if character.isalnum() else "sign"


def pieces(texts: Sequence[str], most: int = MOST_PIECES) -> tuple[Piece, ...]:
    """What is left out, one at a time: words, or runs of equally many words where there are more than `most`."""
    spans = [words(text) for text in texts]
    size = max(1, -(-sum(map(len, spans)) // most))
    while sum(-(-len(one) // size) for one in spans) > most:
        size += 1
    return tuple(
        Piece(side, run[0][0], run[-1][1], len(run))
        for side, one in enumerate(spans)
        for run in (one[i : i + size] for i in range(0, len(one), size))
    )


def without(text: str, start: int, end: int) -> str:
    """The text without these characters, and without a space that would be left over."""
    before, after = text[:start], text[end:]
    if after[:1].isspace() and (not before or before[-1].isspace()):
        after = after[1:]
    elif not after and before[-1:].isspace():
        before = before[:-1]
    return before + after


def occluded(texts: Sequence[str], left_out: Sequence[Piece]) -> list[list[str]]:
    """Rows of the first text, and of the second where there is one: as given, then without each piece."""
    columns = [[text] * (1 + len(left_out)) for text in texts]
    for row, piece in enumerate(left_out, 1):
        columns[piece.side][row] = without(texts[piece.side], piece.start, piece.end)
    return columns


def weights(task: Task, temperatures: Sequence[float], outputs: Outputs) -> NDArray[np.float64]:
    """How far the probability of the first row's label (for scores: the value) falls in each row after the first:
    (n - 1,). `temperatures` are those of the tiers."""
    if isinstance(task, Classify):
        heat = np.asarray(temperatures)[outputs.tier]
        said = softmax(outputs.logits / heat[:, None])[:, outputs.logits[0].argmax()]
    else:
        said = task.values(outputs.logits)
    return np.asarray(said[0] - said[1:], np.float64)
