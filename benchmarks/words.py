"""What a table of words saves in tokenization: the same ids, with and without it, in turns.

    .venv/bin/python benchmarks/words.py TABLE... [--text text] [--rounds 7]

Takes the starter's tokenizer and at most 3,000 rows of each table; ends with 1 where an id differs. Prints microseconds
a row, the ratio, how many rows are plain text, and what the second half of the rows takes of a table that has seen the
first half alone, beside one that has seen both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import netweight.model
from netweight.data import Columns, read
from netweight.encode import TextEncoder

MOST = 3_000


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--text", default="text")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    definition = (netweight.model._folder("starter") / "tokenizer.json").read_text(encoding="utf-8")
    fast, usual = TextEncoder(definition), TextEncoder(definition)
    assert fast._words is not None
    usual._words = None
    differ = False
    for table in given.tables:
        texts = list(read(table, Columns(given.text), label_required=False).rows.text)[:MOST]
        one, other = fast.encode(texts), usual.encode(texts)
        differ |= one.ids.tolist() != other.ids.tolist() or one.offsets.tolist() != other.offsets.tolist()
        first, second = texts[: len(texts) // 2], texts[len(texts) // 2 :]
        took: dict[str, list[float]] = {"fast": [], "usual": [], "new": [], "seen": []}
        for _ in range(given.rounds):
            fresh = TextEncoder(definition)
            fresh.encode(first)
            for name, encoder, rows in (
                ("fast", fast, texts),
                ("usual", usual, texts),
                ("new", fresh, second),
                ("seen", fast, second),
            ):
                began = time.perf_counter()
                encoder.encode(rows)
                took[name].append(1e6 * (time.perf_counter() - began) / len(rows))
        ratio = statistics.median(a / b for a, b in zip(took["usual"], took["fast"], strict=True))
        plain = sum(fast._words.ids(text) is not None for text in texts) / len(texts)
        middle = {name: statistics.median(values) for name, values in took.items()}
        called = Path(table).parent.name or table
        print(
            f"{called}: {middle['usual']:.1f} and {middle['fast']:.1f} us a row, {ratio:.1f}x; {plain:.1%} plain; "
            f"{middle['new']:.1f} us with words that are new, {middle['seen']:.1f} when they are not"
        )
    if differ:
        print("ids differ", file=sys.stderr)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
