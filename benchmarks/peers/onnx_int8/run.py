"""The teacher in ONNX Runtime's dynamic int8."""

from __future__ import annotations

from encoders import keep_tokenizer, onnx_predict, overflows
from onnxruntime.quantization import QuantType, quantize_dynamic
from protocol import Options, Predict, main


def train(options: Options) -> None:
    """Quantize the weights; activations take their ranges from each batch."""
    keep_tokenizer(options)
    assert options.teacher
    quantize_dynamic(
        options.teacher / "model.onnx",
        options.model / "model.onnx",
        per_channel=True,
        reduce_range=overflows(),
        weight_type=QuantType.QInt8,
    )


def load(options: Options) -> Predict:
    """The quantized file."""
    return onnx_predict(options.model / "model.onnx", options)


if __name__ == "__main__":
    main(train, load, ("onnxruntime", "tokenizers", "numpy"))
