"""What is written down of answers: records of a sample of rows, and, where asked, rows that are worth labelling.

All of it happens in a thread of its own. Where that cannot follow, rows are left out; requests never wait for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from netweight.engine import Outputs
from netweight.errors import OptionError
from netweight.monitor.watch import Record
from netweight.serve.hosted import Hosted
from netweight.serve.steady import Said
from netweight.signals import AGREES

log = logging.getLogger("netweight.serve")
_WAITING = 1000  # samples that may wait for the thread
_SHADOW = 10  # one in so many rows is also shown to the strongest tier
_UNSURE = 0.05  # rows less sure than this share of the certified ones are worth labelling
_KEPT = 10_000


@dataclass(frozen=True)
class _Sample:
    hosted: Hosted
    at: float
    texts: Sequence[str]
    pairs: Sequence[str] | None
    said: Said


class Recorder:
    """Appends to `path`, and rows worth labelling, with their text, to `keep`.

    Args:
        rate: rows a second that are written down at most, on average.
    """

    def __init__(self, path: Path, rate: float = 5.0, keep: Path | None = None, seed: int | None = None) -> None:
        self._rate, self._allowed, self._last = rate, rate, time.monotonic()
        self._waiting: queue.Queue[_Sample | None] = queue.Queue(_WAITING)
        self._random = random.Random(seed)
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._keep = Keeper(keep) if keep is not None else None
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def drawn(self, count: int) -> list[int]:
        """Which of `count` rows are to be offered: drawn when they arrive, since of a burst those that an early tier is
        sure of are answered first, and would be taken before the others."""
        now = time.monotonic()
        self._allowed = min(2 * self._rate + 1, self._allowed + (now - self._last) * self._rate)
        self._last = now
        taken = min(count, int(self._allowed))
        self._allowed -= taken
        return sorted(self._random.sample(range(count), taken))

    def offer(
        self, hosted: Hosted, texts: Sequence[str], pairs: Sequence[str] | None, said: Said, rows: list[int]
    ) -> None:
        """An answer, and which of its rows were drawn."""
        if hosted.fingerprint is None or not rows:
            return
        outputs = said.outputs
        part = Said(Outputs(outputs.logits[rows], outputs.confidence[rows], outputs.tier[rows]))
        second = None if pairs is None else [pairs[i] for i in rows]
        with suppress(queue.Full):
            self._waiting.put_nowait(_Sample(hosted, time.time(), [texts[i] for i in rows], second, part))

    def close(self) -> None:
        """Write what waits."""
        self._waiting.put(None)
        self._thread.join(30)
        self._file.close()

    def _work(self) -> None:
        while (sample := self._waiting.get()) is not None:
            try:
                self._reopen()
                for record in self._records(sample):
                    self._file.write(f"{record.to_line()}\n")
                self._file.flush()
                if self._keep is not None:
                    self._keep(sample.hosted, sample.texts, sample.pairs, sample.said.outputs)
            except Exception:
                log.exception("rows could not be written down")

    def _reopen(self) -> None:
        """Begin a new log where the old one has been moved away, as logrotate does."""
        here = os.fstat(self._file.fileno())
        now = self._path.stat() if self._path.exists() else None
        if now is None or (now.st_dev, now.st_ino) != (here.st_dev, here.st_ino):
            # In this order, so that where the new one cannot be opened now, the next sample tries again.
            old, self._file = self._file, self._path.open("a", encoding="utf-8")
            old.close()

    def _records(self, sample: _Sample) -> list[Record]:
        engine, fingerprint = sample.hosted.engine, sample.hosted.fingerprint
        assert fingerprint is not None
        tokens, outputs = engine.encoder.encode(sample.texts, sample.pairs), sample.said.outputs
        signals = fingerprint.signals(engine.encoder, tokens, outputs)
        rows = [{name: float(values[i]) for name, values in signals.items()} for i in range(len(tokens))]
        shown = [i for i in range(len(tokens)) if self._random.random() < 1 / _SHADOW]
        if shown and AGREES in fingerprint.histograms:
            best = engine.logits(len(engine.tiers) - 1, tokens.take(np.array(shown))).argmax(axis=1)
            for i, label in zip(shown, best.tolist(), strict=True):
                rows[i][AGREES] = float(label == outputs.logits[i].argmax())
        return [Record(sample.at, sample.hosted.name, engine.version, values) for values in rows]


class Keeper:
    """Keeps texts that the model is less sure of than of nearly all certified ones, each once, 10,000 at most.

    The file is for its owner's eyes only, since it holds what customers wrote: one that was there already, and one
    that is begun anew where it was moved away, as well.
    """

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        try:
            path.chmod(0o600)
        except PermissionError:
            raise OptionError(
                f"{path} is somebody else's, who could read what customers write; name another file."
            ) from None
        self._path = path
        held = path.read_bytes()
        if not held.endswith(b"\n") and held:
            # A process that was killed left half a line; the next one must not be glued to it.
            with path.open("ab") as file:
                file.write(b"\n")
        rows = [self._read(line) for line in held.split(b"\n")]
        self._seen = {self._key(*row) for row in rows if row is not None}

    @staticmethod
    def _read(line: bytes) -> tuple[str, str | None] | None:
        try:
            found = json.loads(line)
            return found["text"], found.get("pair")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # half a line, or an empty one

    @staticmethod
    def _key(text: str, pair: str | None) -> bytes:
        return hashlib.sha256(json.dumps([text, pair]).encode()).digest()

    def __call__(self, hosted: Hosted, texts: Sequence[str], pairs: Sequence[str] | None, outputs: Outputs) -> None:
        assert hosted.fingerprint is not None
        limit = hosted.fingerprint.histograms["confidence"].quantile(_UNSURE)
        lines = []
        for i in np.flatnonzero(outputs.confidence < limit).tolist():
            pair = None if pairs is None else pairs[i]
            key = self._key(texts[i], pair)
            if key not in self._seen and len(self._seen) < _KEPT:
                self._seen.add(key)
                row = {"text": texts[i]} | ({} if pair is None else {"pair": pair})
                row["confidence"] = round(float(outputs.confidence[i]), 6)  # type: ignore[assignment]
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if lines:
            with open(self._path, "a", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
                file.writelines(lines)
