"""What works under which run: every way of every technique, one short fit each, works or is refused with a sentence.

`scripts/parallel_techniques.py` writes docs/parallel-techniques.md from `table`; a slow test holds the page to it, and a
fast one holds its rows, its columns and what needs no processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pytest

from conftest import tiny_dataset
from netweight.errors import NetweightError
from netweight.network import tensors
from netweight.run import Local, Parallel, Pool, Run, Setup
from netweight.run.commands import Strategy
from netweight.testing import fresh_digest
from netweight.train import Plan
from quick import WAYS, suited
from test_compose import few
from test_federated_techniques import federated, pooled

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel-techniques.md"
PLAN = Plan(batch_size=16, precision="fp32")
Where = Literal["local", "federated"] | Strategy
RUNS: tuple[Where, ...] = ("local", *get_args(Strategy), "federated")


def opened(where: Where, pool: Pool | None) -> Run:
    if where == "local":
        return Local(few())
    if where == "federated":
        return federated(pooled(tiny_dataset()))
    return Parallel(few(), strategy=where, setup=Setup(timeout=60), pool=pool)


def outcome(way: str, where: Where, pool: Pool | None = None) -> str:
    """Nothing where it works, else the sentence with which it was refused."""
    technique = WAYS[way]
    model, run = suited(technique), opened(where, pool)
    before = fresh_digest(model)
    try:
        made = technique(model, run, PLAN)
    except NetweightError as refusal:
        return str(refusal)
    finally:
        if isinstance(run, Parallel):
            run.close()
    assert fresh_digest(model) == before != made.digest, "it did nothing, or to the given model"
    assert all(t.isfinite().all() for t in tensors(made.network).values() if t.is_floating_point())
    if pool is not None:
        assert len(pool.members) in (0, pool.processes), "a process was lost: it did not work, nor was it refused"
    return ""


def table() -> str:
    """The page: a matrix with a number for each sentence."""
    sentences: dict[str, int] = {}
    lines = [f"| technique | {' | '.join(RUNS)} |", "|---" * (1 + len(RUNS)) + "|"]
    with Pool(2) as pool:
        for way in WAYS:
            cells = []
            for where in RUNS:
                said = outcome(way, where, pool)
                assert not said or len(said.split()) > 5, f"{way} under {where}: {said!r} is no sentence"
                cells.append(f"[{sentences.setdefault(said, len(sentences) + 1)}]" if said else "yes")
            lines.append(f"| **{way}** | {' | '.join(cells)} |")
    notes = [f"- [{number}] {said}" for said, number in sentences.items()]
    head = (
        "# What works under which run\n\nEvery technique on one tiny BERT of three layers (on a GPT-2 where it is causal), "
        "one short fit each: alone, on two\nprocesses under each strategy, and on three clients without "
        "[privacy](federated-privacy.md). What is refused is refused with\nthe sentence of its number. Written by "
        "`scripts/parallel_techniques.py`.\n"
    )
    return "\n".join([head, *lines, "", *notes, ""])


def test_the_page_has_every_way_under_every_run() -> None:
    """And a sentence for each number, of which those that need no processes are still said."""
    again, lines = "run scripts/parallel_techniques.py and commit it", PAGE.read_text(encoding="utf-8").splitlines()
    head, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if "|" in line)
    notes = dict(line.removeprefix("- ").split(" ", 1) for line in lines if line.startswith("- ["))
    assert head == ["technique", *RUNS], again
    assert [way for way, *_ in rows] == list(WAYS), again
    refused = {(way, where): cell for way, *cells in rows for where, cell in zip(RUNS, cells) if cell != "yes"}
    assert list(dict.fromkeys(refused.values())) == list(notes) == [f"[{i + 1}]" for i in range(len(notes))], again
    here = {(way, where): notes[cell] for (way, where), cell in refused.items() if where in ("local", "federated")}
    assert here == {(way, where): outcome(way, where) for way, where in here}, again
    assert ("LinearFloor", "federated") in here, again


@pytest.mark.slow
def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run scripts/parallel_techniques.py and commit it"
