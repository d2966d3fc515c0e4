"""A trained model becomes the files that an engine runs.

Transformers become ONNX; ranges and bit-widths on the model become QuantizeLinear and DequantizeLinear around
each linear layer, whether they came from calibration or from training. Static and linear models become tables.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxscript import FLOAT, INT8, opset18
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from netweight.errors import ModelError
from netweight.layers import put
from netweight.model import Model, Range
from netweight.network import Linear, Static, Transformer
from netweight.packing import packed_file
from netweight.techniques.quantize import OUT

Kind = Literal["static", "onnx"]

# An ONNX file is packed where that leaves so little of it; weights of fewer bytes are left where they are.
_WORTH_PACKING = 0.9
_SMALL = 1024


@dataclass(frozen=True)
class Exported:
    """One tier's file: `data` is safetensors (static) or ONNX, packed where that pays; `options` are what its engine
    must know."""

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
        proto = _onnx(model)
        data = proto.SerializeToString()
        small = packed_file(data, list(_weights(proto, data)))
        if len(small) < _WORTH_PACKING * len(data):
            return Exported("onnx", small, {"packed": True})
        return Exported("onnx", data, {})
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


def _weights(proto: onnx.ModelProto, data: bytes) -> Iterator[tuple[int, NDArray[Any]]]:
    """Where the weights stand in a serialised model."""
    at = 0
    for held in proto.graph.initializer:
        if len(held.raw_data) >= _SMALL:
            at = data.index(held.raw_data, at)
            yield at, np.frombuffer(held.raw_data, onnx.helper.tensor_dtype_to_np_dtype(held.data_type))
            at += len(held.raw_data)


# --- ONNX ---


@torch.library.custom_op("netweight::fake_uint8", mutates_args=())
def _fake_uint8(x: Tensor, scale: float, zero: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


@_fake_uint8.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("netweight::fake_int8", mutates_args=())
def _fake_int8(x: Tensor, scale: float) -> Tensor:
    return (x / scale).round().clamp(-128, 127).mul(scale)


@_fake_int8.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("netweight::from_int8", mutates_args=())
def _from_int8(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.to(torch.float32) * scale


@_from_int8.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


_OP: Any = opset18  # its stubs know no value that is a constant


def _qdq(x: FLOAT, scale: float, zero: int) -> FLOAT:
    s = _OP.Constant(value_float=scale)
    z = _OP.Cast(_OP.Constant(value_int=zero), to=onnx.TensorProto.UINT8)
    return cast(FLOAT, _OP.DequantizeLinear(_OP.QuantizeLinear(x, s, z), s, z))


def _qdq_signed(x: FLOAT, scale: float) -> FLOAT:
    s = _OP.Constant(value_float=scale)
    z = _OP.Cast(_OP.Constant(value_int=0), to=onnx.TensorProto.INT8)
    return cast(FLOAT, _OP.DequantizeLinear(_OP.QuantizeLinear(x, s, z), s, z))


def _dq(weight: INT8, scale: FLOAT) -> FLOAT:
    return cast(FLOAT, _OP.DequantizeLinear(weight, scale, axis=1))


class Unsigned(nn.Module):
    """Rounds to uint8 with a zero point: layer inputs, which lean to one side."""

    def __init__(self, given: Range) -> None:
        super().__init__()
        self.scale = max(given.high - given.low, 1e-8) / 255
        self.zero = int(min(255, max(0, round(-given.low / self.scale))))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.netweight.fake_uint8(x, self.scale, self.zero))


class Signed(nn.Module):
    """Rounds to int8 around zero: attention's factors. With zero points OpenVINO turned them back to fp32."""

    def __init__(self, given: Range) -> None:
        super().__init__()
        self.scale = max(-given.low, given.high, 1e-8) / 127

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.netweight.fake_int8(x, self.scale))


class QuantizedLinear(nn.Module):
    """A linear layer as integer arithmetic sees it: uint8 inputs, int8 weights with a scale per output channel.

    Its output is rounded too where it has a range, which is where the next product is one of integers.
    """

    def __init__(self, linear: nn.Linear, given: Range, out: Range | None) -> None:
        super().__init__()
        self.given = Unsigned(given)
        self.out = nn.Identity() if out is None else Signed(out)
        weight = linear.weight.detach().T.contiguous()
        scale = weight.abs().amax(dim=0).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.given(x), torch.ops.netweight.from_int8(self.weight, self.weight_scale))
        return cast(Tensor, self.out(y if self.bias is None else y + cast(Tensor, self.bias)))


class QuantizedEmbedding(nn.Module):
    """An embedding table in int8 with a scale for each row."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        scale = table.weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("rows", (table.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        # `embedding` exports as Gather; indexing would as GatherND, which neither engine is quick at.
        rows = F.embedding(ids, cast(Tensor, self.rows)).to(torch.float32)
        return rows * F.embedding(ids, cast(Tensor, self.scale))


class Gelu(nn.Module):
    """x (1 + erf(x / sqrt(2))) / 2, with the products in the order that ONNX Runtime fuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.erf(x / math.sqrt(2.0)) + 1.0) * 0.5


_ATTENTION = "netweight_plain"
_SHARES = Unsigned(Range(0.0, 1.0))


def _plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v for (n, heads, length, width); returns (n, length, heads, width).

    The graph that fused attention exports to carries shape arithmetic and checks for NaN that hide this pattern
    from both engines. Where the layer's value is rounded, so are the softmax's shares.
    """
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    shares = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    if any(isinstance(m, QuantizedLinear) and isinstance(m.out, Signed) for m in module.children()):
        shares = _SHARES(shares)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), None


def _plain_mask(*args: Any, **options: Any) -> Tensor | None:
    """What is added to the scores: (n, 1, 1, length) where every token sees all real ones, else transformers' own."""
    real = options.get("attention_mask")
    if real is None or options.get("mask_function") is not bidirectional_mask_function:
        return cast("Tensor | None", eager_mask(*args, **options))
    dtype = options.get("dtype", torch.float32)
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(real.bool()[:, None, None, :], torch.zeros((), dtype=dtype), hidden)


def lowered(model: Model) -> nn.Module:
    """The network with every layer that has a range replaced by its quantized form; the input is untouched."""
    network = copy.deepcopy(model.network)
    network.eval()
    if isinstance(network, Transformer) and getattr(network.backbone, "_supports_sdpa", False):
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _plain_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, _plain_mask)
        cast(Any, network.backbone).set_attn_implementation(_ATTENTION)
    for name, module in list(network.named_modules()):
        if isinstance(module, GELUActivation):
            put(network, name, Gelu())
    for name, given in model.ranges.items():
        if not name.endswith(OUT):
            linear = cast(nn.Linear, network.get_submodule(name))
            put(network, name, QuantizedLinear(linear, given, model.ranges.get(name + OUT)))
    if model.ranges:
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Embedding) and module.weight.numel() > 100_000:
                put(network, name, QuantizedEmbedding(module))
    return network


def _onnx(model: Model) -> onnx.ModelProto:
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
                torch.ops.netweight.fake_int8.default: _qdq_signed,
                torch.ops.netweight.from_int8.default: _dq,
            },
        )
    proto = cast(onnx.ModelProto, cast(Any, program).model_proto)
    onnx.checker.check_model(proto)
    return proto
