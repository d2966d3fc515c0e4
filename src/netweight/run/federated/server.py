"""The server of a federated run: rounds of training on clients' rows, which never leave them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from netweight.data import Dataset
from netweight.errors import ModelError, OptionError
from netweight.loss import Loss
from netweight.model import Model
from netweight.run.base import Statistic, merge
from netweight.run.federated.checks import Round
from netweight.run.federated.client import Client, manifest_of, trained
from netweight.run.federated.codecs import put, seed_of, size, travelling
from netweight.run.federated.inprocess import InProcess
from netweight.run.federated.members import Members, too_few
from netweight.run.federated.messages import (
    Channel,
    FitTask,
    Fitted,
    Joined,
    Lost,
    Reduced,
    ReduceTask,
    Scored,
    ScoreTask,
    Tensors,
)
from netweight.run.federated.options import Algorithm, FedAvg, Rounds, Travel
from netweight.run.federated.report import FederationReport, RoundReport, Standing
from netweight.run.federated.state import State, distance
from netweight.run.local import Local
from netweight.run.processes import shares
from netweight.train import Plan, Silent, fit_digest

_HEADS = ("head", "heads")


class Federated:
    """Trains and adds up where the rows are: on clients.

    A plan's epochs and its schedule are shared out over the rounds. With one client and one round the result is that
    of `Local`, bit for bit.

    Args:
        clients: those of a simulation in this process, or a channel to others.
        data: rows of the server's own, for `quality` and early stopping; none of them is trained on. None asks clients.
        folder: where the state after each round is kept, so that a killed server goes on; None keeps nothing.
        rounds, algorithm, travel: see there.
    """

    def __init__(
        self,
        clients: Sequence[Client] | Channel,
        data: Dataset | None = None,
        folder: Path | None = None,
        *,
        rounds: Rounds | None = None,
        algorithm: Algorithm | None = None,
        travel: Travel | None = None,
    ) -> None:
        self.channel: Channel = InProcess(clients) if isinstance(clients, Sequence) else clients
        self.held_out, self.folder = data, folder
        self.rounds = rounds or Rounds()
        self.algorithm: Algorithm = algorithm or FedAvg()
        self.travel = travel or Travel()
        self.members = Members(self.channel, self.rounds)
        self.reports: list[FederationReport] = []

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        """A copy of `model`, trained over all rounds; see `reports` for what happened.

        Raises ClientError (nobody is there, or too few answer), ModelError (no weight moved), OptionError (nothing
        would travel).
        """
        return _Fit(self, model, loss, plan, label).run()

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        """The statistic over all clients' rows; of a limit each client takes its share by rows."""
        usable = self.usable(model)
        names = sorted(usable)
        rows = [usable[name].rows for name in names]
        takes: list[int | None] = [None] * len(names)
        if limit is not None and limit < sum(rows):
            takes = list(shares(limit, rows))
        tasks = {n: ReduceTask(model, statistic, k, unlabelled) for n, k in zip(names, takes, strict=True) if k != 0}
        answers = self.channel.exchange(tasks, self.rounds.seconds)
        parts = {name: a.tensors for name, a in sorted(answers.items()) if isinstance(a, Reduced)}
        if len(parts) < min(self.rounds.minimum, len(tasks)):
            lost = tuple(a for _, a in sorted(answers.items()) if isinstance(a, Lost))
            raise too_few(len(parts), lost, self.rounds.minimum, "a statistic")
        return merge(statistic, [dict(part) for part in parts.values()])

    def quality(self, model: Model) -> float:
        """The task's metric on the server's select rows, or, where it has none, the mean over clients by their rows."""
        if self.held_out is not None:
            return Local(self.held_out).quality(model)
        scores = self.scores(model, "")
        known = [(s.quality, s.rows) for s in scores.values() if s.quality is not None]
        if not known:
            raise OptionError("no client has select rows to measure quality on; give the server `data`.")
        return sum(q * n for q, n in known) / sum(n for _, n in known)

    def scores(self, model: Model, fit: str) -> dict[str, Scored]:
        """Each client's own view of a model, by name; with `fit` with the parameters that it kept in that fit."""
        tasks = {name: ScoreTask(model, fit) for name in self.usable(model)}
        answers = self.channel.exchange(tasks, self.rounds.seconds)
        return {name: a for name, a in sorted(answers.items()) if isinstance(a, Scored)}

    def usable(self, model: Model) -> dict[str, Joined]:
        """Clients that can take part now, by name."""
        columns = tuple(name for name, _ in self.held_out.select.columns()) if self.held_out is not None else ()
        return self.members.there(manifest_of(model, columns))

    @property
    def report(self) -> FederationReport:
        """That of the last fit. Raises OptionError before the first."""
        if not self.reports:
            raise OptionError("this run has not fitted anything yet; there is no report.")
        return self.reports[-1]


class _Fit:
    """One fit over all rounds."""

    def __init__(self, run: Federated, model: Model, loss: Loss, plan: Plan, label: str) -> None:
        self.run_, self.model, self.loss, self.plan, self.label = run, model, loss, plan, label
        self.trained = trained(model)
        self.personal = _personal(model) if run.travel.personal_head else ()
        self.start = travelling(model.network, self.personal)
        self.travelling = self.trained - set(self.personal)
        if not self.trained:
            raise OptionError("every parameter is frozen; there is nothing to fit.")
        if not self.travelling:
            raise OptionError("only the head is trained and each client keeps its own: nothing would travel.")
        self.fit = fit_digest(
            {
                "model": model.digest,
                "loss": repr(loss),
                "teachers": [t.digest for t in loss.teachers],
                "plan": plan.describe(),
                "trained": sorted(self.trained),
                "run": [repr(run.rounds), repr(run.algorithm), repr(run.travel)],
            }
        )
        self.path = run.folder / f"rounds-{self.fit[:16]}.safetensors" if run.folder else None
        self.began = time.monotonic()

    def run(self) -> Model:
        path, total = self.path, self.run_.rounds.number
        state = State.load(path, self.fit) if path and path.exists() else State(self.start)
        reporter = self.plan.reporter
        reporter.start(self.label, total, len(state.rounds))
        while len(state.rounds) < total and not self._stops(state):
            state = self.round(state)
            if path:
                state.save(path, self.fit)
            done = state.rounds[-1]
            reporter.step(len(state.rounds), done.loss, self.plan.learning_rate)
            if done.quality is not None:
                reporter.note(f"quality on select: {done.quality:.4f}")
        final = state.best if state.best is not None else state.values
        made = self._with(final)
        made.network.eval()
        self._report(made, state, distance(final, self.start))
        if path:
            path.unlink(missing_ok=True)
        return made

    def round(self, state: State) -> State:
        """The state after one more round."""
        began, run, number = time.monotonic(), self.run_, len(state.rounds)
        usable = run.usable(self.model)
        chosen = run.members.drawn(usable, self.plan.seed, number)
        task = self.task(state, number)
        answers = run.channel.exchange(dict.fromkeys(chosen, task), run.rounds.seconds)
        fitted = {name: a for name, a in sorted(answers.items()) if isinstance(a, Fitted)}
        lost = tuple(_lost(name, answers.get(name)) for name in chosen if name not in fitted)
        shared = seed_of(self.fit, number)
        check = Round(run.travel.codec, state.values, self.travelling, shared, run.rounds.outlier)
        updates, refused = check.accepted({name: a.tensors for name, a in fitted.items()})
        if len(updates) < run.rounds.minimum:
            raise too_few(len(updates), (*lost, *refused), run.rounds.minimum, f"round {number}")
        rows = {name: float(usable[name].rows) for name in updates}
        mean = run.algorithm.aggregate(updates, rows)
        was = {name: state.values[name] for name in self.travelling}
        new, moments = run.algorithm.step(was, mean, state.moments)
        values = {**mean, **new}
        up = sum(size(a.tensors) + size(a.variate or {}) for a in fitted.values())
        down = len(chosen) * (size(state.values) + size(task.variate or {}))
        variate = self._variate(state, {name: fitted[name] for name in updates}, len(usable))
        loss = sum(fitted[n].loss * rows[n] for n in updates) / sum(rows.values())
        quality = self._quality(values)
        report = RoundReport(number, tuple(updates), lost, refused, up, down, loss, time.monotonic() - began, quality)
        return self._next(replace(state, values=values, moments=moments, variate=variate), report)

    def task(self, state: State, number: int) -> FitTask:
        """What clients are asked in a round."""
        run, plan = self.run_, self.plan
        rounds = run.rounds.number
        variate = None
        if run.algorithm.variates:
            zero = {name: torch.zeros_like(self.start[name]) for name in self.travelling}
            variate = state.variate or zero
        part = replace(plan, seed=plan.seed + 7919 * number, reporter=Silent())
        if rounds > 1:
            begin, end = plan.part
            cut = (end - begin) / rounds
            stretch = (begin + number * cut, min(end, begin + (number + 1) * cut))
            part = replace(part, epochs=plan.epochs / rounds, part=stretch, patience=None)
        if plan.seconds:
            left = max(plan.seconds - (time.monotonic() - self.began), 1.0)
            part = replace(part, seconds=left / (rounds - number))
        model = self._with(state.values) if number else self.model
        return FitTask(
            self.fit,
            number,
            model,
            self.loss,
            part,
            self.label,
            run.travel.codec,
            self.personal,
            run.algorithm.proximal,
            variate,
        )

    def _with(self, values: Tensors) -> Model:
        new = self.model.copy()
        put(new.network, values)
        return new

    def _variate(self, state: State, fitted: dict[str, Fitted], clients: int) -> Tensors | None:
        """c + (1 / N) * sum of the changes of c_k, over those that answered; N counts all clients."""
        if not self.run_.algorithm.variates:
            return None
        held = {n: v.clone() for n, v in state.variate.items()} if state.variate else {}
        for name in sorted(fitted):
            change = fitted[name].variate or {}
            for parameter in self.travelling & set(change):
                old = held.get(parameter, torch.zeros_like(change[parameter]))
                held[parameter] = old + change[parameter] / clients
        return held

    def _quality(self, values: Tensors) -> float | None:
        if self.plan.patience is None or self.run_.rounds.number == 1:
            return None
        return self.run_.quality(self._with(values))

    def _next(self, state: State, report: RoundReport) -> State:
        state = replace(state, rounds=(*state.rounds, report))
        if report.quality is None:
            return state
        if report.quality > state.quality:
            return replace(state, best=state.values, quality=report.quality, stale=0)
        return replace(state, stale=state.stale + 1)

    def _stops(self, state: State) -> bool:
        return self.plan.patience is not None and state.stale > self.plan.patience

    def _report(self, made: Model, state: State, moved: float) -> None:
        if not moved > 0:
            raise ModelError(f"{self.label}: no weight moved in {len(state.rounds)} rounds; raise the learning rate.")
        run = self.run_
        scores = run.scores(made, self.fit if self.personal else "")
        standings = tuple(
            Standing(name, about.rows, scores[name].quality if name in scores else None)
            for name, about in sorted(run.members.joined.items())
        )
        privacy = "none: updates travel as they are"
        run.reports.append(
            FederationReport(self.label, self.fit, state.rounds, standings, moved, privacy, run.members.notes())
        )


def _personal(model: Model) -> tuple[str, ...]:
    """Names of the head's parameters."""
    found = tuple(n for n, _ in model.network.named_parameters() if n.partition(".")[0] in _HEADS)
    if not found:
        raise OptionError(f"a {type(model.network).__name__} has no head that clients could keep for themselves.")
    return found


def _lost(name: str, answer: object) -> Lost:
    if isinstance(answer, Lost):
        return answer
    return Lost(name, "no answer." if answer is None else f"it answered with {type(answer).__name__}.")
