"""A few processes on loopback that stay, and do one task after the other together: starting them takes seconds."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_LONGEST = 120  # seconds that a task may take


class Team:
    """Processes of one gloo group; a context manager that ends them."""

    def __init__(self, processes: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        context = mp.get_context("spawn")
        self._pipes = [context.Pipe() for _ in range(processes)]
        self._running = [
            context.Process(target=_member, args=(rank, processes, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(self._pipes)
        ]
        for process in self._running:
            process.start()

    def __call__(self, task: Callable[..., Any], *given: Any) -> list[Any]:
        """What `task(*given)` returns in each, by rank; it is defined in a module. What they raise is raised here."""
        for ours, _ in self._pipes:
            ours.send((task, given))
        said = []
        for rank, (ours, _) in enumerate(self._pipes):
            assert ours.poll(_LONGEST), f"process {rank} does not answer"
            said.append(ours.recv())
        for rank, (fine, value) in enumerate(said):
            assert fine, f"process {rank}: {value}"
        return [value for _, value in said]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
            process.join()
        self._folder.cleanup()


def _member(rank: int, processes: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    while True:
        task, given = pipe.recv()
        try:
            pipe.send((True, task(*given)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
