"""Templates: `[a|b]` is a choice (an empty branch makes it optional), `{name}` a slot that holds templates itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypeVar

T = TypeVar("T")

Slots = Mapping[str, Sequence[str]]

_TOKEN = re.compile(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+")


@dataclass(frozen=True)
class _Slot:
    name: str


@dataclass(frozen=True)
class _Choice:
    branches: tuple[tuple[_Part, ...], ...]


_Part = str | _Slot | _Choice


@dataclass(frozen=True)
class Phrases:
    """How customers express one intent, in lower case and without contractions.

    `says` are statements that stand alone or after "that"; `asks` stand alone as questions or requests; `wants`
    follow "to"; `topics` are noun phrases; `fine` are statements that this aspect is no issue. `near` names the
    intents that one message is likely to mention too.
    """

    near: tuple[str, ...]
    says: tuple[str, ...]
    asks: tuple[str, ...]
    wants: tuple[str, ...]
    topics: tuple[str, ...]
    fine: tuple[str, ...]


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of the options. Only `random()` is drawn: its sequence is the one that Python promises to keep."""
    return options[int(rng.random() * len(options))]


def expand(template: str, slots: Slots, rng: Random) -> str:
    """The template with every choice made and every slot filled; blanks may be doubled."""
    out: list[str] = []
    _write(_parse(template), slots, rng, out)
    return "".join(out)


def _write(parts: tuple[_Part, ...], slots: Slots, rng: Random, out: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, _Slot):
            _write(_parse(pick(rng, slots[part.name])), slots, rng, out)
        else:
            _write(pick(rng, part.branches), slots, rng, out)


@cache
def _parse(template: str) -> tuple[_Part, ...]:
    """Raises ValueError where brackets do not match."""
    # Each level is the list of its branches so far; the outermost level has one.
    levels: list[list[list[_Part]]] = [[[]]]
    for token in _TOKEN.findall(template):
        if token == "[":
            levels.append([[]])
        elif token == "|" and len(levels) > 1:
            levels[-1].append([])
        elif token == "]" and len(levels) > 1:
            branches = levels.pop()
            levels[-1][-1].append(_Choice(tuple(tuple(branch) for branch in branches)))
        elif token.startswith("{"):
            levels[-1][-1].append(_Slot(token[1:-1]))
        elif token in "[]|":
            raise ValueError(f"{token!r} outside of a choice in the template {template!r}")
        else:
            levels[-1][-1].append(token)
    if len(levels) > 1:
        raise ValueError(f"a choice is not closed in the template {template!r}")
    return tuple(levels[0][0])
