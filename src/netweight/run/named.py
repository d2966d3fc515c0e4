"""Runs by name, as the command line knows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.quiet import cores
from netweight.run import group
from netweight.run.base import Run, Runs
from netweight.run.commands import Setup, Strategy
from netweight.run.local import Local
from netweight.run.parallel import Parallel
from netweight.run.strategies import check


def named(text: str, threads: int | None = None) -> Runs:
    """What makes the runs of that name.

    Args:
        text: `local`, or a strategy and a number of processes on this machine: `ddp:2`; on a Ray cluster
            `ray://HOST:PORT/ddp:2`, on the one that this machine belongs to `ray://auto/ddp:2`, on one that is started
            on this machine for the run `ray://local/ddp:2`. Options of `Setup` follow behind commas: `tensor=N`,
            `micro-batches=N`, `activation-checkpointing`, `offload`.
        threads: of all processes together; None: the cores of this machine, and one for each on another cluster.

    Raises OptionError for other names and options, for those that the strategy does not have, and for `ddp:2` and the
    like in a program that torchrun started.
    """
    if text == "local":
        return Local
    run, *options = text.split(",")
    found = re.fullmatch(rf"(ray://(local|auto|[^/:\s]+:\d+)/)?({'|'.join(get_args(Strategy))}):([1-9]\d*)", run)
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
    setup = _setup(options, text)
    check(name, setup, processes)  # type: ignore[arg-type]
    cluster = f"ray://{where}" if where and ":" in where else where
    count = threads or (cores() if where in (None, "local") else processes)
    each = max(1, count // processes)

    def made(data: Dataset, folder: Path) -> Run:
        return Parallel(data, processes, name, folder, each, setup, cluster=cluster)  # type: ignore[arg-type]

    return made


def _setup(options: list[str], text: str) -> Setup:
    chosen: dict[str, Any] = {}
    for option in options:
        found = re.fullmatch(r"(tensor|micro-batches)=([1-9]\d*)|(activation-checkpointing|offload)", option)
        if not found:
            raise OptionError(
                "options of a run are tensor=N, micro-batches=N, activation-checkpointing and offload; "
                f"given was {option!r} in {text!r}."
            )
        chosen[(found[1] or found[3]).replace("-", "_")] = int(found[2]) if found[1] else True
    return Setup(**chosen)
