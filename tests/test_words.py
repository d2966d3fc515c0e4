"""The table of words gives the ids that the tokenizer gives, for every text, or says that it does not know."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from conftest import many_rows
from netweight import words
from netweight.encode import TextEncoder
from netweight.errors import OptionError
from netweight.words import Words

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789ABCXYZ.,!?-'$好评价，。"]
PIECES += ["##a", "##b", "##e", "##s", "##ing", "##12", "the", "good", "bad", "Good", "##好"]
# What may go wrong: special tokens, accents, control and zero-width characters, full-width and other scripts.
RISKY = [
    "[SEP]",
    "[sep]",
    "[CLS]x",
    "é",
    "e\u0301",
    "\t",
    "\n",
    "\x00",
    "\u200b",
    "\ufffd",
    "Ａ",
    "ＡB",
    "ñandú",
    "😀",
    "١٢",
]
RISKY += [
    "好good",
    "don't",
    "a-b",
    "U.S.",
    "good好,bad",
    "x" * 120,
    "ǅ",
    "İ",
    "ß",
    "\u3000",
    "\xa0",
    "-",
    "···",
    "“好”",
    "\ud800",
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(RISKY), st.text(max_size=6), st.text("abegGXs好价，。!$ ", max_size=12)), max_size=8
)


def definition(lowercase: bool = True, chinese: bool = True) -> str:
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase, handle_chinese_chars=chinese)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(PIECES[:4])
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return str(made.to_str())


def usual(encoder: TextEncoder) -> TextEncoder:
    encoder._words = None
    return encoder


@settings(deadline=None)
@given(st.lists(st.text(alphabet="abe sthing.[SEP]好价é", max_size=60), max_size=6), st.integers(4, 20))
def test_what_was_read_farther_is_cut_as_if_it_had_not_been(texts: list[str], most: int) -> None:
    for around, closing in ((True, 1), (False, 0)):
        stored = json.loads(definition())
        if not around:
            stored["post_processor"] = None
        short = TextEncoder(json.dumps(stored), most)
        assert short.closing == closing
        far = short.reading(64)
        assert far.fingerprint != short.fingerprint
        assert far.reading(most).fingerprint == short.fingerprint
        found, wanted = short.cut(far.encode(texts)), short.encode(texts)
        assert found.ids.tolist() == wanted.ids.tolist()
        assert found.offsets.tolist() == wanted.offsets.tolist()
        assert found.types.tolist() == wanted.types.tolist()


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("chinese", [True, False])
@pytest.mark.parametrize("max_length", [5, 12])
def test_every_text_gets_the_tokenizers_ids(lowercase: bool, chinese: bool, max_length: int) -> None:
    told = definition(lowercase, chinese)
    fast, slow = TextEncoder(told, max_length), usual(TextEncoder(told, max_length))
    assert fast._words is not None

    @settings(max_examples=150)
    @given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(["", " ", "  "]))
    def same(parts: list[list[str]], between: str) -> None:
        texts = [between.join(part) for part in parts]
        try:
            wanted = slow.encode(texts)
        except OptionError:
            with pytest.raises(OptionError):
                fast.encode(texts)
            return
        found = fast.encode(texts)
        assert found.ids.tolist() == wanted.ids.tolist()
        assert found.offsets.tolist() == wanted.offsets.tolist()
        assert not found.types.any()

    same()


def test_plain_texts_take_the_fast_way_and_others_do_not() -> None:
    encoder = TextEncoder(definition())
    assert encoder._words is not None
    for text in ("Good, bad!", "", "好评，good。", " ".join(many_rows(3).text)):
        assert encoder._words.ids(text) is not None
    for text in ("[SEP]", "café", "a\tb", "好\u3000", "😀"):
        assert encoder._words.ids(text) is None
    with pytest.raises(OptionError, match=r"texts\[0\] is of type bytes"):
        encoder.encode([b"good"])  # type: ignore[list-item]


def test_other_tokenizers_take_the_usual_way() -> None:
    stored = json.loads(definition())
    other = [
        stored | {"normalizer": None},
        stored | {"pre_tokenizer": {"type": "Whitespace"}},
        stored | {"added_tokens": [stored["added_tokens"][0] | {"content": "pad"}]},
    ]
    for each in other:
        told = json.dumps(each)
        assert Words.of(Tokenizer.from_str(told), told, 12) is None


def test_words_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST", 3)
    encoder = TextEncoder(definition())
    assert encoder._words is not None
    wanted = usual(TextEncoder(definition())).encode(["a b c d e a b e"]).ids.tolist()
    for _ in range(2):
        assert encoder.encode(["a b c d e a b e"]).ids.tolist() == wanted
    stretches = encoder._words._stretches
    assert 0 < len(stretches) <= 3
    assert 0 < len(stretches._table) <= 3
    # Nor is a word remembered that is as long as a text: memory is bounded, not only their number.
    encoder = TextEncoder(definition())
    assert encoder.encode(["a" * 40]).ids.tolist() == usual(TextEncoder(definition())).encode(["a" * 40]).ids.tolist()
    assert encoder._words is not None
    assert not encoder._words._stretches
    assert not encoder._words._stretches._table


def test_words_that_fill_the_table_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST", 3)
    encoder, asked = TextEncoder(definition()), []

    class Counting:
        def encode(self, word: str, add_special_tokens: bool) -> Any:
            asked.append(word)
            return encoder._tokenizer.encode(word, add_special_tokens=add_special_tokens)

    assert encoder._words is not None
    encoder._words._stretches._table._tokenizer = Counting()
    for text in ("a b c", "d", "d", "bad", "d"):
        encoder.encode([text])
    assert asked == ["a", "b", "c", "d", "bad"]


def test_sentences_without_spaces_are_not_remembered_but_their_words_are() -> None:
    encoder = TextEncoder(definition())
    assert encoder._words is not None
    encoder.encode(["好评，good。 Good, bad!"])
    stretches = encoder._words._stretches
    assert set(stretches) == {"Good,", "bad!"}
    assert {"好", "评", "，", "。", "good", "bad", ",", "!"} == set(stretches._table)


@pytest.mark.parametrize("most", [words._MOST, 5])
def test_threads_may_share_it(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST", most)  # where it is small, one begins a table anew that others read
    texts = [f"good {i} bad{i % 7} ing{i}" for i in range(2000)]
    wanted = usual(TextEncoder(definition())).encode(texts).ids.tolist()
    encoder, found = TextEncoder(definition()), []
    threads = [threading.Thread(target=lambda: found.append(encoder.encode(texts).ids.tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4


@pytest.mark.parametrize("token", [" foo", "\n", "\u3000", "\x00foo"])
def test_an_added_token_that_begins_with_a_space_or_a_letter_takes_the_usual_way(token: str) -> None:
    told = adding(token)
    assert Words.of(Tokenizer.from_str(told), told, 12) is None


@pytest.mark.parametrize("token", ["……", "——", "《退货》", "$$", "\u0387\u0387"])
def test_what_an_added_token_begins_with_takes_the_usual_way(token: str) -> None:
    told = adding(token)
    fast, slow = TextEncoder(told), usual(TextEncoder(told))
    assert fast._words is not None
    assert fast._words.ids("好评，good!") is not None
    texts = [f"好{token}a", f"{token[0]}好", "好··a", "good, bad"]
    assert fast.encode(texts).ids.tolist() == slow.encode(texts).ids.tolist()
    assert len(PIECES) in fast.encode([f"好{token}a"]).ids


def adding(token: str) -> str:
    """The definition with a further token that is looked for in normalised text, as those of `add_tokens`."""
    made = Tokenizer.from_str(definition())
    made.add_tokens([token])
    return str(made.to_str())
