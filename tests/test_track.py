"""Trackers: what they wrote is read back with the readers that come with them; nothing reaches the network."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from conftest import many_rows, tiny_base
from netweight import optimize
from netweight.data import Dataset
from netweight.errors import MissingExtra, OptionError
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local
from netweight.store import store_of
from netweight.track import Name, Tracked, trackers
from netweight.train import Plan
from test_habits import _CONNECTIONS, python

LABEL = "fit of 2 layers, again"
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Remembering:
    """Stands for a progress bar and for a tracker."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def start(self, label: str, steps: int, done: int) -> None:
        self.seen.append(("start", label, steps, done))

    def step(self, step: int, loss: float, rate: float) -> None:
        self.seen.append((step, loss, rate))

    def note(self, message: str) -> None:
        self.seen.append(("note", message))

    def log(self, label: str, step: int, loss: float, rate: float) -> None:
        self.seen.append((label, step, loss, rate))

    def close(self) -> None:
        self.seen.append(("close",))


def need(name: str) -> None:
    pytest.importorskip(MODULES[name], reason=f"{name} is in the extra `track`, which is not installed here")


def fitted(model: Model, dataset: Dataset, name: Name, folder: Path) -> list[tuple[int, float, float]]:
    """Fits with a tracker; gives the steps, losses and rates that a progress bar saw."""
    bar = Remembering()
    with Tracked(bar, trackers([name], folder)) as reporter:
        plan = Plan(batch_size=16, epochs=1, precision="fp32", reporter=reporter)
        Local(dataset).fit(model, Supervised(model.task), plan, LABEL)
    steps = [(int(seen[0]), float(seen[1]), float(seen[2])) for seen in bar.seen if len(seen) == 3]  # type: ignore[call-overload, arg-type]
    assert len(steps) == 5
    return steps


def records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, behind a header of 7 bytes: blocks of 32 KiB; parts with a checksum, length and kind."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at < len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def test_everything_is_passed_on_and_every_tracker_sees_each_step(model: Model, dataset: Dataset) -> None:
    bar, one, two = Remembering(), Remembering(), Remembering()

    def fail() -> None:
        with Tracked(bar, [one, two]) as reporter:
            reporter.start("a", 9, 2)
            reporter.step(3, 0.5, 0.1)
            reporter.note("so far")
            reporter.start("b", 1, 0)
            reporter.step(1, 0.25, 0.2)
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fail()
    assert bar.seen == [("start", "a", 9, 2), (3, 0.5, 0.1), ("note", "so far"), ("start", "b", 1, 0), (1, 0.25, 0.2)]
    assert one.seen == two.seen == [("a", 3, 0.5, 0.1), ("b", 1, 0.25, 0.2), ("close",)]


@pytest.mark.parametrize("name", get_args(Name))
def test_without_its_package_a_tracker_names_the_extra(
    name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(
        MissingExtra, match=r"tracking with .* needs an extra; in a clone of Netweight: pip install '\.\[track\]'"
    ):
        trackers([name], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no tracker 'mlfow'; use tensorboard, wandb, mlflow. Did you mean 'mlflow'"):
        trackers(["mlfow"], tmp_path)  # type: ignore[list-item]
    with pytest.raises(OptionError, match="no tracker 'mlfow'"):
        trackers("mlfow", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no tracker 'neptune'"):
        optimize(many_rows(20), out=tmp_path / "o.nw", track=["neptune"])  # type: ignore[list-item]


def test_tensorboard(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = fitted(model, dataset, "tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag, at in (("loss", 1), ("learning rate", 2)):
        found = [(e.step, e.value) for e in events.Scalars(f"{LABEL}/{tag}")]
        assert found == [(step[0], pytest.approx(step[at], rel=1e-6)) for step in steps]


@pytest.mark.slow  # it makes its tables by 60 migrations
def test_mlflow(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    need("mlflow")
    from mlflow import MlflowClient

    steps = fitted(model, dataset, "mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("netweight")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith(tmp_path.as_uri())
    for name, at in (("loss", 1), ("learning rate", 2)):
        history = client.get_metric_history(run.info.run_id, f"fit of 2 layers_ again/{name}")
        assert [(m.step, m.value) for m in history] == [(step[0], pytest.approx(step[at])) for step in steps]
    again = trackers(["mlflow"], tmp_path)
    again[0].close()
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_wandb(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    need("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    steps = fitted(model, dataset, "wandb", tmp_path)
    (file,) = tmp_path.glob("wandb/wandb/offline-run-*/run-*.wandb")
    found = []
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append(tuple(row[f"{LABEL}/{name}"] for name in ("step", "loss", "learning rate")))
    assert found == [tuple(map(pytest.approx, step)) for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Name))
def test_trackers_phone_nobody(name: Name, tmp_path: Path) -> None:
    """Of this process; what Weights & Biases' own one does, `strace -f -e connect` showed: nothing but a local socket."""
    need(name)
    code = (
        _CONNECTIONS
        + """
import os
from pathlib import Path
from netweight.track import Tracked, trackers
from netweight.reporter import Silent
with Tracked(Silent(), trackers([sys.argv[1]], Path(sys.argv[2]))) as reporter:
    reporter.start("fit", 1, 0)
    reporter.step(1, 0.5, 0.1)
print(os.environ["MLFLOW_DISABLE_TELEMETRY"], os.environ["WANDB_ERROR_REPORTING"])
"""
    )
    assert python(code, name, tmp_path).split() == ["true", "false"]


@pytest.mark.slow
def test_a_job_is_tracked(tmp_path: Path, quick: None) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base, out = tiny_base(tmp_path / "base"), tmp_path / "made.nw"
    optimize(many_rows(800), out=out, model=str(base), max_drop=8.0, threads=1, track=["tensorboard"])
    tags = EventAccumulator(str(store_of(out) / "tensorboard")).Reload().Tags()["scalars"]
    assert {"fine-tune/loss", "static student/loss"} <= set(tags)
