"""A shallower student: some of the teacher's own layers, trained on the teacher's outputs.

Layer selection as in DistilBERT (Sanh et al., 2019) and Shleifer and Rush (2020); soft targets as in
Hinton, Vinyals and Dean (2015). With other teachers the student may be any model, and may match their inside too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from netweight.errors import ModelError, OptionError
from netweight.loss import Loss, SoftTargets, short_row
from netweight.matching import LayerMap, Match, Matching, mapped, project, unproject
from netweight.model import Model
from netweight.network import Exits, Transformer
from netweight.run import Run
from netweight.techniques.base import planned, transformer
from netweight.techniques.finetune import freeze_embeddings
from netweight.train import Plan


@dataclass(frozen=True)
class Distill:
    """Keep `layers` of the model's layers, evenly spaced from the first, and train them to match the model.

    `splice` synthetic rows for each real one are labelled by the teacher, too.

    `teachers` are other models than the given one, or one such model, for the same task; `layers=None` then trains the
    given model as it is, however it was made: cut narrower, or from scratch. Several are combined by the mean of their
    logits, or weighted in each row by their "confidence" (after Kwon et al., ICASSP 2020, who weigh by entropy).

    `match` says what is matched, one or several: the teacher's outputs ("logits"), its hidden states, attention maps,
    or relations (`netweight.matching.Matching` has the formulas). `match_weight` scales all but the first, `layer_map`
    says which teacher layer each student layer looks at, `relation_heads` into how many parts queries, keys and values
    are cut. Projections between widths are trained with the student and then dropped.

    `freeze_embeddings`: None freezes the token tables where they are the teacher's own.
    """

    layers: int | None = 3
    epochs: float = 6.0
    learning_rate: float = 2e-4
    temperature: float = 2.0
    hard: float = 0.1
    token_dropout: float = 0.1
    splice: float = 4.0
    match: Match | tuple[Match, ...] = "logits"
    match_weight: float = 1.0
    layer_map: LayerMap = "uniform"
    relation_heads: int = 12
    teachers: tuple[Model, ...] = field(default=(), repr=False)
    combine: Literal["mean", "confidence"] = "mean"
    freeze_embeddings: bool | None = None

    def __post_init__(self) -> None:
        given: Any = self.teachers
        object.__setattr__(self, "teachers", (given,) if isinstance(given, Model) else tuple(given))

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        given, teachers = transformer(model, "Distill"), self.teachers or (model,)
        self._check(model, teachers)
        network = copy.deepcopy(given) if self.layers is None else shallower(given, self.layers)
        student = model.with_network(network)
        freeze_embeddings(network, self._frozen(network, teachers[0]))
        loss = self._loss(student, teachers, plan.seed)
        new = run.fit(student, loss, planned(plan, self), f"distil {student.depth} layers")
        trained = transformer(new, "Distill")
        freeze_embeddings(trained, False)
        unproject(trained)
        return new.with_network(trained)

    @property
    def _matched(self) -> tuple[Match, ...]:
        return self.match if isinstance(self.match, tuple) else (self.match,)

    def _loss(self, student: Model, teachers: tuple[Model, ...], seed: int) -> Loss:
        targets = SoftTargets(student.task, teachers, self.temperature, self.hard, combine=self.combine)
        if self._matched == ("logits",):
            return targets
        network, teacher = transformer(student, "Distill"), transformer(teachers[0], "matching a teacher's inside")
        layers = tuple(range(student.depth))
        if {"hidden", "attention"} & set(self._matched):
            layers = mapped(self.layer_map, student.depth, teachers[0].depth)
        if "hidden" in self._matched:
            project(network, teacher, seed)
        loss = Matching(targets, self._matched, layers, self.relation_heads, self.match_weight)
        _try(loss, student)
        return loss

    def _frozen(self, network: Transformer, teacher: Model) -> bool:
        if self.freeze_embeddings is not None:
            return self.freeze_embeddings
        own, known = _tables(network), _tables(teacher.network)
        return all(any(torch.equal(one, other) for other in known) for one in own)

    def _check(self, model: Model, teachers: tuple[Model, ...]) -> None:
        matched = set(self._matched)
        unknown = matched - set(get_args(Match))
        if unknown or not matched:
            raise OptionError(f"match is {self.match!r}; use one or several of {', '.join(get_args(Match))}.")
        if self.combine not in ("mean", "confidence"):
            raise OptionError(f"combine is {self.combine!r}; use mean or confidence.")
        if self.layers is None and not self.teachers:
            raise OptionError(
                "layers=None trains the given model as it is, so it needs teachers; else say how many layers."
            )
        inside = matched - {"logits"}
        if inside and len(teachers) > 1:
            raise OptionError(f"{', '.join(sorted(inside))} of {len(teachers)} teachers cannot be matched; give one.")
        for teacher in teachers:
            self._check_teacher(model, teacher, bool(inside))
        needs = {
            "temperature": "logits" in matched,
            "match_weight": bool(inside),
            "layer_map": bool(inside & {"hidden", "attention"}),
            "relation_heads": "relations" in inside,
            "combine": len(teachers) > 1,
        }
        for option in fields(self):
            if not needs.get(option.name, True) and getattr(self, option.name) != option.default:
                raise OptionError(
                    f"{option.name}={getattr(self, option.name)!r} does not apply to match={self.match!r} "
                    f"with {len(teachers)} teacher(s); leave it out."
                )
        if self.match_weight <= 0 or self.relation_heads < 1:
            raise OptionError("match_weight must be above 0, and relation_heads 1 or more.")

    def _check_teacher(self, model: Model, teacher: Model, inside: bool) -> None:
        # The metric does not change what outputs mean.
        if {**teacher.task.to_dict(), "metric": ""} != {**model.task.to_dict(), "metric": ""}:
            raise ModelError(
                "a teacher has another task than the model: other labels, or another scale; train it on the same rows."
            )
        if (self.splice or inside) and teacher.encoder.definition != model.encoder.definition:
            raise ModelError(
                "a teacher has another tokenizer than the model, so it reads other tokens: "
                "set splice=0 and match only logits."
            )
        reads, wanted = teacher.encoder.max_length, model.encoder.max_length
        if inside and reads < wanted:
            raise ModelError(
                f"the teacher reads {reads} tokens of a text and the model {wanted}, and the inside is matched on the "
                f"same ones: give a teacher of max_length={wanted} or more, let the model read {reads}, or match only "
                "logits."
            )


def _tables(network: nn.Module) -> list[Tensor]:
    return [module.weight for module in network.modules() if isinstance(module, nn.Embedding)]


def _try(loss: Loss, student: Model) -> None:
    """Ask the loss of one short row, so that what does not fit together is refused before anything is computed."""
    outputs = tuple(torch.zeros(1, student.task.outputs) for _ in loss.teachers)
    with torch.no_grad():
        student.network.eval()
        loss(student.network, replace(short_row(student), teachers=outputs))


def heal(student: Model, loss: Loss, run: Run, plan: Plan, label: str) -> Model:
    """A student that an edit has hurt, trained on. Its token tables stay as they are, as in `Distill`."""
    freeze_embeddings(transformer(student, label), True)
    new = run.fit(student, loss, plan, label)
    freeze_embeddings(transformer(new, label), False)
    return new


def shallower(network: Transformer, layers: int) -> Transformer:
    """A copy with `layers` evenly spaced layers, the first among them; widths stay as they are."""
    depth = len(network.layers())
    if not 1 <= layers <= depth:
        raise OptionError(f"cannot keep {layers} layers of {depth}; choose 1 to {depth}.")
    return with_layers(network, evenly(layers, depth))


def evenly(layers: int, depth: int) -> list[int]:
    """Numbers of so many evenly spaced layers of `depth`, the first among them."""
    return [i * depth // layers for i in range(layers)]


def with_layers(network: Transformer, chosen: Sequence[int]) -> Transformer:
    """A copy with the layers of these numbers, in this order; widths stay as they are."""
    new = copy.deepcopy(network)
    stack, prefix = new.layers(), new.stack
    if isinstance(network, Exits) and len(chosen) < len(stack):
        raise ModelError("a model with exits cannot lose layers; distil first, then add exits.")
    if getattr(network.config, "scale_attn_by_inverse_layer_idx", False) and list(chosen) != list(range(len(chosen))):
        raise ModelError(
            "attention in this model is scaled by the number of its layer, so layers cannot be renumbered; keep the "
            "first ones, or all."
        )
    kept = nn.ModuleList([stack[i] for i in chosen])
    for module in new.backbone.modules():
        for name, child in module.named_children():
            if child is stack:
                setattr(module, name, kept)
    for position, layer in enumerate(kept):
        for part in layer.modules():
            # Decoders index their key-value cache by this number.
            if hasattr(part, "layer_idx"):
                part.layer_idx = position  # type: ignore[assignment]
    new.config.num_hidden_layers = len(chosen)
    if getattr(new.config, "layer_types", None):
        new.config.layer_types = [network.config.layer_types[i] for i in chosen]
    moved = {f"{prefix}.{old}.": f"{prefix}.{position}." for position, old in enumerate(chosen)}
    new.edits = _moved(network.edits, prefix, moved)
    for position, layer in enumerate(kept):
        for name, part in layer.named_modules():
            # ModernBERT's first layer has no norm before attention, as a network built from the config would not here.
            at = f"{prefix}.{position}.{name}"
            usual = isinstance(stack[position].get_submodule(name), nn.LayerNorm) and at not in network.edits
            if isinstance(part, nn.LayerNorm) and not usual:
                new.replace(at, part)
    return new


def _moved(edits: dict[str, dict[str, Any]], prefix: str, moved: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Edits of a network whose layers were renumbered; those of layers that are gone are dropped."""
    found = {}
    for name, edit in edits.items():
        if not name.startswith(f"{prefix}."):
            found[name] = edit
            continue
        old = next((old for old in moved if name.startswith(old)), None)
        if old is not None:
            found[moved[old] + name[len(old) :]] = edit
    return found
