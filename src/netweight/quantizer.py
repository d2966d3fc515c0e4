"""Quantization as pure functions of tensors: grids, rounding with its gradients, and where to clip.

Affine quantization (Jacob et al., CVPR 2018): q = clamp(round(x / scale) + zero, low, high), and back
x' = scale (q - zero). Weights are held as signed integers, -2^(b-1) to 2^(b-1) - 1; layer inputs as unsigned ones.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from netweight.model import Range, Weights

GROUPS = (16, 32, 64, 128, 256)  # inputs that share a scale, of which ONNX Runtime has a kernel (MatMulNBits)
TINY = 1e-12
_RATIOS = 64  # clips that a search tries between a tenth of the extreme and all of it
_LEAST = 0.1
_DAMP = 0.01  # of the mean of the moments' diagonal
_HALF_TINY = 2.0**-24  # the smallest number that fp16 holds


# --- grids ---


def affine(given: Range) -> tuple[float, int]:
    """Scale and zero point of unsigned integers 0 to 2^bits - 1 over a range that holds zero."""
    top = 2**given.bits - 1
    scale = max(given.high - given.low, 1e-8) / top
    return scale, int(min(top, max(0, round(-given.low / scale))))


def symmetric(given: Range) -> float:
    """Scale of signed integers around zero over a range."""
    return max(-given.low, given.high, 1e-8) / limits(given.bits)[1]


def by_token(x: Tensor) -> Tensor:
    """Scales (..., 1) of signed integers of 8 bits for each token's values (..., n), by the largest of them."""
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=TINY) / limits(8)[1]


def limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest signed integer of so many bits."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def grouped(weight: Tensor, spec: Weights) -> Tensor:
    """Weights (outputs, inputs) with a row for all that share a scale: the tensor, a channel, or a group of inputs.

    Groups are filled up with zeros: (outputs * groups, group).
    """
    if spec.granularity == "tensor":
        return weight.reshape(1, -1)
    if spec.granularity == "group":
        return F.pad(weight, (0, -weight.shape[1] % spec.group)).reshape(-1, spec.group)
    return weight


def ungrouped(values: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `grouped`."""
    return values.reshape(shape[0], -1)[:, : shape[1]]


def grid(weight: Tensor, spec: Weights) -> tuple[Tensor, Tensor]:
    """Scale and zero point (rows, 1) of each row of `grouped(weight, spec)`.

    The scales of groups are numbers that fp16 holds, so that files store them in two bytes.
    """
    values = grouped(weight.detach(), spec)
    if spec.steps:
        scale = torch.tensor(spec.steps, dtype=weight.dtype)[:, None]
        return scale, torch.zeros_like(scale)
    scale, zero = _grid(values, spec, 1.0)
    if spec.clip == "minmax":
        return scale, zero
    best = (rounded(values, scale, zero, *limits(spec.bits)) - values).square().sum(dim=1, keepdim=True)
    for ratio in torch.linspace(1.0, _LEAST, _RATIOS).tolist()[1:]:
        s, z = _grid(values, spec, ratio)
        error = (rounded(values, s, z, *limits(spec.bits)) - values).square().sum(dim=1, keepdim=True)
        better = error < best
        best, scale, zero = best.where(~better, error), scale.where(~better, s), zero.where(~better, z)
    return scale, zero


def _grid(values: Tensor, spec: Weights, ratio: float) -> tuple[Tensor, Tensor]:
    """The grid over `ratio` of what each row spans."""
    low, high = limits(spec.bits)
    if spec.symmetric:
        scale = (ratio * values.abs().amax(dim=1, keepdim=True)).clamp(min=TINY) / high
    else:
        least = ratio * values.amin(dim=1, keepdim=True).clamp(max=0)
        most = ratio * values.amax(dim=1, keepdim=True).clamp(min=0)
        scale = (most - least).clamp(min=TINY) / (high - low)
    if spec.granularity == "group":
        scale = scale.half().to(values.dtype).clamp(min=_HALF_TINY)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (low - least / scale).round().clamp(low, high)


def integers(weight: Tensor, scale: Tensor, zero: Tensor, spec: Weights) -> Tensor:
    """The weights' integers as int8, in rows as `grouped` makes them."""
    return ((grouped(weight.detach(), spec) / scale).round() + zero).clamp(*limits(spec.bits)).to(torch.int8)


def fake(weight: Tensor, spec: Weights) -> Tensor:
    """What the weights (outputs, inputs) become when they are rounded and brought back."""
    scale, zero = grid(weight, spec)
    return ungrouped(rounded(grouped(weight, spec), scale, zero, *limits(spec.bits)), weight.shape)


def settled(weight: Tensor, scale: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Weights (outputs, inputs) on the grid of `scale` (outputs or 1, 1), chosen so that the layer's outputs change
    little: GPTQ (Frantar et al., ICLR 2023). `moments` (inputs, inputs) is the sum of x x^T over inputs x.

    Inputs are rounded one after another, those with the largest squares first. What rounding one of them changes is
    made up for by the weights of those to come, as least squares has it: by the rows of the Cholesky factor of the
    inverse of the moments (a hundredth of their mean diagonal is added, as there). What is zero stays zero, so that a
    pruned layer stays pruned (Frantar and Alistarh, SparseGPT, ICML 2023).
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    moments = moments[order][:, order].double()
    ridge = _DAMP * float(moments.diagonal().mean()) or 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments + ridge * torch.eye(len(moments))))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, held = weight.detach()[:, order].double(), torch.empty_like(weight, dtype=torch.float64)
    there = left != 0
    for i in range(len(order)):
        held[:, i : i + 1] = rounded(left[:, i : i + 1], scale.double(), 0.0, *limits(bits)) * there[:, i : i + 1]
        error = (left[:, i] - held[:, i]) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
    return held[:, order.argsort()].to(weight.dtype)


def held_bytes(shape: torch.Size, spec: Weights) -> int:
    """Bytes of the weights' integers and of their scales as they are stored, without zero points."""
    outputs, inputs = shape
    rows = {"tensor": 1, "channel": outputs, "group": outputs * -(-inputs // max(1, spec.group))}[spec.granularity]
    return -(-outputs * inputs * spec.bits // 8) + rows * (2 if spec.granularity == "group" else 4)


# --- rounding ---


def rounded(x: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    """scale (clamp(round(x / scale) + zero, low, high) - zero)."""
    return (x / scale).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(scale)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, ends: tuple[int, int], factor: float) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.ends, ctx.factor = ends, factor
        return rounded(x, scale, zero, *ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale, zero = ctx.saved_tensors
        low, high = ctx.ends
        v = x / scale
        at = v + zero
        inside = (at > low).logical_and_(at < high).to(v.dtype)
        for_scale = None
        if ctx.needs_input_grad[1]:
            # q - v where x is not clipped, q elsewhere.
            slope = v.round().add_(zero).clamp_(low, high).sub_(zero).addcmul_(v, inside, value=-1.0)
            for_scale = slope.mul_(grads[0]).sum_to_size(scale.shape) * ctx.factor
        return grads[0] * inside, for_scale, None, None, None


def learned(x: Tensor, scale: Tensor, zero: Tensor, ends: tuple[int, int], values: int) -> Tensor:
    """`rounded`, with the gradients of LSQ (Esser et al., ICLR 2020, equations 3 and 5).

    For x it is straight through where x is not clipped. For a scale, v = x / scale: round(v) - v where x is not clipped
    and the end that it was clipped to elsewhere, times 1 / sqrt(values * high): `values` share the scale.
    """
    top = max(1.0, float(ends[1] - zero.min()))
    return cast(Tensor, _Rounded.apply(x, scale, zero, ends, (values * top) ** -0.5))  # type: ignore[no-untyped-call]


# --- where to clip: `counts` (bins,) of values in equal bins from `low` to `high` ---


def percentile_range(counts: Tensor, low: float, high: float, keep: float) -> tuple[float, float]:
    """The range that holds the share `keep` of a histogram at each end."""
    below = counts.cumsum(0) / counts.sum()
    width = (high - low) / len(counts)
    first = int((below > 1 - keep).nonzero()[0])
    last = int((below >= keep).nonzero()[0])
    return low + first * width, low + (last + 1) * width


def mse_range(counts: Tensor, low: float, high: float, bits: int, around_zero: bool = False) -> tuple[float, float]:
    """The range with the least squared error of rounding the histogram's values (bins are taken at their middle).

    Either end is searched with the other held, twice; `around_zero` searches both as one, for signed integers.
    """
    middle = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (high - low) / len(counts)
    ratios = torch.linspace(_LEAST, 1.0, 2 * _RATIOS, dtype=torch.float64)[:, None]
    low, high = min(low, 0.0), max(high, 0.0)

    def best(least: Tensor, most: Tensor) -> tuple[float, float]:
        least, most = torch.broadcast_tensors(least, most)
        if around_zero:
            ends, zero = limits(bits), torch.zeros_like(least)
            scale = torch.maximum(-least, most).clamp(min=1e-8) / ends[1]
        else:
            ends = (0, 2**bits - 1)
            scale = (most - least).clamp(min=1e-8) / ends[1]
            zero = (-least / scale).round().clamp(*ends)
        error = ((rounded(middle, scale, zero, *ends) - middle).square() * counts).sum(dim=1)
        at = int(error.argmin())
        return float(least[at]), float(most[at])

    if around_zero:
        return best(low * ratios, high * ratios)
    least, most = low, high
    for _ in range(2):
        least, most = best(torch.tensor([[least]], dtype=torch.float64), high * ratios)
        least, most = best(low * ratios, torch.tensor([[most]], dtype=torch.float64))
    return least, most


def entropy_range(counts: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """The range whose rounded distribution is nearest to the true one in KL divergence (Migacz, GTC 2017).

    `low` = -`high`: the search is for one threshold of |x|, with 2^(bits - 1) levels below it, as in TensorRT.
    """
    half = len(counts) // 2
    size = (counts[half:] + counts[:half].flip(0)).double().numpy()
    levels = 2 ** (bits - 1)
    best, at = float("inf"), len(size)
    for kept in range(levels, len(size) + 1):
        p = size[:kept].copy()
        seen = p > 0
        level = np.arange(kept) * levels // kept
        mass, bins = np.bincount(level, p, levels), np.bincount(level, seen, levels)
        # A level's mass is spread evenly over those of its bins in which anything lies.
        q = (mass / np.maximum(bins, 1))[level] * seen
        p[-1] += size[kept:].sum()
        divergence = _divergence(p, q)
        if divergence < best:
            best, at = divergence, kept
    threshold = high * at / len(size)
    return -threshold, threshold


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """KL(p || q) of two histograms; infinite where q lacks what p has."""
    there = p > 0
    if not (q[there] > 0).all():
        return float("inf")
    p, q = p[there] / p.sum(), q[there] / q.sum()
    return float((p * np.log(p / q)).sum())
