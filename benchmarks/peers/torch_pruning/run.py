"""Torch-Pruning: half of the teacher's heads and feed-forward units go, or a quarter where dev misses half too much.
What stays is fine-tuned, exported to ONNX and quantized by ONNX Runtime's dynamic int8, as one would deploy it."""

from __future__ import annotations

import itertools
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
from protocol import MOST_LOST, TRAINING, Data, Options, Predict, Scores, main, quality
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

SHARES, SEEN, EPOCHS, RATE, BATCH, WARMUP = (0.5, 0.25), 20, 3, 1e-4, 32, 0.1
WINDOW = 16  # batches, within which texts are sorted by length


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


def prune(model: Classifier, share: float, batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """By the first-order Taylor term of the loss of some batches, in place, as its examples of transformers advise. The
    hidden width stays: what carries it is ignored."""
    for ids, mask, labels in batches:
        nn.functional.cross_entropy(model(ids, mask), labels).backward()
    layers = model.backbone.encoder.layer
    heads = {m: layer.attention.self.num_attention_heads for layer in layers for m in _projections(layer)}
    keeps_width = [m for layer in layers for m in (layer.attention.output.dense, layer.output.dense)]
    pruner = tp.pruner.BasePruner(
        model,
        batches[0][:2],
        tp.importance.GroupTaylorImportance(),
        pruning_ratio=share,
        ignored_layers=[model.head, model.backbone.embeddings, *keeps_width],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=share,
    )
    pruner.step()
    model.zero_grad()
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
    rows, encoder, rng = options.rows("train"), Encoder(options.teacher), np.random.default_rng(options.seed)
    steps, box = EPOCHS * -(-len(rows.text) // BATCH), 5.0 if options.quick else TRAINING / len(SHARES)
    optimizer, began, step = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True), time.monotonic(), 0
    model.train()
    for chosen in _batches(rng, rows.text):
        done = max(step / steps, (time.monotonic() - began) / box)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = RATE * _schedule(done)
        ids, mask, labels = _tensors(encoder, rows, chosen)
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    model.eval()
    print(f"{step} of {steps} steps of {EPOCHS} epochs in {time.monotonic() - began:.0f} s")


def _batches(rng: np.random.Generator, texts: list[str]) -> Iterator[NDArray[np.int64]]:
    """Of texts of about equal length, epoch after epoch."""
    lengths = np.array([len(text) for text in texts])
    while True:
        order = rng.permutation(len(texts))
        windows = [order[start : start + WINDOW * BATCH] for start in range(0, len(order), WINDOW * BATCH)]
        order = np.concatenate([window[np.argsort(lengths[window])] for window in windows])
        yield from (order[start : start + BATCH] for start in rng.permutation(range(0, len(order), BATCH)))


def _tensors(encoder: Encoder, rows: Data, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (rows, longest), and labels."""
    ((part, inputs),) = encoder.batches([rows.text[i] for i in chosen], BATCH)
    labels = torch.from_numpy(rows.label[chosen[part]])
    return torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"]), labels


def _scores(model: Classifier, encoder: Encoder, texts: list[str]) -> Scores:
    out = np.zeros((len(texts), model.head.out_features), np.float32)
    with torch.no_grad():
        for part, inputs in encoder.batches(texts, BATCH):
            out[part] = model(torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"])).numpy()
    return out


def _schedule(done: float) -> float:
    """Share of the rate: up in the first tenth, then down, both along a cosine."""
    part = done / WARMUP if done < WARMUP else 1 - (done - WARMUP) / (1 - WARMUP)
    return (1 - math.cos(math.pi * part)) / 2


def choose(options: Options, example: list[tuple[Tensor, Tensor, Tensor]]) -> Classifier:
    """The larger share that keeps the teacher's quality on dev; where none does, the best there."""
    assert options.teacher
    dev, metric, found = options.rows("dev"), options.task["metric"], list[tuple[float, Classifier]]()
    wanted = quality(np.load(options.teacher / "answers.npz")["dev"], dev.label, metric) - MOST_LOST
    for share in SHARES:
        model = Classifier(options.teacher).eval()
        prune(model, share, example)
        finetune(model, options)
        reached = quality(_scores(model, Encoder(options.teacher), dev.text), dev.label, metric)
        print(f"share {share}: {sum(p.numel() for p in model.parameters()):,} parameters, {reached:.4f} on dev")
        found.append((reached, model))
        if reached >= wanted:
            return model
    return max(found, key=lambda one: one[0])[1]


def train(options: Options) -> None:
    """Prune, fine-tune, export, quantize."""
    keep_tokenizer(options)
    assert options.teacher
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows, encoder = options.rows("train"), Encoder(options.teacher)
    some = itertools.islice(_batches(np.random.default_rng(options.seed), rows.text), SEEN)
    example = [_tensors(encoder, rows, chosen) for chosen in some]
    model = choose(options, example)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    plain = options.out / "fp32.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model,
            example[0][:2],
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
