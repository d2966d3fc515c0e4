"""What peers share that run a transformer's file: tokens as the teacher takes them, and the two engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from protocol import Options, Predict, Scores, buckets
from tokenizers import Tokenizer

Inputs = dict[str, NDArray[np.int32]]


def overflows() -> bool:
    """Whether pairs of products of 8-bit integers overflow the 16 bits that they are added in, as on x86 without VNNI
    or AMX. Weights of 7 bits do not: what ONNX Runtime calls reduce_range."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx2" in flags and not any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


class Encoder:
    """The teacher's tokenizer, from its folder or from one to which `keep_tokenizer` copied it."""

    def __init__(self, folder: Path) -> None:
        kept = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(kept["max_length"])
        self.pad, self.pooling = int(kept["pad"]), str(kept["pooling"])

    def batches(self, texts: list[str], batch: int) -> Iterator[tuple[NDArray[np.int64], Inputs]]:
        """Row numbers, and ids, mask and types (rows, longest), sorted by length."""
        found = self._tokenizer.encode_batch_fast(texts)
        lengths = np.array([len(row.ids) for row in found])
        for rows in buckets(lengths, batch):
            shape = (len(rows), int(lengths[rows].max()))
            ids, mask = np.full(shape, self.pad, np.int32), np.zeros(shape, np.int32)
            for k, i in enumerate(rows):
                ids[k, : lengths[i]], mask[k, : lengths[i]] = found[i].ids, 1
            yield rows, {"ids": ids, "mask": mask, "types": np.zeros(shape, np.int32)}


def keep_tokenizer(options: Options) -> None:
    """Put the teacher's tokenizer beside the model: it must travel too."""
    assert options.teacher
    for name in ("tokenizer.json", "teacher.json"):
        shutil.copy(options.teacher / name, options.model / name)


def onnx_predict(path: Path, options: Options) -> Predict:
    """An ONNX file on ONNX Runtime: one batch on all threads, several on one thread each, which is faster (as in
    Netweight's own engine)."""
    import onnxruntime as ort

    encoder, sessions = Encoder(options.model), []
    for threads in (options.threads, 1):
        setting = ort.SessionOptions()
        setting.intra_op_num_threads = threads
        setting.inter_op_num_threads = 1
        # Else idle workers would go on spinning while the other process has its turn.
        setting.add_session_config_entry("session.force_spinning_stop", "1")
        # The fused kernel of an addition and a norm is slower than the two (1.32, AVX-512): a fifth less time is taken
        # without it, as Netweight's engine does.
        skip = ["SkipLayerNormFusion"]
        sessions.append(ort.InferenceSession(str(path), setting, ["CPUExecutionProvider"], disabled_optimizers=skip))
    together, alone = sessions
    takes, width = {i.name for i in together.get_inputs()}, len(options.labels)
    pool = ThreadPoolExecutor(options.threads)

    def predict(texts: list[str], batch: int) -> Scores:
        out = np.zeros((len(texts), width), np.float32)
        batches = list(encoder.batches(texts, batch))
        session = alone if len(batches) > 1 else together

        def answer(part: tuple[NDArray[np.int64], Inputs]) -> None:
            rows, inputs = part
            out[rows] = session.run(None, {k: v for k, v in inputs.items() if k in takes})[0]

        if len(batches) == 1:
            answer(batches[0])
        else:
            list(pool.map(answer, reversed(batches)))
        return out

    return predict


def openvino_model(path: Path) -> tuple[Any, set[str]]:
    """A model that OpenVINO reads, and which of our inputs it takes."""
    import openvino as ov

    model = ov.Core().read_model(path)
    return model, {name for i in model.inputs for name in i.names} & {"ids", "mask", "types"}


def openvino_predict(path: Path, options: Options) -> Predict:
    """An OpenVINO file, as it comes: the CPU plugin chooses precision and kernels."""
    import openvino as ov

    encoder, (model, takes) = Encoder(options.model), openvino_model(path)
    hints = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(model, "CPU", hints)
    request, width = compiled.create_infer_request(), len(options.labels)

    def predict(texts: list[str], batch: int) -> Scores:
        out = np.zeros((len(texts), width), np.float32)
        for rows, inputs in encoder.batches(texts, batch):
            out[rows] = request.infer({k: v for k, v in inputs.items() if k in takes})[compiled.output(0)]
        return out

    return predict


def calibration(options: Options, takes: set[str], rows: int = 300) -> list[Inputs]:
    """Batches of 8 train texts."""
    assert options.teacher
    texts = options.rows("train").text
    chosen = np.random.default_rng(options.seed).permutation(len(texts))[:rows]
    found = Encoder(options.teacher).batches([texts[i] for i in chosen], 8)
    return [{k: v for k, v in inputs.items() if k in takes} for _, inputs in found]
