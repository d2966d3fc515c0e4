"""SetFit: the pretrained sentence encoder, trained on pairs of texts, and logistic regression on its embeddings.

It is a method for few labels: pairs of all rows would be millions, so at most 1,000 steps of 16 pairs are taken from
them; the head sees all rows.
"""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from protocol import Options, Predict, Scores, main
from setfit import SetFitModel, Trainer, TrainingArguments

STEPS, BATCH, LENGTH = 1000, 16, 128


def train(options: Options) -> None:
    """Its trainer's defaults but for the number of steps."""
    torch.set_num_threads(options.threads)
    rows = options.rows("train")
    model = SetFitModel.from_pretrained(
        str(options.base), head_params={"max_iter": 1000, "random_state": options.seed}, device="cpu"
    )
    model.model_body.max_seq_length = LENGTH
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        batch_size=BATCH,
        max_steps=5 if options.quick else STEPS,
        num_iterations=max(1, STEPS * BATCH // (2 * len(rows.text)) + 1),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    data = Dataset.from_dict({"text": rows.text, "label": rows.label.tolist()})
    Trainer(model=model, args=arguments, train_dataset=data).train()
    model.save_pretrained(str(options.model))


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
