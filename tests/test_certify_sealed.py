"""Certify labels are opened in one room only."""

from __future__ import annotations

import ast
from pathlib import Path

import netweight

SOURCE = Path(netweight.__file__).parent


def openings(source: str, name: str) -> list[str]:
    """Lines that touch `.unseal` or the rows behind it, as file:line: text."""
    lines = source.splitlines()
    found = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and n.attr in ("unseal", "_labelled")
    ]
    return [f"{name}:{n.lineno}: {lines[n.lineno - 1].strip()}" for n in found]


def test_nothing_but_certify_opens_the_certify_labels() -> None:
    offending = []
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE)
        # `data/rows.py` defines the seal.
        if where.parts[0] != "certify" and where != Path("data/rows.py"):
            offending += openings(path.read_text(encoding="utf-8"), str(where))
    assert not offending, "certify labels are opened outside netweight/certify:\n" + "\n".join(offending)


def test_the_walk_sees_an_opening() -> None:
    assert openings("x = 1\nrows = data.certify.unseal('0' * 64)\n", "search.py") == [
        "search.py:2: rows = data.certify.unseal('0' * 64)"
    ]
