"""One of each technique, with options that a tiny model takes in a moment, and variants that take other ways."""

from __future__ import annotations

from conftest import tiny_model
from netweight.model import Model
from netweight.techniques import (
    Distill,
    EarlyExit,
    Factor,
    FactorEmbedding,
    Finetune,
    Half,
    LinearFloor,
    MixedBits,
    Pretrain,
    Prune,
    Quantize,
    QuantizeAware,
    SelfTrain,
    Shrink,
    Static,
    SwapActivation,
    Technique,
    Vocab,
)

TECHNIQUES: tuple[Technique, ...] = (
    Pretrain("contrastive", epochs=1),
    Finetune(epochs=1),
    Vocab(),
    FactorEmbedding(rank=8),
    Static(width=8, buckets=64, epochs=1, splice=1.0),
    Distill(layers=1, epochs=1, splice=1.0),
    Shrink(neurons=0.5, rows=16, epochs=1, splice=0.0),
    Prune(sparsity=0.5, epochs=1),
    Factor(rank=4, rows=16, epochs=1),
    SwapActivation("relu", epochs=1),
    EarlyExit((1,), epochs=1, splice=0.0),
    SelfTrain(floor=0.5, epochs=1, drift=1.0),
    Quantize(rows=16),
    QuantizeAware(Quantize(weight_bits=4, rows=16), epochs=1),
    MixedBits(mean_bits=5.0, rows=16),
    Half(),
    LinearFloor(buckets=64),
)
LORA = Finetune(train="lora", rank=2, epochs=2, learning_rate=1e-3, freeze_embeddings=True)
VARIANTS: tuple[Technique, ...] = (
    LORA,
    Finetune(train="head", epochs=2, learning_rate=1e-2),
    Shrink(heads=0.5, neurons=0.5, rows=20, epochs=1, multiple=8),
)
# One of each technique and of each way that one trains, by the names of docs/parallel-techniques.md.
WAYS: dict[str, Technique] = {
    **{type(technique).__name__: technique for technique in TECHNIQUES if not isinstance(technique, Pretrain)},
    "Pretrain, masked": Pretrain("masked", epochs=1),
    "Pretrain, contrastive": Pretrain("contrastive", epochs=1),
    "Pretrain, causal": Pretrain("causal", epochs=1),
    "Finetune, lora": Finetune(epochs=1, train="lora"),
    "Finetune, head": Finetune(epochs=1, train="head"),
    "Finetune, r-drop": Finetune(epochs=1, regularizer="r-drop"),
    "Finetune, adversarial": Finetune(epochs=1, regularizer="adversarial"),
    "Distill": Distill(layers=2, epochs=1, splice=1.0),
    "Distill, hidden states": Distill(layers=2, epochs=1, splice=0.0, match=("logits", "hidden")),
    "Distill, attention": Distill(layers=2, epochs=1, splice=0.0, match=("attention",)),
    "Distill, relations": Distill(layers=2, epochs=1, splice=0.0, match=("relations",), relation_heads=4),
    "QuantizeAware, fixed": QuantizeAware(Quantize(weight_bits=4, rows=16), epochs=1, ranges="fixed"),
}


def suited(technique: Technique) -> Model:
    """A tiny model of three layers that this one of `WAYS` can be tried on, with words that no row has."""
    causal = isinstance(technique, Pretrain) and technique.objective == "causal"
    return tiny_model(family="gpt2" if causal else "bert", layers=3, more=("never", "nowhere", "[MASK]"))


def some(*kinds: type[Technique]) -> list[Technique]:
    """Those of these types."""
    return [technique for technique in TECHNIQUES if isinstance(technique, kinds)]
