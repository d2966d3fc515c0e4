"""Encoder tiers for LiteRT (TensorFlow Lite), from models of the run store. Needs torch and `litert-torch`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from netweight.artifact import Manifest, Tier
from netweight.convert import Format, inputs_and_outputs
from netweight.encode import INPUTS, Tokens
from netweight.engine.base import TierEngine
from netweight.errors import MissingExtra
from netweight.export import lowered
from netweight.lower import PLAIN
from netweight.model import Model
from netweight.store import Store


@dataclass(frozen=True)
class Litert:
    """A .tflite file of one row of `max_length` tokens.

    It computes in fp32. Layers that are int8 in the artifact are rounded to the same steps, so that labels stay, but
    neither faster nor smaller than fp32: converters to LiteRT's own int8 round elsewhere.
    """

    store: Path
    threads: int = 1
    format: Format = "litert"

    def write(self, stem: Path, manifest: Manifest, tier: Tier, onnx: bytes) -> tuple[TierEngine, dict[str, Any]]:
        """One file, made from the model of the tier's name."""
        converter = _needs("litert_torch")
        with Store(self.store, None) as store:
            model = Model.load(store.model_folder(tier.name))
        file = stem.with_name(f"{stem.name}.tflite")
        given = example(model.encoder.max_length)
        with torch.no_grad():
            converter.convert(program(model, given).module(), sample_kwargs=given).export(str(file))
        engine = LitertEngine(file, manifest.pad, self.threads)
        said = {"format": "litert", "file": file.name}
        return engine, said | inputs_and_outputs(engine.takes, manifest.task, str(model.encoder.max_length))


class LitertEngine:
    """Runs a .tflite file on the CPU, a row at a time."""

    def __init__(self, file: Path, pad: int, threads: int) -> None:
        self._interpreter = _needs("ai_edge_litert.interpreter").Interpreter(str(file), num_threads=threads)
        self._run = self._interpreter.get_signature_runner()
        details = self._run.get_input_details()
        self.takes = set(details)
        self._length = int(next(iter(details.values()))["shape"][1])
        self._pad = pad

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        return np.concatenate([self._row(tokens, i) for i in range(len(tokens))])

    def _row(self, tokens: Tokens, i: int) -> NDArray[np.float32]:
        found = tokens.named(np.array([i]), self._pad)
        fill = {"ids": self._pad, "mask": 0, "types": 0}
        given = {}
        for name in self.takes:
            missing = self._length - found[name].shape[1]
            given[name] = np.pad(found[name], ((0, 0), (0, missing)), constant_values=fill[name])
        return np.asarray(self._run(**given)["logits"], np.float32)


def example(length: int) -> dict[str, Tensor]:
    """Inputs (1, length)."""
    return {name: torch.ones(1, length, dtype=torch.int32) for name in INPUTS}


def program(model: Model, given: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """The lowered model for inputs of these shapes, in operators of torch alone."""
    exported = torch.export.export(_Named(lowered(model)), (), given)
    plain: torch.export.ExportedProgram = exported.run_decompositions(PLAIN)
    return plain


class _Named(nn.Module):
    """Its output has a name in the file."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(ids, mask, types)}


def _needs(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra("exporting to LiteRT", "litert") from None
