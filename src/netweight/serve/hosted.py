"""Models of a server: loaded, answering, exchanged for newer ones while requests run."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from netweight import artifact
from netweight.engine import Engine, load
from netweight.errors import OptionError
from netweight.monitor.log import read_fingerprint
from netweight.serve.problems import Problem
from netweight.serve.queue import Queue
from netweight.serve.steady import Said, answer
from netweight.signals import Fingerprint

Observe = Callable[[str, int, float], None]


@dataclass(frozen=True)
class Hosted:
    """One version of one model, with its queue, and what is said of it: read when it was loaded, since its folder may
    hold another one by now."""

    name: str
    folder: Path
    engine: Engine
    queue: Queue
    about: dict[str, Any]
    fingerprint: Fingerprint | None = None


def described(name: str, folder: Path, engine: Engine) -> dict[str, Any]:
    """For `GET /v1/models`. Raises ArtifactError or CorruptArtifact."""
    manifest = artifact.read_manifest(folder)
    said: dict[str, Any] = {
        "name": name,
        "version": engine.version,
        "task": engine.task.kind,
        "labels": list(getattr(engine.task, "labels", ())),
        "tiers": [tier.name for tier in engine.tiers],
        "bytes": artifact.size(folder, manifest),
    }
    for key, file in (("certificate", artifact.CERTIFICATE), ("measurements", artifact.MEASUREMENTS)):
        if file in manifest.files:
            said[key] = json.loads(artifact.read_file(folder, manifest, file))
    return said


class Models:
    """Who answers under which name.

    Args:
        threads: of every engine.
        patience: seconds that a request may wait for an engine.
        observe: told name, rows and seconds of each batch.
    """

    def __init__(
        self, threads: int, patience: float = 0.1, observe: Observe = lambda name, rows, seconds: None
    ) -> None:
        self._threads, self.patience, self._observe = threads, patience, observe
        self._hosted: dict[str, Hosted] = {}
        self._changing = threading.Lock()

    def __iter__(self) -> Any:
        return iter(list(self._hosted.values()))

    def __getitem__(self, name: str) -> Hosted:
        """Raises Problem where there is none."""
        found = self._hosted.get(name)
        if found is None:
            known = ", ".join(sorted(self._hosted)) or "none"
            raise Problem(404, "unknown-model", f"there is no model {name!r} here; there are: {known}.")
        return found

    async def answer(
        self, name: str, texts: Sequence[str], pairs: Sequence[str] | None = None, seconds: float = 30.0
    ) -> tuple[Hosted, Said]:
        """Answers, and who gave them. Raises Problem."""
        while True:
            hosted = self[name]
            try:
                return hosted, await hosted.queue.ask(texts, pairs, seconds)
            except Problem:
                # A newer version took this one's place between the two lines above.
                if not (hosted.queue.closed and self._hosted.get(name) is not hosted):
                    raise
            except Exception as problem:
                raise Problem(
                    500, "engine-failed", "no tier of this model could answer; the server's log says why."
                ) from problem

    def load(self, folder: Path, name: str | None = None) -> Hosted:
        """Verify, load and warm up an artifact, and let it answer from now on; the one before answers what it has.

        Raises ArtifactError or CorruptArtifact; then nothing has changed.
        """
        name = name or artifact.name_of(folder)
        if not name or "/" in name:
            raise OptionError(f"a model cannot be called {name!r}; rename its folder.")
        with self._changing:
            artifact.check(folder)
            engine = load(folder, self._threads)
            engine.warm()
            about = described(name, folder, engine)
            manifest = artifact.read_manifest(folder)
            known = read_fingerprint(folder, manifest) if artifact.FINGERPRINT in manifest.files else None
            queue = Queue(partial(answer, engine), self.patience, partial(self._observe, name))
            before = self._hosted.get(name)
            self._hosted[name] = hosted = Hosted(name, folder, engine, queue, about, known)
        if before is not None:
            before.queue.close()
        return hosted

    async def exchange(self, name: str, folder: Path | None = None) -> Hosted:
        """`load` beside the event loop; without a folder, from where the model lies already."""
        place = folder or self[name].folder
        return await asyncio.to_thread(self.load, place, name)

    def close(self) -> None:
        """Answer what waits, take nothing more."""
        for hosted in self:
            hosted.queue.close()
