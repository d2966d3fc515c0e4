"""SetFit: the pretrained sentence encoder, trained on pairs of texts, and logistic regression on its embeddings.

It is a method for few labels: pairs of all rows would be millions, so at most 1,000 steps of 16 pairs are taken from
them, and fewer of long texts, so that they fit into the box; the head sees all rows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from protocol import TRAINING, Data, Options, Predict, Scores, main
from setfit import SetFitModel, Trainer, TrainingArguments
from transformers import TrainerCallback

STEPS, TRIED, BATCH, LENGTH = 1000, 20, 16, 128


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of a step, without those of the first."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step is done."""
        self._ends.append(time.monotonic())

    @property
    def each(self) -> float:
        """The mean."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def train(options: Options) -> None:
    """Its trainer's defaults but for the number of steps."""
    torch.set_num_threads(options.threads)
    rows = options.rows("train")
    clock, trial = Clock(), _trainer(options, rows, 5 if options.quick else TRIED)
    trial.add_callback(clock)
    trial.train_embeddings(rows.text, rows.label.tolist())
    steps = 5 if options.quick else min(STEPS, int(TRAINING / clock.each))
    print(f"{steps} steps of {clock.each:.2f} s")
    trainer = _trainer(options, rows, steps)
    trainer.train()
    trainer.model.save_pretrained(str(options.model))


def _trainer(options: Options, rows: Data, steps: int) -> Trainer:
    head = {"max_iter": 1000, "random_state": options.seed}
    if options.task["metric"] != "accuracy":  # rare labels count as much
        head["class_weight"] = "balanced"
    model = SetFitModel.from_pretrained(str(options.base), head_params=head, device="cpu")
    model.model_body.max_seq_length = LENGTH
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        batch_size=BATCH,
        max_steps=steps,
        num_iterations=max(1, STEPS * BATCH // (2 * len(rows.text)) + 1),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    data = Dataset.from_dict({"text": rows.text, "label": rows.label.tolist()})
    return Trainer(model=model, args=arguments, train_dataset=data)


def load(options: Options) -> Predict:
    """In PyTorch, as its `predict` runs it; it sorts by length itself."""
    torch.set_num_threads(options.threads)
    model = SetFitModel.from_pretrained(str(options.model), device="cpu")
    columns, width = np.asarray(model.model_head.classes_), len(options.labels)

    def predict(texts: list[str], batch: int) -> Scores:
        out = np.full((len(texts), width), -20.0, np.float32)
        shares = model.predict_proba(texts, batch_size=batch, as_numpy=True)
        out[:, columns] = np.log(np.maximum(shares, 1e-9))
        return out

    return predict


if __name__ == "__main__":
    main(train, load, ("setfit", "sentence-transformers", "transformers", "torch", "scikit-learn"))
