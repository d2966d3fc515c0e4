"""Training curves for TensorBoard, Weights & Biases (offline) and MLflow: reporters beside the progress bar.

None of them uses the network. Two would by themselves: MLflow tells its makers what is used, Weights & Biases what
fails. Both read an environment variable when they are imported; it is set before that, unless its owner has set it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from netweight.errors import MissingExtra, OptionError, did_you_mean
from netweight.reporter import Passing, Reporter

Name = Literal["tensorboard", "wandb", "mlflow"]

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


class Tracker(Protocol):
    """Takes numbers of one fit at a step."""

    def log(self, label: str, step: int, loss: float, rate: float) -> None: ...
    def close(self) -> None: ...


class Tracked(Passing):
    """A reporter that passes everything on, and every step's loss and learning rate to trackers as well."""

    def __init__(self, reporter: Reporter, trackers: Sequence[Tracker]) -> None:
        super().__init__(reporter)
        self._trackers, self._label = tuple(trackers), ""

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for tracker in self._trackers:
            tracker.close()

    def start(self, label: str, steps: int, done: int) -> None:
        """A fit begins."""
        self._label = label
        super().start(label, steps, done)

    def step(self, step: int, loss: float, rate: float) -> None:
        """One step was made."""
        super().step(step, loss, rate)
        for tracker in self._trackers:
            tracker.log(self._label, step, loss, rate)


class Boxed(Passing):
    """A reporter that passes everything on, and counts what a time box leaves of fits: by label the steps that were
    planned, which `keep` gets for whoever goes on after a kill, and those that fit."""

    def __init__(self, reporter: Reporter, planned: Mapping[str, int], keep: Callable[[dict[str, int]], None]) -> None:
        super().__init__(reporter)
        self.planned, self.keep, self.fits = dict(planned), keep, dict[str, int]()

    def start(self, label: str, steps: int, done: int) -> None:
        """A fit begins, or has another number of steps now."""
        if label not in self.planned:
            self.planned[label] = steps
            self.keep(self.planned)
        self.fits[label] = steps
        super().start(label, steps, done)

    @property
    def share(self) -> float:
        """Of the planned steps, that of the fit of which least was left; 1 where nothing was fitted."""
        return min((self.fits[label] / self.planned[label] for label in self.fits), default=1.0)


def trackers(names: Name | Sequence[Name], folder: Path) -> list[Tracker]:
    """Trackers that write below `folder`, each in a folder of its name; one name will do. Raises OptionError or
    MissingExtra."""
    names = (names,) if isinstance(names, str) else names
    made: dict[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    for name in names:
        if name not in made:
            raise OptionError(f"there is no tracker {name!r}; use {', '.join(made)}.{did_you_mean(name, made)}")
    return [made[name](folder / name) for name in dict.fromkeys(names)]


def _needs(module: str, purpose: str) -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(purpose, "track") from None


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._writer = _needs("torch.utils.tensorboard", "tracking with TensorBoard").SummaryWriter(str(folder))

    def log(self, label: str, step: int, loss: float, rate: float) -> None:
        """Loss and learning rate of a fit."""
        self._writer.add_scalar(f"{label}/loss", loss, step)
        self._writer.add_scalar(f"{label}/learning rate", rate, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WandB:
    """An offline run; `wandb sync` sends it when its owner wants to."""

    def __init__(self, folder: Path) -> None:
        wandb = _needs("wandb", "tracking with Weights & Biases")
        folder.mkdir(parents=True, exist_ok=True)
        # Neither the terminal's text nor anything of the machine or its repository goes into the run's files.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(mode="offline", dir=str(folder), project="netweight", settings=settings)

    def log(self, label: str, step: int, loss: float, rate: float) -> None:
        """Loss and learning rate of a fit; `step` is a number beside them, since a run has one axis for all fits."""
        self._run.log({f"{label}/loss": loss, f"{label}/learning rate": rate, f"{label}/step": step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run in a local SQLite file: `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows it."""

    def __init__(self, folder: Path) -> None:
        mlflow = _needs("mlflow", "tracking with MLflow")
        folder.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        found = self._client.get_experiment_by_name("netweight")
        artifacts = (folder.resolve() / "artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment("netweight", artifacts)
        self._run = self._client.create_run(experiment).info.run_id

    def log(self, label: str, step: int, loss: float, rate: float) -> None:
        """Loss and learning rate of a fit."""
        # MLflow refuses a metric's name with other characters than these.
        label = re.sub(r"[^\w\-. :/]", "_", label, flags=re.ASCII)
        self._client.log_metric(self._run, f"{label}/loss", loss, step=step)
        self._client.log_metric(self._run, f"{label}/learning rate", rate, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)
