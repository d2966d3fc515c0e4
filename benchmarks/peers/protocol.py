"""What every peer speaks. Needs the standard library and numpy.

    PYTHONPATH=benchmarks/peers PYTHON benchmarks/peers/NAME/run.py train --data DIR --out DIR [--seed N] [--threads N]
    PYTHONPATH=benchmarks/peers PYTHON benchmarks/peers/NAME/run.py serve --data DIR --out DIR [--threads N]

DATA holds train.jsonl and dev.jsonl (text, label), test.jsonl (text alone: the certify labels stay with the driver) and
task.json (labels in order, metric).

`train` writes OUT/model/ (what must travel to serve), OUT/answers.npz with `dev` and `test`, scores (n, labels) of the
model as it was loaded back, and last OUT/train.json (seconds, bytes, versions).

`serve` loads the model and prints a line {"rows", "batches"}: how many distinct certify texts it holds, in an order
that is the same for every peer, and the batch sizes that make sense. Then it answers each line {"start", "count",
"batch"} with {"seconds"} for predicting that many texts from `start` on, going round, in batches of texts of about
equal length; at batch 0, each text is a request of its own and `seconds` is a list. Tokenization counts, and no answer
is kept; what a library itself remembers of texts (Netweight the tokens of words that it has seen) is left to it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCHES = (1, 4, 8, 16, 32, 128)
MOST = 4000  # texts that are timed
# Seconds that a peer may train for where steps of long texts would take longer: what a whole job of Netweight takes on
# short ones, and more than its teacher gets on long ones.
TRAINING = 900.0
MOST_LOST = 0.01  # of the teacher's quality on dev, for peers that choose between sizes or speeds
Scores = NDArray[np.float32]
# Texts and a batch size to scores (n, labels).
Predict = Callable[[list[str], int], Scores]


@dataclass(frozen=True)
class Data:
    """The rows of one split; `label` holds label numbers, and is empty for certify rows."""

    text: list[str]
    label: NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """What the driver asks for. teacher: a folder with the fine-tuned teacher. base: the pretrained model it started
    from. artifact: Netweight's. quick: train for a moment only, to see whether the peer runs."""

    data: Path
    out: Path
    seed: int
    threads: int
    teacher: Path | None
    base: Path | None
    artifact: Path | None
    quick: bool

    @property
    def model(self) -> Path:
        """Where what serves is kept."""
        return self.out / "model"

    @property
    def task(self) -> dict[str, Any]:
        """`labels` in order, and `metric`."""
        return dict(json.loads((self.data / "task.json").read_text(encoding="utf-8")))

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the columns of scores."""
        return list(self.task["labels"])

    def rows(self, name: str) -> Data:
        """A split by name: train, dev or test."""
        with (self.data / f"{name}.jsonl").open(encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        number = {label: i for i, label in enumerate(self.labels)}
        labels = [number[row["label"]] for row in found if "label" in row]
        return Data([row["text"] for row in found], np.array(labels, np.int64))


def buckets(lengths: Sequence[int] | NDArray[Any], batch: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers in batches, sorted by length so that little is padded."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def quality(scores: Scores, labels: NDArray[np.int64], metric: str) -> float:
    """Accuracy or macro-F1, for peers that choose on dev."""
    said = scores.argmax(axis=1)
    if metric == "accuracy":
        return float((said == labels).mean())
    found = sorted(set(said.tolist()) | set(labels.tolist()))
    f1 = [2 * ((said == k) & (labels == k)).sum() / ((said == k).sum() + (labels == k).sum()) for k in found]
    return float(np.mean(f1))


def main(
    train: Callable[[Options], int | None],
    load: Callable[[Options], Predict],
    packages: Sequence[str],
    batches: Sequence[int] = BATCHES,
) -> None:
    """Do what the command line says. `train` may return the bytes of what serves, else the files of the model count."""
    # Libraries print; the driver reads only what this module writes.
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "serve"))
    for name in ("data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("teacher", "base", "artifact"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = vars(parser.parse_args())
    what = given.pop("what")
    options = Options(**given)
    if what == "serve":
        _serve(load(options), options, batches, said)
        return
    options.model.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    size = train(options)
    seconds = time.monotonic() - began
    if size is None:
        size = sum(path.stat().st_size for path in options.model.rglob("*") if path.is_file())
    predict = load(options)
    answers = {name: predict(options.rows(name).text, 32).astype(np.float32) for name in ("dev", "test")}
    np.savez(options.out / "answers.npz", **answers)
    versions = {name: metadata.version(name) for name in packages}
    found = {"seconds": round(seconds, 1), "bytes": size, "versions": versions}
    (options.out / "train.json").write_text(json.dumps(found), encoding="utf-8")


def _serve(predict: Predict, options: Options, batches: Sequence[int], said: Any) -> None:
    texts = list(dict.fromkeys(options.rows("test").text))
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:MOST]]
    predict(texts[:1], 1)

    def answer(value: dict[str, Any]) -> None:
        said.write(json.dumps(value) + "\n")
        said.flush()

    answer({"rows": len(texts), "batches": list(batches)})
    for line in sys.stdin:
        asked = json.loads(line)
        part = [texts[(asked["start"] + i) % len(texts)] for i in range(asked["count"])]
        if asked["batch"]:
            began = time.perf_counter()
            predict(part, asked["batch"])
            answer({"seconds": time.perf_counter() - began})
            continue
        spent = []
        for text in part:
            began = time.perf_counter()
            predict([text], 1)
            spent.append(time.perf_counter() - began)
        answer({"seconds": spent})
