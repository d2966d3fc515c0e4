"""A model2vec classifier: static vectors distilled from the pretrained model, then trained with its own head."""

from __future__ import annotations

import numpy as np
import torch
from model2vec.distill import distill
from model2vec.inference import StaticModelPipeline
from model2vec.train import StaticModelForClassification
from protocol import Options, Predict, Scores, main, quality


def train(options: Options) -> None:
    """Its defaults; early stopping on dev. Where rare labels count as much, with weights that say so or without, by
    dev."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows, dev, labels = options.rows("train"), options.rows("dev"), options.labels
    static = distill(str(options.base), pca_dims=256)
    metric, best = options.task["metric"], -1.0
    for weight in (None,) if metric == "accuracy" else (None, "balanced"):
        classifier = StaticModelForClassification.from_static_model(model=static)
        classifier.fit(
            rows.text,
            [labels[i] for i in rows.label],
            X_val=dev.text,
            y_val=[labels[i] for i in dev.label],
            max_epochs=1 if options.quick else -1,
            class_weight=weight,
            random_seed=options.seed,
        )
        pipeline = classifier.to_pipeline()
        if (reached := quality(_predict(pipeline, labels)(dev.text, 128), dev.label, metric)) > best:
            best, kept = reached, pipeline
    kept.save_pretrained(str(options.model))


def load(options: Options) -> Predict:
    """Its pipeline, without torch."""
    return _predict(StaticModelPipeline.from_pretrained(options.model), options.labels)


def _predict(pipeline: StaticModelPipeline, labels: list[str]) -> Predict:
    columns = [labels.index(label) for label in pipeline.classes_]

    def predict(texts: list[str], batch: int) -> Scores:
        out = np.full((len(texts), len(labels)), -20.0, np.float32)
        out[:, columns] = np.log(np.maximum(pipeline.predict_proba(texts, batch_size=batch), 1e-9))
        return out

    return predict


if __name__ == "__main__":
    main(train, load, ("model2vec", "torch", "transformers", "numpy"), (32, 128, 512, 1024))
