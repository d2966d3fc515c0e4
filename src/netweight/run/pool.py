"""Processes that a program starts once and that work for its parallel runs; what is lost is noticed and replaced by
those that are left."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from netweight.errors import OptionError, RunError
from netweight.run.commands import (
    Cancel,
    Close,
    Command,
    Do,
    Done,
    Failed,
    Give,
    Idle,
    Open,
    Reply,
    Result,
    Told,
    Waits,
)
from netweight.run.group import Join, refused
from netweight.run.strategies import WHOLE
from netweight.run.worker import Line, error_of, main
from netweight.train import Reporter

_TRIES = 5  # groups that may fail one after the other though nobody is lost
_START = 120.0  # seconds that a process may take to start


@dataclass(eq=False)
class _Member:
    """A process, the line to it, and its rank in the group."""

    process: SpawnProcess
    line: Line
    rank: int

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"

    def hear(self) -> Any:
        """The next message, or None where the process is gone."""
        try:
            return self.line.hear()
        except (EOFError, OSError):
            return None

    def say(self, message: object) -> None:
        """Whoever is gone is noticed when it does not answer."""
        with suppress(OSError):
            self.line.say(message)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.end.close()


class Pool:
    """Processes of this machine; they start with the first command and end with `close`.

    Args:
        processes: how many.
        threads: of each.
        pin: give each a core of its own.
    """

    def __init__(self, processes: int = 2, threads: int = 1, pin: bool = False) -> None:
        if processes < 1 or threads < 1:
            raise OptionError(f"{processes} processes of {threads} threads are asked for; both must be 1 or more.")
        self.processes, self.threads, self.pin = processes, threads, pin
        self.members: list[_Member] = []
        self._numbers = itertools.count()
        self.opened: dict[int, Open] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.together: float | None = None  # the timeout of the group that all members are in

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the processes, by rank."""
        return [member.process.pid or 0 for member in self.members]

    def close(self) -> None:
        """End the processes. The next command would start new ones."""
        for member in self.members:
            member.kill()
        self.members, self.together = [], None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def open(self, opened: Open) -> int:
        """Rows that commands may name; the number of `opened` is given here."""
        number = next(self._numbers)
        self.opened[number] = replace(opened, number=number)
        for member in self.members:
            member.say(self.opened[number])
        return number

    def shut(self, number: int) -> None:
        """Such rows are needed no more."""
        if self.opened.pop(number, None):
            for member in self.members:
                member.say(Close(number))

    def do(self, number: int, command: Command, reporter: Reporter) -> dict[str, Tensor]:
        """What a command gives.

        Raises what it raises in a process (errors of this package as they are, others as RunError), what the reporter
        raises, and RunError where no process is left.
        """
        try:
            self.start()
            round_ = _Round(self, number, command, reporter)
            while True:
                if (found := round_.played()) is not None:
                    return found
        except BaseException as problem:
            if not isinstance(problem, Exception):
                self.close()  # Ctrl-C: nobody waits for the end of a step
            raise

    def start(self) -> None:
        """Start the processes, where there are none. Raises RunError where they do not come."""
        if self.members:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="netweight-")
        context = get_context("spawn")
        cores = sorted(os.sched_getaffinity(0)) if self.pin and hasattr(os, "sched_getaffinity") else []
        for rank in range(self.processes):
            here, there = context.Pipe()
            core = cores[rank % len(cores)] if cores else None
            process = context.Process(target=main, args=(there, self.threads, core), daemon=True)
            process.start()
            there.close()
            self.members.append(_Member(process, Line(here), rank))
        for member in self.members:
            if not member.line.end.poll(_START) or not isinstance(member.hear(), Idle):
                name = member.name
                self.close()
                raise RunError(
                    f"{name} did not start. A script that uses Parallel needs `if __name__ == '__main__':` around what "
                    "it does, because its processes import it."
                )
            for opened in self.opened.values():
                member.say(opened)

    def joins(self, timeout: float) -> Iterator[Join]:
        """A new group of all members, one value for each; ranks follow their order."""
        assert self._folder is not None  # there are members
        file = Path(self._folder.name) / f"group-{next(self._numbers)}"
        for rank, member in enumerate(self.members):
            member.rank = rank
            yield Join(str(file), rank, len(self.members), timeout)


class _Round:
    """One command: messages until every process has ended it, or waits for a new group."""

    def __init__(self, pool: Pool, number: int, command: Command, reporter: Reporter) -> None:
        self.pool, self.number, self.command, self.reporter = pool, number, command, reporter
        opened = pool.opened[number]
        self.setup, self.whole = opened.setup, opened.strategy in WHOLE
        self.raised: Exception | None = None
        self.failures = 0
        self.heard: dict[_Member, Any] = {}
        self.gone: list[str] = []
        self._begin()

    def _begin(self) -> None:
        """The command, for all."""
        self.heard = {}
        new = self.pool.together != self.setup.timeout
        joins = list(self.pool.joins(self.setup.timeout)) if new else [None] * len(self.pool.members)
        self.pool.together = None
        for member, join in zip(self.pool.members, joins, strict=True):
            member.say(Do(self.number, self.command, join))

    def played(self) -> dict[str, Tensor] | None:
        """The result; None where the round goes on with a new group."""
        self.gone = []
        self._listen()
        if self.raised is not None:
            self._cancel()
            raise self.raised
        if not self.pool.members:
            self.pool.close()
            raise refused(f"no process is left: {'; '.join(self.gone)}")
        failed = {m: said for m, said in self.heard.items() if isinstance(said, Failed)}
        # Where one is gone, others fail of that, in whichever words a library has for it.
        real = [m for m, said in failed.items() if said.kind or not self.gone]
        if real:
            self._cancel()
            raise error_of(failed[real[0]], real[0].rank, real[0].process.pid or 0)
        done = [m for m, said in self.heard.items() if isinstance(said, Done)]
        if done:
            self._cancel()
            done[0].say(Give())
            given = done[0].hear()
            if isinstance(given, Result):
                self.pool.together = self.setup.timeout if len(done) == len(self.pool.members) else None
                return given.held
            self._lose(done[0], "ended")
        self._again(whole=self.whole and not failed and not done)
        return None

    def _again(self, whole: bool) -> None:
        """Go on: those who wait in a new group, or all from the start, which is the last checkpoint."""
        self.failures = 0 if self.gone else self.failures + 1
        if self.failures >= _TRIES:
            self._cancel()
            why = next((said.why for said in self.heard.values() if isinstance(said, Waits)), "")
            raise refused(f"{_TRIES} groups of processes failed one after the other: {why}")
        left = len(self.pool.members)
        if self.gone:
            where = "" if whole else ", from the last checkpoint"
            plural = "process" if left == 1 else "processes"
            self.reporter.note(f"{'; '.join(self.gone)}: going on with {left} {plural}{where}")
        if not whole:
            self._cancel()
            self._begin()
            return
        self.heard = {}
        for member, join in zip(self.pool.members, self.pool.joins(self.setup.timeout), strict=True):
            member.say(join)

    def _listen(self) -> None:
        """Until every process has ended the command or waits. One that stays silent while another waits is killed."""
        first = 0.0
        while missing := [m for m in self.pool.members if m not in self.heard]:
            by = {m.line.end: m for m in missing}
            ready = connection.wait(list(by), self.setup.timeout if first else None)
            for end in ready:
                self._take(by[end])  # type: ignore[index]
            if not first and any(isinstance(said, Waits | Failed) for said in self.heard.values()):
                first = time.monotonic()
            if first and time.monotonic() - first > self.setup.timeout:
                for member in missing:
                    if member not in self.heard and member in self.pool.members:
                        self._lose(member, f"did not answer for {self.setup.timeout:g} s and was ended")

    def _take(self, member: _Member) -> None:
        said = member.hear()
        if said is None:
            member.process.join(10)
            code = member.process.exitcode
            self._lose(member, f"was ended by signal {-code}" if code and code < 0 else f"ended with status {code}")
        elif isinstance(said, Told):
            if self.raised is None:
                try:
                    getattr(self.reporter, said.what)(*said.values)
                except Exception as problem:  # whatever a reporter raises ends the fit
                    self.raised = problem
            member.say(Reply(self.raised is None))
        else:
            self.heard[member] = said

    def _lose(self, member: _Member, how: str) -> None:
        self.gone.append(f"{member.name} {how}")
        self.heard.pop(member, None)
        member.kill()
        self.pool.members.remove(member)

    def _cancel(self) -> None:
        """End the command where it waits for a group."""
        for member, said in list(self.heard.items()):
            if isinstance(said, Waits) and member in self.pool.members:
                member.say(Cancel())
                if member.hear() is None:
                    self._lose(member, "ended")
