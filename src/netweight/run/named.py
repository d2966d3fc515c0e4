"""Runs by name, as the command line knows them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.run import group
from netweight.run.base import Run, Runs
from netweight.run.commands import Strategy
from netweight.run.local import Local
from netweight.run.parallel import Parallel


def named(text: str, threads: int | None = None) -> Runs:
    """What makes the runs of that name.

    Args:
        text: `local`, or a strategy and a number of processes on this machine: `ddp:2`; on a Ray cluster
            `ray://HOST:PORT/ddp:2`, on the one that this machine belongs to `ray://auto/ddp:2`, on one that is started
            on this machine for the run `ray://local/ddp:2`.
        threads: of all processes together; None: the cores of this machine, and one for each on another cluster.

    Raises OptionError for other names, and for `ddp:2` and the like in a program that torchrun started.
    """
    if text == "local":
        return Local
    found = re.fullmatch(rf"(ray://(local|auto|[^/:\s]+:\d+)/)?({'|'.join(get_args(Strategy))}):([1-9]\d*)", text)
    if not found:
        raise OptionError(
            f"a run is local, or one of {', '.join(get_args(Strategy))} with a number of processes, such as ddp:2; "
            f"or that on a Ray cluster: ray://HOST:PORT/ddp:2, ray://auto/ddp:2, ray://local/ddp:2; given was {text!r}."
        )
    if group.launched():
        raise OptionError(
            f"--run {text} starts its own processes, and a launcher (torchrun, Ray Train) started this program; "
            "start it by itself. Launchers are for programs that call `Parallel` themselves."
        )
    where, name, processes = found[2], found[3], int(found[4])
    cluster = f"ray://{where}" if where and ":" in where else where
    cores = len(os.sched_getaffinity(0)) if where in (None, "local") else processes
    each = max(1, (threads or cores) // processes)

    def made(data: Dataset, folder: Path) -> Run:
        return Parallel(data, processes, name, folder, each, cluster=cluster)  # type: ignore[arg-type]

    return made
