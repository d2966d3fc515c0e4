"""A trained model becomes the files that an engine runs.

Transformers become ONNX; ranges and bit-widths on the model become QuantizeLinear and DequantizeLinear around
each linear layer, whether they came from calibration or from training. Static and linear models become tables.
"""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxscript import FLOAT, INT8, opset18
from safetensors.numpy import save
from torch import Tensor, nn

from netweight.errors import ModelError
from netweight.model import Model, Range
from netweight.network import Linear, Static, Transformer

Kind = Literal["static", "onnx"]


@dataclass(frozen=True)
class Exported:
    """One tier's file: `data` is safetensors (static) or ONNX bytes; `options` are what its engine must know."""

    kind: Kind
    data: bytes
    options: dict[str, Any]


def export(model: Model) -> Exported:
    """The file of this model. Raises ModelError for a network that no engine runs."""
    network = model.network
    if isinstance(network, Static):
        return _static(network)
    if isinstance(network, Linear):
        return _linear(network)
    if isinstance(network, Transformer):
        return Exported("onnx", _onnx(model), {})
    raise ModelError(f"no engine runs a {type(network).__name__}.")


def _static(network: Static) -> Exported:
    """Weights are multiplied into the vectors; a linear head is folded in where that makes the rows shorter."""
    with torch.no_grad():
        weight = network.weight.exp()
        table = network.table * weight[:, None]
        layers = [(m.weight, m.bias) for m in network.head if isinstance(m, nn.Linear)]
        if len(layers) == 1 and not network.segments and layers[0][0].shape[0] <= network.width:
            table, layers = table @ layers[0][0].T, [(torch.empty(0), layers[0][1])]
        norm = weight[: network.vocabulary]
    held = {"norm": norm.numpy().astype(np.float32)} | _int8(table)
    for i, (matrix, bias) in enumerate(layers):
        held[f"bias.{i}"] = bias.detach().numpy().astype(np.float32)
        if matrix.numel():
            held[f"matrix.{i}"] = np.ascontiguousarray(matrix.detach().numpy().T, np.float32)
    options = {"buckets": network.buckets, "norm": "mean", "segments": network.segments}
    return Exported("static", save(held), options)


def _linear(network: Linear) -> Exported:
    with torch.no_grad():
        table = network.table * network.weight[:, None]
    held = {"norm": network.weight.numpy().astype(np.float32), "bias.0": network.bias.detach().numpy()} | _int8(table)
    return Exported("static", save(held), {"buckets": network.buckets, "norm": "l2", "segments": False})


def _int8(table: Tensor) -> dict[str, NDArray[Any]]:
    """Symmetric int8 with one scale for each row."""
    values = table.numpy().astype(np.float32)
    scale = np.maximum(np.abs(values).max(axis=1), 1e-12) / 127
    return {"table": np.rint(values / scale[:, None]).astype(np.int8), "scale": scale.astype(np.float32)}


# --- ONNX ---


@torch.library.custom_op("netweight::fake_uint8", mutates_args=())
def _fake_uint8(x: Tensor, scale: float, zero: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


@_fake_uint8.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("netweight::from_int8", mutates_args=())
def _from_int8(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.to(torch.float32) * scale


@_from_int8.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


def _qdq(x: FLOAT, scale: float, zero: int) -> FLOAT:  # type: ignore[valid-type]
    s = opset18.Constant(value_float=scale)
    z = opset18.Cast(opset18.Constant(value_int=zero), to=onnx.TensorProto.UINT8)
    return opset18.DequantizeLinear(opset18.QuantizeLinear(x, s, z), s, z)


def _dq(weight: INT8, scale: FLOAT) -> FLOAT:  # type: ignore[valid-type]
    return opset18.DequantizeLinear(weight, scale, axis=1)


class QuantizedLinear(nn.Module):
    """A linear layer as integer arithmetic sees it: uint8 inputs, int8 weights with a scale per output channel."""

    def __init__(self, linear: nn.Linear, given: Range) -> None:
        super().__init__()
        self.scale = max(given.high - given.low, 1e-8) / 255
        self.zero = int(min(255, max(0, round(-given.low / self.scale))))
        weight = linear.weight.detach().T.contiguous()
        scale = weight.abs().amax(dim=0).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.netweight.fake_uint8(x, self.scale, self.zero)
        y = torch.matmul(x, torch.ops.netweight.from_int8(self.weight, self.weight_scale))
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """An embedding table in int8 with a scale for each row."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        scale = table.weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("rows", (table.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.rows[ids].to(torch.float32) * self.scale[ids])  # type: ignore[index]


def lowered(model: Model) -> nn.Module:
    """The network with every layer that has a range replaced by its quantized form; the input is untouched."""
    network = copy.deepcopy(model.network)
    network.eval()
    for name, given in model.ranges.items():
        parent, _, leaf = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, leaf, QuantizedLinear(cast(nn.Linear, getattr(owner, leaf)), given))
    if model.ranges:
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Embedding) and module.weight.numel() > 100_000:
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, QuantizedEmbedding(module))
    return network


def _onnx(model: Model) -> bytes:
    network = lowered(model)
    rows, length = 2, 8
    example = tuple(torch.ones(rows, length, dtype=torch.int32) for _ in range(3))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=model.encoder.max_length)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=["ids", "mask", "types"],
            output_names=["logits"],
            dynamic_shapes=({0: batch, 1: tokens},) * 3,
            custom_translation_table={
                torch.ops.netweight.fake_uint8.default: _qdq,
                torch.ops.netweight.from_int8.default: _dq,
            },
        )
    proto = cast(Any, program).model_proto
    onnx.checker.check_model(proto)
    return cast(bytes, proto.SerializeToString())
