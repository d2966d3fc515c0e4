"""Parallel runs in programs that torchrun started, and in whole jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Shop, again, journal, tiny_model
from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local, Parallel, named
from test_parallel import PLAN, assert_equal, undropped

TESTS = Path(__file__).parent
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from conftest import Killed, Killer, tiny_model, tiny_rows
from dataclasses import replace
from pathlib import Path
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import OptionError
from netweight.loss import Supervised
from netweight.run import Parallel, Setup
from netweight.testing import Count
from test_parallel import PLAN, undropped

rows, folder, rank = tiny_rows(), Path(sys.argv[2]), int(os.environ["RANK"])
data = Dataset(
    rows.take(range(80)), rows.take(range(80, 90)), rows.take(range(90, 100)), Sealed(rows.take(range(100, 120)))
)
model = undropped(tiny_model())
with Parallel(data, setup=Setup(balance=False, timeout=60), folder=folder / "work") as run:
    assert float(run.reduce(model, Count())["found"]) == 80
    run.fit(model, Supervised(model.task), PLAN).save(folder / f"made-{rank}")
try:
    Parallel(data, processes=3)
except OptionError as problem:
    (folder / f"refused-{rank}").write_text(str(problem))
try:
    run.fit(undropped(tiny_model(seed=rank)), Supervised(model.task), PLAN)
except Exception as problem:
    (folder / f"differs-{rank}").write_text(f"{type(problem).__name__}: {problem}")
os._exit(0)  # one rank has raised and the other still waits
"""


def test_a_program_under_torchrun_trains_as_one_process(dataset: Dataset, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--standalone"]
    said = subprocess.run(
        [sys.executable, *launch, str(script), str(TESTS), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert said.returncode == 0, said.stderr[-3000:]
    model = undropped(tiny_model())
    wanted = Local(dataset).fit(model, Supervised(model.task), PLAN)
    for rank in range(2):
        assert_equal(Model.load(tmp_path / f"made-{rank}"), wanted, dataset)
        refused = (tmp_path / f"refused-{rank}").read_text()
        assert refused == (
            "3 processes are asked for, and torchrun started 2; leave the number out, or give the same to both."
        )
    assert (
        (tmp_path / "differs-1")
        .read_text()
        .startswith("RunError: processes of one run were given different models or plans")
    )


def test_names_of_runs(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named("local") is Local
    run = named("ddp:3", threads=7)(dataset, tmp_path)
    assert isinstance(run, Parallel)
    assert (run.strategy, run._pool.processes, run._pool.threads) == ("ddp", 3, 2)
    for wrong in ("ddp", "ddp:0", "magic:2", "", "ray://ddp:2", "ray://nowhere/ddp:2", "ray://auto/ddp"):
        with pytest.raises(OptionError, match=f"such as ddp:2; or that on a Ray cluster: .*; given was '{wrong}'"):
            named(wrong)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(OptionError, match="--run ddp:2 starts its own processes, and this program was started by tor"):
        named("ddp:2")


@pytest.mark.slow
def test_a_whole_job_on_two_processes(shop: Shop, tmp_path: Path, quick: None) -> None:
    made = again(shop, tmp_path / "made.nw", runs=named("ddp:2", threads=2))
    assert made.certificate.shipped is not None
    assert set(journal(tmp_path / "made.nw")) == set(journal(shop.folder))
