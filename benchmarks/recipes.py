"""What `techniques.py` makes: (page, name, what it starts from, recipe) of each example in docs/techniques."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from netweight.active import Method, select
from netweight.bench import block_latency
from netweight.data import Rows
from netweight.measure import cores
from netweight.model import Model, pretrained
from netweight.run import Local, Run
from netweight.scratch import scratch
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
    Recipe,
    SelfTrain,
    Shrink,
    Static,
    SwapActivation,
    Vocab,
)
from netweight.train import Plan

FEW = 10  # labelled rows of a class that the semi-supervised examples keep
TEACHER, PRETRAINED = "teacher", "pretrained"
ALONE: dict[str, Any] = {"weight_bits": 4, "granularity": "group", "group": 32, "activations": "none"}
# Page, name, what it starts from, recipe; "few" has FEW labels a class and all other texts as its pool, "few-alone" has
# no pool, and "scratch" is the teacher of a student with a tokenizer of its own.
EXAMPLES: tuple[tuple[str, str, str, Recipe], ...] = (
    ("", "the teacher", TEACHER, ()),
    ("finetune", "all weights, from a probe", PRETRAINED, (Finetune(),)),
    ("finetune", "all weights, from a random head", PRETRAINED, (Finetune(probe=False),)),
    ("finetune", "the head alone", PRETRAINED, (Finetune(train="head"),)),
    ("finetune", "LoRA", PRETRAINED, (Finetune(train="lora"),)),
    ("finetune", "R-Drop", PRETRAINED, (Finetune(regularizer="r-drop"),)),
    ("finetune", "label smoothing", PRETRAINED, (Finetune(smoothing=0.1),)),
    ("pretrain", "masked, then fine-tuned", PRETRAINED, (Pretrain(), Finetune())),
    ("pretrain", "contrastive, then fine-tuned", PRETRAINED, (Pretrain(objective="contrastive"), Finetune())),
    ("finetune", "adversarial", PRETRAINED, (Finetune(regularizer="adversarial"),)),
    ("linear", "tokens and bigrams", TEACHER, (LinearFloor(),)),
    ("static", "a mean of tokens", TEACHER, (Static(buckets=0),)),
    ("static", "tokens and bigrams", TEACHER, (Static(),)),
    ("static", "tokens, bigrams and windows of 5", TEACHER, (Static(filters=256, learning_rate=2e-3),)),
    ("static", "windows of 3", TEACHER, (Static(filters=256, reach=3, learning_rate=2e-3),)),
    ("distill", "3 of 6 layers, outputs", TEACHER, (Distill(3),)),
    ("distill", "3 of 6 layers, outputs without spliced rows", TEACHER, (Distill(3, splice=0.0),)),
    ("distill", "3 of 6 layers, outputs and hidden states", TEACHER, (Distill(3, match=("logits", "hidden")),)),
    ("distill", "3 of 6 layers, outputs and relations", TEACHER, (Distill(3, match=("logits", "relations")),)),
    ("distill", "3 of 6 layers, outputs and attention", TEACHER, (Distill(3, match=("logits", "attention")),)),
    ("shrink", "half of the neurons", TEACHER, (Shrink(neurons=0.5),)),
    ("shrink", "half of the heads", TEACHER, (Shrink(heads=0.5),)),
    ("shrink", "half of the neurons, of all layers together", TEACHER, (Shrink(neurons=0.5, uniform=False),)),
    ("shrink", "4 of 6 layers", TEACHER, (Shrink(layers=4),)),
    ("shrink", "three quarters of the hidden width", TEACHER, (Shrink(hidden=0.75),)),
    ("prune", "half of the weights, smallest, not healed", TEACHER, (Prune(sparsity=0.5, epochs=0),)),
    ("prune", "the same, of each layer", TEACHER, (Prune(sparsity=0.5, scope="layer", epochs=0),)),
    ("prune", "the same, Fisher", TEACHER, (Prune(sparsity=0.5, importance="fisher", epochs=0),)),
    ("prune", "half of the weights, smallest", TEACHER, (Prune(sparsity=0.5),)),
    ("prune", "80 %, Taylor, in stages", TEACHER, (Prune(sparsity=0.8, importance="taylor", schedule="cubic"),)),
    ("prune", "2 of 4", TEACHER, (Prune(pattern=(2, 4)),)),
    ("prune", "half of the weights, then fine-tuned", TEACHER, (Prune(sparsity=0.5, epochs=0), Finetune(probe=False))),
    ("factor", "half of the parameters, plain, not healed", TEACHER, (Factor(budget=0.5, aware=False, epochs=0),)),
    ("factor", "half of the parameters, aware, not healed", TEACHER, (Factor(budget=0.5, epochs=0),)),
    ("factor", "95 % of the energy, aware, not healed", TEACHER, (Factor(energy=0.95, epochs=0),)),
    ("factor", "half of the parameters, aware", TEACHER, (Factor(budget=0.5),)),
    ("vocab", "tokens that occur", TEACHER, (Vocab(),)),
    ("vocab", "tokens that occur and common ones", TEACHER, (Vocab(common=8000),)),
    ("vocab", "tokens that occur, factored, int8", TEACHER, (Vocab(), FactorEmbedding(rank=128), Quantize())),
    ("quantize", "int8", TEACHER, (Quantize(),)),
    ("quantize", "int8, ranges from the extremes", TEACHER, (Quantize(method="minmax"),)),
    ("quantize", "int8, ranges of least squared error", TEACHER, (Quantize(method="mse"),)),
    ("quantize", "int8, ranges by entropy", TEACHER, (Quantize(method="entropy"),)),
    ("quantize", "int8, one scale for each matrix", TEACHER, (Quantize(granularity="tensor"),)),
    ("quantize", "int8, weights with zero points", TEACHER, (Quantize(symmetric=False),)),
    ("quantize", "int8, mixed", TEACHER, (Quantize(activations="mixed"),)),
    ("quantize", "int8, each token by its own range", TEACHER, (Quantize(activations="dynamic"),)),
    ("quantize", "weights alone, 4 bits in groups of 32", TEACHER, (Quantize(**ALONE),)),
    ("quantize", "weights alone, int8", TEACHER, (Quantize(activations="none"),)),
    ("quantize", "fp16 storage", TEACHER, (Half(),)),
    ("quantize", "4-bit weights, nearest", TEACHER, (Quantize(weight_bits=4),)),
    ("quantize", "4-bit weights, least squares", TEACHER, (Quantize(weight_bits=4, weight_clip="mse"),)),
    ("quantize", "4-bit weights, GPTQ", TEACHER, (Quantize(weight_bits=4, weight_clip="mse", rounding="gptq"),)),
    ("quantize", "5-bit weights, GPTQ", TEACHER, (Quantize(weight_bits=5, weight_clip="mse", rounding="gptq"),)),
    ("quantize", "3-bit weights, GPTQ", TEACHER, (Quantize(weight_bits=3, weight_clip="mse", rounding="gptq"),)),
    ("quantize", "4-bit weights, trained", TEACHER, (QuantizeAware(),)),
    ("quantize", "3-bit weights, trained", TEACHER, (QuantizeAware(Quantize(weight_bits=3, weight_clip="mse")),)),
    ("quantize", "4 bits in the mean, mixed", TEACHER, (MixedBits(mean_bits=4),)),
    ("activation", "ReLU, not healed", TEACHER, (SwapActivation("relu", epochs=0), Quantize())),
    ("activation", "ReLU", TEACHER, (SwapActivation("relu"), Quantize())),
    ("activation", "ReLU6", TEACHER, (SwapActivation("relu6"), Quantize())),
    ("activation", "hard swish", TEACHER, (SwapActivation("hardswish"), Quantize())),
    ("exits", "an exit after layer 2", TEACHER, (EarlyExit(after=(2,)),)),
    ("exits", "exits after layers 2 and 4", TEACHER, (EarlyExit(after=(2, 4)),)),
    ("semi-supervised", f"{FEW} labels a class", "few", (Finetune(),)),
    ("semi-supervised", f"{FEW} labels a class, then its own labels", "few", (Finetune(), SelfTrain())),
)


@dataclass(frozen=True)
class Faster:
    """`Shrink` to so many times the speed, by a latency table of this machine."""

    speedup: float

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        table = block_latency(model, (3, 6, 9), (384, 768, 1152), threads=cores())
        return Shrink(speedup=self.speedup, table=table)(model, run, plan)


@dataclass(frozen=True)
class Narrower:
    """`Distill` from the given model into one of half its width, heads and neurons."""

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        student = Shrink(hidden=0.5, heads=0.5, neurons=0.5, epochs=0)(model, run, plan)
        return Distill(None, teachers=model)(student, run, plan)


# Trained on, so that with a penalty and without it a model has seen as much.
ON, CUT = Finetune(probe=False, learning_rate=3e-4), Prune(sparsity=0.7, epochs=0)
FEWER = Shrink(neurons=0.5, importance="magnitude", epochs=0)


@dataclass(frozen=True)
class One:
    """`Distill` from the given model, which was asked about all rows before."""

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        run.outputs(model, unlabelled=True, half=True)
        return Distill(3, splice=0.0)(model, run, plan)


@dataclass(frozen=True)
class Several:
    """`Distill` from the given model and another of another seed, which is made first, and asked about all rows: what
    one teacher says is known, too, when its student is trained."""

    combine: Literal["mean", "confidence"]

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        start = pretrained("starter", model.task, seed=plan.seed + 1)
        other = Finetune()(start, run, replace(plan, seed=plan.seed + 1))
        for teacher in (model, other):
            run.outputs(teacher, unlabelled=True, half=True)
        return Distill(3, teachers=(model, other), combine=self.combine, splice=0.0)(model, run, plan)


# The second table of a page, of a run of its own.
FURTHER: tuple[tuple[str, str, str, Recipe], ...] = (
    ("", "the teacher", TEACHER, ()),
    ("prune", "trained on, then 70 % of the weights gone", TEACHER, (ON, CUT)),
    ("prune", "the same with an L1 penalty", TEACHER, (replace(ON, penalty="l1", strength=5e-5), CUT)),
    ("prune", "the same with an L2 penalty", TEACHER, (replace(ON, penalty="l2", strength=1e-3), CUT)),
    ("shrink", "half of the neurons, Fisher, not healed", TEACHER, (Shrink(neurons=0.5, epochs=0),)),
    ("shrink", "the same, Taylor", TEACHER, (Shrink(neurons=0.5, importance="taylor", epochs=0),)),
    ("shrink", "the same, magnitude", TEACHER, (FEWER,)),
    ("shrink", "trained on, then half of the neurons gone, magnitude", TEACHER, (ON, FEWER)),
    ("shrink", "the same with a group lasso", TEACHER, (replace(ON, penalty="group", strength=5e-5), FEWER)),
    ("shrink", "1.5 times faster, by a latency table", TEACHER, (Faster(1.5),)),
    ("distill", "3 of 6 layers", TEACHER, (Distill(3),)),
    ("distill", "half of the width, heads and neurons", TEACHER, (Narrower(),)),
    ("quantize", "6-bit weights, least squares", TEACHER, (Quantize(weight_bits=6, weight_clip="mse"),)),
    ("quantize", "2-bit weights, GPTQ", TEACHER, (Quantize(weight_bits=2, weight_clip="mse", rounding="gptq"),)),
    ("quantize", "4-bit weights, trained, learned ranges", TEACHER, (QuantizeAware(),)),
    ("quantize", "4-bit weights, trained, fixed ranges", TEACHER, (QuantizeAware(ranges="fixed"),)),
)
# More than one teacher, GPT-2 from nothing, and 8 to 5 bits of one kind.
LEARNS = Finetune(learning_rate=5e-4, freeze_embeddings=False)
READS = Pretrain("causal", epochs=20, learning_rate=1e-3)
REST: tuple[tuple[str, str, str, Recipe], ...] = (
    ("", "the teacher", TEACHER, ()),
    ("distill", "3 of 6 layers, one teacher, no spliced rows", TEACHER, (One(),)),
    ("distill", "the same, two teachers, their mean", TEACHER, (Several("mean"),)),
    ("distill", "the same, the surer one weighs more", TEACHER, (Several("confidence"),)),
    ("pretrain", "GPT-2 from scratch, fine-tuned", "gpt2", (LEARNS,)),
    ("pretrain", "GPT-2 from scratch, causal, then fine-tuned", "gpt2", (READS, LEARNS)),
    ("quantize", "8-bit weights, all activations dynamic", TEACHER, (Quantize(activations="dynamic"),)),
    ("quantize", "7-bit weights, the same", TEACHER, (Quantize(weight_bits=7, activations="dynamic"),)),
    ("quantize", "6-bit weights, the same", TEACHER, (Quantize(weight_bits=6, activations="dynamic"),)),
    ("quantize", "5-bit weights, the same", TEACHER, (Quantize(weight_bits=5, activations="dynamic"),)),
)
# On labels of which some are rare.
RARE: tuple[tuple[str, str, str, Recipe], ...] = (
    ("", "the teacher", TEACHER, ()),
    ("finetune", "all weights, from a probe", PRETRAINED, (Finetune(),)),
    ("finetune", "the same, rare labels weigh more", PRETRAINED, (Finetune(class_weights=True),)),
)
ASKED = 3  # labelled rows of a class that the examples of active learning begin with


def first(rows: Rows, count: int) -> list[int]:
    """Positions of the first `count` rows of each label."""
    seen: dict[str, list[int]] = {}
    for i, label in enumerate(rows.label or ()):
        seen.setdefault(label, []).append(i)
    return sorted(i for some in seen.values() for i in some[:count])


@dataclass(frozen=True)
class FromScratch:
    """`Distill` from the given model, asked about all rows before, into one that is made of nothing but their texts."""

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        assert isinstance(run, Local)
        run.outputs(model, unlabelled=True, half=True)
        student = scratch(run.data.train.text, model.task, seed=plan.seed)
        return Distill(None, epochs=20, learning_rate=5e-4, splice=0.0, teachers=model)(student, run, plan)


@dataclass(frozen=True)
class Revealed:
    """`Finetune` on as many rows as FEW labels a class would be: ASKED of each, and others that a model of these asks
    for by `method`, from their texts alone, or that are drawn at random (None)."""

    method: Method | None

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        assert isinstance(run, Local)
        rows = run.data.train
        known = first(rows, ASKED)
        others = np.setdiff1d(np.arange(len(rows)), known)
        count = FEW * model.task.outputs - len(known)
        if self.method is None:
            chosen = np.random.default_rng(plan.seed).choice(len(others), count, replace=False)
        else:
            asks = Finetune()(model, Local(replace(run.data, train=rows.take(known))), plan)
            chosen = select(asks, rows.take(others).unlabelled(), count, plan.seed, self.method, rows.take(known))
        return Finetune()(model, Local(replace(run.data, train=rows.take([*known, *others[chosen]]))), plan)


POOL: tuple[tuple[str, str, str, Recipe], ...] = (
    ("", "the teacher", TEACHER, ()),
    ("distill", "a student from scratch, outputs", "scratch", (FromScratch(),)),
    ("distill", f"{FEW} labels a class, fine-tuned, then 3 of 6 layers", "few-alone", (Finetune(), One())),
    ("distill", "the same, also of the other texts, as a pool", "few", (Finetune(), One())),
    ("semi-supervised", f"{ASKED} labels a class, then others at random", PRETRAINED, (Revealed(None),)),
    ("semi-supervised", "the same, others by margin", PRETRAINED, (Revealed("margin"),)),
    ("semi-supervised", "the same, others by badge", PRETRAINED, (Revealed("badge"),)),
)
GROUPS = {"techniques": EXAMPLES, "further": FURTHER, "rest": REST, "rare": RARE, "pool": POOL}
