"""Techniques: frozen options objects, called as `(model, run, plan) -> Model`. One file each."""

from netweight.techniques.activation import SwapActivation
from netweight.techniques.base import Recipe, Technique, describe
from netweight.techniques.distill import Distill
from netweight.techniques.finetune import Finetune
from netweight.techniques.half import Half
from netweight.techniques.linear import LinearFloor
from netweight.techniques.mixed import MixedBits
from netweight.techniques.qat import QuantizeAware
from netweight.techniques.quantize import Quantize
from netweight.techniques.static import Static

__all__ = [
    "Distill",
    "Finetune",
    "Half",
    "LinearFloor",
    "MixedBits",
    "Quantize",
    "QuantizeAware",
    "Recipe",
    "Static",
    "SwapActivation",
    "Technique",
    "describe",
]
