"""Techniques: frozen options objects, called as `(model, run, plan) -> Model`. One file each."""

from netweight.techniques.base import Recipe, Technique, describe
from netweight.techniques.distill import Distill
from netweight.techniques.finetune import Finetune
from netweight.techniques.linear import LinearFloor
from netweight.techniques.quantize import Quantize
from netweight.techniques.shrink import LatencyTable, Shrink
from netweight.techniques.static import Static
from netweight.techniques.vocab import FactorEmbedding, Vocab

__all__ = [
    "Distill",
    "FactorEmbedding",
    "Finetune",
    "LatencyTable",
    "LinearFloor",
    "Quantize",
    "Recipe",
    "Shrink",
    "Static",
    "Technique",
    "Vocab",
    "describe",
]
