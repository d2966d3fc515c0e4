"""Models of a server: loaded, answering, exchanged for newer ones while requests run."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from netweight import artifact
from netweight.engine import Engine, load
from netweight.engine.cascade import expect
from netweight.errors import OptionError
from netweight.monitor.log import read_fingerprint
from netweight.serve.problems import Problem
from netweight.serve.queue import Queue
from netweight.serve.steady import Said, begin, step
from netweight.signals import Fingerprint

log = logging.getLogger("netweight.serve")
# While a model is loaded, and for a moment after it, requests may wait so many times longer: that ends by itself.
_STALLED, _MOMENT = 20, 1.0
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
    memory: int = 0
    mark: tuple[int, int] | None = None

    @property
    def replaced(self) -> bool:
        """Whether its folder holds another manifest than when it was read; not while there is none."""
        now = _mark(self.folder)
        return now is not None and now != self.mark


def _mark(folder: Path) -> tuple[int, int] | None:
    """By which a manifest is known again."""
    try:
        found = (folder / artifact.MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class Second(Protocol):
    """A candidate that sees some of a model's requests."""

    def chosen(self, hosted: Hosted) -> bool: ...
    async def answer(
        self, hosted: Hosted, texts: Sequence[str], pairs: Sequence[str] | None, seconds: float
    ) -> tuple[Hosted, Said]: ...
    def state(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def described(name: str, folder: Path, engine: Engine) -> dict[str, Any]:
    """For `GET /v1/models`. Raises ArtifactError or CorruptArtifact."""
    manifest = artifact.read_manifest(folder)
    said: dict[str, Any] = {
        "name": name,
        "version": engine.version,
        "task": engine.task.kind,
        "labels": list(getattr(engine.task, "labels", ())),
        "tiers": [tier.name for tier in engine.tiers],
        "pairs": engine.paired,
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
        patience: seconds that a request may wait for an engine, when nothing is being loaded.
        observe: told name, rows and seconds of each batch.
        memory: bytes that models may take together; the least recently asked sleep before another one is loaded, and
            wake when they are asked. One that takes more is awake alone.
    """

    def __init__(
        self,
        threads: int,
        patience: float = 0.1,
        observe: Observe = lambda name, rows, seconds: None,
        memory: int | None = None,
    ) -> None:
        self._threads, self._patience, self._observe, self._memory = threads, patience, observe, memory
        self._calm = 0.0  # when loading is over and done with
        self._hosted: OrderedDict[str, Hosted] = OrderedDict()  # awake, the least recently asked first
        self._known: dict[str, tuple[Path, dict[str, Any]]] = {}  # where they lie, and what is said of them
        self._took: dict[str, int] = {}  # bytes of memory that they take
        self._changing = threading.Lock()
        self.trials: dict[str, Second] = {}

    def patience(self) -> float:
        """Seconds that who comes now may wait."""
        stalled = self._changing.locked() or time.monotonic() < self._calm
        return self._patience * (_STALLED if stalled else 1)

    def __iter__(self) -> Any:
        """Those that are awake."""
        return iter(list(self._hosted.values()))

    @property
    def known(self) -> list[dict[str, Any]]:
        """What is said of every model."""
        return [
            about
            | {"asleep": name not in self._hosted}
            | ({"candidate": self.trials[name].state()} if name in self.trials else {})
            for name, (_, about) in list(self._known.items())
        ]

    def require(self, name: str) -> None:
        """Raises Problem where there is no such model, awake or asleep."""
        if name not in self._known:
            known = ", ".join(sorted(self._known)) or "none"
            raise Problem(404, "unknown-model", f"there is no model {name!r} here; there are: {known}.")

    def __getitem__(self, name: str) -> Hosted:
        """A model that is awake, or woken now. Raises Problem where there is none."""
        self.require(name)
        found = self._hosted.get(name)
        return found if found is not None else self._wake(name)

    def _wake(self, name: str) -> Hosted:
        with self._changing:
            try:
                return self._hosted.get(name) or self._load(self._known[name][0], name)
            except Exception as problem:  # every engine has errors of its own
                log.exception("%s could not be woken", name)
                raise Problem(
                    503, "not-ready", f"model {name!r} cannot be loaded now.", {"Retry-After": "5"}
                ) from problem

    async def answer(
        self,
        name: str,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        seconds: float = 30.0,
        tried: bool = True,
    ) -> tuple[Hosted, Said]:
        """Answers, and who gave them; no candidate sees rows that are not to be `tried`. Raises Problem."""
        self.require(name)
        while True:
            hosted = self._hosted.get(name)
            if hosted is None:
                hosted = await asyncio.to_thread(self._wake, name)
            with suppress(KeyError):  # it was put to sleep in between
                self._hosted.move_to_end(name)
            trial = self.trials.get(name) if tried else None
            try:
                expect(hosted.engine.paired, pairs is not None, name)
                if trial is not None and trial.chosen(hosted):
                    return await trial.answer(hosted, texts, pairs, seconds)
                return hosted, await hosted.queue.ask(texts, pairs, seconds)
            except Problem:
                # A newer version took this one's place between the two lines above.
                if not (hosted.queue.closed and self._hosted.get(name) is not hosted):
                    raise
            except OptionError as problem:
                raise Problem(409, "other-rows", str(problem)) from None
            except Exception as problem:
                raise Problem(
                    500, "engine-failed", "no tier of this model could answer; the server's log says why."
                ) from problem

    def load(self, folder: Path, name: str | None = None) -> Hosted:
        """Verify, load and warm up an artifact, and let it answer from now on; the one before answers what it has.

        Raises ArtifactError or CorruptArtifact; then nothing has changed, but others may sleep, to make room for it.
        """
        name = name or artifact.name_of(folder)
        if not name or "/" in name:
            raise OptionError(f"a model cannot be called {name!r}; rename its folder.")
        with self._changing:
            return self._load(folder, name)

    def _load(self, folder: Path, name: str) -> Hosted:
        before = self._hosted.get(name)
        hosted = self.made(folder, name, alone=before is None)
        self._hosted[name] = hosted
        self._known[name], self._took[name] = (folder, hosted.about), hosted.memory
        if before is not None:
            before.queue.close()
        self._hosted.move_to_end(name)
        self._make_room()
        return hosted

    def made(self, folder: Path, name: str, alone: bool = False) -> Hosted:
        """Verified, loaded and warm, but not asked by anybody; where it comes `alone`, and not beside a version before
        it, room is made first. Raises ArtifactError or CorruptArtifact."""
        mark = _mark(folder)  # before anything is read: what comes in between is seen later
        manifest = artifact.check(folder)
        least = artifact.size(folder, manifest)
        if alone:
            # Where another one has just gone, its pages may be taken again, and how much the process grew says little.
            least = max(least, self._took.get(name, 0))
            self._make_room(least)
        held = resident()
        engine = load(folder, self._threads)
        engine.warm()
        about = described(name, folder, engine)
        known = read_fingerprint(folder, manifest) if artifact.FINGERPRINT in manifest.files else None
        queue = Queue(
            partial(begin, engine),
            partial(step, engine),
            len(engine.tiers),
            self.patience,
            partial(self._observe, name),
        )
        memory = max(resident() - held, least)
        self._calm = time.monotonic() + _MOMENT
        return Hosted(name, folder, engine, queue, about, known, memory, mark)

    def _make_room(self, coming: int = 0) -> None:
        """For so many bytes; where nothing comes, one stays awake, whatever it takes."""
        while (
            self._memory is not None
            and sum(h.memory for h in self) + coming > self._memory
            and len(self._hosted) > (coming == 0)
        ):
            name, sleeper = self._hosted.popitem(last=False)
            log.info("%s sleeps: models may take %d bytes, and it was asked least recently", name, self._memory)
            sleeper.queue.close()

    async def exchange(self, name: str, folder: Path | None = None) -> Hosted:
        """`load` beside the event loop; without a folder, from where the model lies already."""
        place = folder or self._known[name][0]
        return await asyncio.to_thread(self.load, place, name)

    def close(self) -> None:
        """Answer what waits, take nothing more."""
        for hosted in self:
            hosted.queue.close()
        for trial in self.trials.values():
            trial.close()
