"""Modules that compute as an engine will: rounded inputs, integer weights, and what each becomes in ONNX.

Each operation is a custom operator of torch, so that the exporter takes it whole and `TRANSLATIONS` says what it is in
ONNX: QuantizeLinear and DequantizeLinear, MatMulInteger with scales around it, or ONNX Runtime's MatMulNBits, which
multiplies by weights of 4 or 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import onnx
import torch
from onnxscript import FLOAT, INT8, UINT8, opset18
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch.nn import functional as F

from netweight.model import Range, Weights
from netweight.quantizer import GROUPS, TINY, affine, by_token, grid, integers, symmetric

# --- operators ---


def _fake_uint8(x: Tensor, scale: float, zero: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


@torch.library.custom_op("netweight::fake_uint8", _fake_uint8, mutates_args=()).register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


def _fake_int8(x: Tensor, scale: float) -> Tensor:
    return (x / scale).round().clamp(-128, 127).mul(scale)


@torch.library.custom_op("netweight::fake_int8", _fake_int8, mutates_args=()).register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def _from_int8(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.to(torch.float32) * scale


@torch.library.custom_op("netweight::from_int8", _from_int8, mutates_args=()).register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


def _from_int8_around(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (weight.to(torch.float32) - zero.to(torch.float32)) * scale


@torch.library.custom_op("netweight::from_int8_around", _from_int8_around, mutates_args=()).register_fake
def _(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


def _matmul_nbits(
    x: Tensor, held: Tensor, scale: Tensor, zero: Tensor, sizes: list[int], bits: int, block: int
) -> Tensor:
    """x (..., inputs) times weights held in blocks (outputs, blocks, bytes), each with its scale; `sizes`: (inputs,
    outputs). `zero` has no element where it is the middle."""
    inputs, outputs = sizes
    values = unpacked(held, bits).float().reshape(outputs, -1, block)
    middle = torch.full_like(scale, 2 ** (bits - 1)).reshape(outputs, -1)
    if zero.numel():
        middle = unpacked(zero.reshape(outputs, -1), bits).float()[:, : values.shape[1]]
    weight = ((values - middle[:, :, None]) * scale.reshape(outputs, -1, 1)).reshape(outputs, -1)[:, :inputs]
    return F.linear(x, weight)


@torch.library.custom_op("netweight::matmul_nbits", _matmul_nbits, mutates_args=()).register_fake
def _(x: Tensor, held: Tensor, scale: Tensor, zero: Tensor, sizes: list[int], bits: int, block: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], sizes[1]))


def _by_token(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (..., inputs), each token rounded to int8 by its own scale, times int8 weights (inputs, outputs) with a scale a
    channel or one."""
    step = by_token(x)
    return torch.matmul((x / step).round(), weight.to(torch.float32)) * step * scale


@torch.library.custom_op("netweight::by_token", _by_token, mutates_args=()).register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def packed(values: Tensor, bits: int) -> Tensor:
    """Integers of 4 or 8 bits as bytes, two in one, the first in the low half (along the last axis)."""
    if bits == 8:
        return values.to(torch.uint8)
    pairs = F.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2)).to(torch.uint8)
    return cast(Tensor, pairs[..., 0] | (pairs[..., 1] << 4))


def unpacked(held: Tensor, bits: int) -> Tensor:
    """Inverse of `packed`, up to what filled the last byte."""
    return held if bits == 8 else torch.stack([held & 15, held >> 4], dim=-1).flatten(-2)


# --- what they are in ONNX ---

_OP: Any = opset18  # its stubs know no value that is a constant


def _matmul_nbits_schema() -> onnx.defs.OpSchema:
    """The part of ONNX Runtime's operator that is used here; the onnx package knows nothing of it."""
    given = onnx.defs.OpSchema.FormalParameter
    kinds = [("F", ["tensor(float)"], ""), ("B", ["tensor(uint8)"], "")]
    maybe = onnx.defs.OpSchema.FormalParameterOption.Optional
    return onnx.defs.OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[given("A", "F"), given("B", "B"), given("scales", "F"), given("zero_points", "B", param_option=maybe)],
        outputs=[given("Y", "F")],
        type_constraints=kinds,
        attributes=[
            onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.INT)
            for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )


_MATMUL_NBITS: Any = Op(Opset("com.microsoft", 1), "MatMulNBits", _matmul_nbits_schema())


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


def _dq_around(weight: INT8, scale: FLOAT, zero: INT8) -> FLOAT:
    return cast(FLOAT, _OP.DequantizeLinear(weight, scale, zero, axis=1))


def _int8_by_token(x: FLOAT, weight: INT8, scale: FLOAT) -> FLOAT:
    most = _OP.ReduceMax(_OP.Abs(x), _OP.Constant(value_ints=[-1]), keepdims=1)
    step = _OP.Div(_OP.Max(most, _OP.Constant(value_float=TINY)), _OP.Constant(value_float=127.0))
    # Kernels multiply unsigned by signed integers.
    zero = _OP.Cast(_OP.Constant(value_int=128), to=onnx.TensorProto.UINT8)
    whole = _OP.Add(_OP.Round(_OP.Div(x, step)), _OP.Constant(value_float=128.0))
    sums = _OP.MatMulInteger(_OP.Cast(whole, to=onnx.TensorProto.UINT8), weight, zero)
    return cast(FLOAT, _OP.Mul(_OP.Mul(_OP.Cast(sums, to=onnx.TensorProto.FLOAT), step), scale))


def _nbits(x: FLOAT, held: UINT8, scale: FLOAT, zero: UINT8, sizes: list[int], bits: int, block: int) -> FLOAT:
    given = (x, held, scale, zero) if 0 not in (zero.shape or ()) else (x, held, scale)
    inputs, outputs = sizes
    # Level 4 would be quicker, but rounds inputs to int8: this is the form whose inputs are not.
    options = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 1}
    return cast(FLOAT, _MATMUL_NBITS(*given, **options))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.netweight.fake_uint8.default: _qdq,
    torch.ops.netweight.fake_int8.default: _qdq_signed,
    torch.ops.netweight.from_int8.default: _dq,
    torch.ops.netweight.from_int8_around.default: _dq_around,
    torch.ops.netweight.matmul_nbits.default: _nbits,
    torch.ops.netweight.by_token.default: _int8_by_token,
}


# What they are made of, for converters that know none of them.
PLAIN: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.ops.netweight.fake_uint8.default: _fake_uint8,
    torch.ops.netweight.fake_int8.default: _fake_int8,
    torch.ops.netweight.from_int8.default: _from_int8,
    torch.ops.netweight.from_int8_around.default: _from_int8_around,
    torch.ops.netweight.matmul_nbits.default: _matmul_nbits,
    torch.ops.netweight.by_token.default: _by_token,
}


# --- modules ---


class Unsigned(nn.Module):
    """Rounds to unsigned integers with a zero point: layer inputs, which lean to one side.

    Engines know 8 bits; fewer are those of a range that is clipped first.
    """

    def __init__(self, given: Range) -> None:
        super().__init__()
        self.scale, self.zero = affine(given)
        top = 2**given.bits - 1
        self.ends = None if given.bits == 8 else (-self.zero * self.scale, (top - self.zero) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.ends is None else x.clamp(*self.ends)
        return cast(Tensor, torch.ops.netweight.fake_uint8(x, self.scale, self.zero))


class Signed(nn.Module):
    """Rounds to integers around zero: attention's factors. With zero points OpenVINO turned them back to fp32."""

    def __init__(self, given: Range) -> None:
        super().__init__()
        self.scale = symmetric(given)
        top = 2 ** (given.bits - 1)
        self.ends = None if given.bits == 8 else (-top * self.scale, (top - 1) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.ends is None else x.clamp(*self.ends)
        return cast(Tensor, torch.ops.netweight.fake_int8(x, self.scale))


class QuantizedLinear(nn.Module):
    """A linear layer as integer arithmetic sees it: unsigned inputs, int8 weights with a scale per channel or tensor.

    Its output is rounded too where it has a range, which is where the next product is one of integers.
    """

    def __init__(self, linear: nn.Linear, given: Range, out: Range | None, spec: Weights) -> None:
        super().__init__()
        self.given = Unsigned(given)
        self.out = nn.Identity() if out is None else Signed(out)
        self.register_buffer("divided", 1 / torch.tensor(given.scale) if given.scale else None)
        weight = linear.weight * torch.tensor(given.scale) if given.scale else linear.weight
        scale, zero = grid(weight, spec)
        held = integers(weight, scale, zero, spec).reshape(weight.shape)
        self.register_buffer("weight", held.T.contiguous())
        self.register_buffer("weight_scale", _flat(scale))
        self.around = not spec.symmetric
        self.register_buffer("weight_zero", _flat(zero).to(torch.int8) if self.around else None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = self.given(x if self.divided is None else x * cast(Tensor, self.divided))
        if self.around:
            weight = torch.ops.netweight.from_int8_around(self.weight, self.weight_scale, self.weight_zero)
        else:
            weight = torch.ops.netweight.from_int8(self.weight, self.weight_scale)
        y = torch.matmul(x, weight)
        return cast(Tensor, self.out(y if self.bias is None else y + cast(Tensor, self.bias)))


def _flat(scale: Tensor) -> Tensor:
    """One value a channel, or a scalar."""
    return scale.reshape(()) if scale.numel() == 1 else scale.flatten()


class DynamicLinear(nn.Module):
    """A linear layer whose inputs are rounded to int8 as they come, each token by its own largest value, so that a row
    depends on no other (one range for a batch, as in ONNX Runtime's dynamic quantization, would)."""

    def __init__(self, linear: nn.Linear, spec: Weights) -> None:
        super().__init__()
        scale, zero = grid(linear.weight, spec)
        self.register_buffer(
            "weight", integers(linear.weight, scale, zero, spec).reshape(linear.weight.shape).T.contiguous()
        )
        self.register_buffer("weight_scale", _flat(scale))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.netweight.by_token(x, self.weight, self.weight_scale)
        return cast(Tensor, y if self.bias is None else y + cast(Tensor, self.bias))


class WeightOnlyLinear(nn.Module):
    """A linear layer with weights of few bits in blocks of inputs, and fp32 arithmetic.

    4 bits are held two in a byte. All other widths take a byte each in memory, for lack of a kernel; a file packs them
    into their bits.
    """

    def __init__(self, linear: nn.Linear, spec: Weights) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.sizes, self.bits = [inputs, outputs], 4 if spec.bits == 4 else 8
        # Where a whole channel shares a scale, the blocks that divide it best repeat that.
        self.block = spec.group or max(min(GROUPS), math.gcd(inputs, max(GROUPS)))
        scale, zero = grid(linear.weight, spec)
        held = integers(linear.weight, scale, zero, spec)
        middle = 2 ** (self.bits - 1)
        held = F.pad(held.reshape(outputs, -1), (0, -held.numel() // outputs % self.block))
        held = held.unflatten(1, (-1, self.block)).short() + middle
        shape = (outputs, held.shape[1])
        every = scale.reshape(outputs if scale.numel() > 1 else 1, -1)
        where = zero.short().reshape(every.shape).expand(shape) + middle
        self.register_buffer("held", packed(held, self.bits))
        self.register_buffer("scale", every.expand(shape).flatten())
        nothing = torch.empty(0, dtype=torch.uint8)
        self.register_buffer("zero", nothing if spec.symmetric else packed(where, self.bits).flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.netweight.matmul_nbits(x, self.held, self.scale, self.zero, self.sizes, self.bits, self.block)
        return cast(Tensor, y if self.bias is None else y + cast(Tensor, self.bias))


class QuantizedEmbedding(nn.Module):
    """An embedding table in int8 (or fewer bits of it) with a scale for each row."""

    def __init__(self, table: nn.Embedding, spec: Weights) -> None:
        super().__init__()
        scale, zero = grid(table.weight, spec)
        self.register_buffer("rows", integers(table.weight, scale, zero, spec))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        # `embedding` exports as Gather; indexing would as GatherND, which neither engine is quick at.
        rows = F.embedding(ids, cast(Tensor, self.rows)).to(torch.float32)
        return rows * F.embedding(ids, cast(Tensor, self.scale))
