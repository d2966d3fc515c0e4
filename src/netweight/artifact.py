"""The folder that ships. The only module that knows its file names.

    manifest.json       written last: format, task, tiers, hashes of every other file, provenance
    tokenizer.json      one tokenizer for all tiers
    tiers/0-NAME.safetensors, tiers/1-NAME.onnx, ...       from cheap to strong
    certificate.json, outcomes.json, measurements.json, fingerprint.json, report.html

A folder is written beside its final place and renamed, so one that exists is complete. Every byte is checked
against its SHA-256 when read. Hashes detect corruption, not forgery.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from netweight.errors import ArtifactError, CorruptArtifact
from netweight.task import Task, task_from_dict

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CERTIFICATE = "certificate.json"
OUTCOMES = "outcomes.json"
MEASUREMENTS = "measurements.json"
FINGERPRINT = "fingerprint.json"
REPORT = "report.html"
_SUFFIX = {"static": "safetensors", "exits": "safetensors"}
_SEAL = b',\n "sha256": "%s"\n}'
_HEX = b"0" * 64
READS = "reads"
_OPTIONS = {READS, "packed", "buckets", "norm", "segments", "reach", "thresholds"}  # that tiers may have
_STAGED = "-saving-"
_MANIFEST_MOST = 16 * 2**20
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


class _OtherVersion(ArtifactError):
    """An artifact, but none that this version reads."""


@dataclass(frozen=True)
class Tier:
    """One model of an artifact.

    `engine` is static, onnx, exits or openvino. The option READS says how many tokens of a text it reads, where that is
    fewer than `max_length`, and how many of them, special ones, come from the text's end. A row whose confidence, after
    dividing the logits by `temperature`, is below `threshold` goes to the next tier; the last tier answers whatever is
    left. To its own logits a tier adds those that the row was handed over with, times `before`.
    """

    name: str
    engine: str
    file: str
    options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    threshold: float = 0.0
    before: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `before` only where it says something, so that artifacts from before it keep their digest."""
        return {name: value for name, value in asdict(self).items() if name != "before" or value}


@dataclass(frozen=True)
class Manifest:
    """What an engine must know, and where all of it came from."""

    task: Task
    max_length: int
    pad: int
    tiers: tuple[Tier, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": self.format,
            "task": self.task.to_dict(),
            "max_length": self.max_length,
            "pad": self.pad,
            "tiers": [tier.to_dict() for tier in self.tiers],
            "provenance": dict(self.provenance),
            "files": dict(self.files),
        }

    @property
    def paired(self) -> bool | None:
        """Whether rows are pairs of texts; None for artifacts of before this was written down."""
        said = self.provenance.get("pairs")
        return said if isinstance(said, bool) else None

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines predictions: task, tokenizer, tiers and their files."""
        named = {TOKENIZER, *(tier.file for tier in self.tiers)}
        parts = self.to_dict() | {"provenance": None, "files": {k: v for k, v in self.files.items() if k in named}}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tier_file(position: int, name: str, engine: str) -> str:
    """Path of a tier's file inside the folder."""
    return f"tiers/{position}-{name}.{_SUFFIX.get(engine, 'onnx')}"


def hashed(manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
    """The manifest with the SHA-256 of every file."""
    return replace(manifest, files={name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())})


def sealed(stored: Mapping[str, Any]) -> bytes:
    """The text of a manifest: JSON whose last entry is the SHA-256 of the text without that entry."""
    body = json.dumps(stored, indent=1, ensure_ascii=False).encode().removesuffix(b"\n}")
    return body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def _intact(text: bytes) -> bool:
    body, seal = text[: -len(_SEAL % _HEX)], text[-len(_SEAL % _HEX) :]
    return seal == _SEAL % hashlib.sha256(body).hexdigest().encode()


def name_of(folder: Path) -> str:
    """What an artifact is called where it is served."""
    return folder.name.removesuffix(".nw")


def replaceable(folder: Path) -> None:
    """Raises ArtifactError where nothing can take the place of `folder`: without a name, as a mount point, or as a link
    to nothing."""
    if folder.name in ("", ".."):
        raise ArtifactError(f"the folder {str(folder)!r} has no name of its own; name a new one, such as shop.nw.")
    if os.path.ismount(folder):
        raise ArtifactError(
            f"{folder} is a mount point, which cannot be exchanged; name a folder inside it, such as "
            f"{folder / 'shop.nw'}."
        )
    if folder.is_symlink() and not folder.exists():
        raise ArtifactError(
            f"{folder} is a link to {folder.readlink()}, which is not there; remove it, or choose another folder."
        )


def writable(folder: Path) -> None:
    """Raises ArtifactError where `folder` exists and is not an artifact, or holds a file that its manifest does not
    list, since nothing else is ever overwritten, and where it is not `replaceable`."""
    replaceable(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        listed = {MANIFEST, *read_manifest(folder).files}
    except _OtherVersion:
        raise
    except ArtifactError as problem:
        raise ArtifactError(
            f"{folder} exists and is not an artifact; choose another folder, or remove this one by hand. {problem}"
        ) from problem
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).as_posix() not in listed and (path.is_symlink() or not path.is_dir()):
            raise ArtifactError(
                f"{path} is no file of the artifact that would be replaced; move it away, or choose another folder."
            )


def save(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
    """Write an artifact, replacing one of the same place; returns the manifest with its hashes.

    Raises ArtifactError as `writable` does: nothing but an artifact is ever overwritten.
    """
    writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = hashed(manifest, contents)
    text = sealed(manifest.to_dict())
    with staged(folder) as new:
        for name, data in [*sorted(contents.items()), (MANIFEST, text)]:
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if not folder.exists():
            new.rename(folder)
        elif not _exchanged(new, folder):
            with staged(folder) as old:
                folder.rename(old / "replaced")
                try:
                    new.rename(folder)
                except BaseException:
                    (old / "replaced").rename(folder)
                    raise
    return manifest


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden empty folder beside `folder`, locked, gone at the end; so are those that killed processes left there.

    The lock, not a name, says whether a process still works in one: it ends with the process, whatever ended that.
    """
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_STAGED}", dir=folder.parent))
    held = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        new.chmod(0o755)
        yield new
        # Last, since until then a leftover may be all that there is of a replaced artifact.
        for left in folder.parent.glob(f".{glob.escape(folder.name)}{_STAGED}*"):
            if left != new and left.is_dir() and not left.is_symlink():
                _remove_unlocked(left)
    finally:
        if new.is_symlink():  # what stood there was a link, and has been exchanged
            new.unlink()
        shutil.rmtree(new, ignore_errors=True)
        os.close(held)


def _remove_unlocked(folder: Path) -> None:
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:  # another process was quicker, or it is somebody else's
        return
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(held)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step (renameat2 of Linux): at no moment is either missing. False where it cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises ArtifactError (no artifact, newer format or options) or CorruptArtifact."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}.")
    if path.stat().st_size > _MANIFEST_MOST:
        raise CorruptArtifact(f"{path} is larger than {_MANIFEST_MOST} bytes; no manifest is.")
    try:
        text = path.read_bytes()
        stored = json.loads(text.decode())
        if stored["format"] != FORMAT:
            raise _OtherVersion(
                f"{folder} has format {stored['format']!r}; this version reads {FORMAT}. Update netweight."
            )
        manifest = Manifest(
            task_from_dict(stored["task"]),
            stored["max_length"],
            stored["pad"],
            tuple(Tier(**tier) for tier in stored["tiers"]),
            dict(stored["provenance"]),
            dict(stored["files"]),
        )
        _typed(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CorruptArtifact(f"{path} cannot be read as a manifest: {problem!r}.") from problem
    for name in manifest.files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name:
            raise CorruptArtifact(f"{path} names {name!r}, which lies outside the folder.")
    if not _intact(text):
        raise CorruptArtifact(f"{path} is damaged: it does not have the SHA-256 that it states. Copy it again.")
    if unknown := {name for tier in manifest.tiers for name in tier.options} - _OPTIONS:
        # Who passed it over would answer otherwise than what was certified.
        raise _OtherVersion(
            f"{folder} has tiers with the options {', '.join(sorted(unknown))}; this version knows "
            f"{', '.join(sorted(_OPTIONS))}. Update netweight."
        )
    return manifest


def _typed(manifest: Manifest) -> None:
    """Raises TypeError where values are not as declared, or beyond int32: the file may come from anywhere."""
    whole = [("max_length", manifest.max_length), ("pad", manifest.pad)]
    texts = [("a file", text) for pair in manifest.files.items() for text in pair]
    numbers: list[tuple[str, Any]] = []
    for tier in manifest.tiers:
        texts += [("a tier", text) for text in (tier.name, tier.engine, tier.file)]
        _reads(manifest, tier)
        numbers += [("temperature", tier.temperature), ("threshold", tier.threshold), ("before", tier.before)]
    for wanted, values in ((int, whole), (str, texts), ((int, float), numbers)):
        for name, value in values:
            beyond = isinstance(value, int) and not 0 <= value < 2**31  # ids of tokens are int32
            if not isinstance(value, wanted) or isinstance(value, bool) or beyond:
                raise TypeError(f"{name} is {value!r}")


def _reads(manifest: Manifest, tier: Tier) -> None:
    """Raises TypeError or ValueError where a tier reads what no row can have."""
    if not isinstance(tier.options, Mapping):
        raise TypeError(f"options are {tier.options!r}")
    most, closing = tier.options.get(READS, (manifest.max_length, 0))
    if type(most) is not int or type(closing) is not int or not 0 <= closing < most <= manifest.max_length:
        raise ValueError(f"tier {tier.name!r} reads {most!r} tokens, {closing!r} of them at the end")


def read_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A file's bytes, checked. Raises CorruptArtifact with the file's name."""
    wanted = manifest.files.get(name)
    if wanted is None:
        raise CorruptArtifact(f"{folder / MANIFEST} lists no file {name!r}.")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise CorruptArtifact(f"{path} is missing or no plain file.")
    for parent in PurePosixPath(name).parents:
        if parent.name and (folder / parent).is_symlink():
            raise CorruptArtifact(f"{folder / parent} is a link to elsewhere; copy the artifact again, with its files.")
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != wanted:
        raise CorruptArtifact(f"{path} is damaged: its SHA-256 is {actual}, the manifest says {wanted}. Copy it again.")
    return data


def check(folder: Path) -> Manifest:
    """Read every file of an artifact and compare its hash."""
    manifest = read_manifest(folder)
    for name in manifest.files:
        read_file(folder, manifest, name)
    return manifest


def size(folder: Path, manifest: Manifest) -> int:
    """Bytes that must travel to serve it: manifest, tokenizer and tiers."""
    names = [MANIFEST, TOKENIZER, *(tier.file for tier in manifest.tiers)]
    return sum((folder / name).stat().st_size for name in names)
