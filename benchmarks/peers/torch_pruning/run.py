"""Torch-Pruning: half of the teacher's heads and half of its feed-forward units go, then it is fine-tuned, exported to
ONNX and quantized by ONNX Runtime's dynamic int8, as one would deploy it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from encoders import Encoder, keep_tokenizer, onnx_predict, overflows
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from protocol import TRAINING, Options, Predict, main
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

SHARE, EPOCHS, RATE, BATCH, WARMUP = 0.5, 3, 1e-4, 32, 0.1


class Classifier(nn.Module):
    """Backbone, mean over tokens, linear head: the teacher."""

    def __init__(self, teacher: Path) -> None:
        super().__init__()
        self.backbone = AutoModel.from_pretrained(
            teacher, use_safetensors=True, attn_implementation="eager", add_pooling_layer=False
        )
        held = load_file(teacher / "head.safetensors")
        self.head = nn.Linear(held["weight"].shape[1], held["weight"].shape[0])
        self.head.load_state_dict(held)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(dim=1) / weight.sum(dim=1))


def prune(model: Classifier, inputs: tuple[Tensor, Tensor]) -> None:
    """By magnitude, in place. The hidden width stays: what carries it is ignored."""
    layers = model.backbone.encoder.layer
    heads = {m: layer.attention.self.num_attention_heads for layer in layers for m in _projections(layer)}
    keeps_width = [m for layer in layers for m in (layer.attention.output.dense, layer.output.dense)]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=SHARE,
        ignored_layers=[model.head, model.backbone.embeddings, *keeps_width],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=SHARE,
    )
    pruner.step()
    for layer in layers:
        attention = layer.attention.self
        attention.all_head_size = attention.query.out_features
        attention.num_attention_heads = attention.all_head_size // attention.attention_head_size


def _projections(layer: nn.Module) -> list[nn.Module]:
    attention = layer.attention.self
    return [attention.query, attention.key, attention.value]


def finetune(model: Classifier, options: Options) -> None:
    """Cross-entropy on the labels, in three epochs or what of them fits into the box; the rate falls to 0 with it."""
    assert options.teacher
    rows, encoder = options.rows("train"), Encoder(options.teacher)
    epochs = 1 if options.quick else EPOCHS
    rng, steps = np.random.default_rng(options.seed), epochs * -(-len(rows.text) // BATCH)
    optimizer, began, step = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True), time.monotonic(), 0
    model.train()
    for chosen in _batches(rng, len(rows.text), epochs):
        done = max(step / steps, (time.monotonic() - began) / TRAINING)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = RATE * _schedule(done)
        ((part, inputs),) = encoder.batches([rows.text[i] for i in chosen], BATCH)
        logits = model(torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"]))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(rows.label[chosen[part]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    model.eval()
    print(f"{step} of {steps} steps of {epochs} epochs in {time.monotonic() - began:.0f} s")


def _batches(rng: np.random.Generator, rows: int, epochs: int) -> Iterator[NDArray[np.int64]]:
    for _ in range(epochs):
        order = rng.permutation(rows)
        yield from (order[start : start + BATCH] for start in range(0, rows, BATCH))


def _schedule(done: float) -> float:
    """Share of the rate: up in the first tenth, then down, both along a cosine."""
    part = done / WARMUP if done < WARMUP else 1 - (done - WARMUP) / (1 - WARMUP)
    return (1 - math.cos(math.pi * part)) / 2


def train(options: Options) -> None:
    """Prune, fine-tune, export, quantize."""
    keep_tokenizer(options)
    assert options.teacher
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = Classifier(options.teacher).eval()
    some = next(iter(Encoder(options.teacher).batches(options.rows("train").text[:4], 4)))[1]
    inputs = torch.from_numpy(some["ids"]), torch.from_numpy(some["mask"])
    before = sum(p.numel() for p in model.parameters())
    prune(model, inputs)
    print(f"{before:,} parameters became {sum(p.numel() for p in model.parameters()):,}")
    finetune(model, options)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    plain = options.out / "fp32.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model,
            inputs,
            str(plain),
            input_names=["ids", "mask"],
            output_names=["logits"],
            dynamic_shapes=(free, free),
            dynamo=True,
            external_data=False,
        )
    quantize_dynamic(
        plain,
        options.model / "model.onnx",
        per_channel=True,
        reduce_range=overflows(),
        weight_type=QuantType.QInt8,
    )


def load(options: Options) -> Predict:
    """The quantized file."""
    return onnx_predict(options.model / "model.onnx", options)


if __name__ == "__main__":
    main(train, load, ("torch-pruning", "torch", "transformers", "onnxruntime", "onnx", "onnxscript"))
