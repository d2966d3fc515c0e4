"""Processes of this machine that a program starts once for its parallel runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from netweight.errors import RunError
from netweight.run.commands import Idle
from netweight.run.crew import Crew
from netweight.run.group import File
from netweight.run.worker import Pipe, main

_START = 120.0  # seconds that a process may take to start


@dataclass(eq=False)
class _Process:
    """A process, the line to it, and its rank in the group."""

    process: SpawnProcess
    line: Pipe
    rank: int

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"

    def hear(self) -> Any:
        try:
            return self.line.hear()
        except (EOFError, OSError):
            return None

    def say(self, message: object) -> None:
        with suppress(OSError):
            self.line.say(message)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.end.close()


class Pool(Crew[_Process]):
    """Processes of this machine; they start with the first command and end with `close`.

    Args:
        processes: how many.
        threads: of each.
        pin: give each a core of its own.
        restarts: how often one command begins again from its last checkpoint, with all processes new, when too few
            are left to go on.
    """

    def __init__(self, processes: int = 2, threads: int = 1, pin: bool = False, restarts: int = 3) -> None:
        super().__init__(processes, threads, restarts)
        self.pin = pin
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pids(self) -> list[int]:
        """Of the processes, by rank."""
        return [member.process.pid or 0 for member in self.members]

    def ready(self, members: Collection[_Process], timeout: float | None) -> list[_Process]:
        by = {member.line.end: member for member in members}
        return [by[end] for end in connection.wait(list(by), timeout)]  # type: ignore[index]

    def lose(self, member: _Process, how: str | None = None) -> list[str]:
        if how is None:
            member.process.join(10)
            code = member.process.exitcode
            how = f"was ended by signal {-code}" if code and code < 0 else f"ended with status {code}"
        member.kill()
        self.members.remove(member)
        return [f"{member.name} {how}"]

    def _place(self, number: int) -> File:
        assert self._folder is not None  # there are members
        return File(str(Path(self._folder.name) / f"group-{number}"))

    def _started(self, fewer: bool) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="netweight-")
        context = get_context("spawn")
        cores = sorted(os.sched_getaffinity(0)) if self.pin and hasattr(os, "sched_getaffinity") else []
        for rank in range(self.processes):
            here, there = context.Pipe()
            core = cores[rank % len(cores)] if cores else None
            process = context.Process(target=main, args=(there, self.threads, core), daemon=True)
            process.start()
            there.close()
            self.members.append(_Process(process, Pipe(here), rank))
        for member in self.members:
            if not member.line.end.poll(_START) or not isinstance(member.hear(), Idle):
                raise RunError(
                    f"{member.name} did not start. A script that uses Parallel needs `if __name__ == '__main__':` "
                    "around what it does, because its processes import it."
                )

    def _stopped(self) -> None:
        for member in self.members:
            member.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
