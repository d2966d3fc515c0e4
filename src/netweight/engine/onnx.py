"""Transformer tiers: ONNX Runtime, or OpenVINO reading the same file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight import quiet
from netweight.encode import INPUTS, Tokens
from netweight.errors import MissingExtra

Index = NDArray[np.int64]

# Rows of a batch: more pad more, and leave the cache. 8 was best of 1 to 64 for MiniLM in int8 and 17 tokens a row.
_MOST = 8


def session(data: bytes, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    ort = quiet.onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Workers spin between the parts of one row, which takes a tenth to a fifth less time than waking them; beyond it
    # they would steal the core that tokenizes.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # The fused kernel for x + y and its norm takes six times as long as an addition and a norm (1.32, AVX-512),
    # a sixth of an int8 encoder's time.
    slow = ["SkipLayerNormFusion"]
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=slow)


class Sessions:
    """ONNX Runtime over some files that go together. One row is computed by all threads; several are cut into two
    batches or more for each thread, which computes them alone: products of a few rows are too small to be worth
    sharing, and rows of about one length pad less (MiniLM in int8 on two cores: 0.75 of the time for 4 rows, less than
    half for 32)."""

    def __init__(self, files: Sequence[bytes], threads: int) -> None:
        self.together = [session(data, threads) for data in files]
        self._threads, self._lock = threads, Lock()
        self._files = files if threads > 1 else ()
        self._alone = self.together if threads == 1 else []

    def each(self, tokens: Tokens, batch: int, answer: Callable[[list[Any], Index], None]) -> None:
        """Call `answer` with sessions and row numbers, until every row was asked for; perhaps in several threads."""
        if self._threads == 1 or len(tokens) < 2:
            for rows in tokens.buckets(min(batch, _MOST)):
                answer(self.together, rows)
            return
        alone = self._made()
        batches = list(tokens.buckets(min(batch, _MOST, -(-len(tokens) // (2 * self._threads)))))
        with ThreadPoolExecutor(self._threads) as pool:
            # The longest first, so that no thread begins them when the others have ended.
            list(pool.map(partial(answer, alone), reversed(batches)))

    def _made(self) -> list[Any]:
        """Sessions that compute where they are called; made when they are first needed."""
        with self._lock:
            if not self._alone:
                self._alone, self._files = [session(data, 1) for data in self._files], ()
            return self._alone


class OnnxEngine:
    """ONNX Runtime on the CPU."""

    def __init__(self, data: bytes, pad: int, threads: int) -> None:
        self._sessions = Sessions([data], threads)
        (first,) = self._sessions.together
        self.takes = {i.name for i in first.get_inputs()}
        self._pad = pad
        self._width = first.get_outputs()[0].shape[-1]

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        out = np.zeros((len(tokens), self._width), np.float32)

        def answer(sessions: list[Any], rows: Index) -> None:
            given = tokens.named(rows, self._pad)
            out[rows] = sessions[0].run(None, {k: v for k, v in given.items() if k in self.takes})[0]

        self._sessions.each(tokens, batch, answer)
        return out


class OpenvinoEngine:
    """OpenVINO on the CPU, in fp32 around the int8 layers."""

    def __init__(self, data: bytes | Path, pad: int, threads: int) -> None:
        try:
            ov = quiet.openvino()
        except ImportError:
            raise MissingExtra("this artifact's encoder tier on OpenVINO", "openvino") from None
        core = ov.Core()
        # bf16 would be chosen on some processors, and would change labels with the batch.
        # Layers whose weights alone are quantized would get inputs of int8, and logits that are off by 1 %.
        # With fused attention (snippets), other batches or padding moved logits in up to 4 of 700 rows, by up to 1 %
        # (2026.4, int8 encoder of three layers); without it, in none, bit for bit.
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "SNIPPETS_MODE": "DISABLE",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        model = core.read_model(data)
        self._compiled: Any = core.compile_model(model, "CPU", hints)
        # An input also bears the names of what was folded into it (a cast, say), so `any_name` may be none of ours.
        self.takes = {name for i in self._compiled.inputs for name in i.names} & set(INPUTS)
        self._pad = pad
        self._width = self._compiled.output(0).partial_shape[-1].get_length()

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        # An infer request is not shared between threads; making one is cheap beside running it.
        request = self._compiled.create_infer_request()
        out = np.zeros((len(tokens), self._width), np.float32)
        for rows in tokens.buckets(batch):
            given = tokens.named(rows, self._pad)
            result = request.infer({k: v for k, v in given.items() if k in self.takes})
            out[rows] = result[self._compiled.output(0)]
        return out
