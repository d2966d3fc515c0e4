"""Torch-Pruning: half of the teacher's heads and half of its feed-forward units go, then it is fine-tuned, exported to
ONNX and quantized by ONNX Runtime's dynamic int8, as one would deploy it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from encoders import Encoder, keep_tokenizer, onnx_predict, overflows
from onnxruntime.quantization import QuantType, quantize_dynamic
from protocol import Options, Predict, main
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

SHARE, EPOCHS, RATE, BATCH = 0.5, 3, 1e-4, 32


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
    """Cross-entropy on the labels."""
    assert options.teacher
    rows, encoder = options.rows("train"), Encoder(options.teacher)
    epochs = 1 if options.quick else EPOCHS
    rng, steps = np.random.default_rng(options.seed), epochs * -(-len(rows.text) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        order = rng.permutation(len(rows.text))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            ((part, inputs),) = encoder.batches([rows.text[i] for i in chosen], BATCH)
            logits = model(torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"]))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(rows.label[chosen[part]]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


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
