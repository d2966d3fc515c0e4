"""An artifact in memory: tiers from cheap to strong, each row answered by the first tier that is sure enough."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from netweight import artifact
from netweight.artifact import READS, Manifest, Tier
from netweight.encode import TextEncoder, Tokens
from netweight.engine.base import Outputs, Short, TierEngine
from netweight.engine.exits import ExitsEngine
from netweight.engine.onnx import OnnxEngine, OpenvinoEngine
from netweight.engine.static import StaticEngine
from netweight.errors import ArtifactError, CorruptArtifact, OptionError
from netweight.packing import unpacked_file
from netweight.quiet import cores
from netweight.task import Floats, Prediction, ScorePrediction, Task

# Rows that a tier takes at a time: larger batches leave the cache, and those of a transformer pad more.
_BATCH = 32  # engines may take fewer
_STATIC = 128


class Engine:
    """Runs one artifact. Threads may share it.

    Labels do not depend on batch size, order or padding: static tiers add up each row by itself, and quantized
    tiers use fixed ranges, or each token's own.
    """

    def __init__(self, task: Task, encoder: TextEncoder, tiers: Sequence[tuple[Tier, TierEngine]], name: str) -> None:
        if not tiers:
            raise ArtifactError(f"{name} has no tier; it cannot answer.")
        self.task, self.encoder, self.name = task, encoder, name
        self.tiers = tuple(tier for tier, _ in tiers)
        self._engines = [engine for _, engine in tiers]
        self.version = ""
        self.paired: bool | None = None  # whether rows are pairs of texts, where that is known

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, batch: int | None = None
    ) -> list[Prediction] | list[ScorePrediction]:
        """One prediction a text, in order. `batch` bounds how many rows a transformer takes at a time."""
        if batch is not None and batch < 1:
            raise OptionError(f"batch is {batch}; use 1 or more.")
        out = self.outputs(texts, pairs, batch)
        names = [tier.name for tier in self.tiers]
        return self.task.predictions(out.logits, out.confidence, [names[i] for i in out.tier.tolist()])

    def outputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None, batch: int | None = None) -> Outputs:
        """Logits, confidence and tier of texts. Raises OptionError for pairs where it was made for single texts, and
        the other way round: answers would look as good as any."""
        expect(self.paired, pairs is not None, self.name)
        return self.run(self.encoder.encode(texts, pairs), batch)

    def run(self, tokens: Tokens, batch: int | None = None) -> Outputs:
        """Logits, confidence and tier of rows that this engine's encoder encoded."""

        def answer(i: int, rows: NDArray[np.int64]) -> Floats:
            return self.logits(i, tokens if len(rows) == len(tokens) else tokens.take(rows), batch)

        return cascade(self.task, self.tiers, len(tokens), answer)

    def logits(self, tier: int, tokens: Tokens, batch: int | None = None) -> Floats:
        """What one tier says of encoded rows (n, outputs)."""
        static = self.tiers[tier].engine == "static"
        return self._engines[tier].logits(tokens, _STATIC if static else batch or _BATCH)

    def warm(self) -> None:
        """Run every tier on one row and on two, so that no request waits for what is made on first use."""
        for texts in (["ok"], ["ok", "ok"]):
            tokens = self.encoder.encode(texts)
            for engine in self._engines:
                engine.logits(tokens, 2)


def expect(paired: bool | None, pairs: bool, name: str) -> None:
    """Raises OptionError where rows are not of the kind that the artifact answers, pairs of texts or single ones."""
    if paired is not None and paired != pairs:
        told = (
            "answers pairs of texts; give the second text of each too (--pair COLUMN, pairs= in Python, "
            "or pairs over HTTP)"
            if paired
            else "answers single texts; give no second one (no --pair, no pairs= in Python, and texts over HTTP)"
        )
        raise OptionError(f"{name} {told}.")


def cascade(task: Task, tiers: Sequence[Tier], n: int, answer: Callable[[int, NDArray[np.int64]], Floats]) -> Outputs:
    """Ask each tier about the rows that the tiers before it were not sure of.

    `answer(i, rows)` gives tier i's own logits (len(rows), outputs) of the rows at these positions of n.
    """
    logits = np.zeros((n, task.outputs), np.float32)
    confidence, answered = np.zeros(n), np.zeros(n, np.int64)
    rows = np.arange(n)
    for i, tier in enumerate(tiers):
        if not len(rows):
            break
        logits[rows], confidence[rows], still = heard(task, tier, answer(i, rows), logits[rows])
        answered[rows] = i
        rows = rows[still]
    return Outputs(logits, confidence, answered)


def heard(task: Task, tier: Tier, own: Floats, before: Floats) -> tuple[Floats, NDArray[np.float64], NDArray[np.bool_]]:
    """Logits (n, outputs) and confidence (n,) of rows once a tier said its `own`, and which it hands over (n,)."""
    found = together(own, tier.before, before)
    sure = task.confidence(found, tier.temperature)
    return found, sure, sure < tier.threshold


def together(own: Floats, weight: float, before: Floats) -> Floats:
    """Logits of a tier (n, outputs) with those that its rows were handed over with: a logarithmic opinion pool (Genest
    and Zidek, 1986), a product of experts (Hinton, 2002). The cheaper tier was asked already, so its vote is free."""
    return own + np.float32(weight) * before if weight else own


def load(folder: str | Path, threads: int | None = None) -> Engine:
    """An artifact, every file verified, ready to answer.

    `threads` for transformer tiers (default: the cores of this process). A tier chosen for OpenVINO runs on
    ONNX Runtime, with a warning, where OpenVINO is not installed.
    Raises ArtifactError or CorruptArtifact.
    """
    path = Path(folder)
    manifest = artifact.read_manifest(path)
    count = threads or cores()
    try:
        return _loaded(path, manifest, count)
    except (CorruptArtifact, FileNotFoundError):
        # Files of one version and the manifest of another, where it was exchanged in between, are no damage.
        if (now := artifact.read_manifest(path)) == manifest:
            raise
    return _loaded(path, now, count)


def _loaded(path: Path, manifest: Manifest, count: int) -> Engine:
    definition = artifact.read_file(path, manifest, artifact.TOKENIZER).decode()
    encoder = TextEncoder(definition, manifest.max_length, manifest.pad)
    tiers = [
        (tier, tier_engine(tier, artifact.read_file(path, manifest, tier.file), manifest.pad, count))
        for tier in manifest.tiers
    ]
    engine = Engine(manifest.task, encoder, tiers, path.name)
    engine.version, engine.paired = manifest.digest[:12], manifest.paired
    return engine


def tier_engine(tier: Tier, data: bytes, pad: int, threads: int) -> TierEngine:
    """The engine that runs a tier's file, on as many tokens of a row as the tier reads."""
    engine = _whole(tier, data, pad, threads)
    return Short(engine, *tier.options[READS]) if READS in tier.options else engine


def _whole(tier: Tier, data: bytes, pad: int, threads: int) -> TierEngine:
    if tier.options.get("packed"):
        data = unpacked_file(data)
    if tier.engine == "static":
        return StaticEngine(data, tier.options)
    if tier.engine == "exits":
        return ExitsEngine(data, tier.options, pad, threads)
    return encoder_engine(tier, data, pad, threads)


def encoder_engine(tier: Tier, data: bytes, pad: int, threads: int) -> OnnxEngine | OpenvinoEngine:
    """The engine that runs a transformer tier's ONNX file, unpacked."""
    if tier.engine == "openvino" and importlib.util.find_spec("openvino") is not None:
        return OpenvinoEngine(data, pad, threads)
    if tier.engine == "openvino":
        warnings.warn(
            f"tier {tier.name!r} was certified on OpenVINO, which is not installed; ONNX Runtime runs the same file, "
            "more slowly, and a few labels may differ. To get what was certified, in a clone of Netweight: "
            "pip install '.[openvino]'",
            stacklevel=2,
        )
    if tier.engine in ("onnx", "openvino"):
        return OnnxEngine(data, pad, threads)
    known = "static, onnx, exits and openvino"
    raise ArtifactError(f"tier {tier.name!r} wants engine {tier.engine!r}; this version has {known}.")
