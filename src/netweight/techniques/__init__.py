"""Techniques: frozen options objects, called as `(model, run, plan) -> Model`. One file each."""

from netweight.techniques.activation import SwapActivation
from netweight.techniques.base import Recipe, Technique, describe
from netweight.techniques.distill import Distill
from netweight.techniques.exits import EarlyExit
from netweight.techniques.factor import Factor
from netweight.techniques.finetune import Finetune
from netweight.techniques.half import Half
from netweight.techniques.linear import LinearFloor
from netweight.techniques.mixed import MixedBits
from netweight.techniques.pretrain import Pretrain
from netweight.techniques.prune import Prune
from netweight.techniques.qat import QuantizeAware
from netweight.techniques.quantize import Quantize
from netweight.techniques.selftrain import SelfTrain
from netweight.techniques.shrink import LatencyTable, Shrink
from netweight.techniques.static import Static
from netweight.techniques.vocab import FactorEmbedding, Vocab

__all__ = [
    "Distill",
    "EarlyExit",
    "Factor",
    "FactorEmbedding",
    "Finetune",
    "Half",
    "LatencyTable",
    "LinearFloor",
    "MixedBits",
    "Pretrain",
    "Prune",
    "Quantize",
    "QuantizeAware",
    "Recipe",
    "SelfTrain",
    "Shrink",
    "Static",
    "SwapActivation",
    "Technique",
    "Vocab",
    "describe",
]
