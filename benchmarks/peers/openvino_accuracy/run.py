"""The teacher after NNCF's int8 with accuracy control: layers go back to float until dev loses at most one point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import openvino as ov
from encoders import Encoder, calibration, keep_tokenizer, openvino_model, openvino_predict
from protocol import Options, Predict, main, quality


def train(options: Options) -> None:
    """Calibrate on 300 train texts, hold the metric on dev."""
    keep_tokenizer(options)
    assert options.teacher
    model, takes = openvino_model(options.teacher / "model.onnx")
    dev, metric = options.rows("dev"), options.task["metric"]
    items = [
        ({k: v for k, v in inputs.items() if k in takes}, dev.label[rows])
        for rows, inputs in Encoder(options.teacher).batches(dev.text, 32)
    ]

    def reached(compiled: Any, given: Iterable[Any]) -> tuple[float, None]:
        pairs = [(compiled(inputs)[compiled.output(0)], labels) for inputs, labels in given]
        scores, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return quality(scores, labels, metric), None

    batches = calibration(options, takes)
    made = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(batches),
        nncf.Dataset(items, lambda item: item[0]),
        reached,
        max_drop=0.01,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    ov.save_model(made, options.model / "model.xml")


def load(options: Options) -> Predict:
    """The quantized file."""
    return openvino_predict(options.model / "model.xml", options)


if __name__ == "__main__":
    main(train, load, ("openvino", "nncf", "tokenizers", "numpy"))
