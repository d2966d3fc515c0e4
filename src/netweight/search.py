"""Which recipes to try. `ask` and `tell` drive the search; whoever has machines can call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight.techniques import Distill, LinearFloor, Quantize, Recipe, Static


@dataclass(frozen=True)
class Rung:
    """One step of the ladder. `share` of the time that is left may go into it."""

    name: str
    recipe: Recipe
    share: float


def ladder(depth: int) -> tuple[Rung, ...]:
    """From the trivial floor to the full encoder in int8, in the order in which they are tried: what is cheap to make,
    or decides most, comes first."""
    layers = sorted({max(1, depth // 3), max(1, depth // 2)} - {depth})
    names = {depth // 2: "half", depth // 3: "third"}
    students = [Rung(f"{names.get(n, n)}-int8", (Distill(layers=n), Quantize()), 0.5) for n in layers]
    return (
        Rung("linear", (LinearFloor(),), 0.2),
        Rung("full-int8", (Quantize(),), 0.2),
        Rung("static", (Static(),), 0.3),
        *students,
    )


@dataclass(frozen=True)
class Point:
    """A rung that was trained, exported and run on dev.

    logits (n, outputs) are those of the exported file on dev, select rows first. `file` is the SHA-256 of the file.
    """

    name: str
    engine: str
    options: Mapping[str, Any]
    file: str
    bytes: int
    temperature: float
    logits: NDArray[np.float32] = field(repr=False)


class Search:
    """Walks the ladder; a rung that was told is not asked for again."""

    def __init__(self, rungs: Sequence[Rung], told: Iterable[Point] = ()) -> None:
        self._rungs = tuple(rungs)
        self.points: dict[str, Point] = {point.name: point for point in told}

    def ask(self) -> Rung | None:
        """The next rung to try; None where all were told."""
        return next((rung for rung in self._rungs if rung.name not in self.points), None)

    def tell(self, point: Point) -> None:
        """What a rung gave."""
        self.points[point.name] = point
