"""Processes that work for the parallel runs of a program, whoever starts them; what is lost is noticed, and those that
are left go on."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from netweight.errors import NetweightError, OptionError
from netweight.reporter import Reporter
from netweight.run.commands import (
    Cancel,
    Close,
    Command,
    Do,
    Done,
    Failed,
    Fit,
    Give,
    Open,
    Reply,
    Result,
    Told,
    Waits,
)
from netweight.run.group import Join, Place, refused
from netweight.run.strategies import WHOLE, workable
from netweight.run.worker import error_of

_TRIES = 5  # groups that may fail one after the other though nobody is lost


class Member(Protocol):
    """A process, and its rank in the group."""

    rank: int

    @property
    def name(self) -> str: ...

    def say(self, message: object) -> None:
        """Send a message. To a process that is gone it is lost without an error: `hear` then gives None."""

    def hear(self) -> Any:
        """The next message; waits. None where the process is gone."""


M = TypeVar("M", bound=Member)


class Crew(ABC, Generic[M]):
    """Processes; they start with the first command and end with `close`.

    Args:
        processes: how many.
        threads: of each.
        restarts: how often one command may begin again with new processes when too few are left to go on.
    """

    def __init__(self, processes: int, threads: int, restarts: int = 0) -> None:
        if processes < 1 or threads < 1:
            raise OptionError(f"{processes} processes of {threads} threads are asked for; both must be 1 or more.")
        self.processes, self.threads, self.restarts = processes, threads, restarts
        self.members: list[M] = []
        self._numbers = itertools.count()
        self.opened: dict[int, Open] = {}
        self.together: float | None = None  # the timeout of the group that all members are in

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- what differs from kind to kind ---

    @abstractmethod
    def ready(self, members: Collection[M], timeout: float | None) -> list[M]:
        """Members that have sent something or are gone; waits for one, `timeout` seconds at most (None: for ever)."""

    @abstractmethod
    def lose(self, member: M, how: str | None = None) -> list[str]:
        """A member is gone, or is ended now for a reason: it is taken off, with those that cannot go on without it.
        Gives who was lost, and how."""

    @abstractmethod
    def _place(self, number: int) -> Place:
        """Where the group of that number meets."""

    @abstractmethod
    def _started(self, fewer: bool) -> None:
        """Fill `members`, with fewer than were asked for where that is allowed. Raises RunError where none come."""

    @abstractmethod
    def _stopped(self) -> None:
        """End all processes."""

    # --- what does not ---

    def close(self) -> None:
        """End the processes. The next command would start new ones."""
        self._stopped()
        self.members, self.together = [], None

    def start(self, fewer: bool = False) -> None:
        """Start the processes, where there are none. Raises RunError where they do not come."""
        if self.members:
            return
        self.close()
        try:
            self._started(fewer)
        except BaseException:
            self.close()
            raise
        for opened in self.opened.values():
            self.tell(opened)

    def tell(self, message: object) -> None:
        """Send the same message to every member."""
        for member in self.members:
            member.say(message)

    def open(self, opened: Open) -> int:
        """Rows that commands may name; the number of `opened` is given here."""
        number = next(self._numbers)
        self.opened[number] = replace(opened, number=number)
        self.tell(self.opened[number])
        return number

    def shut(self, number: int) -> None:
        """Drop the rows of this number, which no later command names."""
        if self.opened.pop(number, None):
            self.tell(Close(number))

    def do(self, number: int, command: Command, reporter: Reporter) -> dict[str, Tensor]:
        """What a command gives.

        Raises what it raises in a process (errors of this package as they are, others as RunError), what the reporter
        raises, and RunError where too few processes are left.
        """
        try:
            self.start()
            round_ = _Round(self, number, command, reporter)
            try:
                round_.begin()
                while True:
                    if (found := round_.played()) is not None:
                        return found
            except Exception:
                round_.leave()
                raise
        except BaseException as problem:
            if not isinstance(problem, Exception):
                self.close()  # Ctrl-C: nobody waits for the end of a step
            raise

    def joins(self, members: Sequence[M], timeout: float) -> Iterator[Join]:
        """A new group of these members, one value for each; ranks follow their order."""
        place = self._place(next(self._numbers))
        for rank, member in enumerate(members):
            member.rank = rank
            yield Join(place, rank, len(members), timeout)


class _Round(Generic[M]):
    """One command: messages until every process has ended it, or waits for a new group.

    `team` works on it: all members, or after a loss as many as can divide the network between them; others idle.
    """

    def __init__(self, crew: Crew[M], number: int, command: Command, reporter: Reporter) -> None:
        self.crew, self.number, self.command, self.reporter = crew, number, command, reporter
        opened = crew.opened[number]
        self.strategy, self.setup, self.whole = opened.strategy, opened.setup, opened.strategy in WHOLE
        self.raised: Exception | None = None
        self.failures = self.restarts = 0
        self.team: list[M] = []
        self.heard: dict[M, Any] = {}
        self.gone: list[str] = []

    def begin(self) -> None:
        """Send the command to as many members as can work on it together."""
        crew, size = self.crew, self._size()
        if not size:
            self._restart()
            return
        everyone = size == len(crew.members)
        new = not everyone or crew.together != self.setup.timeout
        crew.together = None
        self.heard, do = {}, Do(self.number, self.command, new)
        if everyone:
            crew.tell(do)
        else:
            for member in crew.members[:size]:
                member.say(do)
        self.team = crew.members[:size]
        if new:
            self._meet()

    def _size(self) -> int:
        """How many of those that are there can work. All that were asked for say themselves what is wrong."""
        left = len(self.crew.members)
        if left >= self.crew.processes:
            return left
        network = self.command.model.network if isinstance(self.command, Fit) else None
        return workable(self.strategy, self.setup, left, network)

    def _meet(self) -> None:
        """Send the team into a new group."""
        for member, join in zip(self.team, self.crew.joins(self.team, self.setup.timeout), strict=True):
            member.say(join)

    def played(self) -> dict[str, Tensor] | None:
        """The result; None where the round goes on with a new group."""
        self.gone = []
        self._listen()
        if self.raised is not None:
            raise self.raised
        failed = {m: said for m, said in self.heard.items() if isinstance(said, Failed)}
        # Where one is gone, others fail of that, in whichever words a library has for it. By rank: who is heard first
        # is chance.
        real = sorted((m for m, said in failed.items() if said.kind or not self.gone), key=lambda m: m.rank)
        if real:
            raise error_of(failed[real[0]], real[0].name)
        done = [m for m, said in self.heard.items() if isinstance(said, Done)]
        if done:
            self._cancel()
        for member in (m for m in done if m in self.crew.members):  # each holds the whole result
            member.say(Give())
            given = member.hear()
            if isinstance(given, Result):
                everyone = not self.gone and len(done) == len(self.crew.members)
                self.crew.together = self.setup.timeout if everyone else None
                return given.held
            self._lose(member)
        self._again(whole=self.whole and not failed and not done)
        return None

    def leave(self) -> None:
        """The command has ended with an error: nobody waits for a group any more, or is in the midst of a step."""
        if all(member in self.heard for member in self.team if member in self.crew.members):
            self._cancel()
        else:
            self.crew.close()

    def _restart(self) -> None:
        """From the last checkpoint with new processes, as often as this kind of them allows."""
        few = self._few()
        lost = "; ".join(self.gone)
        what = ": ".join(part for part in (few, lost) if part)
        self.crew.close()
        if self.restarts == self.crew.restarts:
            raise refused(what)
        self.restarts += 1
        try:
            self.crew.start(fewer=True)
        except NetweightError as problem:
            raise refused(f"{what}; {str(problem).rstrip('.')}") from None
        if not self._size():
            raise refused(f"{what}; after a new start {self._few()}")
        self._note(lost or few, whole=False)
        self.begin()

    def _few(self) -> str:
        left = len(self.crew.members)
        if not left:
            return "no process is left"
        return f"{left} {'process is' if left == 1 else 'processes are'} left, too few for tensor={self.setup.tensor}"

    def _note(self, lost: str, whole: bool) -> None:
        size = self._size()
        plural = "process" if size == 1 else "processes"
        self.reporter.note(f"{lost}: going on with {size} {plural}{'' if whole else ', from the last checkpoint'}")

    def _again(self, whole: bool) -> None:
        """Go on: those who wait in a new group, or all from the start, which is the last checkpoint."""
        self.failures = 0 if self.gone else self.failures + 1
        if self.failures >= _TRIES:
            why = next((said.why for said in self.heard.values() if isinstance(said, Waits)), "")
            raise refused(f"{_TRIES} groups of processes failed one after the other: {why}")
        if not whole:
            self._cancel()
        if not self._size():
            self._restart()
            return
        if self.gone:
            self._note("; ".join(self.gone), whole)
        if whole:
            self.heard = {}
            self.team = list(self.crew.members)
            self._meet()
        else:
            self.begin()

    def _listen(self) -> None:
        """Until every process has ended the command or waits. One that stays silent while another waits is killed."""
        first = 0.0
        while missing := [m for m in self.team if m in self.crew.members and m not in self.heard]:
            for member in self.crew.ready(missing, self.setup.timeout if first else None):
                if member in self.crew.members:
                    self._take(member)
            if not first and any(isinstance(said, Waits | Failed) for said in self.heard.values()):
                first = time.monotonic()
            if first and time.monotonic() - first > self.setup.timeout:
                for member in missing:
                    if member not in self.heard and member in self.crew.members:
                        self._lose(member, f"did not answer for {self.setup.timeout:g} s and was ended")

    def _take(self, member: M) -> None:
        said = member.hear()
        if said is None:
            self._lose(member)
        elif isinstance(said, Told):
            if self.raised is None:
                try:
                    getattr(self.reporter, said.what)(*said.values)
                except Exception as problem:  # whatever a reporter raises ends the fit
                    self.raised = problem
            member.say(Reply(self.raised is None))
        else:
            self.heard[member] = said

    def _lose(self, member: M, how: str | None = None) -> None:
        self.gone += self.crew.lose(member, how)
        self.heard.pop(member, None)

    def _cancel(self) -> None:
        """End the command where it waits for a group."""
        for member, said in list(self.heard.items()):
            if isinstance(said, Waits) and member in self.crew.members:
                member.say(Cancel())
                self.heard[member] = member.hear()
                if self.heard[member] is None:
                    self._lose(member)
