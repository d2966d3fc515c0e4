"""Parts of a partitioned table, and the folder of their answers.

    IN/day=1/part-0.parquet   ->   OUT/day=1/part-0.parquet       the same name, the same format
    OUT/_netweight/                what was done: a run store

Names that begin with a dot or an underscore are no parts, as other tools for partitioned tables have it (`_SUCCESS`).
A part appears under its name when it is complete (`data.files.atomic`), and its line in the store is written after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from netweight.data.files import HALF, existing, file_of
from netweight.errors import DataError, OptionError
from netweight.store import Store

STORE = "_netweight"
_NAMED = 3  # in a sentence


@dataclass(frozen=True)
class Part:
    """One table of the input: where it is, where its answers go, and `size` (bytes) and `changed` (ns), by which it is
    known again."""

    name: str
    source: str
    target: str
    size: int
    changed: int


@dataclass(frozen=True)
class Done:
    """What became of a part, as it was read; `written` bytes of output. With an `error`, nothing was written."""

    name: str
    size: int
    changed: int
    written: int = 0
    rows: int = 0
    bad: int = 0
    error: str = ""

    def stands(self, part: Part) -> bool:
        """Whether the part's answers are there, and are those of the input that is there now."""
        there = Path(part.target)
        same = (self.size, self.changed) == (part.size, part.changed)
        return same and there.is_file() and there.stat().st_size == self.written


def parts_of(source: Path, out: Path) -> tuple[Part, ...]:
    """All parts of a folder, or the one table that `source` is, by name.

    Raises DataError where there is none, or where something is no table, or a link to a folder or to nothing;
    OptionError where `out` lies in the input.
    """
    inside, outside = source.resolve(), out.resolve()
    if source.is_dir():
        if inside == outside or inside in outside.parents or outside in inside.parents:
            raise OptionError(
                f"{out} and the input {source} lie in one another; write the parts to a folder beside it."
            )
        files = dict(sorted((path.relative_to(source).as_posix(), path) for path in _files(source)))
    else:
        files = {source.name: existing(source).path}
        if inside.parent == outside:
            raise OptionError(f"{source} lies in {out} itself; write the parts to another folder.")
    if not files:
        raise DataError(f"{source} holds no tables; its parts end in .csv, .tsv, .jsonl (also .gz) or .parquet.")
    found = []
    for name, path in files.items():
        file_of(path)
        size, changed = mark(path)
        found.append(Part(name, str(path.absolute()), str(out.absolute() / name), size, changed))
    return tuple(found)


def _files(folder: Path) -> Iterator[Path]:
    """All that are not hidden. What cannot be looked into is an error: its parts would be missing without a word."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_symlink() and not entry.is_file():
                raise DataError(
                    f"{entry.path} is a link to {'a folder' if entry.is_dir() else 'nothing'}, and only links to files "
                    "are followed. Put what it means in its place, or let its name begin with _ to leave it out."
                )
            if entry.is_dir():
                yield from _files(Path(entry.path))
            elif entry.is_file():
                yield Path(entry.path)


def mark(path: Path) -> tuple[int, int]:
    """Bytes, and nanoseconds of the last change."""
    there = path.stat()
    return there.st_size, there.st_mtime_ns


def opened(out: Path, parts: Sequence[Part], version: str, text: str, pair: str | None) -> Store:
    """The store of a folder of answers, locked until it is closed; half-written files of runs that died are removed.

    Raises OptionError where the folder holds what this input does not explain, StoreError where it belongs to another
    artifact or other columns, or where another process works in it.
    """
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out} is a file; parts are written to a folder.")
    out.mkdir(parents=True, exist_ok=True)
    there = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    written = [name for name in there if not _hidden(name)]
    if written and not (out / STORE).is_dir():
        raise OptionError(f"{out} holds {_some(written)}, which no earlier run wrote; use a new folder.")
    strange = sorted(set(written) - {part.name for part in parts})
    if strange:
        raise OptionError(
            f"{out} also holds {_some(strange)}, which the input does not have. "
            "Is it another input? Use another folder, or remove what is too much."
        )
    store = Store(out / STORE, {"artifact": version, "text": text, "pair": pair})
    sweep(out)
    return store


def sweep(out: Path) -> None:
    """Remove what workers that died left half-written. The store must be locked: nobody else writes here."""
    for path in out.rglob(".*.part"):
        if HALF.fullmatch(path.name):
            path.unlink(missing_ok=True)


def kept(store: Store, part: Part) -> Done | None:
    """What the store knows of a part."""
    held = store.get(part.name)
    return None if held is None else Done(**held)


def keep(store: Store, part: Part, done: Done) -> None:
    """Write down that a part is complete. Raises DataError where its file is not seen from here."""
    there = Path(part.target)
    if not there.is_file() or there.stat().st_size != done.written:
        raise DataError(f"a worker wrote {there}, but it is not here: every machine must see the same folders.")
    store.put(part.name, asdict(done))


def _hidden(name: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in name.split("/"))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
