"""The server of a federated run: rounds of training on clients' rows, which never leave them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from netweight.data import Dataset
from netweight.errors import ModelError, OptionError
from netweight.loss import Loss, short_row
from netweight.model import Model
from netweight.reporter import Silent
from netweight.run.base import Statistic, merge
from netweight.run.federated.checks import Round, capped, measured, missing, sound_parts, unlikely
from netweight.run.federated.client import Client, manifest_of, trained
from netweight.run.federated.codecs import Decoded, Full, put, seed_of, size, travelling
from netweight.run.federated.inprocess import InProcess
from netweight.run.federated.members import Members, too_few
from netweight.run.federated.membership import Membership
from netweight.run.federated.messages import (
    AttackTask,
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
from netweight.run.federated.privacy import (
    OFF,
    Automatic,
    ClientLevel,
    Guarded,
    Privacy,
    Setting,
    among_others,
    least,
    noise_to_signal,
    refuse,
    statement,
)
from netweight.run.federated.report import Attacked, FederationReport, RoundReport, Standing, in_words
from netweight.run.federated.state import State, distance
from netweight.run.federated.veiled import Veiled
from netweight.run.local import Local
from netweight.run.processes import shares
from netweight.train import Plan, fit_digest

T = TypeVar("T")
_HEADS = ("head", "heads")
_PRIVATE = Automatic()


class Federated:
    """Trains and adds up where the rows are: on clients.

    A plan's epochs and its schedule are shared out over the rounds. With one client and one round the result is that
    of `Local`, bit for bit.

    Args:
        clients: those of a simulation in this process, or a channel to others.
        data: rows of the server's own, for `quality` and early stopping; none of them is trained on. None asks clients.
        folder: where the state after each round is kept, so that a killed server goes on; None keeps nothing.
        rounds, algorithm, travel: see there.
        privacy: what is promised of rows; None turns it off, and the report says so.
    """

    def __init__(
        self,
        clients: Sequence[Client] | Channel,
        data: Dataset | None = None,
        folder: str | Path | None = None,
        *,
        rounds: Rounds | None = None,
        algorithm: Algorithm | None = None,
        travel: Travel | None = None,
        privacy: Automatic | Privacy | None = _PRIVATE,
    ) -> None:
        self.channel: Channel = InProcess(clients) if isinstance(clients, Sequence) else clients
        self.held_out, self.folder = data, None if folder is None else Path(folder)
        self.rounds = rounds or Rounds()
        self.algorithm: Algorithm = algorithm or FedAvg()
        self.travel = travel or Travel()
        self.privacy = privacy
        self.members = Members(self.channel, self.rounds, self.refuses)
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
        if self.privacy is not None:
            raise OptionError(
                f"{type(statistic).__name__} is an exact sum over rows, which no noise hides: a technique that needs "
                "it cannot run with privacy (Finetune: probe=False, class_weights=False). Leave it out, or turn "
                "privacy off (privacy=None, --privacy off)."
            )
        usable = self.usable(model)
        names = sorted(usable)
        rows = [usable[name].rows for name in names]
        takes: list[int | None] = [None] * len(names)
        if limit is not None and limit < sum(rows):
            takes = list(shares(limit, rows))
        tasks = {n: ReduceTask(model, statistic, k, unlabelled) for n, k in zip(names, takes, strict=True) if k != 0}
        answers = self.channel.exchange(tasks, self.rounds.seconds)
        sent = {name: a.tensors for name, a in answers.items() if isinstance(a, Reduced)}
        with torch.no_grad():
            form = statistic(model.network, short_row(model))
        summed = statistic.combine == "sum"
        per = {n: float(task.limit or usable[n].rows) if summed else 1.0 for n, task in tasks.items()}
        parts, refused = sound_parts(form, sent, per, self.rounds.outlier)
        for one in refused:
            self.refuses(one.client, one.reason, False)
        if len(parts) < min(self.rounds.minimum, len(tasks)):
            lost = (*(missing(n, answers.get(n)) for n in tasks if n not in sent), *refused)
            raise too_few(len(parts), lost, self.rounds.minimum, "a statistic")
        return merge(statistic, [dict(part) for part in parts.values()])

    def quality(self, model: Model) -> float:
        """The task's metric on the server's select rows, or, where it has none, the mean over clients by their rows."""
        if self.held_out is not None:
            return Local(self.held_out).quality(model)
        scores = self.scores(model)
        weights = capped({name: s.rows for name, s in scores.items() if s.quality is not None}, self.rounds.heaviest)
        known = [(s.quality, weights[name]) for name, s in scores.items() if s.quality is not None]
        if not known:
            raise OptionError("no client has select rows to measure quality on; give the server `data`.")
        return sum(q * n for q, n in known) / sum(n for _, n in known)

    def scores(self, model: Model, fit: str = "", taken: Mapping[str, int] | None = None) -> dict[str, Scored]:
        """Each client's own view of a model, by name; with `fit` with the parameters that it kept in that fit, after
        the round that `taken` has for it."""
        tasks = _each(partial(ScoreTask, model, fit), self.usable(model), taken or {})
        answers = self.channel.exchange(tasks, self.rounds.seconds)
        return {name: a for name, a in sorted(answers.items()) if isinstance(a, Scored) and measured(a)}

    def usable(self, model: Model, least: int = 0) -> dict[str, Joined]:
        """Clients that can take part now, by name. Raises ClientError where they are fewer than `least`."""
        columns = tuple(name for name, _ in self.held_out.select.columns()) if self.held_out is not None else ()
        return self.members.there(manifest_of(model, columns), least)

    def account(self) -> dict[str, Any]:
        """What fits did, in numbers that name no client."""
        return {"fits": [report.numbers() for report in self.reports]}

    def remarks(self) -> tuple[str, ...]:
        """What all fits cost the rows of clients."""
        return (in_words(self.reports),) if self.reports else ()

    def refuses(self, client: str, reason: str, final: bool) -> None:
        """A client cannot take part; what differs (`final`) does so whenever it is asked."""

    def finished(self, report: FederationReport) -> None:
        """A fit has come to its end."""
        self.reports.append(report)

    def settled(self, state: Path) -> None:
        """A fit's model is handed over; its state is not needed any more."""
        state.unlink(missing_ok=True)

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
                "run": [repr(replace(run.rounds, wait=0.0)), repr(run.algorithm), repr(run.travel), repr(run.privacy)],
            }
        )
        self.path = run.folder / f"rounds-{self.fit[:16]}.safetensors" if run.folder else None
        self.guarded: Guarded | None = None
        self.began = time.monotonic()

    def run(self) -> Model:
        path, total = self.path, self.run_.rounds.number
        state = State.load(path, self.fit) if path and path.exists() else State(self.start)
        known = not self._goes_on(state) and any(report.fit == self.fit for report in self.run_.reports)
        if self._goes_on(state) or not known:
            self.guarded = self._promised(state)
            self.began = time.monotonic()  # waiting for clients is no training
        if self.guarded and not state.most:
            # Before the first round, so that a server that is killed in it promises the same once more.
            one = self.guarded
            state = replace(state, unit=one.privacy.unit, least=one.least, most=one.most)
            if path:
                state.save(path, self.fit)
        reporter = self.plan.reporter
        reporter.start(self.label, total, len(state.rounds))
        while self._goes_on(state):
            state = self.round(state)
            if path:
                state.save(path, self.fit)
            done = state.rounds[-1]
            reporter.step(len(state.rounds), math.nan if done.loss is None else done.loss, self.plan.learning_rate)
            if done.quality is not None:
                reporter.note(f"quality on select: {done.quality:.4f}")
        final = state.best if state.best is not None else state.values
        made = self._with(final)
        made.network.eval()
        if not known:
            self._report(made, state, distance(final, self.start))
        if path:
            self.run_.settled(path)
        return made

    def round(self, state: State) -> State:
        """The state after one more round."""
        began, run, number = time.monotonic(), self.run_, len(state.rounds)
        usable = run.usable(self.model, state.least)
        chosen = run.members.drawn(usable, self.plan.seed, number, state.least)
        task = self.task(state, number)
        collect = self._veiled if self.guarded and self.guarded.privacy.secure else self._open
        found = collect(state, task, chosen, usable)
        run.members.forget(lost.client for lost in (*found.lost, *found.refused))
        mean, fitted, took = found.mean, found.fitted, found.took
        was = {name: state.values[name] for name in self.travelling}
        new, moments = run.algorithm.step(was, mean, state.moments)
        values = {**mean, **new}
        down = len(chosen) * (size(state.values) + size(task.variate or {}))
        variate = self._variate(state, {name: fitted[name] for name in took}, len(usable))
        weights = {n: weight for n, weight in run.members.weights(usable).items() if n in took}
        loss = None if self.guarded else sum(fitted[n].loss * weights[n] for n in took) / sum(weights.values())
        quality, seconds = self._quality(values), time.monotonic() - began
        cost = (max(a.epsilon for a in fitted.values()), max(a.in_all for a in fitted.values()))
        report = RoundReport(number, took, found.lost, found.refused, found.up, down, loss, seconds, quality, *cost)
        return self._next(replace(state, values=values, moments=moments, variate=variate), report)

    def _open(self, state: State, task: FitTask, chosen: list[str], usable: Mapping[str, Joined]) -> _Collected:
        """Updates that the server sees one by one."""
        run = self.run_
        # An aggregation that needs more of them says so before they train.
        run.algorithm.aggregate({name: {} for name in chosen}, dict.fromkeys(chosen, 1.0))
        answers = run.channel.exchange(_told(task, state, chosen), run.rounds.seconds)
        fitted = {name: a for name, a in sorted(answers.items()) if isinstance(a, Fitted)}
        lost = tuple(missing(name, answers.get(name)) for name in chosen if name not in fitted)
        up = sum(size(a.tensors) + size(a.variate or {}) for a in fitted.values())
        unsound = {name: unlikely(a, usable[name].rows, self.guarded is not None) for name, a in fitted.items()}
        fitted = {name: a for name, a in fitted.items() if not unsound[name]}
        updates, refused = self._accepted(state, task, fitted)
        refused += tuple(Lost(name, problem) for name, problem in unsound.items() if problem)
        minimum = self.guarded.threshold(len(chosen)) if self.guarded else run.rounds.minimum
        if len(updates) < minimum:
            raise too_few(len(updates), (*lost, *refused), minimum, f"round {task.round}")
        mean = run.algorithm.aggregate(updates, self._weights(updates, usable))
        return _Collected(mean, fitted, tuple(updates), lost, refused, up)

    def _accepted(
        self, state: State, task: FitTask, fitted: Mapping[str, Fitted]
    ) -> tuple[dict[str, Decoded], tuple[Lost, ...]]:
        """Updates that are sound, with their variates, and who was refused."""
        run, shared = self.run_, seed_of(self.fit, task.round)
        odd: tuple[Lost, ...] = ()
        if task.variate is not None:
            zero = {name: torch.zeros_like(task.variate[name]) for name in sorted(task.variate)}
            # Who takes part late sends its whole variate, the others by how much theirs changed.
            whole = math.sqrt(sum(float(v.double().square().sum()) for v in task.variate.values()))
            check = Round(Full(), zero, self.travelling, shared, run.rounds.outlier, "variate", whole)
            sound, odd = check.accepted({name: a.variate or {} for name, a in fitted.items()})
            fitted = {name: fitted[name] for name in sound}
        check = Round(run.travel.codec, state.values, self.travelling, shared, run.rounds.outlier)
        updates, refused = check.accepted({name: a.tensors for name, a in fitted.items()})
        return updates, (*odd, *refused)

    def _veiled(self, state: State, task: FitTask, chosen: list[str], usable: Mapping[str, Joined]) -> _Collected:
        """Updates of which the server sees the sum."""
        assert self.guarded is not None
        run = self.run_
        veiled = Veiled(
            run.channel.exchange,
            _told(task, state, chosen),
            self._weights(chosen, usable),
            {name: usable[name].rows for name in chosen},
            self.guarded.threshold(len(chosen)),
            self.guarded.privacy.largest,
            run.rounds.seconds,
        )
        mean = veiled.mean(state.values, self.travelling, seed_of(self.fit, task.round))
        lost = tuple(veiled.lost[name] for name in sorted(veiled.lost))
        return _Collected(mean, veiled.fitted, tuple(veiled.fitted), lost, (), veiled.up)

    def _weights(self, clients: Iterable[str], usable: Mapping[str, Joined]) -> dict[str, float]:
        """By rows. Under privacy whoever else is there: a client in two sums of one round weighs the same in both."""
        if self.guarded is not None:
            return {name: min(usable[name].rows / self.guarded.most, 1.0) for name in clients}
        weights = self.run_.members.weights(usable)
        return {name: weights[name] for name in clients}

    def _promised(self, state: State) -> Guarded | None:
        """What is promised to the clients that are there, or was when the fit began; None without privacy. Raises
        OptionError where it cannot be kept, or nothing would be learned."""
        run = self.run_
        if run.privacy is None:
            run.usable(self.model)
            return None
        needed = state.least or (2 if among_others(run.privacy) else 1)
        usable = run.usable(self.model, needed if self._goes_on(state) else 0)
        kind = run.privacy.among(len(usable), state.unit) if isinstance(run.privacy, Automatic) else run.privacy
        rows = {name: about.rows for name, about in usable.items()}
        d = sum(self.start[name].numel() for name in self.travelling)
        setting = Setting(self.plan, run.rounds, rows, d)
        if not state.unit:
            refuse(kind, setting, run.algorithm, run.travel)
        most = state.most or (1.0 if isinstance(kind, ClientLevel) else max(run.members.weights(usable).values()))
        return Guarded(kind, state.least or least(kind, setting), noise_to_signal(kind, setting)[0], most)

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
            self.guarded.privacy.task(rounds, self.guarded.least) if self.guarded else None,
        )

    def _with(self, values: Tensors) -> Model:
        new = self.model.copy()
        put(new.network, values)
        with torch.no_grad():
            for name in new.network.pruned:  # noise moves what is zero, too
                new.network.get_parameter(name).mul_(self.model.network.get_parameter(name) != 0)
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

    def _goes_on(self, state: State) -> bool:
        stops = self.plan.patience is not None and state.stale > self.plan.patience
        return len(state.rounds) < self.run_.rounds.number and not stops

    def _report(self, made: Model, state: State, moved: float) -> None:
        if not moved > 0:
            raise ModelError(f"{self.label}: no weight moved in {len(state.rounds)} rounds; raise the learning rate.")
        run = self.run_
        taken = _last(state) if self.personal else {}
        scores = run.scores(made, self.fit if self.personal else "", taken)
        standings = tuple(
            Standing(name, about.rows, scores[name].quality if name in scores else None)
            for name, about in sorted(run.members.joined.items())
        )
        run.finished(
            FederationReport(
                self.label,
                self.fit,
                state.rounds,
                standings,
                moved,
                self._statement(state),
                run.members.notes(),
                max(r.epsilon for r in state.rounds) if self.guarded else None,
                self._attacks(made, taken),
            )
        )

    def _statement(self, state: State) -> str:
        if self.guarded is None:
            return OFF
        spent, in_all = (max(getattr(r, name) for r in state.rounds) for name in ("epsilon", "in_all"))
        ratio = f"; predicted noise to signal {self.guarded.ratio:.2f}"
        return statement(self.guarded.privacy, spent, in_all) + ratio

    def _attacks(self, made: Model, taken: Mapping[str, int]) -> tuple[Attacked, ...]:
        """What clients' training rows can be told by, before and after; of those that have rows enough."""
        run, names = self.run_, sorted(self.run_.usable(self.model))
        found = []
        for model, fit in ((self.model, ""), (made, self.fit if self.personal else "")):
            tasks = _each(partial(AttackTask, model, fit), names, taken)
            answers = run.channel.exchange(tasks, run.rounds.seconds)
            found.append({n: a for n, a in answers.items() if isinstance(a, Membership)})
        before, after = found
        return tuple(Attacked(n, before[n], after[n]) for n in names if n in before and n in after)


@dataclass(frozen=True)
class _Collected:
    """What a round brought: the aggregate of the updates, answers, who took part, was lost, was refused; bytes of the
    updates."""

    mean: dict[str, Tensor]
    fitted: Mapping[str, Fitted]
    took: tuple[str, ...]
    lost: tuple[Lost, ...]
    refused: tuple[Lost, ...]
    up: int


def _personal(model: Model) -> tuple[str, ...]:
    """Names of the head's parameters."""
    found = tuple(n for n, _ in model.network.named_parameters() if n.partition(".")[0] in _HEADS)
    if not found:
        raise OptionError(f"a {type(model.network).__name__} has no head that clients could keep for themselves.")
    return found


def _told(task: FitTask, state: State, clients: Iterable[str]) -> dict[str, FitTask]:
    """The task by client, with the last round in which its answer counted."""
    return _each(lambda round_: replace(task, taken=round_), clients, _last(state))


def _each(make: Callable[[int], T], clients: Iterable[str], last: Mapping[str, int]) -> dict[str, T]:
    """A task by client, made for the last round in which its answer counted (-1: none). Those with one such round share
    it, and so what is packed."""
    tasks = {round_: make(round_) for round_ in (-1, *last.values())}
    return {name: tasks[last.get(name, -1)] for name in clients}


def _last(state: State) -> dict[str, int]:
    """The last round in which an answer of each client counted; without those of whom none did."""
    return {name: done.round for done in state.rounds for name in done.took_part}
