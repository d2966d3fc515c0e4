"""Token ids of plain text, from a table of words.

BERT's tokenizers split a text into words first and each word into pieces by itself, so what a word comes to may be
remembered. In plain text (printable ASCII, Chinese characters and their punctuation) nothing is left to normalise but
capitals, and words are found by one regular expression: on a quiet machine that takes a third to a half of the time
(`benchmarks/words.py`). All other text, and every tokenizer of another kind, takes the usual way.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

_MOST = 200_000  # words that are remembered
_LONG = 32  # characters of a word, above which it is none that comes again
# Each is a word of its own for BERT, and has no accent that could be split off.
_CHINESE = "\u4e00-\u9fff，。！？；：、（）“”‘’《》…—·"
_WORD = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]")


class Words:
    """The fast way of one tokenizer, which must cut what is longer than `max_length` at its end."""

    def __init__(self, tokenizer: Tokenizer, stored: dict[str, Any], max_length: int) -> None:
        normalizer = stored["normalizer"]
        added = {token["content"][0] for token in stored["added_tokens"]}
        plain = "".join(re.escape(chr(c)) for c in range(32, 127) if chr(c) not in added)
        chinese = _CHINESE if normalizer["handle_chinese_chars"] else ""
        self._plain = re.compile(f"[{plain}{chinese}]*")
        self._lowercase = bool(normalizer["lowercase"])
        self._table = _Table(tokenizer)
        before, after = around(tokenizer)
        self._before, self._after = before, after
        self._room = max_length - len(before) - len(after)

    @staticmethod
    def of(tokenizer: Tokenizer, definition: str, max_length: int) -> Words | None:
        """None where the tokenizer is of another kind."""
        stored = json.loads(definition)
        kinds = [(stored[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
            return None
        if any(token["content"][:1].isalnum() or not token["content"] for token in stored["added_tokens"]):
            return None
        return Words(tokenizer, stored, max_length)

    def ids(self, text: str) -> list[int] | None:
        """None where the text is not plain. Raises TypeError for anything but a string."""
        if self._plain.fullmatch(text) is None:
            return None
        words = _WORD.findall(text.lower() if self._lowercase else text)
        found = list(chain.from_iterable(map(self._table.__getitem__, words)))
        return [*self._before, *found[: self._room], *self._after]


class _Table(dict[str, list[int]]):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(self) < _MOST and len(word) <= _LONG:
            self[word] = ids
        return ids


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that are put before and behind every text."""
    whole = tokenizer.encode("a").ids
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:at], whole[at + len(inner) :]
