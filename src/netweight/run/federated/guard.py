"""A client's side of privacy: noise, a ledger of what its rows have cost, and its seat in secure aggregation."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netweight.data.files import atomic
from netweight.errors import OptionError, StoreError
from netweight.run.federated.accountant import Steps, epsilon
from netweight.run.federated.codecs import Full, RandomK
from netweight.run.federated.messages import (
    Advertise,
    Advertised,
    FitTask,
    ReduceTask,
    RowNoise,
    Share,
    Shared,
    Task,
    Tensors,
    Told,
    Unmask,
    UpdateNoise,
)
from netweight.run.federated.privacy import planned, row_noise, two_thirds
from netweight.seams import Seams

if TYPE_CHECKING:
    from netweight.run.federated.secure import Member

RANGE = 8.0  # no weight moves so far in a round that trains anything
_SLACK = 1 + 1e-9
_DELTA = 1e-5  # at which a client's own limit holds


class Guard:
    """Keeps a client's rows to what was promised of them.

    `folder` holds the ledger, so that a killed client does not forget; None keeps it in memory. `limit` is the epsilon
    that all fits may cost together. Raises OptionError for one that is no number above 0.
    """

    def __init__(self, name: str, folder: Path | None, limit: float | None = None) -> None:
        if limit is not None and not 0 < limit < math.inf:
            raise OptionError(f"the epsilon that {name} allows is {limit}; use a number above 0, or no limit.")
        self.name, self.limit = name, limit
        self.ledger = Ledger(folder and folder / "privacy.json")
        self.opened = Opened(folder and folder / "opened.json")
        self._members: dict[tuple[str, int], Member] = {}
        self._last: tuple[Share | Unmask, Shared | Told] | None = None

    def admit(self, task: Task) -> None:
        """Raises OptionError for a task that no noise hides, or a share of it, where there is a limit to what rows may
        cost."""
        if self.limit is None:
            return
        if isinstance(task, ReduceTask) or (isinstance(task, FitTask) and task.privacy is None):
            asked = "an exact sum over rows" if isinstance(task, ReduceTask) else "an update without noise"
            raise OptionError(
                f"{self.name} allows its rows to cost epsilon {self.limit:g} in all, and was asked for {asked}, which "
                "has no bound; turn privacy on, or start the client without a limit."
            )
        if isinstance(task, FitTask) and isinstance(task.privacy, UpdateNoise):
            # Who asks may name any number of clients; how many add their noise, secure aggregation knows.
            sure = self._member((task.fit, task.round)).least if task.seat else 1
            if not 0 < task.privacy.cohort <= sure:
                raise OptionError(
                    f"{self.name} allows its rows to cost epsilon {self.limit:g} in all, and was asked for its share "
                    f"of the noise of {task.privacy.cohort} clients, where the sum of {sure} may be seen; use "
                    "row-level privacy or secure aggregation, or start the client without a limit."
                )

    def stated(self, task: FitTask) -> str:
        """What a fit promises of this client's rows, in a sentence."""
        p = task.privacy
        if p is None:
            return f"{task.label}: privacy is OFF; nothing bounds what this client's updates tell of its rows."
        unit = "row" if isinstance(p, RowNoise) else "client"
        seen = "this client's update" if task.seat is None else "sums of updates only"
        return (
            f"{task.label}: {unit}-level privacy, epsilon {p.epsilon:g} at delta {p.delta:g}; the server sees {seen}."
        )

    def seams(self, task: FitTask, rows: int, inner: Seams) -> Seams:
        """Those of the loop. Raises OptionError for what the noise cannot hide, and where the budget of this fit does
        not last for one more round."""
        if task.privacy is None:
            return inner
        plain = isinstance(task.codec, Full | RandomK)
        if isinstance(task.privacy, UpdateNoise) and (task.variate is not None or not plain):
            bare = f"{type(task.codec).__name__} of its update" if not plain else "SCAFFOLD's variate"
            raise OptionError(
                f"{self.name} was asked for {bare}, and noise for clients is added to values of the update alone; use "
                "FedAvg, FedProx or FedAdam (--algorithm) with Full or RandomK (--travel), or row-level privacy."
            )
        self._afford(task, rows)
        if not isinstance(task.privacy, RowNoise):
            return inner
        from netweight.run.federated.private import RowPrivate, require

        require(task.model.network, task.loss, task.plan)
        return RowPrivate(self._round(task, rows).noise, task.privacy.clip, task.plan.batch_size, inner)

    def note(self, task: FitTask, rows: int, steps: int) -> None:
        """Enter the steps of a round into the ledger."""
        if task.privacy is None:
            return
        one = self._round(task, rows)
        self.ledger.add(task.fit, Steps(one.noise, one.rate, steps if isinstance(task.privacy, RowNoise) else 1))

    def spent(self, task: FitTask) -> tuple[float, float]:
        """What this fit, and all fits, have cost by now at the task's delta."""
        if task.privacy is None:
            return 0.0, 0.0
        delta = task.privacy.delta
        return epsilon(self.ledger.of(task.fit), delta), epsilon(self.ledger.of(None), delta)

    def noised(self, task: FitTask, old: Tensors, sent: dict[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """What may leave: the update, clipped and noised where clients are hidden.

        `sent` is what the task's codec made of the parameters of these `names`; buffers are what is left. Raises
        OptionError where a buffer changed, or a value is not finite.
        """
        if task.privacy is None:
            return sent
        for name in sorted(set(sent) - names):
            if name in old and not torch.equal(sent[name], old[name]):
                raise OptionError(
                    f"training changed the buffer {name}, which no noise hides; train another way, or turn privacy off."
                )
        if isinstance(task.privacy, RowNoise):
            return sent
        changes = _changes(task, old, sent, names)
        shortened(changes, task.privacy.clip)
        noises = np.random.default_rng(secrets.randbits(128))  # torch's generator looks at 32 bits of a seed
        deviation = task.privacy.noise * task.privacy.clip / math.sqrt(task.privacy.cohort)
        held = dict(sent)
        for name, value in changes.items():
            value += deviation * torch.from_numpy(noises.standard_normal(value.shape))
            whole = old[name].double() + value if isinstance(task.codec, Full) else value
            held[name] = whole.to(sent[name].dtype)
        return held

    def masked(self, task: FitTask, old: Tensors, sent: Tensors, names: frozenset[str]) -> Tensors:
        """The update under masks, where the task has a seat: one tensor of 32-bit words, of the changes in the order of
        their names. Raises OptionError for what is not finite or out of range."""
        if task.seat is None:
            return sent
        from netweight.run.federated.secure import Fixed

        changes = _changes(task, old, sent, names)
        shortened(changes, task.seat.largest)
        values = torch.cat([v.flatten() for v in changes.values()]) * task.seat.weight
        words = Fixed(RANGE, task.seat.clients).encode(values.numpy())
        seat = task.seat
        received = {n: (_bytes(part), _bytes(seat.digests.get(n, ""))) for n, part in seat.sealed.items()}
        hidden = self._member((task.fit, task.round)).masked(words, received)
        return {"masked": torch.from_numpy(hidden.view(np.int32))}

    def answer(self, task: Advertise | Share | Unmask) -> Advertised | Shared | Told:
        """One step of secure aggregation; asked for it again, since an answer was lost on its way, the same one. Raises
        OptionError and RunError as `secure.Member` does; OptionError, too, where a round that is asked for again would
        be opened for other clients."""
        from netweight.run.federated.secure import Member

        at = (task.fit, task.round)
        if isinstance(task, Advertise):
            self._members, self._last = {at: Member(self.name, task.threshold)}, None
            keys = self._members[at].advertise()
            return Advertised(keys.seal.hex(), keys.mask.hex())
        if self._last is None or self._last[0] != task:
            self._last = task, self._answer(task, self._member(at))
        return self._last[1]

    def _answer(self, task: Share | Unmask, member: Member) -> Shared | Told:
        from netweight.run.federated.secure import Keys

        if isinstance(task, Share):
            if member.threshold < two_thirds(len(task.keys)):
                raise OptionError(
                    f"{self.name} was told that {member.threshold} of {len(task.keys)} clients can open a sum; it "
                    f"shares its secrets where {two_thirds(len(task.keys))} must."
                )
            everyone = {n: Keys(_bytes(k.seal), _bytes(k.mask)) for n, k in task.keys.items()}
            deal = member.share(everyone)
            return Shared(_hex(deal.sealed), _hex(deal.digests), deal.seed.hex())
        self._same(task)
        shares = member.unmask(frozenset(task.survivors))
        self.opened.add(task.fit, task.round, task.survivors)
        return Told({n: s.hex() for n, s in shares.seeds.items()}, {n: s.hex() for n, s in shares.keys.items()})

    def _same(self, task: Unmask) -> None:
        # Asked again, clients answer with the vectors of the first time: two sums would differ by one client's update.
        before = self.opened.of(task.fit, task.round)
        if before and before != tuple(sorted(task.survivors)):
            raise OptionError(
                f"{self.name} has told shares for the sum of {', '.join(before)} in round {task.round}, and was asked "
                f"for that of {', '.join(sorted(task.survivors))}: both would show who is in one of them only. Start "
                "the clients of the first sum again, or begin another fit."
            )

    def _member(self, at: tuple[str, int]) -> Member:
        if at not in self._members:
            raise OptionError(f"{self.name} has advertised no keys for round {at[1]}; it takes part in the next one.")
        return self._members[at]

    def _round(self, task: FitTask, rows: int) -> Steps:
        """What the task's round will release, as planned."""
        if not isinstance(task.privacy, RowNoise):
            assert task.privacy is not None
            return Steps(task.privacy.noise, 1.0, 1)
        p, size = task.privacy, task.plan.batch_size
        steps = planned(rows, task.plan.epochs, size)
        return Steps(row_noise(p.epsilon, p.delta, rows, size, steps * p.rounds), min(1.0, size / rows), steps)

    def _afford(self, task: FitTask, rows: int) -> None:
        assert task.privacy is not None
        if isinstance(task.privacy, RowNoise) and not 0 <= task.round < task.privacy.rounds:
            raise OptionError(
                f"{self.name} was asked for round {task.round} of a fit of {task.privacy.rounds}, counted from 0; "
                "noise is planned for those alone. Begin another fit."
            )
        after = epsilon([*self.ledger.of(task.fit), self._round(task, rows)], task.privacy.delta)
        if after > task.privacy.epsilon * _SLACK:
            raise OptionError(
                f"one more round would cost the rows of {self.name} epsilon {after:.2f} in this fit, and "
                f"{task.privacy.epsilon:g} was promised; it answers no more."
            )
        if self.limit is None:
            return
        # All rounds that are left: who stops in the middle has spent what it spent for nothing.
        one = self._round(task, rows)
        left = task.privacy.rounds - task.round if isinstance(task.privacy, RowNoise) else 1
        whole = [*self.ledger.of(None), replace(one, count=one.count * left)]
        total = epsilon(whole, min(task.privacy.delta, _DELTA))
        if total > self.limit * _SLACK:
            raise OptionError(
                f"with this fit the rows of {self.name} would have cost epsilon {total:.2f} in all, and it allows "
                f"{self.limit:g}; ask for less (a smaller epsilon), or do without this client."
            )


def _changes(task: FitTask, old: Tensors, sent: Tensors, names: frozenset[str]) -> dict[str, Tensor]:
    """What was learned, of the parameters of these names; in fp64."""
    full = isinstance(task.codec, Full)
    return {n: sent[n].double() - old[n].double() if full else sent[n].double() for n in sorted(names)}


class Ledger:
    """What was released of a client's rows, fit by fit; written before it is released.

    The file is read each time: actors of a simulation have copies of one client."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._memory: dict[str, list[Steps]] = {}
        self._held()  # a damaged one is no empty one

    def of(self, fit: str | None) -> list[Steps]:
        """The releases of a fit, or of all."""
        return [s for name, steps in self._held().items() if fit in (None, name) for s in steps]

    def add(self, fit: str, steps: Steps) -> None:
        """Enter a release."""
        held = self._held()
        held.setdefault(fit, []).append(steps)
        _write(self.path, {name: [asdict(s) for s in made] for name, made in held.items()})

    def _held(self) -> dict[str, list[Steps]]:
        return _read(self.path, "the privacy ledger", "what these rows have cost", _steps, self._memory)


class Opened:
    """Of which clients' sums shares were told, by fit and round; written before they are told."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._memory: dict[str, dict[str, list[str]]] = {}
        self._held()

    def of(self, fit: str, round_: int) -> tuple[str, ...]:
        """The clients whose sum it was, sorted; empty where none was."""
        return tuple(self._held().get(fit, {}).get(str(round_), ()))

    def add(self, fit: str, round_: int, clients: Collection[str]) -> None:
        """Enter a sum."""
        held = self._held()
        held.setdefault(fit, {})[str(round_)] = sorted(clients)
        _write(self.path, held)

    def _held(self) -> dict[str, dict[str, list[str]]]:
        return _read(self.path, "the record of opened sums", "whose sums were told", dict, self._memory)


def _steps(given: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Steps]]:
    return {fit: [Steps(**one) for one in steps] for fit, steps in given.items()}


def _read(
    path: Path | None, what: str, lost: str, built: Callable[[Any], dict[str, Any]], memory: dict[str, Any]
) -> dict[str, Any]:
    if path is None:
        return memory
    if not path.exists():
        return {}
    try:
        return built(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as problem:
        raise StoreError(
            f"{what} {path} is damaged ({problem}); {lost} is not known any more. Restore it from a backup; without "
            "it, deleting it starts to count from nothing."
        ) from None


def _write(path: Path | None, held: Mapping[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as out:
        out.write(json.dumps(held).encode())


def shortened(values: Mapping[str, Tensor], limit: float) -> None:
    """Scale tensors down, in place, to a norm over all of them of `limit`. Raises OptionError where one is not
    finite."""
    norm = math.sqrt(sum(float(v.square().sum()) for v in values.values()))
    if not math.isfinite(norm):
        raise OptionError("the update has values that are not finite; lower the learning rate.")
    if norm > limit:
        for value in values.values():
            value *= limit / norm


def _hex(parts: Mapping[str, bytes]) -> dict[str, str]:
    return {name: part.hex() for name, part in parts.items()}


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise OptionError("keys and shares travel as hexadecimal text, and something else came.") from None
