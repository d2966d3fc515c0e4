"""Text to token ids, for training and serving alike. Needs numpy and `tokenizers` only.

One `TextEncoder` belongs to a model for life. Its tokenizer is configured once and never touched again, so
threads may share it (changing truncation or padding while another thread encodes raises "Already borrowed").
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from netweight.errors import ModelError, OptionError, no_list
from netweight.words import ID, Words, around, as_bytes

# Characters read per token of `max_length`: bounds the work that one huge text can cause. No word piece of the
# texts we measured needs half as many on average.
_CHARACTERS_PER_TOKEN = 16
MOST_TOKENS = 8192
INPUTS = ("ids", "mask", "types")  # of encoders, as `padded` gives them
# Texts that are tokenized at a time: until all are done, `tokenizers` holds of each token many times an id's bytes.
_TEXTS = 4096
_SHOWN = 20  # characters of a stretch that is unknown

Int32 = NDArray[np.int32]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """Ragged token ids of n rows: row i is `ids[offsets[i]:offsets[i + 1]]`. `types` is 1 for a pair's second text and
    what closes it, whatever the tokenizer."""

    ids: Int32
    types: NDArray[np.uint8]
    offsets: Index

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> Index:
        """Tokens of each row (n,)."""
        return np.diff(self.offsets)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        return hashlib.sha256(b"".join(part.tobytes() for part in (self.ids, self.types, self.offsets))).hexdigest()

    def take(self, rows: Index) -> Tokens:
        """The chosen rows, in the order given."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        where = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(self.ids[where], self.types[where], offsets)

    def cut(self, most: int, closing: int) -> Tokens:
        """At most `most` tokens of each row: its first ones and its `closing` last."""
        if self.lengths.max(initial=0) <= most:
            return self
        lengths = np.minimum(self.lengths, most)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        left = np.repeat(offsets[1:], lengths) - np.arange(offsets[-1])  # tokens from here to the row's end
        where = np.where(
            left > closing,
            np.repeat(self.offsets[:-1] - offsets[:-1], lengths) + np.arange(offsets[-1]),
            np.repeat(self.offsets[1:], lengths) - left,
        )
        return Tokens(self.ids[where], self.types[where], offsets)

    def joined(self, *others: Tokens) -> Tokens:
        """These rows, and the other ones behind them."""
        if not others:
            return self
        parts = (self, *others)
        return Tokens(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.types for part in parts]),
            np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
        )

    def stretch(self, first: int, last: int) -> Tokens:
        """The rows from `first` up to, not including, `last`."""
        offsets = self.offsets[first : last + 1]
        part = slice(offsets[0], offsets[-1])
        return Tokens(self.ids[part], self.types[part], offsets - offsets[0])

    def segment(self, kind: int) -> Tokens:
        """Of each row, the tokens of its first (0) or second (1) text."""
        keep = self.types == kind
        row = np.repeat(np.arange(len(self)), self.lengths)[keep]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(self)))])
        return Tokens(self.ids[keep], self.types[keep], offsets)

    def padded(self, rows: Index, pad: int) -> tuple[Int32, Int32, Int32]:
        """Ids, attention mask and token types of the chosen rows, each (len(rows), longest of them)."""
        lengths = self.lengths[rows]
        mask = np.arange(max(1, int(lengths.max(initial=0)))) < lengths[:, None]
        ids = np.full(mask.shape, pad, np.int32)
        types = np.zeros(mask.shape, np.int32)
        if len(rows):
            flat = self.take(rows)
            ids[mask], types[mask] = flat.ids, flat.types
        return ids, mask.astype(np.int32), types

    def named(self, rows: Index, pad: int) -> dict[str, Int32]:
        """`padded`, by the names that files of encoders give it."""
        return dict(zip(INPUTS, self.padded(rows, pad), strict=True))

    def buckets(self, size: int) -> Iterator[Index]:
        """Row numbers in batches of at most `size`, sorted by length so that little is padded."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), size):
            yield order[start : start + size]


class TextEncoder:
    """Tokenizer, truncation and padding token of one model.

    Args:
        definition: the text of a `tokenizer.json` file.
        max_length: tokens kept per row, special tokens included.
        pad: id that fills short rows; masked, so its value changes no result.
    """

    def __init__(self, definition: str, max_length: int = 128, pad: int | None = None) -> None:
        if not 4 <= max_length <= MOST_TOKENS:
            raise OptionError(f"max_length is {max_length}; use 4 to {MOST_TOKENS} tokens.")
        try:
            self._tokenizer = Tokenizer.from_str(definition)
        except Exception as problem:
            raise ModelError(f"the tokenizer definition cannot be read: {problem}") from problem
        self.definition = definition
        self.max_length = max_length
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        # Vocabularies may have holes, so count by the largest id.
        self.vocabulary: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.pad: int = pad if pad is not None else self._find_pad()
        self._words = Words.of(self._tokenizer, definition, max_length)

    def _find_pad(self) -> int:
        for name in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"):
            found = self._tokenizer.token_to_id(name)
            if found is not None:
                return int(found)
        return 0

    @cached_property
    def specials(self) -> tuple[int, ...]:
        """Ids that the tokenizer adds around every text ([CLS], [SEP])."""
        return tuple(self._tokenizer.encode("").ids)

    @cached_property
    def closing(self) -> int:
        """Tokens that the tokenizer puts behind every text."""
        return len(around(self._tokenizer)[1])

    def reading(self, max_length: int) -> TextEncoder:
        """The same tokenizer, which reads another number of tokens of a text."""
        return self if max_length == self.max_length else TextEncoder(self.definition, max_length, self.pad)

    def cut(self, tokens: Tokens) -> Tokens:
        """What this encoder keeps of texts, not pairs, that one with the same tokenizer has read as far or farther;
        more of a text with above 16 characters a token, of which `encode` reads no more characters than that."""
        return tokens.cut(self.max_length, self.closing)

    @cached_property
    def unknown(self) -> int | None:
        """Id of what stands for text outside the vocabulary; None where every byte has a token."""
        model = json.loads(self.definition)["model"]
        if isinstance(found := model.get("unk_id"), int):
            return found
        name = model.get("unk_token")
        return self._tokenizer.token_to_id(name) if name else None

    def missing(self, texts: Sequence[str], most: int = 3) -> list[str]:
        """Of what `unknown` stands for in these texts, the most frequent stretches, the first characters of each."""
        kept, counts = listed(texts, "texts", self.max_length * _CHARACTERS_PER_TOKEN), Counter[str]()
        for text, row in zip(kept, self._tokenizer.encode_batch(kept), strict=True):
            spans = (span for i, span in zip(row.ids, row.offsets, strict=True) if i == self.unknown)
            counts.update(text[first:last].strip()[:_SHOWN] for first, last in spans)
        return [stretch for stretch, _ in counts.most_common(most)]

    @cached_property
    def marks(self) -> bool:
        """Whether the tokenizer itself marks a pair's second text: RoBERTa's and GPT-2's do not."""
        (both,) = self._tokenizer.encode_batch_fast([("a", "a")])
        return any(both.type_ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that changes the ids."""
        return hashlib.sha256(json.dumps([self.definition, self.max_length, self.pad]).encode()).hexdigest()

    def tokens(self) -> list[str]:
        """Every token's text, by id; holes are empty."""
        names = [""] * self.vocabulary
        for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            names[i] = name
        return names

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tokens:
        """Token ids of the texts, or of (text, pair) rows. Raises OptionError for anything but lists of strings."""
        limit = self.max_length * _CHARACTERS_PER_TOKEN
        first = listed(texts, "texts", limit)
        second = None if pairs is None else listed(pairs, "pairs", limit)
        try:
            rows: list[Any] = first if second is None else list(zip(first, second, strict=True))
            parts = (rows[at : at + _TEXTS] for at in range(0, max(len(rows), 1), _TEXTS))
            start, *rest = map(self._alone if second is None else self._paired, parts)
        except (TypeError, ValueError, UnicodeEncodeError) as problem:
            raise OptionError(f"texts must be strings of valid Unicode, one pair text for each: {problem}") from problem
        return start.joined(*rest)

    def _paired(self, rows: list[Any]) -> Tokens:
        found = self._tokenizer.encode_batch_fast(rows)
        ids, offsets = self._flat([as_bytes(row.ids) for row in found])
        types = np.fromiter(chain.from_iterable(row.type_ids or [0] for row in found), np.uint8, len(ids))
        if not self.marks:
            known = (_text(row.sequence_ids) or [0] for row in found)
            types = np.fromiter(chain.from_iterable(known), np.uint8, len(ids))
        return Tokens(ids, types, offsets)

    def _alone(self, texts: list[str]) -> Tokens:
        known = self._words
        found = [None if known is None else known.ids(text) for text in texts]
        rest = [i for i, ids in enumerate(found) if ids is None]
        for i, row in zip(rest, self._tokenizer.encode_batch_fast([texts[i] for i in rest]), strict=True):
            found[i] = as_bytes(row.ids)
        ids, offsets = self._flat(found)  # type: ignore[arg-type]  # nothing is None any more
        return Tokens(ids, np.zeros(len(ids), np.uint8), offsets)

    def _flat(self, found: list[bytes]) -> tuple[Int32, Index]:
        # Tokenizers that add nothing around a text give an empty one no token; a network needs one to look at.
        nothing = as_bytes([self.pad])
        ids = [row or nothing for row in found]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)) // ID, out=offsets[1:])
        return np.frombuffer(bytearray().join(ids), np.int32), offsets


def _text(sequence: Sequence[int | None]) -> list[int]:
    """Which text each token of a row goes with: special ones (None) with the one before them, as BERT's do. So each
    text is one stretch, in which every reader of it sees the same neighbours."""
    last = 0
    return [last := last if own is None else own for own in sequence]


def listed(texts: Iterable[str], name: str, limit: int | None = None) -> list[str]:
    """The texts, at most `limit` characters of each. Raises OptionError for what is no list, or holds anything but
    strings: some tokenizers would take a list of two strings for a pair."""
    if why := no_list(texts, name):
        raise OptionError(why)
    return [text[:limit] if isinstance(text, str) else _refuse(text, f"{name}[{i}]") for i, text in enumerate(texts)]


def _refuse(text: object, name: str) -> NoReturn:
    raise OptionError(f"{name} is of type {type(text).__name__}; pass a string for every row.")
