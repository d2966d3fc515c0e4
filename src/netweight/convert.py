"""An artifact in the formats of other runtimes: files that run without Netweight, and a JSON that says how.

    OUT/spec.json        task, limits, tiers with inputs, outputs and thresholds, what was compared
    OUT/tokenizer.json   as in the artifact
    OUT/0-NAME.safetensors, OUT/1-NAME.onnx, ...

What was written is read back and run on rows. It must give every row the label that the artifact's own tier gives, at
logits that are close; else nothing stays on disk.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from safetensors.numpy import load, save

from netweight import artifact, quiet
from netweight.artifact import Manifest, Tier
from netweight.data import Rows
from netweight.encode import TextEncoder
from netweight.engine.base import TierEngine
from netweight.engine.cascade import encoder_engine, expect, tier_engine
from netweight.engine.onnx import OpenvinoEngine
from netweight.engine.static import FACTORS, StaticEngine, window_table
from netweight.errors import ArtifactError, MissingExtra
from netweight.features import BIGRAM_A, BIGRAM_B
from netweight.packing import unpacked_file
from netweight.task import Classify, Floats, Task

Format = Literal["onnx", "openvino", "litert"]

SPEC = "spec.json"
ROWS = 1_000  # that are compared
# Of the distance between the smallest and the largest logit. Two runtimes round int8 layers in different places.
_CLOSE = 0.02


_CASCADE = (
    "Confidence is the largest entry of softmax(logits / temperature). A row whose confidence is below a tier's "
    "threshold goes to the next tier; the last tier answers the rest. A tier with `before` adds, to its own logits, "
    "those that the row was handed over with, times `before`; its confidence is that of the sums. The label is that of "
    "the largest logit."
)


class Writer(Protocol):
    """Writes an encoder tier's file for one runtime."""

    @property
    def format(self) -> Format: ...

    def write(self, stem: Path, manifest: Manifest, tier: Tier, onnx: bytes) -> tuple[TierEngine, dict[str, Any]]:
        """Write `stem` with a suffix of its own, from the tier's ONNX file; returns what runs that which was written,
        and what the spec says of it."""
        ...


@dataclass(frozen=True)
class Compared:
    """One tier's file beside the artifact's own: rows that got the same label, and the largest distance of logits."""

    tier: str
    file: str
    rows: int
    distance: float


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    format: Format
    compared: tuple[Compared, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """For people."""
        return tuple(
            f"{c.file}: the same answers as {c.tier} on {c.rows:,} rows, logits at most {c.distance:.2g} apart"
            for c in self.compared
        )


def convert(folder: Path, out: Path, writer: Writer, rows: Rows, threads: int = 1) -> Converted:
    """Write the artifact for another runtime to the new folder `out`, and compare on (the first 1,000 of) `rows`.

    Raises ArtifactError where a tier has early exits, `out` is not empty, nothing can take its place, or a written file
    answers otherwise.
    """
    manifest = artifact.read_manifest(folder)
    expect(manifest.paired, rows.pair is not None, folder.name)
    artifact.replaceable(out)
    if early := next((tier.name for tier in manifest.tiers if tier.engine == "exits"), None):
        raise ArtifactError(
            f"tier {early!r} has early exits, which no export holds; run the artifact with netweight.load, or optimize "
            "with --effort quick, which makes none."
        )
    if out.exists() and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} exists and is not an empty folder; choose another one.")
    definition = artifact.read_file(folder, manifest, artifact.TOKENIZER)
    encoder = TextEncoder(definition.decode(), manifest.max_length, manifest.pad)
    some = rows.take(range(min(ROWS, len(rows))))
    tokens = encoder.encode(some.text, some.pair)
    out.parent.mkdir(parents=True, exist_ok=True)
    with artifact.staged(out) as new:
        (new / artifact.TOKENIZER).write_bytes(definition)
        tiers, compared = [], []
        for i, tier in enumerate(manifest.tiers):
            data = artifact.read_file(folder, manifest, tier.file)
            most, closing = tier.options.get(artifact.READS, (manifest.max_length, encoder.closing))
            part = tokens.cut(most, closing)
            own = tier_engine(tier, data, manifest.pad, threads).logits(part, 32)
            engine, said = _written(new / f"{i}-{tier.name}", manifest, tier, data, writer)
            distance = _distance(manifest.task, tier, own, engine.logits(part, 32), said["file"])
            said |= {"tokens": most, "closing": closing} if most < manifest.max_length else {}
            compared.append(Compared(tier.name, said["file"], len(tokens), distance))
            held = {"name": tier.name, "temperature": tier.temperature, "threshold": tier.threshold}
            tiers.append(held | ({"before": tier.before} if tier.before else {}) | said)
        spec = _spec(manifest, tiers, compared)
        (new / SPEC).write_text(json.dumps(spec, indent=1, ensure_ascii=False), encoding="utf-8")
        if out.exists():
            out.rmdir()
        new.rename(out)
    return Converted(out, writer.format, tuple(compared))


def _written(
    stem: Path, manifest: Manifest, tier: Tier, data: bytes, writer: Writer
) -> tuple[TierEngine, dict[str, Any]]:
    if tier.options.get("packed"):
        data = unpacked_file(data)
    return _table(stem, tier, data) if tier.engine == "static" else writer.write(stem, manifest, tier, data)


def _distance(task: Task, tier: Tier, own: Floats, other: Floats, file: str) -> float:
    """The largest distance of logits. Raises ArtifactError where a label differs or they are not close."""
    distance = float(np.abs(own - other).max(initial=0))
    labels = int((own.argmax(axis=1) != other.argmax(axis=1)).sum()) if isinstance(task, Classify) else 0
    if labels or not distance <= _CLOSE * max(float(np.ptp(own)), 1e-6):
        raise ArtifactError(
            f"{file} does not answer as the artifact's {tier.name} does: another label on {labels:,} of {len(own):,} "
            f"rows, logits up to {distance:.3g} apart. Nothing was written. Use --to onnx, which keeps the very file."
        )
    return distance


def _spec(manifest: Manifest, tiers: list[dict[str, Any]], compared: list[Compared]) -> dict[str, Any]:
    return {
        "task": manifest.task.to_dict(),
        "tokenizer": artifact.TOKENIZER,
        "max_length": manifest.max_length,
        "pad": manifest.pad,
        "text": f"Cut a text to its first {16 * manifest.max_length} characters, tokenize it, and keep the first "
        "max_length tokens, special ones included; of a pair, the longer text is cut first. A tier with `tokens` takes "
        "so many of them: the first ones, and the `closing` last.",
        "cascade": _CASCADE,
        "tiers": tiers,
        "compared": [asdict(c) for c in compared],
        "artifact": manifest.digest,
    }


def _table(stem: Path, tier: Tier, data: bytes) -> tuple[TierEngine, dict[str, Any]]:
    """A static tier leaves as its table and the maths: a lookup and a sum need no runtime."""
    file = stem.with_name(stem.name + ".safetensors")
    file.write_bytes(_multiplied(data) if "reach" in tier.options else data)
    buckets, squared = int(tier.options["buckets"]), tier.options["norm"] == "l2"
    pairs = f" and v + (t[i] * {BIGRAM_A} + t[i + 1] * {BIGRAM_B}) mod buckets for every two neighbours"
    maths = [
        "v = rows of table - buckets.",
        "The features of the token ids t[0], t[1], ... are the table rows t[i] for every token"
        + (f"{pairs}." if buckets else "."),
        "norm has an entry for each of the first rows of table; the other rows have none, which counts as 0.",
        "x = sum over features f of table[f] * scale[f], divided by max(d, 1e-6), d = "
        + ("the root of the sum of norm[f]^2." if squared else "the sum of norm[f]."),
        "For i = 0, 1, ...: where i > 0, x = max(x, 0); then x = x @ matrix.i + bias.i, or x + bias.i where there is "
        "no matrix.i. The last x are the logits.",
    ]  # fmt: skip
    if reach := tier.options.get("reach"):
        maths += [
            "The windows add to them. Let p[i] be where t[i] stands in windows.known. For every i, z = the sum over "
            f"k = 0 to {reach - 1} of windows.table[k, p[i + k - {reach // 2}]], without tokens that are not known or "
            "lie beyond the text; y = the largest z of each column; y = max(y * windows.scale + windows.bias, 0).",
            "The logits are x + y @ windows.matrix + windows.offset."
            + (" Of two texts y is [u, w, |u - w|, u * w], as x is." if tier.options["segments"] else ""),
        ]
    if tier.options["segments"]:
        maths.insert(
            4,
            "That is done for the first text's tokens (u) and the second's (w), special ones with those before them; "
            "then x = [u, w, |u - w|, u * w].",
        )
    said = {"format": "table", "file": file.name, "buckets": buckets, "maths": maths}
    return StaticEngine(file.read_bytes(), tier.options), said


def _multiplied(data: bytes) -> bytes:
    """A static tier's file with the table of its windows in place of its factors: readers only add and compare."""
    held = load(data)
    held["windows.table"] = window_table(held)
    return save({name: array for name, array in held.items() if name not in FACTORS})


def inputs_and_outputs(takes: set[str], task: Task, tokens: str) -> dict[str, Any]:
    """What an encoder's file takes and gives."""
    meaning = {
        "ids": "token ids; short rows are filled with pad",
        "mask": "1 for a token, 0 for filling",
        "types": "1 for tokens of a pair's second text and those that close it, else 0",
    }
    return {
        "inputs": [
            {"name": name, "dtype": "int32", "shape": ["rows", tokens] if tokens == "tokens" else [1, int(tokens)]}
            | {"meaning": said}
            for name, said in meaning.items()
            if name in takes
        ],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": ["rows" if tokens == "tokens" else 1, task.outputs]}
        ],
    }


@dataclass(frozen=True)
class Onnx:
    """The tier's own file, unpacked."""

    threads: int = 1
    format: Format = "onnx"

    def write(self, stem: Path, manifest: Manifest, tier: Tier, onnx: bytes) -> tuple[TierEngine, dict[str, Any]]:
        """One file."""
        file = stem.with_name(f"{stem.name}.onnx")
        file.write_bytes(onnx)
        # Its own engine, so that what is compared is the file.
        engine = encoder_engine(tier, file.read_bytes(), manifest.pad, self.threads)
        return engine, {"format": "onnx", "file": file.name} | inputs_and_outputs(engine.takes, manifest.task, "tokens")


@dataclass(frozen=True)
class Openvino:
    """OpenVINO's intermediate representation, weights as they are (no fp16)."""

    threads: int = 1
    format: Format = "openvino"

    def write(self, stem: Path, manifest: Manifest, tier: Tier, onnx: bytes) -> tuple[TierEngine, dict[str, Any]]:
        """NAME.xml and NAME.bin."""
        try:
            ov = quiet.openvino()
        except ImportError:
            raise MissingExtra("exporting to OpenVINO", "openvino") from None
        file = stem.with_name(f"{stem.name}.xml")
        ov.save_model(ov.Core().read_model(onnx), str(file), compress_to_fp16=False)
        engine = OpenvinoEngine(file, manifest.pad, self.threads)
        said = {"format": "openvino", "file": file.name, "weights": f"{stem.name}.bin"}
        return engine, said | inputs_and_outputs(engine.takes, manifest.task, "tokens")
