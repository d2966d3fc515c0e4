"""What the search beyond the ladder may propose: options of each kind of student, and the recipe that they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from netweight.errors import OptionError
from netweight.model import Model
from netweight.search import DISTILLED, TRAINED, Rung, ladder, layers_of, quantized, student
from netweight.task import Classify
from netweight.techniques import Distill, EarlyExit, Factor, MixedBits, Prune, QuantizeAware, Recipe, Static, Technique
from netweight.techniques.exits import refusal as no_exits
from netweight.train import Plan

Kind = Literal["static", "encoder", "exits", "factored"]

SHARE = 0.5  # of the time that is left, for a full trial
SHORTENED = 3
# What comes after distillation starts from its student: a part of its epochs at a part of its learning rate.
_AFTER_EPOCHS, _AFTER_RATE = 1 / 3, 1 / 2
# Options that not every job searches, and what they are where it does not: what pays in bytes alone, softer answers of
# a teacher whose answers are scores, and what some families' layers do not have.
_SOFT = {"temperature": 2.0}
_ROUND = {"bits": 7}
_CUT = {"neurons": 0.5, "heads": 1.0, "activation": "relu", "match": "logits"}
ELSE: dict[Kind, dict[str, Any]] = {
    "static": _SOFT,
    "encoder": _SOFT | _ROUND | _CUT | {"sparsity": 0.0},
    "exits": _SOFT | _ROUND,
    "factored": _SOFT | _ROUND,
}


@dataclass(frozen=True)
class Trial:
    """A proposal: the `number`-th of its kind, whether it is to be trained for a third of its epochs only, and the time
    limit of the job that began it in seconds (0: not known)."""

    kind: Kind
    number: int
    short: bool
    params: Mapping[str, Any]
    limit: float = 0.0

    @property
    def name(self) -> str:
        """Of its rung and its point."""
        return f"{self.kind}-{self.number}{'-short' if self.short else ''}"

    def rung(self, teacher: Model) -> Rung:
        """What the proposal comes to. Raises OptionError where its options are not those of the search's space."""
        known, optional = set(space(self.kind, teacher)), ELSE[self.kind]
        if not known - set(optional) <= set(self.params) <= known | set(optional):
            raise OptionError(
                f"trial {self.name} was proposed by another version of Netweight; choose another output, or delete "
                "OUT.run beside it, but keep its looks.jsonl: looks at certify are counted there."
            )
        given = optional | dict(self.params)
        part = 1 / SHORTENED if self.short else 1.0
        given["epochs"], share = given["epochs"] * part, SHARE * part
        how = {name: given.pop(name) for name in ("schedule", "optimizer")}
        plan = replace(TRAINED, **how, limit=self.limit or None)
        if self.kind == "static":
            if not given["filters"]:
                del given["reach"]
            return Rung(self.name, (Static(**given | {"buckets": 2 ** given["buckets"]}),), share, plan)
        plan = replace(plan, batch_size=given.pop("batch_size"))
        return Rung(self.name, _encoder(self.kind, given, teacher), share, plan)


def _encoder(kind: Kind, given: dict[str, Any], teacher: Model) -> Recipe:
    """The recipe of an encoder of a kind with the given options."""
    if kind == "encoder":
        return _student(given, teacher)
    quantize = quantized(given.pop("bits"))
    if kind == "factored":
        return Factor(**given), quantize
    first = given.pop("first")
    after = (first, (first + teacher.depth) // 2)[: given.pop("exits")]
    return EarlyExit(after, **given), quantize


def _student(given: dict[str, Any], teacher: Model) -> Recipe:
    """Cut, distilled, and for some made sparse; quantized at last."""
    shape = {name: given.pop(name) for name in ("layers", "neurons", "activation", "heads")}
    bits, how, match, sparsity = (given.pop(name) for name in ("bits", "quantize", "match", "sparsity"))
    after = {
        "epochs": given["epochs"] * _AFTER_EPOCHS,
        "learning_rate": given["learning_rate"] * _AFTER_RATE,
        "temperature": given["temperature"],
    }
    then: Recipe = (Prune(sparsity, **after),) if sparsity else ()
    last: dict[str, Technique] = {
        "post": quantized(bits),
        "aware": QuantizeAware(quantized(bits), **after),
        "mixed": MixedBits(bits - 1, choices=(2, 3, 4, 6, 7)),
    }
    if match == "hidden":
        given["match"] = ("logits", "hidden")
    elif match == "relations":
        heads = heads_of(teacher)
        # Must divide the columns of the teacher and those of a student with half of the heads.
        divisor = heads if shape["heads"] == 1.0 else math.gcd(heads, heads // 2)
        given |= {"match": ("logits", "relations"), "relation_heads": divisor}
    return student(teacher, **shape, distil=Distill(**given), then=(*then, last[how]))


def heads_of(teacher: Model) -> int:
    """Heads of a layer; 0 in a family whose layers are not known."""
    return min((block.heads for block in layers_of(teacher)), default=0)


def kinds(teacher: Model) -> tuple[Kind, ...]:
    """What can be made of a teacher."""
    return tuple(kind for kind in get_args(Kind) if kind != "exits" or (teacher.depth > 1 and not no_exits(teacher)))


def usual(kind: Kind, teacher: Model, bytes_count: bool = False) -> list[dict[str, Any]]:
    """Options of the ladder's rungs of a kind, and of the technique where the ladder has none; what is tried first."""
    plan = vars(Plan()) | ELSE[kind] | {"quantize": "post"} | ({"bits": 4} if bytes_count else {})
    if kind == "static":
        rungs = [rung.recipe[0] for rung in ladder(teacher) if isinstance(rung.recipe[0], Static)]
        found = [plan | vars(rung) | {"buckets": rung.buckets.bit_length() - 1} for rung in rungs]
    elif kind == "encoder":
        shape = {"layers": max(1, teacher.depth // 2), "batch_size": TRAINED.batch_size, "match": "logits"}
        found = [plan | vars(DISTILLED) | shape]
    elif kind == "exits":
        found = [plan | vars(EarlyExit()) | {"first": min(2, max(1, teacher.depth - 2)), "exits": 1}]
    else:
        found = [plan | vars(Factor(budget=0.5))]
    return [{name: options[name] for name in space(kind, teacher, bytes_count)} for options in found]


def space(kind: Kind, teacher: Model, bytes_count: bool = True) -> dict[str, BaseDistribution]:
    """What may be proposed of this teacher; `bytes_count`: where bytes are minimised."""
    depth = teacher.depth
    shared: dict[str, BaseDistribution] = {"schedule": CategoricalDistribution(["cosine", "linear"])}
    if isinstance(teacher.task, Classify):
        shared["temperature"] = CategoricalDistribution([1.0, 2.0, 4.0])
    if kind == "static":
        return shared | {
            "width": CategoricalDistribution([128, 256, 384]),
            "buckets": IntDistribution(14, 17),
            "filters": CategoricalDistribution([0, 128, 256]),
            "reach": IntDistribution(3, 7, step=2),
            "epochs": IntDistribution(20, 60, step=10),
            "splice": CategoricalDistribution([4.0, 8.0, 12.0]),
            "learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
            "optimizer": CategoricalDistribution(["adamw", "adam"]),
            "token_dropout": FloatDistribution(0.1, 0.3, step=0.1),
            "batch_size": CategoricalDistribution([64, 128, 256]),
        }
    shared |= {
        "learning_rate": FloatDistribution(1e-4, 8e-4, log=True),
        "batch_size": CategoricalDistribution([32, 64, 128]),
        "optimizer": CategoricalDistribution(["adamw", "adam"]),
    }
    if bytes_count:
        # No engine is faster for fewer bits. 8-bit weights overflow in ONNX Runtime on x86 without VNNI: what ships
        # must compute the same anywhere.
        shared["bits"] = CategoricalDistribution([7, 6, 4])
    if kind == "factored":
        return shared | {
            "budget": FloatDistribution(0.3, 0.8, step=0.1),
            "aware": CategoricalDistribution([True, False]),
            "epochs": IntDistribution(2, 6),
        }
    shared |= {
        "splice": CategoricalDistribution([4.0, 8.0, 12.0]),
        "token_dropout": FloatDistribution(0.0, 0.2, step=0.1),
    }
    if kind == "exits":
        return shared | {
            # So that the second exit, half way from the first to the end, is another one.
            "first": IntDistribution(1, max(1, depth - 2)),
            "exits": CategoricalDistribution([1, 2] if depth > 2 else [1]),
            "epochs": IntDistribution(3, 6),
        }
    if heads_of(teacher):
        shared |= {
            "match": CategoricalDistribution(["logits", "hidden", "relations"]),
            "neurons": FloatDistribution(0.25, 1.0, step=0.25),
            "heads": CategoricalDistribution([1.0, 0.5]),
            "activation": CategoricalDistribution(["relu", "hardswish", None]),
        }
    if bytes_count:
        shared["sparsity"] = CategoricalDistribution([0.0, 0.5, 0.7])
    return shared | {
        # Rounded after training, in training, or some layers to fewer bits than others, `bits` - 1 on average.
        "quantize": CategoricalDistribution(["post", "aware", *(["mixed"] if bytes_count else [])]),
        "layers": IntDistribution(1, max(1, depth - 1)),
        "epochs": IntDistribution(6, 18),
    }
