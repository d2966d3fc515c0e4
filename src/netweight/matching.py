"""Distillation from a teacher's inside: hidden states, attention maps, and relations of queries, keys and values.

What a network computes inside is seen by hooks on its layers, so that it is called as always.
The teacher's inside is too large to keep, so it is computed beside the student's, without gradients, on the same batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netweight.anatomy import blocks
from netweight.errors import ModelError, OptionError
from netweight.loss import Batch, Loss, Penalized, SoftTargets, mean, over_exits, supervised
from netweight.model import Model
from netweight.network import Transformer
from netweight.objectives import inner

Match = Literal["logits", "hidden", "attention", "relations"]
LayerMap = Literal["uniform", "last"] | tuple[int, ...]

_PROJECTION = "match_"
_TINY = 1e-7


@dataclass(frozen=True)
class Matching:
    """Soft targets and the inside of the first teacher: loss = targets + scale * (sum of what is matched).

    Each part is a mean over the real tokens of a row, then a weighted mean over rows:

    hidden     |W h - t|^2 / |t|^2 of each student layer h and its teacher layer t, averaged over layers; W is a learned
               projection where widths differ, else the identity (after PKD, Sun et al., 2019, which divides each
               vector of [CLS] by its length, and TinyBERT, Jiao et al., 2020, which does not divide). Dividing by the
               teacher's mean square in the row makes one scale fit models of any size.
    attention  KL of the student's attention maps from the teacher's, averaged over heads and layers (MiniLM, Wang et
               al., 2020, there of the last layer only). The student's attention dropout is off meanwhile: a map with
               holes is no distribution.
    relations  KL of softmax(A A^T / sqrt(d)) for A in queries, keys and values of the last layer, each cut into `heads`
               relation heads of d columns (MiniLMv2, Wang et al., 2021); widths and head counts may differ.

    `layers` has, for each student layer, the number of its teacher layer, both from 0. Tokens that the batch masks are
    masked for both. Without "logits" in `match`, the targets' term is the labels' share alone.
    """

    targets: SoftTargets
    match: tuple[Match, ...]
    layers: tuple[int, ...]
    heads: int
    scale: float

    @property
    def teachers(self) -> tuple[Model, ...]:
        """Those whose outputs a run keeps."""
        return self.targets.teachers

    @property
    def unlabelled(self) -> bool:
        """Rows without a label help."""
        return self.targets.unlabelled

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        student = inner(network)
        teacher = twin(inner(self.teachers[0].network)).eval()
        with torch.no_grad(), watched(teacher, self.match) as shown:
            teacher(batch.ids, batch.mask, batch.types)
        with watched(student, self.match) as seen:
            if "logits" in self.match:
                loss = self.targets(network, batch)
            else:
                labels = over_exits(network, batch, lambda logits: supervised(self.targets.task, logits, batch, 0.0))
                loss = self.targets.hard * labels
        per_row = self._inside(student, seen, shown, batch.mask)
        return loss + self.scale * mean(per_row, batch.weight, batch.everywhere)

    def _inside(self, student: Transformer, seen: Seen, shown: Seen, mask: Tensor) -> Tensor:
        parts: list[Tensor] = []
        # Squares and products of activations lose too much in bf16.
        with torch.autocast(mask.device.type, enabled=False):
            if "hidden" in self.match:
                projections = [getattr(student, f"{_PROJECTION}{i}", None) for i in range(len(self.layers))]
                pairs = zip(seen.hidden, (shown.hidden[i] for i in self.layers), projections, strict=True)
                parts.append(_mean([hidden_states(h.float(), t.float(), mask, w) for h, t, w in pairs]))
            if "attention" in self.match:
                maps = zip(seen.maps, (shown.maps[i] for i in self.layers), strict=True)
                parts.append(_mean([attention_maps(a.float(), b.float(), mask) for a, b in maps]))
            if "relations" in self.match:
                both = zip(seen.qkv, shown.qkv, strict=True)
                parts.append(_mean([relations(a.float(), b.float(), mask, self.heads) for a, b in both]))
        return torch.stack(parts).sum(dim=0)


def hidden_states(student: Tensor, teacher: Tensor, mask: Tensor, projection: nn.Module | None = None) -> Tensor:
    """Squared difference of hidden states (n, length, width) relative to the teacher's mean square in the row: (n,)."""
    given = student if projection is None else projection(student)
    if given.shape != teacher.shape:
        raise ModelError(
            f"hidden states of {given.shape[-1]} and {teacher.shape[-1]} columns were matched without a projection."
        )
    size = _over_tokens(teacher.square().mean(dim=-1), mask).clamp(min=_TINY)
    return _over_tokens((given - teacher).square().mean(dim=-1), mask) / size


def attention_maps(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL of the student's maps (n, heads, length, length) from the teacher's, averaged over heads: (n,)."""
    if student.shape != teacher.shape:
        raise ModelError(
            f"a student layer has {student.shape[1]} attention maps and its teacher layer {teacher.shape[1]}; "
            'match="relations" works across head counts.'
        )
    kl: Tensor = (teacher * (teacher.clamp(min=_TINY).log() - student.clamp(min=_TINY).log())).sum(dim=-1)
    return _over_tokens(kl.mean(dim=1), mask)


def relations(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL of the student's self-relations from the teacher's, of vectors (n, length, width) each: (n,)."""

    def logs(vectors: Tensor) -> Tensor:
        width = vectors.shape[-1]
        if width % heads:
            raise OptionError(
                f"{width} columns cannot be cut into {heads} relation heads; choose a divisor of {width}."
            )
        cut = vectors.unflatten(-1, (heads, width // heads)).transpose(1, 2)
        scores: Tensor = cut @ cut.transpose(-1, -2) / math.sqrt(width // heads)
        # The lowest number and not minus infinity: what is masked must count zero, and zero times infinity is none.
        return scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(dim=-1)

    wanted, got = logs(teacher), logs(student)
    return _over_tokens((wanted.exp() * (wanted - got)).sum(dim=-1).mean(dim=1), mask)


def _over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: (n, length) to (n,)."""
    real = mask.to(values.dtype)
    return (values * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(dim=0)


@dataclass
class Seen:
    """What one forward pass computed: hidden states and attention maps of each layer, queries, keys and values of the
    last."""

    hidden: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)
    qkv: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(network: Transformer, match: tuple[Match, ...]) -> Iterator[Seen]:
    """Fill a `Seen` with what the forward passes inside the block compute; afterwards the network is as it was."""
    seen = Seen()

    def watch(module: nn.Module, into: list[Tensor], groups: int = 1, at: int = 0) -> None:
        def hook(module: nn.Module, given: object, out: Any) -> None:
            found = out[at] if isinstance(out, tuple) else out
            into.extend(found.chunk(groups, dim=-1))

        stack.enter_context(module.register_forward_hook(hook))

    with ExitStack() as stack:
        if "hidden" in match:
            for layer in network.layers():
                watch(layer, seen.hidden)
        if "attention" in match:
            # Only this implementation gives its maps away.
            stack.callback(setattr, network.config, "_attn_implementation", network.config._attn_implementation)
            network.config._attn_implementation = "eager"
            for block in blocks(network):
                attention = network.get_submodule(block.qkv[0].rpartition(".")[0])
                stack.callback(setattr, attention, "training", attention.training)
                attention.training = False
                watch(attention, seen.maps, at=1)
        if "relations" in match:
            last = blocks(network)[-1]
            for name in last.qkv:
                watch(network.get_submodule(name), seen.qkv, last.qkv_groups)
        yield seen


def twin(network: Transformer) -> Transformer:
    """The same network over the same tensors, with modules of its own: hooks and modes of one are not the other's."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


def placed(loss: Loss, device: torch.device) -> Loss:
    """The same loss, with a teacher that it asks in every step on the device."""
    if isinstance(loss, Penalized):
        return replace(loss, loss=placed(loss.loss, device))
    if isinstance(loss, Matching):
        first, *rest = loss.teachers
        return replace(loss, targets=replace(loss.targets, teachers=(first.on(device), *rest)))
    return loss


def mapped(layers: LayerMap, student: int, teacher: int) -> tuple[int, ...]:
    """The number of the teacher's layer for each of the student's, both from 0.

    "uniform" spreads them and ends at the last, "last" takes the last ones (after PKD-skip and PKD-last, which leave
    out the last layer of both). A tuple counts from 1. Raises OptionError where the teacher has too few.
    """
    if isinstance(layers, tuple):
        if len(layers) != student or not all(1 <= i <= teacher for i in layers):
            raise OptionError(
                f"layer_map is {layers}; give a teacher layer, 1 to {teacher}, for each of the student's {student}."
            )
        return tuple(i - 1 for i in layers)
    if student > teacher:
        raise OptionError(
            f"layer_map {layers!r} needs a teacher at least as deep as the student: it has {teacher} layers, "
            f"the student {student}; give a tuple with a teacher layer for each."
        )
    if layers == "last":
        return tuple(range(teacher - student, teacher))
    if layers == "uniform":
        return tuple((i + 1) * teacher // student - 1 for i in range(student))
    raise OptionError(f"unknown layer_map {layers!r}; use uniform, last, or a tuple of teacher layers.")


def project(student: Transformer, teacher: Transformer, seed: int) -> None:
    """Give the student a projection to the teacher's width for each layer, in place, where widths differ.

    They are noted in its spec like any module that a technique puts in, so that they train, save and travel with it.
    """
    inputs, outputs = student.width, teacher.width
    if inputs == outputs:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in range(len(student.layers())):
            student.replace(f"{_PROJECTION}{i}", nn.Linear(inputs, outputs))


def unproject(student: Transformer) -> None:
    """Drop what `project` added, in place."""
    for name in [name for name in student.edits if name.startswith(_PROJECTION)]:
        delattr(student, name)
        student.edits = {kept: edit for kept, edit in student.edits.items() if kept != name}
