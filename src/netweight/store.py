"""The run store, `OUT.run/`: what a job has finished, so that a killed one goes on where it was.

    journal.jsonl      append-only: the job, then one line for each finished piece of work
    models/NAME/       models, as `Model.save` writes them
    points/NAME.bin    exported models, each with its logits on dev in NAME.safetensors
    NAME.safetensors   tables of numbers that a journal line refers to
    work/              what runs keep: checkpoints, outputs of teachers
    trial/             the artifact that was measured last, before its report
    looks.jsonl        registrations on certify splits
    dev.jsonl          the dev rows, for `netweight bench`
    quarantine-*.jsonl rows that were set aside
    trials.db          what Optuna was told, for its dashboard; every process makes it anew

A line is written after the files that it speaks of, and flushed to disk; a last line that was cut off is forgotten.
"""

from __future__ import annotations

import fcntl
import json
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from netweight.data import Columns, Loaded, Rows, read
from netweight.data.files import atomic
from netweight.errors import DataError, OptionError, StoreError

JOURNAL = "journal.jsonl"
LOOKS = "looks.jsonl"
DEV = "dev.jsonl"
MODELS = "models"
TRIALS = "trials.db"


def store_of(out: Path) -> Path:
    """The run store of an artifact's folder."""
    whole = out if out.name not in ("", "..") else out.resolve()  # "." has no name
    return whole.parent / f"{whole.name}.run"


def rows_of(folder: Path, source: str | None, columns: Columns) -> Loaded:
    """A table, or the dev rows that the job of the artifact `folder` kept."""
    if source is not None:
        return read(source, columns, label_required=columns.label is not None)
    if columns not in (Columns(), Columns("text")):
        raise OptionError("--text and the like name columns of --input; without a table, leave them out.")
    path = store_of(folder) / DEV
    if not path.exists():
        raise StoreError(
            f"{path} is not there: without the run store of `netweight optimize` there are no dev rows and no teacher "
            "for baselines; name a table with --input and --text, and ask for no baseline."
        )
    # Not by the rules for tables: rows that came as `Rows` may have texts that no table has, and the logits are of all.
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        kept: dict[str, Any] = {name: tuple([line[name] for line in lines]) for name in lines[0]}
        rows = Rows(**kept)
    except (ValueError, LookupError, TypeError):
        raise DataError(
            f"{path} is empty or damaged; the same `netweight optimize` writes it anew, or name a table with --input."
        ) from None
    return Loaded(DEV, rows, (), len(rows))


def _differences(where: str, there: Any, now: Any) -> Iterator[str]:
    """Each plain value that differs, shortened: a task may have thousands of labels."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in {**now, **there}:
            yield from _differences(f"{where} {key}".strip(), there.get(key), now.get(key))
    elif there != now:
        yield f"{where}: {reprlib.repr(there)} there, {reprlib.repr(now)} now"


class Store:
    """One job's folder, locked while it is open.

    Args:
        folder: made where it is missing.
        job: plain values that identify the job; None takes whatever job the folder holds.

    Raises:
        StoreError: the folder holds another job (which differs where), another process works in it, its file system
            has no locks, it is damaged, or `job` is None and the folder holds none.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any] | None) -> None:
        self.folder = folder
        path = folder / JOURNAL
        if job is None and not path.exists():
            raise StoreError(f"there is no run store {folder}; run `netweight optimize` with that output first.")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StoreError(f"another process works in {folder}; wait for it, or choose another output.") from None
        except OSError as problem:
            self._file.close()
            raise StoreError(
                f"{folder} lies on a file system without locks ({problem.strerror}); choose another output."
            ) from None
        try:
            self._held = self._replayed(path)
            self._claim(job)
            self._sweep()
        except BaseException:
            self._file.close()
            raise

    def _replayed(self, path: Path) -> dict[str, Any]:
        """Key to value of all whole lines; a torn last line is cut off."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        held: dict[str, Any] = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                held[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise StoreError(
                    f"line {number} of {path} is damaged; to start over, delete {self.folder}{self.kept}."
                ) from None
        return held

    def _claim(self, job: Mapping[str, Any] | None) -> None:
        if job is None:
            return
        wanted = json.loads(json.dumps(job))
        known = self._held.get("job")
        if known and "model" in wanted and Path(known.get("model", "")) == Path(wanted["model"]):
            known = known | {"model": wanted["model"]}  # older stores may have a folder as base/
        if known is None:
            self.put("job", wanted)
        elif known != wanted:
            differs = "; ".join(_differences("", known, wanted))
            other = {key for key in ("data", "seed") if known.get(key) != wanted.get(key)}  # a seed cuts other rows
            rows = " New rows need an --out of their own." if other == {"data"} else ""
            raise StoreError(
                f"{self.folder} belongs to another job ({differs}). Choose another output, or delete it{self.kept}."
                f"{rows}"
            )

    @property
    def kept(self) -> str:
        """What who deletes the folder must keep: models can be made again, looks stay taken."""
        there = (self.folder / LOOKS).exists()
        return f", but keep its {LOOKS}: looks at certify are counted there" if there else ""

    def _sweep(self) -> None:
        """Remove what killed processes had begun to write; all of them worked under this lock."""
        for left in (*self.folder.rglob(".*.part"), *self.folder.glob("work/*.new")):
            left.unlink(missing_ok=True)

    @property
    def job(self) -> dict[str, Any]:
        """The job that the folder belongs to."""
        return dict(self._held.get("job", {}))

    def get(self, key: str) -> Any:
        """A finished piece of work, or None."""
        return self._held.get(key)

    def keys(self, prefix: str) -> list[str]:
        """Keys that begin so, in their order."""
        return [key for key in self._held if key.startswith(prefix)]

    def held(self, kind: str) -> dict[str, Any]:
        """The finished pieces of work "KIND NAME" by their names, in their order."""
        named = {key.removeprefix(f"{kind} "): value for key, value in self._held.items() if key.startswith(f"{kind} ")}
        return {name: value for name, value in named.items() if value is not None}

    def put(self, key: str, value: Any) -> None:
        """Append a finished piece of work; it is on disk when this returns."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode()
        self._file.write(line + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._held[key] = json.loads(line)["value"]

    def write(self, name: str, data: bytes) -> None:
        """A file in the folder, all or nothing."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as out:
            out.write(data)

    def read(self, name: str) -> bytes:
        """A file that `write` made. Raises StoreError where it is gone."""
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            raise StoreError(
                f"{self.folder / name} is missing; to start over, delete {self.folder}{self.kept}."
            ) from None

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Named arrays, all or nothing."""
        self.write(f"{name}.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))

    def read_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """What `write_arrays` wrote. Raises StoreError where it is gone or damaged."""
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as problem:
            raise StoreError(
                f"{path} is missing or damaged ({problem}); to start over, delete {self.folder}{self.kept}."
            ) from None

    def model_folder(self, name: str) -> Path:
        """Where a model of this name is kept."""
        return self.folder / MODELS / name

    def discard(self, name: str) -> None:
        """Remove a model, or a half-written one."""
        shutil.rmtree(self.model_folder(name), ignore_errors=True)

    def close(self) -> None:
        """Give the lock back."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
