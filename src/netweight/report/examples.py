"""Readable rows on which the shipped model and its reference part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from netweight.report.html import Html, cut, element, section, table
from netweight.task import Task

_MOST, _TEXT = 20, 400


@dataclass(frozen=True)
class Example:
    """One row: its text and what is true, what the reference says, and what the shipped model says."""

    text: str
    true: str
    reference: str
    shipped: str


def examples_section(examples: Sequence[Example], task: Task) -> Html:
    """Rows that the shipped model loses and gains; rows on which neither is better are left out."""
    change = [_change(example, task) for example in examples]
    lost = [e for e, c in zip(examples, change, strict=True) if c > 0]
    gained = [e for e, c in zip(examples, change, strict=True) if c < 0]
    return section(
        "examples",
        "Rows that changed",
        element("p", "These are texts of the data; mind who may read them."),
        _rows("The reference is better", lost),
        _rows("The shipped model is better", gained),
    )


def _rows(title: str, examples: Sequence[Example]) -> Html:
    if not examples:
        return element("p", f"{title}: none of the rows given.")
    shown = examples[:_MOST]
    return table(
        f"{title}: {len(shown)} of {len(examples)} rows given.",
        ("text", "true", "reference says", "shipped says"),
        [(cut(e.text, _TEXT), cut(e.true, 80), cut(e.reference, 80), cut(e.shipped, 80)) for e in shown],
        kind="texts",
    )


def _change(example: Example, task: Task) -> float:
    """Above 0 where the shipped model is worse."""
    if task.kind == "classify":
        return float(example.reference == example.true) - float(example.shipped == example.true)
    true = float(example.true)
    return abs(float(example.shipped) - true) - abs(float(example.reference) - true)
