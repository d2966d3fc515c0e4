"""Techniques: frozen options objects, called as `(model, run, plan) -> Model`. One file each."""

from netweight.techniques.base import Recipe, Technique, describe
from netweight.techniques.distill import Distill
from netweight.techniques.finetune import Finetune
from netweight.techniques.linear import LinearFloor
from netweight.techniques.pretrain import Pretrain
from netweight.techniques.quantize import Quantize
from netweight.techniques.static import Static

__all__ = ["Distill", "Finetune", "LinearFloor", "Pretrain", "Quantize", "Recipe", "Static", "Technique", "describe"]
