"""`netweight export`: an artifact for another runtime, compared on the job's dev rows or on a table."""

from __future__ import annotations

from pathlib import Path

from netweight import convert
from netweight.artifact import read_manifest
from netweight.convert import Converted, Format, Writer
from netweight.data import Columns
from netweight.errors import MissingExtra, OptionError
from netweight.store import rows_of, store_of


def export(
    folder: str | Path,
    to: Format,
    out: str | Path,
    source: str | None = None,
    *,
    text: str = "text",
    pair: str | None = None,
    threads: int = 1,
) -> Converted:
    """Write the artifact `folder` for the runtime `to` into the new folder `out`.

    What is written is compared with the artifact on the rows of `source` (without one, the job's own dev rows). LiteRT
    is made from the models in `folder`.run. Raises OptionError, ArtifactError, StoreError, MissingExtra.
    """
    folder, out = Path(folder), Path(out)
    read_manifest(folder)  # before anything else is asked for: is there an artifact at all?
    writer = _writer(folder, to, threads)
    rows = rows_of(folder, source, Columns(text, None, pair)).rows
    return convert.convert(folder, out, writer, rows, threads)


def _writer(folder: Path, to: str, threads: int) -> Writer:
    if to == "onnx":
        return convert.Onnx(threads)
    if to == "openvino":
        return convert.Openvino(threads)
    if to != "litert":
        raise OptionError(f"there is no export to {to!r}; use onnx, openvino or litert.")
    try:
        from netweight.litert import Litert
    except ImportError:
        raise MissingExtra("exporting to LiteRT", "litert") from None
    return Litert(store_of(folder), threads)
