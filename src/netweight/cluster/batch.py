"""Predictions for a table in many parts, on a Ray cluster: each part of the input becomes one of the output.

Ray Data maps over the *names* of parts; rows go from file to file inside one task, in constant memory, by the code that
predicts a single table. So the answers are the same, and a task that dies with its node is tried again on another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from netweight import artifact
from netweight.cluster.parts import Done, Part, keep, kept, mark, opened, parts_of, sweep
from netweight.connect import connected, cores, quiet
from netweight.engine import Engine, load
from netweight.errors import ArtifactError, DataError, NetweightError, OptionError
from netweight.predict import answered, opened_rows

_SAID = 3  # errors that are spelled out


@dataclass(frozen=True)
class Batch:
    """What was done. `before` parts were there already; `again` had been, but their input has changed since."""

    parts: int
    before: int
    again: int
    rows: int
    bad: int
    seconds: float

    @property
    def sentence(self) -> str:
        """For people."""
        there = f", {self.before:,} of them from before" if self.before else ""
        again = f" {self.again:,} were done again, since they had changed." if self.again else ""
        bad = f" {self.bad:,} rows could not be used and have no prediction." if self.bad else ""
        pace = f"{self.rows:,} rows in {self.seconds:.1f} s ({self.rows / max(self.seconds, 1e-9):,.0f} rows/s)"
        return f"{self.parts:,} parts{there}; {pace}.{again}{bad}"


@dataclass(frozen=True)
class Work:
    """What is done with every part."""

    folder: str
    version: str
    text: str
    pair: str | None
    threads: int


def predict_parts(
    folder: str | Path,
    source: str | Path,
    *,
    out: str | Path,
    address: str = "auto",
    text: str = "text",
    pair: str | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, parts: None,
) -> Batch:
    """Add predictions to every part of the table `source`, a folder or a file, in the folder `out`; goes on where an
    earlier run ended. Every machine must see `folder`, `source` and `out` under these paths.

    Args:
        address: of the Ray cluster, as `connected` takes it, but for ray://.
        threads: of an engine, and CPUs that a part takes.
        progress: told how many parts are done, and how many there are.

    Raises DataError (the other parts are done then), ColumnError, OptionError, StoreError, ArtifactError,
    EndpointError, MissingExtra.
    """
    if address.startswith("ray://"):
        raise OptionError("Ray Data does not work through ray://; run this on a machine of the cluster, with auto.")
    began = time.monotonic()
    parts = parts_of(Path(source), Path(out))
    version = artifact.check(Path(folder)).digest[:12]
    work = Work(str(Path(folder).absolute()), version, text, pair, threads)
    with opened(Path(out), parts, version, text, pair) as store:
        known = {part.name: kept(store, part) for part in parts}
        ready = [part.name for part in parts if (done := known[part.name]) is not None and done.stands(part)]
        left = {part.name: part for part in parts if part.name not in set(ready)}
        rows = bad = 0
        failed: list[Done] = []
        progress(len(ready), len(parts))
        if left:
            with connected(address):
                for i, done in enumerate(_answers([*left.values()], work), 1):
                    if done.error:  # and nothing stays that is no answer to the input as it is now
                        Path(left[done.name].target).unlink(missing_ok=True)
                        failed.append(done)
                    else:
                        keep(store, left[done.name], done)
                        rows, bad = rows + done.rows, bad + done.bad
                    progress(len(ready) + i, len(parts))
            sweep(Path(out))  # of nodes that died in this run
    if failed:
        said = "; ".join(f"{done.name}: {done.error}" for done in failed[:_SAID])
        raise DataError(f"{len(failed)} of {len(parts)} parts failed, the others are done. {said}")
    again = sum(known[name] is not None for name in left)
    return Batch(len(parts), len(ready), again, rows, bad, time.monotonic() - began)


def _answers(parts: Sequence[Part], work: Work) -> Iterator[Done]:
    """One for each part, as they are ready.

    Tasks and not a pool of actors: what an actor that died with its node had in hand waits until the actor finds room
    again, while a task goes to whoever is free. The engine is kept between the tasks of one process.
    """
    import ray.data

    most, _ = cores()
    if work.threads > most > 0:
        raise OptionError(f"no node of this cluster has {work.threads} CPUs for --threads; the largest has {most}.")
    context = ray.data.DataContext.get_current()
    before, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        with quiet("ray.data"):
            # A block for each part: a block is what is tried again.
            names = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
            for row in names.map(answer, fn_kwargs={"work": work}, num_cpus=work.threads).iter_rows():
                yield Done(**row)
    finally:
        context.enable_progress_bars = before


def answer(row: dict[str, Any], work: Work) -> dict[str, Any]:
    """The task: a `Part` in, a `Done` out, both as Ray Data takes rows. What is wrong with one part ends no other."""
    part = Part(**row)
    try:
        return asdict(_written(part, work))
    except (NetweightError, OSError) as problem:
        return asdict(Done(part.name, part.size, part.changed, error=str(problem)))


def _written(part: Part, work: Work) -> Done:
    source, target = Path(part.source), Path(part.target)
    engine = _engine(work.folder, work.version, work.threads)
    seen = mark(source)
    rows = opened_rows(source, work.text, work.pair)
    target.parent.mkdir(parents=True, exist_ok=True)
    said = answered(engine, rows, target)
    if mark(source) != seen:
        raise DataError("the table changed while it was read; run again.")
    return Done(part.name, *seen, target.stat().st_size, said.rows, said.bad)


@lru_cache(maxsize=1)
def _engine(folder: str, version: str, threads: int) -> Engine:
    engine = load(folder, threads)
    if engine.version != version:
        raise ArtifactError(f"{folder} holds version {engine.version} now, no longer {version}; run again.")
    return engine
