"""Logs of records: followed while they grow, or replayed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from netweight import artifact
from netweight.errors import ArtifactError, DataError
from netweight.monitor.watch import Alert, Monitor, Record
from netweight.signals import Fingerprint

_LOOK = 0.5  # seconds between looks at a log that is followed
_MOST = 65_536  # characters of a line


def monitors(folders: Sequence[Path], budget: float) -> dict[tuple[str, str], Monitor]:
    """One for each artifact, by name and version. `budget`: false alarms a month, of each.

    Raises ArtifactError, CorruptArtifact, OptionError.
    """
    made = {}
    for folder in folders:
        manifest = artifact.read_manifest(folder)
        name, version = artifact.name_of(folder), manifest.digest[:12]
        made[name, version] = Monitor(read_fingerprint(folder, manifest), budget)
    return made


def read_fingerprint(folder: Path, manifest: artifact.Manifest) -> Fingerprint:
    """What an artifact's certify rows looked like to it. Raises ArtifactError where it holds nothing of them."""
    if artifact.FINGERPRINT not in manifest.files:
        raise ArtifactError(
            f"{folder.name} has no fingerprint to compare with; run `optimize` again with the same --out."
        )
    return Fingerprint.from_json(artifact.read_file(folder, manifest, artifact.FINGERPRINT))


def lines(path: Path, stop: threading.Event | None = None, at: int = 0) -> Iterator[str]:
    """Lines of a log from byte `at` on; with `stop`, also those that are yet to come, until it is set. A log that was
    cut short, or moved away and begun anew, is read from its beginning. Raises DataError where there is none."""
    if not path.is_file():
        raise DataError(f"there is no log {path}; `netweight serve --log` writes one.")
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        file.seek(at)
        held = b""
        while True:
            found = file.readline(_MOST)
            held += found
            if held.endswith(b"\n") or len(held) >= _MOST:
                yield held.decode("utf-8", "replace")
                held = b""
            elif not found:
                if stop is None or stop.wait(_LOOK):
                    break
                try:
                    now = path.stat()
                    newer = None if os.path.samestat(now, os.fstat(file.fileno())) else path.open("rb")
                except OSError:  # it has been moved away, and the next one is still to come, or cannot be opened now
                    continue
                if newer is not None:
                    stack.close()
                    file = stack.enter_context(newer)
                    held = b""
                elif now.st_size < file.tell():
                    file.seek(0)
                    held = b""
        if held and stop is None:
            yield held.decode("utf-8", "replace")


def replay(
    log: Iterable[str],
    monitor_of: Callable[[str, str], Monitor | None],
    broken: Callable[[Exception], object] | None = None,
) -> Iterator[Alert]:
    """Alerts of a log, in order. `monitor_of` a model's name and version; rows that nobody watches are passed over, and
    with `broken`, which is told why, lines that are no record.

    Raises DataError with the number of a line that is no record, where nobody is told.
    """
    for number, line in enumerate(log, 1):
        if not line.strip():
            continue
        try:
            record = Record.from_line(line)
        except (ValueError, KeyError, TypeError) as problem:
            if broken is None:
                raise DataError(
                    f"line {number} of the log is no record of an answer ({problem!r}); remove that line."
                ) from None
            broken(problem)
            continue
        monitor = monitor_of(record.model, record.version)
        if monitor is not None:
            yield from monitor.see(record)
