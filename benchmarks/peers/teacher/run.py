"""The fine-tuned teacher itself, in PyTorch and fp32."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from encoders import Encoder
from protocol import Options, Predict, Scores, main
from safetensors.torch import load_file
from transformers import AutoModel


def train(options: Options) -> None:
    """Nothing: the job trained it."""
    assert options.teacher
    for name in ("model.safetensors", "head.safetensors", "config.json", "tokenizer.json", "teacher.json"):
        shutil.copy(options.teacher / name, options.model / name)


def load(options: Options) -> Predict:
    """Backbone, pooling and head."""
    assert options.teacher
    torch.set_num_threads(options.threads)
    encoder, head = Encoder(options.teacher), load_file(options.teacher / "head.safetensors")
    backbone = AutoModel.from_pretrained(options.teacher, use_safetensors=True).eval()
    kept = json.loads((options.teacher / "teacher.json").read_text(encoding="utf-8"))
    if kept["pooling"] != "mean":
        raise SystemExit(f"this script pools by the mean; the teacher pools by {kept['pooling']}")

    def predict(texts: list[str], batch: int) -> Scores:
        out = np.zeros((len(texts), len(head["bias"])), np.float32)
        with torch.inference_mode():
            for rows, inputs in encoder.batches(texts, batch):
                ids, mask = (torch.from_numpy(inputs[name]).long() for name in ("ids", "mask"))
                hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
                weight = mask.unsqueeze(-1).float()
                pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
                out[rows] = (pooled @ head["weight"].T + head["bias"]).numpy()
        return out

    return predict


if __name__ == "__main__":
    main(train, load, ("torch", "transformers", "tokenizers", "numpy"))
