"""How updates are encoded for the way from a client to its server.

What is lost is not forgotten: the client adds it to its next update (error feedback: Seide et al., Interspeech 2014;
Stich et al., NeurIPS 2018), so that what was sent and what is left add up to what was learned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from netweight.errors import OptionError

Tensors = Mapping[str, Tensor]
Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]
_SCALE, _PLACES = "/scale", "/places"  # no parameter has a slash in its name


@dataclass(frozen=True)
class Full:
    """New values as they are, 4 bytes each in fp32."""


@dataclass(frozen=True)
class Int8:
    """Differences in 8 bits with one scale for each row of a matrix or for a whole tensor; rounded to the nearest, or
    stochastically, which is unbiased (Alistarh et al., QSGD, NeurIPS 2017)."""

    scale: Literal["row", "tensor"] = "row"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.scale not in ("row", "tensor") or self.rounding not in ("nearest", "stochastic"):
            raise OptionError(
                f"Int8 has scale {self.scale!r} and rounding {self.rounding!r}; "
                "use scale row or tensor, rounding nearest or stochastic."
            )


@dataclass(frozen=True)
class RandomK:
    """A share of the differences, at places that all clients draw alike in a round: only values travel, and a sum of
    encoded updates is the encoded sum (Konecny et al., 2016, "random mask")."""

    share: float = 0.1

    def __post_init__(self) -> None:
        _check(self.share, "RandomK")


@dataclass(frozen=True)
class TopK:
    """The share of each tensor's differences that are largest, with their places (Aji and Heafield, EMNLP 2017)."""

    share: float = 0.01

    def __post_init__(self) -> None:
        _check(self.share, "TopK")


Codec = Full | Int8 | RandomK | TopK


def _check(share: float, name: str) -> None:
    if not 0 < share <= 1:
        raise OptionError(f"share of {name} is {share}; use a number above 0, at most 1.")


def seed_of(*parts: object) -> int:
    """A number that follows from these parts alone, on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:7], "big")


def travelling(network: nn.Module, personal: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What clients send: parameters that require gradients, and buffers; without those that stay with a client."""
    fixed = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    return {
        name: value.detach().contiguous()
        for name, value in network.state_dict().items()
        if name not in personal and (name in trained or name not in fixed)
    }


def put(network: nn.Module, values: Tensors) -> None:
    """Set parameters and buffers of these names."""
    held = network.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            held[name].copy_(value)


def encoded(
    codec: Codec, old: Tensors, new: Tensors, differences: frozenset[str], draws: tuple[int, int], residual: Tensors
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What travels, and what is left for the next round.

    Args:
        old, new: tensors before and after the round.
        differences: names that the codec works on; the others (buffers) travel as they are.
        draws: the seed that all clients of the round share, and this client's own.
        residual: what the last round left, by name; empty before the first.
    """
    if isinstance(codec, Full):
        return dict(new), {}
    sent: dict[str, Tensor] = {name: value for name, value in new.items() if name not in differences}
    left: dict[str, Tensor] = {}
    for name in sorted(differences):
        change = new[name].float() - old[name].float()
        if name in residual:
            change = change + residual[name]
        parts = _encode(codec, name, change, draws)
        sent |= parts
        left[name] = change - _difference(codec, name, parts, change.shape, draws[0])
    return sent, left


class Decoded(Mapping[str, Tensor]):
    """New values by name, decoded where they are asked for: a server holds few of them at a time.

    `sent` is what `encoded` made of differences to `old`; `shared` the seed of the round. A name that lacks a part
    is not there; other damage is a ValueError.
    """

    def __init__(self, codec: Codec, sent: Tensors, old: Tensors, differences: frozenset[str], shared: int) -> None:
        self.codec, self.sent, self.old, self.shared = codec, sent, old, shared
        self.differences = frozenset() if isinstance(codec, Full) else differences

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.differences:
            return self.sent[name]
        old = self.old[name]
        change = _difference(self.codec, name, self.sent, old.shape, self.shared)
        return (old.float() + change).to(old.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.old)

    def __len__(self) -> int:
        return len(self.old)


def parts_of(codec: Codec, name: str, old: Tensor) -> Parts:
    """Shape and dtype of each part in which the difference of a tensor travels."""
    if isinstance(codec, Int8):
        rows = old.shape[0] if codec.scale == "row" and old.ndim > 1 else 1
        return {name: (tuple(old.shape), torch.int8)} | {name + _SCALE: ((rows,), torch.float32)}
    if isinstance(codec, Full):
        return {name: (tuple(old.shape), old.dtype)}
    kept = (_kept(codec.share, old.numel()),)
    values: Parts = {name: (kept, torch.float32)}
    return values if isinstance(codec, RandomK) else values | {name + _PLACES: (kept, torch.int32)}


def _kept(share: float, n: int) -> int:
    return min(n, math.ceil(share * n))


def _places(seed: int, name: str, n: int, kept: int) -> Tensor:
    """Where the values of a random mask stand; numpy's and torch's generators agree on every platform, Python's hash
    does not."""
    drawn = torch.Generator().manual_seed(seed_of(seed, name))
    return torch.randperm(n, generator=drawn)[:kept]


def _encode(codec: Codec, name: str, change: Tensor, draws: tuple[int, int]) -> dict[str, Tensor]:
    if isinstance(codec, Int8):
        rows = _rows(codec, change)
        scale = (rows.abs().amax(dim=1) / 127) if change.numel() else torch.zeros(len(rows))
        steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        if codec.rounding == "stochastic":
            drawn = torch.Generator().manual_seed(seed_of(draws[1], name))
            steps = (steps + torch.rand(steps.shape, generator=drawn)).floor()
        whole = steps.round().clamp(-127, 127).to(torch.int8)
        return {name: whole.view(change.shape), name + _SCALE: scale}
    flat = change.flatten()
    assert not isinstance(codec, Full)
    kept = _kept(codec.share, len(flat))
    if isinstance(codec, RandomK):
        return {name: flat[_places(draws[0], name, len(flat), kept)]}
    places = flat.abs().topk(kept).indices.sort().values
    return {name: flat[places], name + _PLACES: places.to(torch.int32)}


def _difference(codec: Codec, name: str, sent: Tensors, shape: torch.Size, shared: int) -> Tensor:
    if isinstance(codec, Int8):
        whole = _rows(codec, sent[name].float())
        return (whole * sent[name + _SCALE][:, None]).view(shape)
    n = shape.numel()
    assert not isinstance(codec, Full)
    places = (
        _places(shared, name, n, _kept(codec.share, n)) if isinstance(codec, RandomK) else sent[name + _PLACES].long()
    )
    return torch.zeros(n).index_put_((places,), sent[name]).view(shape)


def _rows(codec: Int8, value: Tensor) -> Tensor:
    """What shares a scale, one a row."""
    return value.reshape(value.shape[0], -1) if codec.scale == "row" and value.ndim > 1 else value.reshape(1, -1)


def size(tensors: Tensors) -> int:
    """Bytes of the buffers that travel."""
    return sum(value.numel() * value.element_size() for value in tensors.values())
