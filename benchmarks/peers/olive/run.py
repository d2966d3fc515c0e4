"""Olive: its own search over ONNX Runtime's dynamic and static int8 of the teacher; the fastest that loses at most one
point on dev.

Olive loads this file again as its user script, for its data.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from encoders import Encoder, keep_tokenizer, onnx_predict
from protocol import MOST_LOST, Options, Predict, main

TRIALS, CALIBRATED = 16, 128
# All of them would give the mask's sum integers that hold nothing else, and calibration by entropy fails on its range.
QUANTIZED = ["MatMul", "Gemm", "Gather"]


class Items:
    """Texts one by one with their labels, as Olive's loader wants them."""

    def __init__(self, options: Options, split: str) -> None:
        assert options.teacher
        rows = options.rows(split)
        order = np.random.default_rng(options.seed).permutation(len(rows.text))
        if split == "train":
            order = order[:CALIBRATED]
        texts, labels = [rows.text[i] for i in order], rows.label[order]
        # Histograms of ranges want rows of one length; the metrics want none padded.
        batch = len(texts) if split == "train" else 1
        self._items = [
            (inputs["ids"][k], inputs["mask"][k], inputs["types"][k], int(labels[i]))
            for part, inputs in Encoder(options.teacher).batches(texts, batch)
            for k, i in enumerate(part)
        ]
        if split == "dev":  # Olive takes latency by the first of them: the one of median length
            half = len(self._items) // 2
            self._items = self._items[half:] + self._items[:half]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> tuple[dict[str, np.ndarray], int]:
        ids, mask, types, label = self._items[i]
        return {"ids": ids, "mask": mask, "types": types}, label


def _options(given: dict[str, Any]) -> Options:
    rest = dict.fromkeys(("base", "artifact")) | {"quick": False}
    return Options(Path(given["data"]), Path("."), given["seed"], given["threads"], Path(given["teacher"]), **rest)


def train(options: Options) -> None:
    """Search, then take the fastest that keeps the metric."""
    keep_tokenizer(options)
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    from olive.workflows import run

    assert options.teacher
    given = {
        "data": str(options.data.absolute()),
        "teacher": str(options.teacher.absolute()),
        "seed": options.seed,
        "threads": options.threads,
    }
    script = str(Path(__file__).absolute())
    session = {"session_options": {"intra_op_num_threads": options.threads}}
    user = {"inference_settings": {"onnx": session}}
    kind = {"task": "multiclass", "num_classes": len(options.labels)}
    kind |= {"average": "micro" if options.task["metric"] == "accuracy" else "macro"}
    kept = {"priority": 2, "metric_config": kind}
    reached = {"name": "f1_score" if kind["average"] == "macro" else "accuracy_score", **kept}
    # A metric of one's own cannot be used: Olive 0.13.0 fails to write its settings down.
    metrics = [
        {"name": "quality", "type": "accuracy", "data_config": "dev", "sub_types": [reached], "user_config": user},
        {"name": "seconds", "type": "latency", "data_config": "dev", "sub_types": [{"name": "avg", "priority": 1}]}
        | {"user_config": user},
    ]
    searched = ("quant_mode", "precision", "per_channel", "reduce_range", "calibrate_method", "quant_format")
    searched += ("activation_type",)
    quantize = dict.fromkeys(searched, "SEARCHABLE_VALUES") | {"op_types_to_quantize": QUANTIZED}
    # `max_samples` does not end the search by itself in Olive 0.13.0; `max_iter` does.
    count = 2 if options.quick else TRIALS
    samples = {"max_iter": count, "sampler_config": {"max_samples": count, "seed": options.seed}}
    work = options.out / "work"
    output = run(
        {
            "input_model": {"type": "OnnxModel", "model_path": str(options.teacher / "model.onnx")},
            "data_configs": [
                {
                    "name": split,
                    "user_script": script,
                    "load_dataset_config": {"type": "text_rows", "params": given | {"split": split}},
                    "dataloader_config": {"params": {"batch_size": 1}},
                    "post_process_data_config": {"type": "best_label"},
                }
                for split in ("train", "dev")
            ],
            "evaluators": {"ours": {"type": "OnnxEvaluator", "metrics": metrics}},
            "passes": {"quantize": {"type": "OnnxQuantization", "data_config": "train", **quantize}},
            "search_strategy": {"execution_order": "joint", "sampler": "tpe", **samples},
            "evaluator": "ours",
            "output_dir": str(work / "out"),
            "cache_dir": str(work / "cache"),
        }
    )
    shutil.copy(_best(output), options.model / "model.onnx")


def _best(output: Any) -> Path:
    """The fastest that keeps the metric; where none does, the best of the metric."""
    values = [Namespace(path=Path(m.model_path), **_values(m.metrics_value)) for m in output.get_output_models()]
    print(*values, sep="\n")
    start = _values(output.get_input_model_metrics())["quality"]
    kept = [v for v in values if v.quality >= start - MOST_LOST]
    best = min(kept, key=lambda v: v.seconds) if kept else max(values, key=lambda v: v.quality)
    return best.path if best.path.suffix == ".onnx" else next(best.path.glob("*.onnx"))


def _values(found: dict[str, Any]) -> dict[str, float]:
    return {name.partition("-")[0]: float(v["value"]) for name, v in found.items()}


def load(options: Options) -> Predict:
    """The chosen file."""
    return onnx_predict(options.model / "model.onnx", options)


if __name__ == "__main__":
    main(train, load, ("olive-ai", "onnxruntime", "onnx", "optuna"))
else:
    # Loaded by Olive, which finds the parts of its data by name.
    from olive.data.registry import Registry

    @Registry.register_dataset("text_rows")
    def text_rows(split: str, **given: Any) -> Items:
        """Train texts for static ranges, dev texts for the metrics."""
        return Items(_options(given), split)

    @Registry.register_post_process("best_label")
    def best_label(outputs: Any, **_: Any) -> Any:
        """Label numbers of logits."""
        return outputs.argmax(dim=-1)
