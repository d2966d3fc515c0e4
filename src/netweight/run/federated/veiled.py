"""A server's side of secure aggregation: one round, over any channel."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from netweight.errors import RunError
from netweight.run.federated.checks import unlikely
from netweight.run.federated.codecs import Decoded, Full, parts_of
from netweight.run.federated.guard import RANGE
from netweight.run.federated.members import too_few
from netweight.run.federated.messages import (
    Advertise,
    Advertised,
    Answer,
    FitTask,
    Fitted,
    Lost,
    Seat,
    Share,
    Shared,
    Task,
    Tensors,
    Told,
    Unmask,
)

if TYPE_CHECKING:
    from netweight.run.federated.secure import Deal, Shares

T = TypeVar("T")
Exchange = Callable[[Mapping[str, Task], float | None], Mapping[str, Answer | Lost]]
# By which part of a round's time each answer must be there: who is silent in one exchange leaves time for the next.
_BY = {Advertised: 0.1, Shared: 0.2, Fitted: 0.9, Told: 1.0}
_LEAST = 0.1  # of it for each exchange: clients of a simulation take their turns while the clock runs


class Veiled:
    """One round whose updates the server sees the sum of, and nothing else.

    Args:
        exchange: how tasks reach clients.
        tasks: what each is asked, without a seat.
        weights: of each client that is asked, above 0 and at most 1.
        rows: that each said it has.
        threshold: clients that must be left in the end.
        largest: the norm that an update may have.
        seconds: of the whole round; None has no end.
    """

    def __init__(
        self,
        exchange: Exchange,
        tasks: Mapping[str, FitTask],
        weights: Mapping[str, float],
        rows: Mapping[str, int],
        threshold: int,
        largest: float,
        seconds: float | None = None,
    ) -> None:
        self.exchange, self.tasks, self.weights, self.rows = exchange, tasks, weights, rows
        self.task = next(iter(tasks.values()))
        self.threshold, self.largest = threshold, largest
        self.seconds, self.began = seconds, time.monotonic()
        self.lost: dict[str, Lost] = {}
        self.fitted: dict[str, Fitted] = {}
        self.up = 0

    def mean(self, old: Tensors, names: frozenset[str], shared: int) -> dict[str, Tensor]:
        """New values: old ones plus the weighted mean of the updates; who answered is in `fitted`, who did not in
        `lost`; `up` counts bytes of masked updates.

        Raises ClientError where fewer than the threshold are left, RunError for a sum that no honest clients make.
        """
        from netweight.run.federated.secure import Deal, Fixed, Keys, route, unmasked

        fit, number = self.task.fit, self.task.round
        keys = self._ask(dict.fromkeys(sorted(self.weights), Advertise(fit, number, self.threshold)), Advertised, _keys)
        shares = self._ask(dict.fromkeys(keys, Share(fit, number, keys)), Shared, partial(_sealed, keys))
        deals = {n: Deal(_all_bytes(a.sealed), _all_bytes(a.digests), bytes.fromhex(a.seed)) for n, a in shares.items()}
        tasks: dict[str, Task] = {}
        for name, parts in route(deals, self.threshold).items():
            sealed, digests = ({sender: pair[i].hex() for sender, pair in parts.items()} for i in (0, 1))
            seat = Seat(sealed, digests, len(keys), self.weights[name], self.largest)
            tasks[name] = replace(self.tasks[name], seat=seat)
        length = sum(math.prod(parts_of(self.task.codec, n, old[n])[n][0]) for n in names)
        self.fitted = self._ask(tasks, Fitted, partial(_masked, length, self.rows))
        # Added up before the next exchange, after which answers may be gone.
        total = np.zeros(length, np.uint32)
        for answer in self.fitted.values():
            total += answer.tensors["masked"].numpy().view(np.uint32)
            self.up += total.nbytes
        unmask = dict.fromkeys(self.fitted, Unmask(fit, number, tuple(self.fitted)))
        told = self._ask(unmask, Told, partial(_told, set(self.fitted), deals))
        words = unmasked(
            total,
            list(self.fitted),
            {n: _shares(a) for n, a in told.items()},
            {n: Keys(bytes.fromhex(a.seal), bytes.fromhex(a.mask)) for n, a in keys.items()},
            deals,
            self.threshold,
        )
        summed = Fixed(RANGE, len(keys)).decode(words)
        weight = sum(self.weights[name] for name in self.fitted)
        self._sound(summed, weight)
        return self._values(torch.from_numpy(summed / weight), old, names, shared)

    def _ask(self, tasks: Mapping[str, Task], kind: type[T], odd: Callable[[str, T], str]) -> dict[str, T]:
        """Answers of a kind, by client; the others are lost, and those of which `odd` says what is wrong. Raises
        ClientError where too few are left."""
        answers = self.exchange(tasks, self._left(kind))
        found: dict[str, T] = {}
        for name in sorted(tasks):
            answer = answers.get(name)
            if isinstance(answer, Lost):
                self.lost[name] = answer
            elif not isinstance(answer, kind):
                self.lost[name] = Lost(name, f"no {kind.__name__} came.")
            elif problem := odd(name, answer):
                self.lost[name] = Lost(name, problem)
            else:
                found[name] = answer
        if len(found) < self.threshold:
            raise too_few(len(found), tuple(self.lost.values()), self.threshold, f"round {self.task.round}, secure sum")
        return found

    def _left(self, kind: type) -> float | None:
        """Seconds for answers of a kind."""
        if self.seconds is None:
            return None
        return max(_BY[kind] * self.seconds - (time.monotonic() - self.began), _LEAST * self.seconds)

    def _sound(self, total: np.ndarray[tuple[int, ...], np.dtype[np.float64]], weight: float) -> None:
        norm, most = float(np.linalg.norm(total)), weight * self.largest
        step = 2 * RANGE * len(self.weights) / 2**31 * len(self.fitted) * math.sqrt(len(total))
        if not norm <= most + step:
            raise RunError(
                f"round {self.task.round}: the sum of updates has norm {norm:.4g}, and those of {len(self.fitted)} "
                f"clients that keep to the rules have {most:.4g} at most. One did not, and a sum does not tell which: "
                "begin again with fewer clients, or, in Python, with secure=False."
            )

    def _values(self, mean: Tensor, old: Tensors, names: frozenset[str], shared: int) -> dict[str, Tensor]:
        held, at = dict(old), 0
        codec = self.task.codec
        for name in sorted(names):
            shape = parts_of(codec, name, old[name])[name][0]
            part = mean[at : at + math.prod(shape)].reshape(shape)
            at += part.numel()
            if isinstance(codec, Full):
                held[name] = (old[name].double() + part).to(old[name].dtype)
            else:
                held[name] = Decoded(codec, {name: part.float()}, old, frozenset({name}), shared)[name]
        return held


def _keys(name: str, answer: Advertised) -> str:
    from netweight.run.federated.secure import is_key

    fine = all(_is_hex(key, 32) and is_key(bytes.fromhex(key)) for key in (answer.seal, answer.mask))
    return "" if fine else "its public keys are none."


def _sealed(everyone: Collection[str], name: str, answer: Shared) -> str:
    from netweight.run.federated.secure import DIGEST, SEALED

    if set(answer.sealed) != set(everyone) - {name} or not all(_is_hex(s, SEALED) for s in answer.sealed.values()):
        return "it sent no sealed share to each other client."
    digests = (_is_hex(answer.seed, DIGEST), *(_is_hex(d, 2 * DIGEST) for d in answer.digests.values()))
    fine = set(answer.digests) == set(everyone) and all(digests)
    return "" if fine else "it vouches for no shares: digests are missing."


def _masked(length: int, rows: Mapping[str, int], name: str, answer: Fitted) -> str:
    held = dict(answer.tensors)
    words = held.get("masked")
    if words is None or len(held) > 1 or words.dtype != torch.int32 or tuple(words.shape) != (length,):
        return f"its update is no vector of {length} masked words."
    return unlikely(answer, rows[name], private=True)


def _told(survivors: set[str], deals: Mapping[str, Deal], name: str, answer: Told) -> str:
    from netweight.run.federated.secure import SHARE, are_dealt

    asked = set(answer.seeds) == survivors and set(answer.keys) == set(deals) - survivors
    if not asked or not all(_is_hex(s, SHARE) for s in (*answer.seeds.values(), *answer.keys.values())):
        return "it told other shares than it was asked for."
    return "" if are_dealt(name, _shares(answer), deals) else "it told other shares than it was dealt."


def _shares(answer: Told) -> Shares:
    from netweight.run.federated.secure import Shares

    return Shares(_all_bytes(answer.seeds), _all_bytes(answer.keys))


def _is_hex(text: str, count: int) -> bool:
    """Whether a text is `count` bytes in hexadecimal."""
    return re.fullmatch(f"[0-9a-f]{{{2 * count}}}", text) is not None


def _all_bytes(texts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in texts.items()}
