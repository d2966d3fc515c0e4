"""A client: it keeps its rows, trains on them, and answers tasks."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from netweight.data import Dataset, Rows
from netweight.data.files import beside
from netweight.errors import DataError, LabelError, OptionError
from netweight.model import Model
from netweight.reporter import Passing, Reporter
from netweight.run.federated.codecs import encoded, put, seed_of, travelling
from netweight.run.federated.guard import Guard
from netweight.run.federated.membership import membership
from netweight.run.federated.messages import (
    Advertise,
    Answer,
    AttackTask,
    FitTask,
    Fitted,
    Join,
    Joined,
    Manifest,
    Reduced,
    Scored,
    ScoreTask,
    Share,
    Task,
    Tensors,
    Unmask,
)
from netweight.run.local import Local
from netweight.seams import Seams
from netweight.task import Classify

_ATTACKED = 500  # rows of each kind in a membership check
_SEEN = ("text", "pair", "label", "weight")  # columns that a model or its loss reads


class Client:
    """Answers tasks from its own rows.

    Args:
        name: unique among the clients of a run.
        data: its rows; only `train` (and the pool) are trained on, `select` tells how good a model is here.
        folder: where it keeps checkpoints and what it carries from round to round, so that a killed client goes on;
            None keeps that in memory.
        expects: what it insists on: a server whose model differs is refused. None takes the server's model, as long as
            its own labels are known to it.
        limit: epsilon that all fits on these rows may cost together, at delta 1e-5; it answers nothing that would cost
            more, and nothing that is not private. None has no limit.
        said: told, in sentences, the privacy of each fit and which labels the server does not know; nobody else hears
            of those.
    """

    def __init__(
        self,
        name: str,
        data: Dataset,
        folder: str | Path | None = None,
        expects: Manifest | None = None,
        limit: float | None = None,
        said: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.data, self.expects, self.limit = name, data, expects, limit
        folder = None if folder is None else Path(folder)
        self._local = Local(data, folder and folder / "work")
        self._kept = Kept(folder)
        self._guard = Guard(name, folder, limit)
        self._said, self._told = said, set[str]()

    def answer(self, task: Task) -> Answer:
        """The answer to a task. Raises what the work raises: DataError without rows, OptionError, ModelError."""
        try:
            return self._answer(task)
        except LabelError as problem:
            self._say(str(problem))  # it quotes labels, and errors travel
            raise LabelError("labels of this client do not fit the task; it says where it runs which.") from None

    def _say(self, sentence: str, about: str = "") -> None:
        """Once of each thing that it is about."""
        if self._said and about + sentence not in self._told:
            self._told.add(about + sentence)
            self._said(f"{self.name}: {sentence}")

    def _answer(self, task: Task) -> Answer:
        if isinstance(task, Join):
            return self._join(task)
        self._guard.admit(task)
        if isinstance(task, FitTask):
            return self._fit(task)
        if isinstance(task, ScoreTask):
            rows = len(self.data.select)
            model = self.own(task.model, task.fit, task.taken)
            return Scored(self._local.quality(model) if rows else None, rows)
        if isinstance(task, AttackTask):
            model = self.own(task.model, task.fit, task.taken)
            return membership(model, self.data.train, self.data.select, _ATTACKED)
        if isinstance(task, Advertise | Share | Unmask):
            return self._guard.answer(task)
        return Reduced(self._local.reduce(task.model, task.statistic, task.limit, task.unlabelled))

    def own(self, model: Model, fit: str, taken: int | None = None) -> Model:
        """The model with the parameters that this client kept for itself in a fit, after the round `taken` (None: the
        last)."""
        kept = self._kept.after(fit, taken, "personal")
        if not kept:
            return model
        mine = model.copy()
        put(mine.network, kept)
        return mine

    def _join(self, task: Join) -> Joined:
        rows = self.data.train
        mine = replace(
            self.expects or task.manifest,
            columns=tuple(name for name in _SEEN if getattr(rows, name) is not None),
            version=version("netweight"),
        )
        found = set(rows.label or ())
        unknown = _strange(found, mine.labels) if self.expects is None else []
        if unknown:
            known = ", ".join(map(repr, mine.labels)) or "numbers"
            some = ", ".join(map(repr, unknown[:5]))
            self._say(f"labels that the server does not know ({len(unknown)}; it has {known}): {some}.")
        return Joined(mine, len(rows), min(len(found), 2) if mine.labels else 0, len(unknown))

    def _fit(self, task: FitTask) -> Fitted:
        _require(self.data.train)
        self._say(self._guard.stated(task), task.fit)
        old, names = travelling(task.model.network, task.personal), trained(task.model) - set(task.personal)
        # Asked again, as by a server that was killed: a second answer of the same rows would cost twice.
        said = self._kept.after(task.fit, task.round, "said") if task.privacy else {}
        now = _weight(task)
        was = self._kept.after(task.fit, task.round, "weight").get("seat", now) if said else now
        if was != now:
            raise OptionError(
                f"{self.name} has answered round {task.round} weighing {float(was):.4g}, and was asked for the same "
                f"weighing {float(now):.4g}: two such sums would show its update. Start again with the clients and the "
                "rows of the first time, or begin another fit."
            )
        fitted = Fitted(said, len(self.data.train), math.nan) if said else self._train(task, old, names)
        spent, in_all = self._guard.spent(task)
        tensors = self._guard.masked(task, old, fitted.tensors, names)
        return replace(fitted, tensors=tensors, epsilon=spent, in_all=in_all)

    def _train(self, task: FitTask, old: Tensors, names: frozenset[str]) -> Fitted:
        model = task.model
        personal = self._kept.after(task.fit, task.taken, "personal")
        if personal:
            model = model.copy()
            put(model.network, personal)
        mine = self._kept.after(task.fit, task.taken, "variate")
        plain = self._local.seams
        seams = Correcting(model.network, task.proximal, task.variate, mine, plain.device)
        meter = Meter(task.plan.reporter)
        data = self._local.taught if task.loss.teachers else self.data
        pool = data.pool if task.loss.unlabelled else None
        drawn = len(data.train) + len(pool or ())
        self._local.seams = self._guard.seams(task, drawn, seams)
        try:
            fitted = self._local.fit(model, task.loss, replace(task.plan, reporter=meter), task.label)
        finally:
            self._local.seams = plain
        self._local.forget()
        self._guard.note(task, drawn, meter.at)
        new = travelling(fitted.network, task.personal)
        seed = seed_of(task.fit, task.round)
        residual = self._kept.after(task.fit, task.taken, "residual")
        draws = (seed, seed_of(seed, self.name))
        sent, left = encoded(task.codec, old, new, names, draws, residual)
        sent = self._guard.noised(task, old, sent, names)
        keep: dict[str, Tensors] = {"residual": left}
        if task.privacy and self._kept.folder:
            keep["said"], keep["weight"] = sent, {"seat": _weight(task)}
        if task.personal:
            keep["personal"] = {name: fitted.network.state_dict()[name].clone() for name in task.personal}
        change = None
        if task.variate is not None:
            keep["variate"] = seams.variate()
            change = {n: v - mine[n] if n in mine else v for n, v in keep["variate"].items()}
        self._kept.save(task, keep)
        return Fitted(sent, len(self.data.train), math.nan if task.privacy else meter.loss, change)


def _strange(found: Collection[str], labels: tuple[str, ...]) -> list[str]:
    """Those that are not among the labels, or no numbers where there are none: scores."""

    def number(label: str) -> bool:
        try:
            return math.isfinite(float(label))
        except ValueError:
            return False

    return sorted(label for label in found if not (label in labels if labels else number(label)))


def _weight(task: FitTask) -> Tensor:
    """By how much the update counts in its sum; 0 where it travels alone."""
    return torch.tensor(task.seat.weight if task.seat else 0.0, dtype=torch.float64)


def _require(rows: Rows) -> None:
    if not len(rows):
        raise DataError("this client has no training rows; it can take part once it has some.")


def trained(model: Model) -> frozenset[str]:
    """Names of the parameters that require gradients."""
    return frozenset(name for name, p in model.network.named_parameters() if p.requires_grad)


def manifest_of(model: Model, columns: tuple[str, ...]) -> Manifest:
    """What a server asks of its clients: the model's own facts, and the columns of its rows."""
    task = model.task
    return Manifest(
        tuple(name for name in _SEEN if name in columns),
        f"{task.kind}, {task.metric}",
        task.labels if isinstance(task, Classify) else (),
        hashlib.sha256(model.encoder.definition.encode()).hexdigest(),
        model.encoder.max_length,
        model.base.digest or model.base.name,
        version("netweight"),
    )


class Correcting(Seams):
    """Adds to each gradient what FedProx and SCAFFOLD ask for, before it is clipped.

    FedProx (Li et al., MLSys 2020): mu * (w - w_server), the gradient of mu / 2 * ||w - w_server||^2.
    SCAFFOLD (Karimireddy et al., ICML 2020): c - c_k. Its option II renews c_k as c_k - c + (x - y) / (K * rate), which
    under plain SGD at a constant rate is the mean of the gradients seen on the way; that mean is what is taken here, so
    that momentum or Adam do not change what a variate is. With them the correction is a heuristic all the same: the
    paper's proofs are for SGD.
    """

    def __init__(
        self,
        network: nn.Module,
        mu: float,
        server: Tensors | None,
        mine: Tensors,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(device)
        self.mu = mu
        held = {name: p.detach().to(self.device) for name, p in network.named_parameters() if p.requires_grad}
        self.start = {name: p.clone() for name, p in held.items()} if mu else {}
        # Parameters that stay with the client have no variate.
        push = {n: v - mine[n] if n in mine else v for n, v in (server or {}).items()}
        self.push = self.scatter(push)
        self.seen = {name: torch.zeros_like(held[name]) for name in push}
        self.steps = 0

    @property
    def terms(self) -> str:
        if not (self.mu or self.push):
            return ""
        digest = hashlib.sha256()
        for name, value in sorted(self.gather(self.push).items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return f"mu {self.mu}, variates {digest.hexdigest()}"

    def correct(self, network: nn.Module) -> None:
        self.steps += 1
        for name, parameter in network.named_parameters():
            if parameter.grad is None:
                continue
            if name in self.push:
                self.seen[name] += parameter.grad  # a sparse one adds to the rows that it has
                add(parameter, self.push[name])
            if self.mu:
                add(parameter, self.mu * (parameter.detach() - self.start[name]))

    def variate(self) -> dict[str, Tensor]:
        """The mean of the gradients that this client saw."""
        return self.gather({name: total / max(self.steps, 1) for name, total in self.seen.items()})


def add(parameter: nn.Parameter, term: Tensor) -> None:
    """Add to a gradient; of one that touches few rows, to those rows only."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        grad = grad.coalesce()
        values = grad.values() + term[grad.indices()[0]]
        parameter.grad = torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True)
    else:
        grad += term


class Meter(Passing):
    """A reporter that keeps count of steps and the mean loss, and passes everything on."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(reporter)
        self.steps = 0
        self.at = 0  # the step that the fit has come to, with those before it was killed
        self.total = 0.0

    @property
    def loss(self) -> float:
        """Mean over the steps of this process."""
        return self.total / max(self.steps, 1)

    def start(self, label: str, steps: int, done: int) -> None:
        """Passed on."""
        self.at = done
        super().start(label, steps, done)

    def step(self, step: int, loss: float, rate: float) -> None:
        """Counted and passed on."""
        self.steps += 1
        self.at = step
        self.total += loss
        super().step(step, loss, rate)


class Kept:
    """What a client carries from round to round, by fit: residuals, its SCAFFOLD variate, personal parameters.

    The state after the last round is kept, and that after the last one whose answer the server took: the next round
    begins from the one or the other, and so does the last one where a server that was killed asks for it again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[tuple[str, int], dict[str, Tensor]] = {}

    def after(self, fit: str, round_: int | None, kind: str) -> dict[str, Tensor]:
        """The tensors of a kind from after a round (None: the last), by name; empty where none are."""
        rounds = [r for r in self._rounds(fit) if round_ in (None, r)]
        held = self._load(fit, max(rounds)) if rounds else {}
        return {name[len(kind) + 1 :]: value for name, value in held.items() if name.startswith(f"{kind}/")}

    def save(self, task: FitTask, state: Mapping[str, Tensors]) -> None:
        """Keep the state after a round. Written whole or not at all."""
        fit, round_ = task.fit, task.round
        held = {f"{kind}/{name}": v.contiguous() for kind, tensors in state.items() for name, v in tensors.items()}
        for old in set(self._rounds(fit)) - {task.taken, round_}:
            self._drop(fit, old)
        if not held:
            return
        if self.folder is None:
            self._held[fit, round_] = held
            return
        path = self._path(fit, round_)
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as new:
            save_file(held, new)

    def _path(self, fit: str, round_: int) -> Path:
        assert self.folder is not None
        if not re.fullmatch("(?:[0-9a-f]{64})?", fit):  # it comes from a server, and could name any folder
            raise OptionError(f"a fit is named by its SHA-256 in hexadecimal text, and {fit[:80]!r} came.")
        return self.folder / f"rounds-{fit[:16]}" / f"{round_}.safetensors"

    def _rounds(self, fit: str) -> list[int]:
        if self.folder is None:
            return [r for name, r in self._held if name == fit]
        return [int(path.stem) for path in self._path(fit, 0).parent.glob("*.safetensors")]

    def _load(self, fit: str, round_: int) -> dict[str, Tensor]:
        return self._held[fit, round_] if self.folder is None else load_file(self._path(fit, round_))

    def _drop(self, fit: str, round_: int) -> None:
        if self.folder is None:
            self._held.pop((fit, round_), None)
        else:
            self._path(fit, round_).unlink(missing_ok=True)
