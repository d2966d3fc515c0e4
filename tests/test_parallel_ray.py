"""Parallel runs on workers of Ray Train."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import netweight
from conftest import Shop, again, journal, tiny_dataset, tiny_model
from netweight.connect import _loopback
from netweight.data import Dataset
from netweight.errors import MissingExtra, OptionError, RunError
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local, Parallel, RayPool, Setup, named
from netweight.run import raytrain as module
from netweight.testing import Count
from test_parallel import PLAN, SAME, assert_equal, undropped
from test_parallel_faults import At, Odd
from test_server import until


def environment() -> dict[str, str]:
    """Of processes of a cluster: they find these tests, ask soon whether others live, and tell nobody."""
    folders = [str(Path(netweight.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "PYTHONPATH": os.pathsep.join(folders),
    }


def program(code: str, *words: str) -> subprocess.Popen[str]:
    """A process of its own: this one is connected to a cluster already."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeeded(process: subprocess.Popen[str]) -> None:
    with process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine with four CPUs, on loopback, to which this process is connected."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed: pip install '.[ray]'")
    with pytest.MonkeyPatch.context() as patch, _loopback():
        for name, value in environment().items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[RayPool]:
    with RayPool("local", 2) as made:
        yield made


@pytest.fixture
def model() -> Model:
    return undropped(tiny_model())


def pids(pool: RayPool) -> list[int]:
    return [member.here.pid for member in pool.members]


# --- without Ray ---


def test_names_of_runs_on_a_cluster(dataset: Dataset, tmp_path: Path) -> None:
    for text, address, threads, each in (
        ("ray://local/ddp:2", "local", 5, 2),
        ("ray://auto/tensor:4", "auto", None, 1),
        ("ray://10.0.0.7:10001/fsdp:3", "ray://10.0.0.7:10001", 12, 4),
    ):
        run = named(text, threads)(dataset, tmp_path)
        assert isinstance(run, Parallel)
        pool = run._pool
        assert isinstance(pool, RayPool)
        assert (pool.address, pool.threads) == (address, each)
        assert f"/{run.strategy}:{pool.processes}" in text


def test_options_of_a_cluster_are_checked(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="pin gives each process a core of this machine; leave it out for a cluster"):
        Parallel(dataset, setup=Setup(pin=True), cluster="auto")
    with pytest.raises(OptionError, match="0 processes of 1 threads are asked for"):
        RayPool("auto", 0)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[ray\]'"):
        Parallel(dataset, cluster="auto")


# --- two workers; the last tests end some ---


def test_workers_of_ray_train_train_as_one_process(model: Model, dataset: Dataset, pool: RayPool) -> None:
    run = Parallel(dataset, setup=SAME, pool=pool)
    assert float(run.reduce(model, Count())["found"]) == 80
    before = pids(pool)
    assert os.getpid() not in before
    made = run.fit(model, Supervised(model.task), PLAN)
    assert pids(pool) == before
    assert_equal(made, Local(dataset).fit(model, Supervised(model.task), PLAN), dataset)


def test_errors_of_workers_are_those_of_the_program(model: Model, dataset: Dataset, pool: RayPool) -> None:
    run, loss = Parallel(dataset, setup=SAME, pool=pool), Supervised(model.task)
    with pytest.raises(OptionError, match=r"^this loss wants another option\.$"):
        run.fit(model, Odd(loss, 1, "option"), PLAN)
    with pytest.raises(RunError, match=r"(?s)rank 1 \(pid \d+ on 127.0.0.1\) failed with ZeroDivision.*raise Zero"):
        run.fit(model, Odd(loss, 1, "division"), PLAN)
    assert run.quality(model) == Local(dataset).quality(model)


def test_more_than_the_cluster_has_is_refused(model: Model, dataset: Dataset, cluster: None) -> None:
    with (
        Parallel(dataset, 5, cluster="auto") as run,
        pytest.raises(
            OptionError, match="5 processes are asked for, each with 1 CPUs, and the cluster auto has room for 4"
        ),
    ):
        run.quality(model)
    with (
        RayPool("auto", 1, cards=True) as pool,
        pytest.raises(OptionError, match="each with 1 CPUs and a graphics card, and the cluster auto has room for 0"),
    ):
        pool.start()


@pytest.mark.slow
def test_a_lost_worker_is_named_and_the_fit_goes_on(
    model: Model, dataset: Dataset, pool: RayPool, tmp_path: Path
) -> None:
    run, loss = Parallel(dataset, setup=SAME, folder=tmp_path, pool=pool), Supervised(model.task)
    pool.start()
    before = pids(pool)
    told = At(7, lambda: os.kill(before[1], signal.SIGKILL))
    made = run.fit(model, loss, replace(PLAN, checkpoint_every=0, reporter=told))
    (note,) = told.notes
    assert note.startswith(f"rank 1 (pid {before[1]} on 127.0.0.1) was lost (ActorDiedError: ")
    assert note.endswith(": going on with 2 processes, from the last checkpoint")
    assert not set(before) & set(pids(pool))
    assert told.starts[0] == 0
    assert told.starts[1] >= 6
    assert_equal(made, Local(dataset).fit(model, loss, PLAN), dataset)
    assert len(list(tmp_path.glob("fit-*"))) == 1
    run.forget()
    assert not list(tmp_path.glob("fit-*"))


@pytest.mark.slow
def test_workers_that_are_lost_again_and_again_are_named(model: Model, dataset: Dataset, cluster: None) -> None:
    loss = Supervised(model.task)
    with RayPool("auto", 2, restarts=0) as pool:
        run = Parallel(dataset, setup=SAME, pool=pool)
        with pytest.raises(
            RunError, match=r"^no process is left: .*rank 1 \(pid \d+ on 127.0.0.1\) was lost .* checkpoint"
        ):
            run.fit(model, Odd(loss, 1, "exit"), PLAN)


@pytest.mark.slow
def test_workers_that_do_not_come(dataset: Dataset, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> dict[int, str]:
        return {0: "ImportError: no module of that name"}

    monkeypatch.setattr(module, "_trained", fails)
    with (
        RayPool("auto", 2) as pool,
        pytest.raises(
            RunError, match="did not start 2 workers on the cluster auto: ImportError: no module of that name"
        ),
    ):
        pool.start()


@pytest.mark.slow
def test_workers_that_take_too_long_give_back_what_they_reserved(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    before = ray.available_resources()["CPU"]
    monkeypatch.setattr(module, "_START", 2.0)
    monkeypatch.setattr(module, "_END", 3.0)
    with RayPool("auto", 2) as pool, pytest.raises(RunError, match="cluster auto: they took more than 2 s"):
        pool.start()
    until(lambda: ray.available_resources()["CPU"] == before)


def _own(given: dict[str, Any]) -> None:
    """The train function of a program of one's own."""
    model, data = given["model"], given["data"]
    with Parallel(data, setup=SAME) as run:
        run.fit(model, Supervised(model.task), PLAN).save(Path(given["folder"]) / f"made-{os.environ['RANK']}")


@pytest.mark.slow
def test_parallel_in_a_train_function(model: Model, dataset: Dataset, cluster: None, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        _own,
        train_loop_config={"model": model, "data": dataset, "folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            storage_path=str(tmp_path / "ray"), worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": "lo"}}
        ),
    ).fit()
    wanted = Local(dataset).fit(model, Supervised(model.task), PLAN)
    for rank in range(2):
        assert_equal(Model.load(tmp_path / f"made-{rank}"), wanted, dataset)


@pytest.mark.slow
def test_a_whole_job_on_a_cluster(shop: Shop, tmp_path: Path, quick: None, cluster: None) -> None:
    made = again(shop, tmp_path / "made.nw", runs=named("ray://auto/ddp:2", threads=2))
    assert made.certificate.shipped is not None
    assert set(journal(tmp_path / "made.nw")) == set(journal(shop.folder))


# --- from outside, and over more than one machine ---


def _outside(address: str) -> None:
    """A program that is no part of the cluster."""
    data, model = tiny_dataset(), undropped(tiny_model())
    with Parallel(data, 2, setup=SAME, cluster=address) as run:
        made = run.fit(model, Supervised(model.task), PLAN)
    assert_equal(made, Local(data).fit(model, Supervised(model.task), PLAN), data)


@pytest.mark.slow
def test_a_program_outside_of_the_cluster(cluster: None) -> None:
    import ray

    serve = (
        "import runpy; from netweight.connect import _loopback\n"
        "with _loopback(): runpy.run_module('ray.util.client.server', run_name='__main__')"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    cluster_at = ray.get_runtime_context().gcs_address
    words = ("--address", cluster_at, "--host", "127.0.0.1", "--port", port, "--mode", "legacy")
    with program(serve, *words) as server:
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", int(port))) == 0)
            succeeded(program(f"import test_parallel_ray as t; t._outside('ray://127.0.0.1:{port}')"))
        finally:
            server.terminate()


def _machine_lost() -> None:
    """A cluster of two machines with a CPU each, one of which is gone after seven steps."""
    from ray.cluster_utils import Cluster

    data, model = tiny_dataset(), undropped(tiny_model())
    small = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    with _loopback(), tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
        told = At(7, lambda: cluster.remove_node(nodes[1], allow_graceful=False))
        plan = replace(PLAN, checkpoint_every=0, reporter=told)
        with RayPool(cluster.address, 2) as pool:
            made = Parallel(data, setup=SAME, folder=Path(folder), pool=pool).fit(model, Supervised(model.task), plan)
        cluster.shutdown()
    (note,) = told.notes
    assert note.endswith(": going on with 1 process, from the last checkpoint"), note
    assert told.starts[1] >= 6, told.starts
    assert_equal(made, Local(data).fit(model, Supervised(model.task), PLAN), data)


@pytest.mark.slow
def test_a_lost_machine(tmp_path: Path) -> None:
    """Its CPU counts as there until the cluster has missed its heartbeats, so the first new workers do not come."""
    pytest.importorskip("ray", reason="the extra ray is not installed: pip install '.[ray]'")
    succeeded(program("import test_parallel_ray as t; t._machine_lost()"))
