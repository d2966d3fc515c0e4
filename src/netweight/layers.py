"""Modules that techniques put in the place of a network's own, and plain descriptions from which they are made again.

What a technique replaces, `Transformer.replace` notes in the spec, so that a network of any shape is rebuilt without
pickle: `describe` and `make` are inverse to each other, up to weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from netweight.errors import ModelError

Activation = Literal["gelu", "gelu_tanh", "relu", "relu6", "hardswish", "silu"]


class LowRank(nn.Module):
    """A linear layer as the product of two thin ones: up(down(x)), of rank `down.out_features`."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.down(x)))


class FactoredEmbedding(nn.Module):
    """A token table as the product of a narrow one and a matrix (Lan et al., ALBERT, ICLR 2020)."""

    def __init__(self, rows: int, rank: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, rank)
        self.project = nn.Linear(rank, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.project(self.table(ids)))


class Activate(nn.Module):
    """An activation function by name; "relu6" is clipped to [0, 6]."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        if kind not in get_args(Activation):
            raise ModelError(f"unknown activation {kind!r}; use one of {', '.join(get_args(Activation))}.")
        self.kind = kind
        kinds: dict[str, Callable[[], nn.Module]] = {
            "gelu": nn.GELU,
            "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
            "relu": nn.ReLU,
            "relu6": nn.ReLU6,
            "hardswish": nn.Hardswish,
            "silu": nn.SiLU,
        }
        self._made = kinds[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._made(x))


def describe(module: nn.Module) -> dict[str, Any]:
    """Plain values from which `make` builds the same module. Raises ModelError for a kind that has no description."""
    if isinstance(module, LowRank):
        inputs, rank, outputs = module.down.in_features, module.down.out_features, module.up.out_features
        return {
            "kind": "low rank",
            "inputs": inputs,
            "rank": rank,
            "outputs": outputs,
            "bias": module.up.bias is not None,
        }
    if isinstance(module, FactoredEmbedding):
        rows, rank = module.table.num_embeddings, module.table.embedding_dim
        return {"kind": "factored embedding", "rows": rows, "rank": rank, "width": module.project.out_features}
    if isinstance(module, Activate):
        return {"kind": "activation", "name": module.kind}
    if isinstance(module, nn.Linear):
        inputs, outputs, bias = module.in_features, module.out_features, module.bias is not None
        return {"kind": "linear", "inputs": inputs, "outputs": outputs, "bias": bias}
    if isinstance(module, nn.LayerNorm):
        width, bias = module.normalized_shape[-1], cast("Tensor | None", module.bias) is not None
        return {"kind": "layer norm", "width": width, "eps": module.eps, "bias": bias}
    if isinstance(module, nn.RMSNorm):
        return {"kind": "rms norm", "width": module.normalized_shape[-1], "eps": module.eps}
    if isinstance(module, nn.Embedding):
        return {"kind": "embedding", "rows": module.num_embeddings, "width": module.embedding_dim}
    raise ModelError(
        f"a {type(module).__name__} cannot be put into a network: it has no description to rebuild it from."
    )


def make(given: dict[str, Any]) -> nn.Module:
    """Inverse of `describe`; weights are fresh. Raises ModelError for a kind that this version does not know."""
    kind = given.get("kind")
    if kind == "low rank":
        return LowRank(given["inputs"], given["rank"], given["outputs"], given["bias"])
    if kind == "factored embedding":
        return FactoredEmbedding(given["rows"], given["rank"], given["width"])
    if kind == "activation":
        return Activate(given["name"])
    if kind == "linear":
        return nn.Linear(given["inputs"], given["outputs"], given["bias"])
    if kind == "layer norm":
        return nn.LayerNorm(given["width"], given["eps"], bias=given["bias"])
    if kind == "rms norm":
        return nn.RMSNorm(given["width"], given["eps"])
    if kind == "embedding":
        return nn.Embedding(given["rows"], given["width"])
    raise ModelError(f"unknown kind of layer {kind!r} in a stored network.")


def put(network: nn.Module, name: str, new: nn.Module) -> None:
    """Set the submodule of this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


def plain(network: nn.Module) -> None:
    """Turn GPT-2's transposed Conv1D layers into linear ones, in place: what holds for one then holds for all."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv1D):
            weight = module.weight.detach()
            linear = nn.Linear(weight.shape[0], weight.shape[1])
            with torch.no_grad():
                linear.weight.copy_(weight.T)
                linear.bias.copy_(module.bias)
            put(network, name, linear)
