"""Netweight's own artifact, served as its peers are."""

from __future__ import annotations

import numpy as np
from protocol import Options, Predict, Scores, main

from netweight import artifact
from netweight import load as load_artifact


def train(options: Options) -> int:
    """Nothing: the job made it. What must travel to serve are the files of its tiers."""
    assert options.artifact
    return artifact.size(options.artifact, artifact.read_manifest(options.artifact))


def load(options: Options) -> Predict:
    """The artifact."""
    assert options.artifact
    engine = load_artifact(options.artifact, options.threads)
    engine.warm()

    def predict(texts: list[str], batch: int) -> Scores:
        return np.asarray(engine.run(engine.encoder.encode(texts), batch).logits)

    return predict


if __name__ == "__main__":
    main(train, load, ("netweight", "onnxruntime", "numpy"))
