"""An ordinary full fine-tune of the starter, the usual way: random head, all parameters, AdamW, 6 epochs at 1e-4.

What `netweight optimize --effort standard` must not take more than three times the time of:

    .venv/bin/python benchmarks/finetune.py TRAIN TEST [--dev DEV] [--epochs 6] [--seed 0] [--results DIR]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from netweight.data import Columns
from netweight.job import Job, Options, Tables, prepare
from netweight.measure import cores
from netweight.model import pretrained
from netweight.progress import Bar
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import Finetune
from netweight.train import Plan


def main() -> None:
    """Print time and accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--dev")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(cores())
    tables = Tables(given.train, Columns("text", "label"), given.dev, given.test)
    data, task, *_ = prepare(Job(tables, options=Options(seed=given.seed)), Path("."))
    base = pretrained("starter", task, seed=given.seed)
    with torch.random.fork_rng():
        torch.manual_seed(given.seed)
        torch.nn.init.normal_(base.network.head.weight, std=0.02)  # type: ignore[union-attr,arg-type]
    ordinary = Finetune(given.epochs, given.learning_rate, probe=False, freeze_embeddings=False)
    began = time.monotonic()
    with Bar() as bar:
        model = ordinary(base, Local(data), Plan(seed=given.seed, reporter=bar))
    seconds = time.monotonic() - began
    dev = data.dev
    logits = logits_of(model, model.encoder.encode(dev.text, dev.pair)).numpy()
    quality = float(task.quality(task.outcomes(logits, task.targets(dev.label or ()))))
    kept = {"seconds": round(seconds), "epochs": given.epochs, "quality": quality}
    (given.results / "finetune.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{given.epochs:g} epochs of full fine-tuning: {seconds:.0f} s, {task.metric} {quality:.4f} on dev")


if __name__ == "__main__":
    main()
