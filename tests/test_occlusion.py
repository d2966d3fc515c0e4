"""Words and what leaving them out does: spans of any text, rows without each, weights from answers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight.engine import Outputs
from netweight.serve.occlusion import MOST_PIECES, Piece, occluded, pieces, weights, without, words
from netweight.task import Classify, Score, softmax

# Plain letters, spaces, joiners, accents, Han, kana, Thai, emoji with skins, and whatever else there is.
CHARACTERS = st.one_of(
    st.sampled_from("ab1 \t\u3000'-.!?，拉了ジが\u0301\u200d\ufe0fวั👍\U0001f3fd\U00020000"), st.characters()
)
TEXTS = st.text(CHARACTERS, max_size=80)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("  \t\u3000 ", []),
        ("The zip broke, it's bad!!", ["The", "zip", "broke", ",", "it's", "bad", "!!"]),
        ("t-shirt 3.5 a@b.com -x a- b", ["t-shirt", "3.5", "a@b.com", "-", "x", "a", "-", "b"]),
        ("拉链坏了，差", ["拉", "链", "坏", "了", "，", "差"]),
        ("iPhone壊れたジッパー", ["iPhone", "壊", "れ", "た", "ジッパー"]),
        ("हिन्दी café 한국어", ["हिन्दी", "café", "한국어"]),
        ("ok👍🏽 :)", ["ok", "👍🏽", ":)"]),
        ("e\u0301 \u0301", ["e\u0301", "\u0301"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
    ],
)
def test_words(text: str, wanted: list[str]) -> None:
    assert [text[start:end] for start, end in words(text)] == wanted


@given(TEXTS)
def test_words_hold_every_character_but_spaces_exactly_once(text: str) -> None:
    spans = words(text)
    assert all(start < end for start, end in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans)), "in order, none over another"
    held = [at for start, end in spans for at in range(start, end)]
    assert held == [at for at, character in enumerate(text) if not character.isspace()]


@given(st.lists(TEXTS, min_size=1, max_size=2), st.integers(2, 9))
def test_pieces_are_runs_of_words_and_few(texts: list[str], most: int) -> None:
    found = pieces(texts, most)
    assert len(found) <= most
    for side, text in enumerate(texts):
        spans, mine = words(text), [piece for piece in found if piece.side == side]
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        assert [piece.start for piece in mine] == [s for s in starts if s in {p.start for p in mine}]
        assert all(piece.end in ends for piece in mine)
        assert not mine or (mine[0].start, mine[-1].end) == (starts[0], ends[-1])
        between = [text[one.end : other.start] for one, other in pairwise(mine)]
        assert all(not gap.strip() for gap in between), "no word between two pieces"
        assert bool(mine) == bool(spans)
        assert sum(piece.count for piece in mine) == len(spans)


def test_a_text_of_few_words_has_one_piece_for_each() -> None:
    text = " ".join(["word"] * MOST_PIECES)
    assert len(pieces([text])) == MOST_PIECES
    assert len(pieces([text + " more"])) == (MOST_PIECES + 2) // 2


def test_what_is_left_reads_as_if_the_word_had_never_been_there() -> None:
    text = "The zip  broke."
    spans = words(text)
    assert [without(text, *span) for span in spans] == ["zip  broke.", "The  broke.", "The zip  .", "The zip  broke"]
    assert without("one two", 4, 7) == "one"
    assert without("拉链坏了", 1, 2) == "拉坏了"


@given(TEXTS)
def test_nothing_but_the_word_and_a_space_goes(text: str) -> None:
    for start, end in words(text):
        left = without(text, start, end)
        bare = text[:start] + text[end:]
        assert "".join(left.split()) == "".join(bare.split())
        assert len(bare) - len(left) in (0, 1)


def test_rows_lack_one_piece_each() -> None:
    first, second = occluded(("a b", "c"), (Piece(0, 0, 1), Piece(0, 2, 3), Piece(1, 0, 1)))
    assert first == ["a b", "b", "a", "a b"]
    assert second == ["c", "c", "c", ""]
    assert occluded(("a b",), ()) == [["a b"]]


def test_weights_are_what_the_label_loses_at_the_temperature_of_who_answered() -> None:
    logits = np.array([[1, 2, 0], [2, 1, 0], [1, 3, 0]], np.float32)
    tier = np.array([0, 1, 0])
    found = weights(Classify(("a", "b", "c")), (2.0, 0.5), Outputs(logits, np.ones(3), tier))
    whole, swapped, stronger = (softmax(row / heat)[1] for row, heat in zip(logits, (2.0, 0.5, 2.0)))
    assert found == pytest.approx([whole - swapped, whole - stronger])
    assert found[0] > 0 > found[1]


def test_weights_of_scores_are_in_units_of_the_label() -> None:
    outputs = Outputs(np.array([[1.0], [0.5], [2.0]], np.float32), np.ones(3), np.zeros(3, np.int64))
    assert weights(Score(mean=3.0, scale=2.0), (1.0,), outputs) == pytest.approx([1.0, -2.0])
