"""Token ids of plain text, from tables of words and of what stands between spaces.

BERT's tokenizers split a text into words first and each word into pieces by itself, so what a word comes to may be
remembered. In plain text (printable ASCII, Chinese characters and their punctuation) nothing is left to normalise but
capitals, no word goes beyond a space, and words are found by one regular expression. So a stretch that came before,
such as "card?", costs one look into a table (`benchmarks/words.py` times it). All other text, and every tokenizer of
another kind, takes the usual way.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

# Words that are remembered, and as many stretches. A full table begins anew: the odd words of one request must not keep
# out for ever those that come again. Threads may share it: what was found is not looked up a second time.
_MOST = 200_000
_LONG = 32  # characters of a word, above which it is none that comes again
# Each is a word of its own for BERT, and has no accent that could be split off.
_HAN = "\u4e00-\u9fff"
_MARKS = "，。！？；：、（）“”‘’《》…—·"
ID = array("i").itemsize  # bytes of an id
_WORD = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]")


class Words:
    """The fast way of one tokenizer, which must cut what is longer than `max_length` at its end."""

    def __init__(self, tokenizer: Tokenizer, normalizer: dict[str, Any], starts: set[str], max_length: int) -> None:
        han, marks = (_HAN, _MARKS) if normalizer["handle_chinese_chars"] else ("", "")
        plain = "".join(re.escape(c) for c in (*map(chr, range(32, 127)), *marks) if c not in starts)
        plain_text = re.compile(f"[{plain}{han}]*")
        self._stretches = _Stretches(_Table(tokenizer), plain_text, bool(normalizer["lowercase"]))
        before, after = around(tokenizer)
        self._before, self._after = as_bytes(before), as_bytes(after)
        self._room = ID * (max_length - len(before) - len(after))

    @staticmethod
    def of(tokenizer: Tokenizer, definition: str, max_length: int) -> Words | None:
        """None where the tokenizer is of another kind."""
        stored = json.loads(definition)
        kinds = [(stored[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
            return None
        added = [token["content"] for token in stored["added_tokens"]]
        # Some are looked for in the normalised text, in their own normalised form: "\n" is a space there.
        starts = {form[:1] for token in added for form in (token, tokenizer.normalizer.normalize_str(token))}
        if any(start == "" or start.isspace() or start.isalnum() for start in starts):
            return None
        return Words(tokenizer, stored["normalizer"], starts, max_length)

    def ids(self, text: str) -> bytes | None:
        """As `as_bytes` has them; None where the text is not plain."""
        try:
            found = b"".join(map(self._stretches.__getitem__, text.split(" ")))
        except _NotPlain:
            return None
        return self._before + found[: self._room] + self._after


def as_bytes(ids: Iterable[int]) -> bytes:
    """Four bytes each (int32), as this machine orders them."""
    return array("i", ids).tobytes()


class _NotPlain(Exception):
    """A stretch holds characters that the usual way has to see."""


class _Stretches(dict[str, bytes]):
    def __init__(self, table: _Table, plain: re.Pattern[str], lowercase: bool) -> None:
        super().__init__()
        self._table, self._plain, self._lowercase = table, plain, lowercase

    def __missing__(self, stretch: str) -> bytes:
        if self._plain.fullmatch(stretch) is None:
            raise _NotPlain
        words = _WORD.findall(stretch.lower() if self._lowercase else stretch)
        found = as_bytes(chain.from_iterable(map(self._table.__getitem__, words)))
        # Chinese has no spaces: its stretches are sentences, which do not come again.
        if len(stretch) <= _LONG and stretch.isascii():
            if len(self) >= _MOST:
                self.clear()
            self[stretch] = found
        return found


class _Table(dict[str, list[int]]):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONG:
            if len(self) >= _MOST:
                self.clear()
            self[word] = ids
        return ids


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that are put before and behind every text."""
    whole = tokenizer.encode("a").ids
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:at], whole[at + len(inner) :]
