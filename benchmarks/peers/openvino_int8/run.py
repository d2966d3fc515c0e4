"""The teacher after NNCF's post-training int8, on OpenVINO."""

from __future__ import annotations

import nncf
import openvino as ov
from encoders import calibration, keep_tokenizer, openvino_model, openvino_predict
from protocol import Options, Predict, main


def train(options: Options) -> None:
    """Calibrate on 300 train texts."""
    keep_tokenizer(options)
    assert options.teacher
    model, takes = openvino_model(options.teacher / "model.onnx")
    batches = calibration(options, takes)
    made = nncf.quantize(model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    ov.save_model(made, options.model / "model.xml")


def load(options: Options) -> Predict:
    """The quantized file."""
    return openvino_predict(options.model / "model.xml", options)


if __name__ == "__main__":
    main(train, load, ("openvino", "nncf", "tokenizers", "numpy"))
