"""A candidate beside a model: silently (shadow), or answering some requests (canary), until a test says which it is.

Of every request that both see, one row drawn at random counts, so that counts are of independent rows. The test's
bounds hold at every row at once (`share_bounds`), so the verdict may be awaited.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from netweight.errors import OptionError
from netweight.monitor.martingale import share_bounds
from netweight.serve.hosted import Hosted, Models
from netweight.serve.options import Rollout
from netweight.serve.problems import Problem
from netweight.serve.steady import Said
from netweight.task import Classify, Task

log = logging.getLogger("netweight.serve")
Verdict = Literal["undecided", "safe", "harmful"]
_LEVEL = 0.05
_AT_ONCE = 64  # comparisons that may run beside requests; beyond, requests are not compared


class Trial:
    """Counts of one candidate against one version of its model."""

    def __init__(self, candidate: Hosted, plan: Rollout, seed: int | None = None) -> None:
        self.candidate, self.plan = candidate, plan
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._against = ""
        self.rows = self.different = self.failed = 0
        self.verdict: Verdict = "undecided"

    def chosen(self, hosted: Hosted) -> bool:
        """Whether the next request is one of the candidate's. Another version of the model starts the count anew."""
        if hosted.engine.version != self._against:
            self._against, self.rows, self.different, self.failed = hosted.engine.version, 0, 0, 0
            self.verdict = "undecided"
            try:
                comparable(hosted.name, hosted.engine, self.candidate.engine)
            except OptionError as problem:
                log.error("the candidate is asked no more: %s", problem)
                self.verdict = "harmful"
        return self.verdict != "harmful" and self._random.random() < self.plan.share

    async def answer(
        self, hosted: Hosted, texts: Sequence[str], pairs: Sequence[str] | None, seconds: float
    ) -> tuple[Hosted, Said]:
        """Both are asked; the candidate's answer goes out in a canary, unless it fails."""
        ours, against = asyncio.ensure_future(hosted.queue.ask(texts, pairs, seconds)), hosted.engine.version
        if self.plan.mode == "shadow":
            said = await ours
            self._beside(self._compare(against, said, texts, pairs, seconds))
            return hosted, said
        try:
            said = await self.candidate.queue.ask(texts, pairs, seconds)
        except Exception as problem:
            self._failed(against, problem)
            return hosted, await ours
        self._beside(self._against_ours(against, ours, said))
        return self.candidate, said

    def _beside(self, work: Any) -> None:
        if len(self._running) >= _AT_ONCE:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(
        self, against: str, ours: Said, texts: Sequence[str], pairs: Sequence[str] | None, seconds: float
    ) -> None:
        i = self._random.randrange(len(texts))
        second = None if pairs is None else [pairs[i]]
        try:
            theirs = await self.candidate.queue.ask([texts[i]], second, seconds)
        except Exception as problem:
            self._failed(against, problem)
            return
        self._count(against, ours.stretch(i, i + 1), theirs)

    async def _against_ours(self, against: str, ours: asyncio.Future[Said], theirs: Said) -> None:
        try:
            said = await ours
        except Exception:  # ours is busy or broken: that says nothing about the candidate
            return
        i = self._random.randrange(len(said.outputs.logits))
        self._count(against, said.stretch(i, i + 1), theirs.stretch(i, i + 1))

    def _failed(self, against: str, problem: Exception) -> None:
        """A candidate that is only busy did not fail."""
        if not isinstance(problem, Problem):
            log.error("the candidate of %s failed: %s", self.candidate.name, type(problem).__name__)
            self._seen(against, different=True, failed=True)

    def _count(self, against: str, one: Said, other: Said) -> None:
        self._seen(against, int(one.outputs.logits.argmax()) != int(other.outputs.logits.argmax()))

    def _seen(self, against: str, different: bool, failed: bool = False) -> None:
        if against != self._against:  # another version took the model's place meanwhile
            return
        self.rows += 1
        self.different += different
        self.failed += failed
        low, high = self.bounds
        found: Verdict = "safe" if high <= self.plan.allowed else "harmful" if low > self.plan.allowed else "undecided"
        # What is safe may yet prove harmful, as where other rows come than before; what is harmful stays so.
        if found not in (self.verdict, "undecided") and self.verdict != "harmful":
            self.verdict = found
            advice = "it may replace the model" if found == "safe" else "it is asked no more"
            log.warning("%s: the candidate is %s, %s: %s", self.candidate.name, found, advice, self.state())

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the share of rows on which the two differ, right at every moment with 95 %."""
        return share_bounds(self.different, self.rows, _LEVEL)

    def close(self) -> None:
        """Answer what waits, take nothing more."""
        self.candidate.queue.close()

    def state(self) -> dict[str, Any]:
        """For people and `GET /v1/models`."""
        low, high = self.bounds
        return {
            "version": self.candidate.engine.version,
            "against": self._against,
            "mode": self.plan.mode,
            "share": self.plan.share,
            "rows": self.rows,
            "different": self.different,
            "failed": self.failed,
            "bounds": [round(low, 6), round(high, 6)],
            "allowed": self.plan.allowed,
            "verdict": self.verdict,
        }


class Answers(Protocol):
    """What a manifest and an engine say of what they answer."""

    @property
    def task(self) -> Task: ...
    @property
    def paired(self) -> bool | None: ...


def comparable(name: str, model: Answers, candidate: Answers) -> None:
    """Raises OptionError where answers of model and candidate cannot be compared row by row."""
    task, other = model.task, candidate.task
    if {model.paired, candidate.paired} == {True, False}:
        raise OptionError(f"{name}: one of model and candidate answers pairs of texts, the other single ones.")
    if not isinstance(task, Classify) or not isinstance(other, Classify):
        raise OptionError(f"{name}: candidates are compared by label; a task of scores has none.")
    if task.labels != other.labels:
        raise OptionError(f"{name}: the candidate has other labels than the model; replace the folder instead.")


def begin(models: Models, name: str, folder: Path, plan: Rollout) -> None:
    """Load a candidate for the model `name` and try it from now on.

    Raises ArtifactError, CorruptArtifact, and OptionError where the two cannot be compared.
    """
    candidate = models.made(folder, name)
    comparable(name, models[name].engine, candidate.engine)
    models.trials[name] = Trial(candidate, plan)
