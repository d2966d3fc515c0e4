"""What a careful engineer would deploy without Netweight: the same teacher, in the usual ways.

Comparisons only. ONNX Runtime's dynamic int8 takes its ranges from each batch, so its labels change with the batch.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from netweight import quiet
from netweight.artifact import Tier
from netweight.data import Rows
from netweight.encode import Tokens
from netweight.engine import Engine
from netweight.engine.base import TierEngine
from netweight.engine.onnx import OnnxEngine, OpenvinoEngine
from netweight.errors import MissingExtra, OptionError
from netweight.export import export
from netweight.model import Model

NAMES = ("teacher", "onnx", "onnx-int8", "openvino-int8")


class TorchEngine:
    """The model in PyTorch, fp32."""

    def __init__(self, model: Model, threads: int) -> None:
        self._model, self._threads = model, threads

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        model = self._model
        out = np.zeros((len(tokens), model.task.outputs), np.float32)
        with torch_threads(self._threads), torch.inference_mode():
            for rows in tokens.buckets(batch):
                out[rows] = model.network(*map(torch.from_numpy, tokens.padded(rows, model.encoder.pad))).numpy()
        return out


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch has one number of threads for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def teacher_engine(model: Model, threads: int) -> Engine:
    """The model as it was trained, in PyTorch."""
    return _engine(model, "teacher", TorchEngine(model, threads))


def baseline(name: str, model: Model, rows: Rows, threads: int) -> tuple[Engine, int]:
    """An engine and its bytes on disk.

    teacher: PyTorch fp32. onnx: ONNX Runtime fp32. onnx-int8: ONNX Runtime's dynamic int8. openvino-int8: OpenVINO with
    NNCF's post-training int8, calibrated on 300 of `rows`. Raises OptionError for another name, and MissingExtra for
    OpenVINO where it is not installed.
    """
    if name not in NAMES:
        raise OptionError(f"there is no baseline {name!r}; use {', '.join(NAMES)}.")
    if name == "teacher":
        return teacher_engine(model, threads), model.bytes
    plain = export(Model(model.network, model.encoder, model.task, model.base)).plain
    pad = model.encoder.pad
    if name == "onnx":
        return _engine(model, name, OnnxEngine(plain, pad, threads)), len(plain)
    if name == "onnx-int8":
        data = dynamic_int8(plain)
        return _engine(model, name, OnnxEngine(data, pad, threads)), len(data)
    tokens = model.encoder.encode(rows.text[:300], rows.pair[:300] if rows.pair else None)
    with tempfile.TemporaryDirectory() as folder:
        path = nncf_int8(plain, tokens, pad, Path(folder))
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        return _engine(model, name, OpenvinoEngine(path, pad, threads)), size


def _engine(model: Model, name: str, runs: TierEngine) -> Engine:
    return Engine(model.task, model.encoder, [(Tier(name, name, ""), runs)], name)


def dynamic_int8(data: bytes) -> bytes:
    """ONNX Runtime's own dynamic quantization of an fp32 file."""
    quiet.onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        given.write_bytes(data)
        quantize_dynamic(given, made, per_channel=True, weight_type=QuantType.QInt8)
        return made.read_bytes()


def nncf_int8(data: bytes, tokens: Tokens, pad: int, folder: Path) -> Path:
    """OpenVINO's form of an fp32 file after NNCF's post-training quantization, written to `folder`."""
    try:
        nncf, ov = quiet.nncf(), quiet.openvino()
    except ImportError:
        raise MissingExtra("the baseline openvino-int8", "openvino") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = ov.Core().read_model(data)
    takes = {name for i in model.inputs for name in i.names}
    batches = [{k: v for k, v in tokens.named(rows, pad).items() if k in takes} for rows in tokens.buckets(8)]
    with redirect_stdout(sys.stderr):  # NNCF draws progress bars where `--json` goes
        made = nncf.quantize(
            model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
        )
    path = folder / "model.xml"
    ov.save_model(made, path)
    return path
