"""Where a fit says how it goes."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """A progress bar, TensorBoard, a test."""

    def start(self, label: str, steps: int, done: int) -> None:
        """A fit of `steps` steps, of which `done` were made before. Called again where their number changes."""

    def step(self, step: int, loss: float, rate: float) -> None:
        """Step number `step` was made, with this loss and learning rate."""

    def note(self, message: str) -> None:
        """A sentence for people."""


class Silent:
    """A reporter that says nothing."""

    def start(self, label: str, steps: int, done: int) -> None:
        """Ignore."""

    def step(self, step: int, loss: float, rate: float) -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""


class Passing:
    """A reporter that passes everything on, for those that also do something of their own."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def start(self, label: str, steps: int, done: int) -> None:
        """Pass it on."""
        self.reporter.start(label, steps, done)

    def step(self, step: int, loss: float, rate: float) -> None:
        """Pass it on."""
        self.reporter.step(step, loss, rate)

    def note(self, message: str) -> None:
        """Pass it on."""
        self.reporter.note(message)
