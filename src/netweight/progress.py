"""A progress bar on the terminal; plain lines where there is none."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY = 20.0  # seconds between plain lines


def _progress(console: Console, *also: TextColumn) -> Progress:
    """What is done, how far, how long it took and how long it will take; gone when it ends."""
    first = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *also)
    last = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*first, *last, console=console, transient=True, disable=not console.is_terminal)


class Bar:
    """A `Reporter` that draws one bar for each fit, with loss and time left; notes are printed above it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = _progress(self._console, TextColumn("{task.fields[loss]}"))
        self._label, self._steps, self._said, self._began, self._done = "", 0, 0.0, 0.0, 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def start(self, label: str, steps: int, done: int) -> None:
        """A fit of `steps`, of which `done` were done before."""
        if self._label != label:
            self._began, self._done = time.monotonic(), done
        self._label, self._steps, self._said = label, steps, time.monotonic()
        for task in list(self._progress.task_ids):
            self._progress.remove_task(task)
        self._progress.add_task(label, total=steps, completed=done, loss="")

    def step(self, step: int, loss: float, rate: float) -> None:
        """One step was made."""
        for task in self._progress.task_ids:
            self._progress.update(task, completed=step, loss=_said(loss))
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._said > _EVERY or step == self._steps):
            left = (now - self._began) / max(1, step - self._done) * (self._steps - step)
            self._console.print(f"{self._label}: step {step} of {self._steps}, {_said(loss)}, {left:.0f} s left")
            self._said = now

    def note(self, message: str) -> None:
        """A sentence."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


def _said(loss: float) -> str:
    """Under privacy nobody is told a loss: it is an exact sum over rows."""
    return "loss not told" if math.isnan(loss) else f"loss {loss:.4f}"


class Parts:
    """A bar for a number of things, such as the parts of a table, with time left."""

    def __init__(self, what: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = _progress(self._console)
        self._what, self._task = what, self._progress.add_task(what, total=None)
        self._began = self._said = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Parts:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int | None = None) -> None:
        """So many are done, of `total` where that is known; the first call says how many were done before."""
        self._progress.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if self._first is None:
            self._first = done
        elif not self._console.is_terminal and (now - self._said > _EVERY or done == total):
            each = (now - self._began) / max(1, done - self._first)
            left = "" if total is None else f" of {total:,}, {each * (total - done):.0f} s left"
            self._console.print(f"{self._what}: {done:,}{left}", highlight=False)
            self._said = now
