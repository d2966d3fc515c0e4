"""A process of a pool: it does what it is told, in groups that it is told to join."""

from __future__ import annotations

import copyreg
import io
import os
import signal
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from netweight.errors import NetweightError, RunError
from netweight.run.commands import (
    Cancel,
    Close,
    Command,
    Do,
    Done,
    Failed,
    Fit,
    Give,
    Idle,
    Open,
    Reply,
    Result,
    Told,
    Waits,
)
from netweight.run.ddp import Again
from netweight.run.group import device_of, leave
from netweight.run.local import Local
from netweight.run.strategies import seams_of
from netweight.seams import Lost, Seams, State

_LINES = 3  # of a traceback that an error shows


class _ByValue(ForkingPickler):
    """Tensors travel as bytes: torch would put them into shared memory, of which containers have little, and where they
    would stay shared."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.dispatch_table = copyreg.dispatch_table.copy()


class Line(Protocol):
    """One end of what is between a program and a process that works for it."""

    def say(self, message: object) -> None:
        """Raises OSError where nobody listens."""

    def hear(self) -> Any:
        """Waits. Raises EOFError or OSError where the other end is gone."""


class Pipe:
    """A line on one machine."""

    def __init__(self, end: Connection) -> None:
        self.end = end

    def say(self, message: object) -> None:
        held = io.BytesIO()
        _ByValue(held).dump(message)
        self.end.send_bytes(held.getbuffer())

    def hear(self) -> Any:
        return ForkingPickler.loads(self.end.recv_bytes())


class Cancelled(Exception):
    """The program wants no more of a command."""


class Worker:
    """Serves one line until it is closed."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.opened: dict[int, tuple[Local, Open]] = {}
        self.held: dict[str, Tensor] = {}

    def serve(self) -> None:
        while True:
            asked = self.line.hear()
            if isinstance(asked, Open):
                self.opened[asked.number] = Local(asked.data, asked.folder), asked
            elif isinstance(asked, Close):
                self.opened.pop(asked.number, None)
            elif isinstance(asked, Give):
                self.line.say(Result(self.held))
            elif isinstance(asked, Do):
                self.line.say(self._answer(asked))

    def _answer(self, asked: Do) -> Done | Failed | Idle:
        self.held = {}
        local, opened = self.opened[asked.number]
        command = asked.command
        if isinstance(command, Fit):
            command = replace(command, plan=replace(command.plan, reporter=_Reporter(self.line)))
        try:
            self.held = self._done(command, local, opened, asked.new)
            return Done()
        except Exception as problem:
            lines = traceback.format_exc().strip().splitlines()[-2 * _LINES :]
            # Others learn that this process has left when nothing holds the group any more.
            traceback.clear_frames(problem.__traceback__)
            local.seams = Seams()
            leave()
            if isinstance(problem, Cancelled):
                return Idle()
            # Lost is no failure of this process: the program knows who is gone.
            if isinstance(problem, NetweightError) and not isinstance(problem, Lost):
                return Failed(type(problem).__name__, str(problem), "")
            return Failed("", f"{type(problem).__name__}: {problem}", "\n".join(lines))

    def _done(self, command: Command, local: Local, opened: Open, new: bool) -> dict[str, Tensor]:
        """The command, again and again while processes are lost."""
        try:
            if new:
                self.line.hear()()
        except Lost as lost:
            self.rejoin(lost)
        while True:
            device = device_of(dist.get_rank(), opened.setup.device)
            seams = seams_of(opened.strategy, opened.setup, device, self.rejoin)
            local.seams = seams
            try:
                return command(local)
            except Again:
                continue
            except Lost:
                try:
                    seams.regroup(State({}, ""), (-1, -1, -1))
                except Again:
                    continue

    def rejoin(self, lost: Lost) -> None:
        """Wait for a new group, and enter it. Raises Cancelled where there will be none."""
        while True:
            leave()
            self.line.say(Waits(str(lost)))
            asked = self.line.hear()
            if isinstance(asked, Cancel):
                raise Cancelled
            try:
                asked()
                return
            except Lost as again:
                lost = again


class _Reporter:
    """Tells the program's reporter what the first process has to say, and ends when it raises."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def start(self, label: str, steps: int, done: int) -> None:
        self._tell(Told("start", (label, steps, done)))

    def step(self, step: int, loss: float, rate: float) -> None:
        self._tell(Told("step", (step, loss, rate)))

    def note(self, message: str) -> None:
        self._tell(Told("note", (message,)))

    def _tell(self, told: Told) -> None:
        if dist.get_rank():
            return
        self._line.say(told)
        reply: Reply = self._line.hear()
        if not reply.go_on:
            raise Cancelled


def main(end: Connection, threads: int, core: int | None) -> None:
    """The whole life of a process. It ends when the program does, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(threads)
    line = Pipe(end)
    try:
        line.say(Idle())
        Worker(line).serve()
    except (EOFError, OSError):
        leave()


def error_of(failed: Failed, name: str) -> NetweightError:
    """What the program raises: an error of this package as it was, any other with the process and where it arose."""
    from netweight import errors

    if failed.kind:
        kind: type[NetweightError] = getattr(errors, failed.kind, RunError)
        error = kind.__new__(kind)
        error.args = (failed.text,)
        return error
    return RunError(f"{name} failed with {failed.text}\n{failed.trace}")
