"""Weights that fp16 holds: a file of half the bytes, computed in fp32 as before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from netweight.errors import ModelError
from netweight.model import Model
from netweight.run import Run
from netweight.train import Plan

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Half:
    """Round every weight to the nearest number of fp16 (IEEE 754 binary16).

    Saved models and tiers store such weights in two bytes, and an engine widens them once, when it loads: size halves,
    speed stays. No processor without AVX512-FP16 multiplies fp16 faster than fp32.
    """

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        new = model.copy()
        with torch.no_grad():
            for name, weight in new.network.named_parameters():
                if float(weight.abs().max()) > _LARGEST:
                    raise ModelError(f"{name} holds {float(weight.abs().max()):g}; fp16 ends at {_LARGEST:g}.")
                weight.copy_(weight.half())
        return new
