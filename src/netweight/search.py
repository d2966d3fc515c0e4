"""Which recipes to try. `ask` and `tell` drive the search; whoever has machines can call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from netweight.anatomy import Block, blocks
from netweight.errors import ModelError
from netweight.layers import Activation
from netweight.model import Model
from netweight.techniques import Distill, LinearFloor, Quantize, QuantizeAware, Recipe, Shrink, Static, SwapActivation
from netweight.techniques.base import transformer
from netweight.train import Plan

# How students are trained: on many spliced rows, since what the teacher says of them is asked for once and serves all
# students and every trial behind the ladder; encoders for long, in large batches. On BANKING77 that brought half of an
# encoder from 1.0 and 1.4 points behind its teacher (two jobs, dev) to .3, in 2.6 times the time of 6 epochs in batches
# of 32.
TRAINED = Plan(spliced_tokens=1_500_000, batch_size=128)
DISTILLED = Distill(epochs=18.0, learning_rate=4e-4, splice=12.0)
# All layers with half of the neurons and heads are nearly the teacher from the first step on: after 300 s they agreed
# with it on 92 % of Amazon reviews' dev, half of the layers on 88 %.
HEALED = replace(DISTILLED, learning_rate=2e-4)
# Rows by whose gradients their neurons and heads are chosen: in a box of 110 s half of an encoder reached 90.3 on
# BANKING77's dev so, and 86.0 by the size of weights.
_RANKED_BY = 256

# With less than one part in so many of the time box left, no further rung is begun.
LEAST = 12

# Encoders compute in int8, and 7 bits of each weight are stored. On Womens Clothing .8 % of dev's labels differ from
# the teacher's then, .9 % with 8 bits and 1.4 % with 6; on BANKING77 6 cost hardly anything.
INT8 = Quantize(weight_bits=7, table_bits=7, weight_clip="mse")
# The same in fewer bytes, each weight rounded for what its layer gives. On BANKING77's dev .9 % of labels differ from
# the teacher's then (2.3 % with weights rounded to the nearest); 2 % where tables have 4 bits too.
FEW = replace(INT8, weight_bits=4, rounding="gptq", rows=1000)


@dataclass(frozen=True)
class Rung:
    """A recipe under a name. `share` of the time that is left may go into it; `plan` holds what its techniques leave
    to the plan. It is worth making only where the rung `after`, a larger one of its kind, has a chance, and the rung
    `unless`, a cheaper one, would hardly pass by itself."""

    name: str
    recipe: Recipe
    share: float
    plan: Plan = field(default_factory=Plan)
    after: str = ""
    unless: str = ""


def ladder(teacher: Model, bytes_count: bool = False) -> tuple[Rung, ...]:
    """From the trivial floor to the full encoder in int8, in the order in which they are tried: what is cheap to make,
    or decides most, comes first. Where bytes count, encoders have weights of few bits; no engine is faster for it."""
    depth = teacher.depth
    layers = sorted({max(1, depth // 3), max(1, depth // 2)} - {depth}, reverse=True)
    names = {depth // 2: "half", depth // 3: "third"}
    kind, last = ("int4", replace(FEW, table_bits=5)) if bytes_count else ("int8", INT8)
    called = [f"{names.get(n, n)}-{kind}" for n in layers]
    static = Static(splice=12.0)
    # Nearer to the teacher than full-int8 and a little slower, for certificates that need it.
    mixed = Rung("full-mixed", (replace(INT8, activations="mixed"),), 0.2, unless="static")
    # In 3 bits 2 % of labels differ from the teacher's, unless that rounding is trained with.
    trained = QuantizeAware(replace(FEW, weight_bits=3, table_bits=5), epochs=3.0, splice=12.0)
    fewer = [
        Rung("full-int4", (FEW,), 0.2, unless="static"),
        Rung("full-int3", (trained,), 0.6, TRAINED, "full-int4", unless="static"),
    ]
    between = fewer if bytes_count else [mixed, *_slim(teacher)] if layers_of(teacher) else []
    students = [
        Rung(name, student(teacher, n, then=(last,)), 0.5, TRAINED, larger, unless="static")
        for name, n, larger in zip(called, layers, ["slim-int8" if mixed in between else "", *called], strict=False)
    ]
    return (
        Rung("linear", (LinearFloor(),), 0.2),
        Rung("full-int8", (INT8,), 0.2),
        Rung("static", (static,), 0.15, TRAINED),
        Rung("conv", (replace(static, filters=256, epochs=20.0, learning_rate=2e-3),), 0.25, TRAINED, unless="static"),
        *between,
        *students,
    )


def _slim(teacher: Model) -> list[Rung]:
    """All layers with half of their heads and neurons, and of that student, once it has learned, half of the neurons.
    Healed for half as long again, it agreed with its teacher on 96.7 % of BANKING77's dev (the larger one on 96.9; one
    seed), in two thirds of a row's time, which counts where it stands behind another, whether it would pass alone or
    not."""
    *steps, last = student(teacher, teacher.depth, 0.5, None, HEALED, heads=0.5)
    cut = Shrink(neurons=0.5, multiple=_multiple(layers_of(teacher)), rows=_RANKED_BY, epochs=0)
    recipes = {"slim-int8": (*steps, last), "thin-int8": (*steps, cut, steps[-1], last)}
    return [Rung(name, recipe, 0.5, TRAINED, unless="static") for name, recipe in recipes.items()]


def _multiple(found: Sequence[Block]) -> int:
    """Kernels work in blocks of 32 neurons; a share of few is cut more finely."""
    return max(1, min(32, min(block.neurons for block in found) // 8))


def layers_of(teacher: Model) -> list[Block]:
    """A teacher's layers; none in families whose layers are built in a way of their own."""
    try:
        return blocks(transformer(teacher, "a student"))
    except ModelError:
        return []


def student(
    teacher: Model,
    layers: int,
    neurons: float = 0.5,
    activation: Activation | None = "relu",
    distil: Distill | None = None,
    heads: float = 1.0,
    then: Recipe | None = None,
) -> Recipe:
    """Some of the teacher's layers with a share of their neurons and heads and a cheaper activation function, trained
    on the teacher; `then` quantizes it (None: `INT8`). In families whose layers cannot be cut, only whole layers go.
    """
    distil, then = distil or DISTILLED, then or (INT8,)
    found = layers_of(teacher)
    if not found:
        return replace(distil, layers=layers), *then
    heads = heads if min(block.heads for block in found) > 1 else 1.0
    steps: Recipe = ()
    if (layers, neurons, heads) != (teacher.depth, 1.0, 1.0):
        multiple = _multiple(found)
        cut = Shrink(heads, neurons, layers, spacing="even", multiple=multiple, rows=_RANKED_BY, epochs=0)
        steps += (cut,)
    steps += (SwapActivation(activation, epochs=0),) if activation else ()
    return *steps, replace(distil, layers=None, teachers=(teacher,)), *then


def quantized(bits: int) -> Quantize:
    """As the ladder rounds weights of so many bits: those of few each for what its layer gives."""
    return replace(FEW, weight_bits=bits, table_bits=5) if bits <= FEW.weight_bits else replace(INT8, weight_bits=bits)


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


class More(Protocol):
    """Who proposes rungs beyond the ladder."""

    def ask(self) -> Rung | None: ...
    def tell(self, point: Point) -> None: ...


class Search:
    """Walks the ladder, then asks `more`; a rung that was told is not asked for again."""

    def __init__(self, rungs: Sequence[Rung], told: Iterable[Point] = (), more: More | None = None) -> None:
        self._rungs = tuple(rungs)
        self._more = more
        self._skipped: dict[str, bool] = {}
        self.points: dict[str, Point] = {point.name: point for point in told}

    def ask(self) -> Rung | None:
        """The next rung to try; None where nothing is left."""
        over = {*self._skipped, *self.points}
        first = next((rung for rung in self._rungs if rung.name not in over), None)
        if first is not None or self._more is None:
            return first
        return self._more.ask()

    def skip(self, rung: Rung, hopeless: bool = True) -> None:
        """Not to be asked for: it is not worth making, or, where it is not hopeless, cannot be made."""
        self._skipped[rung.name] = hopeless

    def skipped(self, name: str) -> bool:
        """Whether a rung of this name was not worth making."""
        return self._skipped.get(name, False)

    def tell(self, point: Point) -> None:
        """What a rung gave."""
        self.points[point.name] = point
        if self._more is not None and point.name not in {rung.name for rung in self._rungs}:
            self._more.tell(point)
