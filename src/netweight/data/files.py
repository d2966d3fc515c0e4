"""Files: which format a name means, text that is UTF-8 or a clear error, and writing that is all or nothing."""

from __future__ import annotations

import codecs
import fcntl
import gzip
import importlib
import io
import os
import re
import secrets
import shlex
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from safetensors import SafetensorError

from netweight.errors import DataError, MissingExtra, did_you_mean

Format = Literal["csv", "tsv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("csv", "tsv", "jsonl", "parquet")
SUFFIXES = ".csv, .tsv, .jsonl (each also with .gz), .parquet"
_AROUND = 1 << 15  # bytes on each side of a fault from which its encoding is guessed
_SPREADSHEET = 'In Excel or WPS save it as "CSV UTF-8".'
HALF = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.part")  # how `atomic` calls what it writes, around the name it will have
_DAMAGED = 1000  # characters for each one that a guessed encoding may fail to read


@dataclass(frozen=True, slots=True)
class File:
    """A path and what its suffix says about it."""

    path: Path
    format: Format
    compressed: bool

    def open(self) -> BinaryIO:
        """The decompressed bytes."""
        return cast(BinaryIO, gzip.open(self.path, "rb") if self.compressed else self.path.open("rb"))


def file_of(path: Path) -> File:
    """Format by suffix. Raises DataError for any other suffix."""
    name = path.name.lower()
    compressed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in FORMATS or (compressed and suffix == "parquet"):
        told = _SPREADSHEET if suffix in ("xlsx", "xls") else "Convert or rename it."
        raise DataError(f"{path.name} has none of the suffixes that tables can have: {SUFFIXES}. {told}")
    return File(path, suffix, compressed)


def existing(path: Path) -> File:
    """`file_of` a file that is there. Raises DataError where it is not, suggesting a name close by."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name one table in it.")
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near) or " Check its path; a relative one begins in the current folder."
        raise DataError(f"there is no file {path}.{hint}")
    return file_of(path)


@contextmanager
def opened_text(file: File, newline: str | None = None) -> Iterator[TextIO]:
    """The file as UTF-8 text, with or without a byte order mark.

    Raises DataError, also while lines are being read: not UTF-8 (with the byte offset), or a damaged .gz.
    """
    try:
        with file.open() as raw, io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        raise DataError(_not_utf8(file)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.path.name} is damaged or cut off ({error}); copy or compress it again.") from None


def _not_utf8(file: File) -> str:
    name = file.path.name
    with file.open() as raw:
        start = raw.read(4)
    sheet = f"a spreadsheet. {_SPREADSHEET}"
    known = {
        b"\x1f\x8b": "gzip data: add .gz to its name.",
        b"PK\x03\x04": f"a zip, or {sheet}",
        b"\xd0\xcf\x11\xe0": sheet,  # of Excel before 2007
    }
    for magic, what in known.items():
        if start.startswith(magic):
            return f"{name} is not text but {what} Tables are UTF-8 text or parquet: {SUFFIXES}."
    offset, line, around = _fault(file)
    inside = " of the decompressed text" if file.compressed else ""
    where = f"{name} is not UTF-8 in line {line:,}, at byte {offset:,}{inside}"
    readable = around.decode("utf-8", "replace")
    foreign = len(re.findall(r"[^\x00-\x7f\ufffd]", readable))
    if foreign >= 4 * max(1, readable.count("\ufffd")):
        return f"{where}, though the text around it is: the file is damaged there. Repair or remove that row."
    encoding = _encoding(start, around)
    if encoding is None:
        return f"{where}. Save it again as UTF-8."
    source, target = (shlex.quote(str(path)) for path in (file.path, file.path.with_name(f"utf8-{name}")))
    # -c leaves out what is damaged; without it iconv would end there.
    convert = f"iconv -c -f {encoding} -t utf-8"
    command = (
        f"gzip -dc {source} | {convert} | gzip > {target}" if file.compressed else f"{convert} {source} > {target}"
    )
    return f"{where}; it looks like {encoding}. Save it as UTF-8, and look at what comes out: {command}"


def _fault(file: File) -> tuple[int, int, bytes]:
    """Offset of the first byte that is not UTF-8, its line from 1, and up to 64 KB around it."""
    offset, line, held, before = 0, 1, b"", b""
    with file.open() as raw:
        while True:
            block = raw.read(1 << 20)
            held += block
            try:
                _, used = codecs.utf_8_decode(held, "strict", not block)
            except UnicodeDecodeError as error:
                good = held[: error.start]
                around = (before + good)[-_AROUND:] + held[error.start : error.start + _AROUND]
                return offset + len(good), line + good.count(b"\n"), around
            line += held[:used].count(b"\n")
            offset, held, before = offset + used, held[used:], held[:used][-_AROUND:] or before
            if not block:
                return offset, line, b""  # it was repaired between two readings


def _encoding(start: bytes, sample: bytes) -> str | None:
    """The likely encoding of a file that is not UTF-8, from its first bytes and those around the fault."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = sample[sample.find(b"\n") + 1 :] or sample
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    high, letters = (len(re.findall(kind, sample)) for kind in (rb"[\x80-\xff]", rb"[A-Za-z]"))
    # In Chinese text nearly all high bytes come in pairs, most of them of the common characters and signs, which begin
    # so (letters of other alphabets do not); in Western text they stand among more ASCII letters.
    pairs = re.findall(rb"([\xa1-\xfe])[\xa1-\xfe]", sample)
    common = sum(first <= b"\xd7" for first in pairs)
    chinese = 2 * len(pairs) >= 0.8 * high and common >= 0.6 * len(pairs)
    encoding = "gb18030" if chinese else "cp1252" if high < letters else None
    if encoding is None:
        return None
    # Where a column was cut after so many bytes, half a character is left now and then.
    read = sample.decode(encoding, "replace")
    return encoding if read.count("\ufffd") <= len(read) // _DAMAGED else None


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Bytes that appear under `path` at the end, all of them, or not at all. Until then they are locked: the lock ends
    with the process, whatever ended that, and so tells `sweep` what is left of killed ones. A file that was there hands
    its rights on, and a link stays one: what it leads to is replaced."""
    path = _meant(path)
    part, out = _begun(path)
    try:
        with out:
            with suppress(OSError):  # there was none, or its file system knows no rights
                os.fchmod(out.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield out
            out.flush()
            replaced(part, path)
    finally:
        part.unlink(missing_ok=True)


def _meant(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _begun(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        # Processes of several machines may share the folder, so a number of a process is not name enough.
        part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        out = part.open("wb")
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(out, fcntl.LOCK_EX)
        if part.exists():
            return part, out
        out.close()  # another process swept it away before it was locked


def sweep(path: Path) -> None:
    """Remove what killed processes left half-written of `path`; what a process that lives writes is locked."""
    path = _meant(path)
    for left in path.parent.glob(".*.part"):
        half = HALF.fullmatch(left.name)
        if half is not None and half[1] == path.name:
            with suppress(OSError), left.open("r+b") as held:  # gone, or not ours, or locked
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def append(file: int, data: bytes) -> None:
    """Bytes behind all others of an open file, on disk when this returns. A full disk takes a part and says nothing:
    then they are taken back, and what it says next is raised."""
    end, left = os.lseek(file, 0, os.SEEK_END), memoryview(data)
    try:
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise


def replaced(new: Path, path: Path) -> None:
    """Put a complete file in the place of another: after a power cut there is one of the two, never an empty one."""
    _settled(new)
    os.replace(new, path)
    with suppress(OSError):  # not every file system lets a folder be asked
        _settled(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For who lets safetensors write `path`: a full disk, for which that has an error of its own, is an OSError."""
    try:
        yield
    except SafetensorError as problem:
        raise OSError(f"{path} cannot be written: {problem}") from None


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name beside `path`, for safetensors to write to. What is there at the end takes the place of `path`; where that
    fails nothing of it is left, on a disk that may be full."""
    new = path.with_suffix(".new")
    try:
        with writing(path):
            yield new
        replaced(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _settled(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def arrow(purpose: str) -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, which only parquet needs. Raises MissingExtra."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtra(purpose, "train", package="pyarrow") from None
