"""Parallel runs in programs that torchrun started, and in whole jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast, get_args

import pytest
import torch.distributed as dist

from conftest import Shop, again, journal, tiny_model
from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.job import Job
from netweight.loss import Supervised
from netweight.model import Model
from netweight.pipeline import _here
from netweight.run import Local, Parallel, Setup, named, roll
from netweight.run.commands import Strategy
from netweight.seams import Lost
from test_parallel import PLAN, assert_equal, undropped

TESTS = Path(__file__).parent
STRATEGIES = get_args(Strategy)
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from conftest import tiny_model, tiny_rows
from pathlib import Path
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import OptionError
from netweight.loss import Supervised
from netweight.run import Parallel, Setup
from netweight.testing import Count
from test_parallel import PLAN, undropped
from test_parallel_launched import STRATEGIES

rows, folder, rank = tiny_rows(), Path(sys.argv[2]), int(os.environ["RANK"])
data = Dataset(
    rows.take(range(80)), rows.take(range(80, 90)), rows.take(range(90, 100)), Sealed(rows.take(range(100, 120)))
)
model = undropped(tiny_model())
for strategy in STRATEGIES:
    setup = Setup(balance=False, timeout=60)
    with Parallel(data, strategy=strategy, setup=setup, folder=folder / "work") as run:
        assert float(run.reduce(model, Count())["found"]) == 80
        run.fit(model, Supervised(model.task), PLAN).save(folder / f"made-{strategy}-{rank}")
try:
    Parallel(data, processes=3)
except OptionError as problem:
    (folder / f"refused-{rank}").write_text(str(problem))
try:
    Parallel(data, setup=setup).fit(undropped(tiny_model(seed=rank)), Supervised(model.task), PLAN)
except Exception as problem:
    (folder / f"differs-{rank}").write_text(f"{type(problem).__name__}: {problem}")
os._exit(0)  # one rank has raised and the other still waits
"""


# In this one the third process dies at its fifth batch. torchrun ends those that are left as soon as it sees that, so
# they do not let themselves be ended.
LOSES = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from conftest import tiny_model, tiny_rows
from dataclasses import dataclass
from pathlib import Path
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import RunError
from netweight.loss import Supervised
from netweight.run import Parallel, Setup
from test_parallel import PLAN

rank, batches = int(os.environ["RANK"]), []

@dataclass(frozen=True)
class Mortal:
    supervised: Supervised
    teachers: tuple = ()
    unlabelled: bool = False

    def __call__(self, network, batch):
        batches.append(batch)
        if len(batches) == 5 and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.supervised(network, batch)

rows = tiny_rows()
data = Dataset(
    rows.take(range(80)), rows.take(range(80, 90)), rows.take(range(90, 100)), Sealed(rows.take(range(100, 120)))
)
model, said = tiny_model(), []
run = Parallel(data, strategy="fsdp", setup=Setup(timeout=60))
for _ in range(2):
    try:
        run.fit(model, Mortal(Supervised(model.task)), PLAN)
    except RunError as problem:
        said.append(str(problem))
(Path(sys.argv[2]) / f"said-{rank}").write_text("\\n".join(said))
os._exit(0)
"""


def launch(program: str, processes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program under torchrun; it is told where the tests and its folder are."""
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run(
        [sys.executable, *torchrun, str(script), str(TESTS), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_program_under_torchrun_trains_as_one_process(dataset: Dataset, tmp_path: Path) -> None:
    said = launch(PROGRAM, 2, tmp_path)
    assert said.returncode == 0, said.stderr[-3000:]
    model = undropped(tiny_model())
    wanted = Local(dataset).fit(model, Supervised(model.task), PLAN)
    for rank in range(2):
        for strategy in STRATEGIES:
            assert_equal(Model.load(tmp_path / f"made-{strategy}-{rank}"), wanted, dataset)
        refused = (tmp_path / f"refused-{rank}").read_text()
        assert refused == (
            "3 processes are asked for, and the launcher started 2; leave the number out, or give the same to both."
        )
    differs = "RunError: processes of one run were given different models or plans"
    assert (tmp_path / "differs-1").read_text().startswith(differs)
    assert re.search(
        rf"Missing: rank 1 \(pid \d+ on \S+\), failed with {differs}", (tmp_path / "differs-0").read_text()
    )


@pytest.mark.slow
def test_who_is_left_names_who_is_missing(tmp_path: Path) -> None:
    said = launch(LOSES, 3, tmp_path)
    assert said.returncode, "torchrun reports that one was killed"
    for rank in range(2):
        first, second = (tmp_path / f"said-{rank}").read_text().splitlines()
        assert re.fullmatch(
            rf"rank {rank} \(pid \d+\) waited for the others, and then: .*\. Missing: rank 2 \(pid \d+ on \S+\), in fit, "
            r"after step 4; the fit goes on from its last checkpoint when it is started again\.",
            first,
        )
        assert second.startswith("this run has lost a process, and left the others; the fit goes on from its last")


def test_the_roll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes, of which the first waits in vain, the second too, the third has failed, and the fourth never came."""
    monkeypatch.setattr(roll, "_SECONDS", 0.2)
    store = dist.HashStore()
    first, second, third, _ = (roll.Roll(store, rank, 4) for rank in range(4))
    third.at("failed with ZeroDivisionError: rows by none")
    assert "Missing: rank 0 which never came; rank 2 (pid" in str(second.lost(Lost("a process is gone")))
    said = str(first.lost(RuntimeError("[gloo] Timed out waiting 4000ms for recv operation\nmore")))
    assert re.fullmatch(
        r"rank 0 \(pid \d+\) waited for the others, and then: \[gloo\] Timed out waiting 4000ms for recv operation\. "
        r"Missing: rank 2 \(pid \d+ on \S+\), failed with ZeroDivisionError: rows by none; rank 3 which never came; "
        r"the fit goes on from its last checkpoint when it is started again\.",
        said,
    )
    alone = roll.Roll(dist.HashStore(), 0, 1)
    assert "Missing: nobody, so a connection was lost" in str(alone.lost(Lost("a process is gone")))


def test_names_of_runs(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named("local") is Local
    run = named("ddp:3", threads=7)(dataset, tmp_path)
    assert isinstance(run, Parallel)
    assert (run.strategy, run._pool.processes, run._pool.threads) == ("ddp", 3, 2)
    chosen = named("tensor:4,tensor=2,activation-checkpointing")(dataset, tmp_path)
    assert isinstance(chosen, Parallel)
    assert (chosen.strategy, chosen.setup) == ("tensor", Setup(tensor=2, activation_checkpointing=True))
    piped = named("ray://auto/pipeline:2,micro-batches=8")
    assert callable(piped)
    for option in ("magic", "tensor", "tensor=two", "offload=1", ""):
        with pytest.raises(
            OptionError, match=f"tensor=N, micro-batches=N, .* and offload; given was '{option}' in 'te"
        ):
            named(f"tensor:4,{option}")
    with pytest.raises(OptionError, match="activation_checkpointing is for strategy fsdp or tensor or pipeline, not"):
        named("ddp:2,activation-checkpointing")
    for wrong in ("ddp", "ddp:0", "magic:2", "", "ray://ddp:2", "ray://nowhere/ddp:2", "ray://auto/ddp"):
        with pytest.raises(OptionError, match=f"such as ddp:2; or that on a Ray cluster: .*; given was '{wrong}'"):
            named(wrong)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        OptionError, match=r"--run ddp:2 starts its own processes, and a launcher \(torchrun, Ray Train\) started"
    ):
        named("ddp:2")


@pytest.mark.parametrize(("name", "here"), [("ddp:2", False), ("fsdp:2", True), ("pipeline:2", True)])
def test_students_are_made_here_where_a_run_divides_layers(
    name: str, here: bool, dataset: Dataset, tmp_path: Path
) -> None:
    job = cast(Job, SimpleNamespace(tables=SimpleNamespace(train="here")))
    with cast(Parallel, named(name, threads=2)(dataset, tmp_path)) as run:
        found = _here(job, dataset, tmp_path, run)
    assert isinstance(found, Local) == here
    assert not here or cast(Local, found).data is dataset


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp:2", "fsdp:2"])
def test_a_whole_job_on_two_processes(shop: Shop, tmp_path: Path, quick: None, name: str) -> None:
    made = again(shop, tmp_path / "made.nw", runs=named(name, threads=2))
    assert made.certificate.shipped is not None
    # Costs bear the name of the files that they are of, which differ in their last bits.
    found, wanted = (
        {key.split(" ")[0] if key.startswith("costs ") else key for key in journal(p)}
        for p in (tmp_path / "made.nw", shop.folder)
    )
    assert found == wanted
