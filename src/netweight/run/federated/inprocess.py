"""A channel without a network: clients in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from netweight.data.files import writing
from netweight.errors import NetweightError, OptionError
from netweight.run.federated.client import Client
from netweight.run.federated.messages import Answer, FitTask, Fitted, Lost, Task, Tensors


class InProcess:
    """Simulates clients: each answers in turn, by name.

    One model is trained at a time, and what clients send waits in files of a temporary folder, so that memory does not
    grow with the number of clients. A plan's time box is shared by those that train, since they do so in turn. Raises
    OptionError where two clients bear one name.
    """

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = {client.name: client for client in sorted(clients, key=lambda c: c.name)}
        if len(self._clients) < len(clients):
            raise OptionError(f"{len(clients)} clients bear {len(self._clients)} names; give each its own.")
        self._folder = TemporaryDirectory(prefix="netweight-clients-")
        self._exchanges = 0

    def clients(self) -> tuple[str, ...]:
        """All of them, sorted by name."""
        return tuple(self._clients)

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        """One answer for each task. An answer that took longer than `seconds` is not taken."""
        for path in Path(self._folder.name).glob("*.safetensors"):
            path.unlink()
        self._exchanges += 1
        return {name: self._ask(name, _in_turn(tasks[name], len(tasks)), seconds) for name in sorted(tasks)}

    def _ask(self, name: str, task: Task, seconds: float | None) -> Answer | Lost:
        began = time.monotonic()
        try:
            answer = self._clients[name].answer(task)
        except NetweightError as problem:
            return Lost(name, str(problem))
        took = time.monotonic() - began
        if seconds is not None and took > seconds:
            return Lost(name, f"no answer within {seconds:g} s")
        if isinstance(answer, Fitted):
            place = Path(self._folder.name) / f"{self._exchanges}-{list(self._clients).index(name)}"
            variate = None if answer.variate is None else Spilled.of(answer.variate, place.with_suffix(".variate"))
            return replace(answer, tensors=Spilled.of(answer.tensors, place.with_suffix(".update")), variate=variate)
        return answer


def _in_turn(task: Task, clients: int) -> Task:
    """A client's part of the time box that all of them have together."""
    if isinstance(task, FitTask) and task.plan.seconds:
        return replace(task, plan=replace(task.plan, seconds=task.plan.seconds / clients))
    return task


class Spilled(Mapping[str, Tensor]):
    """Tensors in a safetensors file, read one at a time when they are asked for."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self.names = path, names

    @classmethod
    def of(cls, tensors: Tensors, path: Path) -> Spilled:
        """Write tensors to `path` (with ".safetensors" behind it)."""
        path = path.with_name(path.name + ".safetensors")
        with writing(path):
            save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        return cls(path, tuple(tensors))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            # A copy: what is read is mapped, and pages of a mapped file would count as memory for as long as they stay.
            found: Tensor = file.get_tensor(name).clone()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
