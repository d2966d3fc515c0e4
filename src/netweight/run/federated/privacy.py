"""What a federated run promises of its rows: the unit, the budget, and whether the noise leaves anything to learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from netweight.errors import OptionError
from netweight.run.aggregate import Mean
from netweight.run.federated.accountant import noise_for
from netweight.run.federated.codecs import Full, RandomK
from netweight.run.federated.messages import RowNoise, UpdateNoise
from netweight.run.federated.options import Algorithm, Rounds, Travel
from netweight.train import Plan

CROSS_DEVICE = 100  # clients from which on a client is the unit


@dataclass(frozen=True)
class RowLevel:
    """Hides each row: clients train with DP-SGD (`private.RowPrivate`), each within a budget of its own, as in Liu et
    al. (NeurIPS 2022, "per-silo example-level" privacy). It holds against the server and everyone who gets the model.

    `epsilon` and `delta` are what one fit may cost each client; `clip` is the norm to which gradients of rows are
    clipped. With `secure` the server sees sums of updates only (`secure`), no update longer than `largest`.
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    clip: float = 1.0
    secure: bool = True
    largest: float = 100.0
    unit = "row"

    def __post_init__(self) -> None:
        _check(self)

    def task(self, rounds: int, cohort: int) -> RowNoise:
        """What clients are told."""
        return RowNoise(self.epsilon, self.delta, self.clip, rounds)


@dataclass(frozen=True)
class ClientLevel:
    """Hides each client: its whole update is clipped to the norm `clip`, and each client adds its share of Gaussian
    noise, so much that the smallest cohort that a round accepts has all of it (McMahan et al., ICLR 2018; shares of
    noise: Kairouz et al., ICML 2021). It holds against everyone who sees sums only: the server too, with `secure`.

    All updates weigh the same, whatever the number of rows behind them.
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    clip: float = 1.0
    secure: bool = True
    unit = "client"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def largest(self) -> float:
        """Longest update with its noise: a bound that only damage crosses."""
        return 1e4 * self.clip

    def task(self, rounds: int, cohort: int) -> UpdateNoise:
        """What clients are told; `cohort` is the least number of clients whose updates are added up."""
        noise = client_noise(self.epsilon, self.delta, rounds)
        return UpdateNoise(noise, self.clip, cohort, self.epsilon, self.delta)


@dataclass(frozen=True)
class Automatic:
    """Row-level privacy for fewer than 100 clients, client-level from there on; both under secure aggregation."""

    epsilon: float = 8.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        _check(RowLevel(self.epsilon, self.delta))

    def among(self, clients: int, unit: str = "") -> RowLevel | ClientLevel:
        """What it is for so many; with a `unit` that was promised before, that."""
        kind = RowLevel if (unit or ("row" if clients < CROSS_DEVICE else "client")) == "row" else ClientLevel
        return kind(self.epsilon, self.delta)


Privacy = RowLevel | ClientLevel
OFF = (
    "OFF, as was asked for: updates travel as they are, the server sees each client's, and nothing bounds what they or "
    "the model tell of a row"
)


def _check(privacy: Privacy) -> None:
    for name in ("epsilon", "clip", "largest"):
        if not 0 < getattr(privacy, name) < math.inf:
            raise OptionError(f"{name} of {type(privacy).__name__} is {getattr(privacy, name)}; use a number above 0.")
    if not 0 < privacy.delta < 0.1:
        raise OptionError(
            f"delta of {type(privacy).__name__} is {privacy.delta}: the chance that the promise fails. Use a number "
            "above 0 and well below 1 / the number of rows, such as 1e-5."
        )


@dataclass(frozen=True)
class Setting:
    """What decides how much noise there is and how much it hides: of the fit, and rows of each client that may take
    part."""

    plan: Plan
    rounds: Rounds
    rows: Mapping[str, int]
    travelling: int  # numbers in an update

    @property
    def cohort(self) -> int:
        """Clients that a round asks."""
        return min(len(self.rows), max(self.rounds.minimum, math.ceil(self.rounds.share * len(self.rows))))


@dataclass(frozen=True)
class Guarded:
    """What holds for a fit: the promise, how many clients must answer in a round at least, the predicted noise to
    signal, and the number of rows from which on a client counts whole (1: all count alike)."""

    privacy: Privacy
    least: int
    ratio: float
    most: float

    def threshold(self, asked: int) -> int:
        """How many must answer where so many are asked."""
        return max(self.least, two_thirds(asked)) if among_others(self.privacy) else self.least


def least(privacy: Privacy, setting: Setting) -> int:
    """Clients that must answer in a round."""
    return max(setting.rounds.minimum, two_thirds(setting.cohort) if among_others(privacy) else 1)


def among_others(privacy: Automatic | Privacy) -> bool:
    """Whether it hides a client among others, so that more than one are needed."""
    return isinstance(privacy, Automatic | ClientLevel) or privacy.secure


def two_thirds(clients: int) -> int:
    """How many of the clients of a round must be left in the end, at least two: a third may vanish."""
    return max(2, math.ceil(2 * clients / 3))


def refuse(privacy: Privacy, setting: Setting, algorithm: Algorithm, travel: Travel) -> None:
    """Raises OptionError for what cannot be private, and where noise would drown what is learned."""
    kind = type(privacy).__name__
    if privacy.secure and not isinstance(algorithm.aggregate, Mean):
        raise OptionError(
            f"{type(algorithm.aggregate).__name__} orders or compares clients' values, and under secure aggregation "
            f"the server sees only their sum: use Mean (--aggregate mean), or, in Python, {kind}(secure=False)."
        )
    if algorithm.variates and (privacy.secure or isinstance(privacy, ClientLevel)):
        raise OptionError(
            "SCAFFOLD sends a second set of tensors, which is neither masked nor noised; use FedAvg, FedProx or "
            "FedAdam (--algorithm), or, in Python, RowLevel(secure=False), under which both are made of noised "
            "gradients."
        )
    if not isinstance(travel.codec, Full | RandomK) and (privacy.secure or isinstance(privacy, ClientLevel)):
        raise OptionError(
            f"{type(travel.codec).__name__} picks places or scales of each client's own, so that encoded updates do "
            "not add up, and the choice tells of its rows: use RandomK, whose places all clients share, or Full "
            "(--travel random-k, full)."
        )
    if privacy.secure and setting.cohort < 2:
        raise OptionError(
            "secure aggregation hides a client among others, and 1 takes part in a round; let more take part, or use "
            f"{kind}(secure=False)."
        )
    if isinstance(privacy, ClientLevel) and setting.cohort < 2:
        raise OptionError("ClientLevel hides a client among others, and 1 takes part in a round; use RowLevel.")
    units = max(setting.rows.values()) if privacy.unit == "row" else len(setting.rows)
    if privacy.delta * units >= 1:
        raise OptionError(
            f"delta is {privacy.delta:g}, and with {units:,} {privacy.unit}s that would allow to tell one of them "
            f"whole; use one well below 1 / {units:,}, such as {0.1 / units:.0e} (--delta)."
        )
    ratio, noise = noise_to_signal(privacy, setting)
    if ratio > 1:
        more = "more rows, a larger batch_size," if privacy.unit == "row" else "more clients in a round,"
        raise OptionError(
            f"the noise of epsilon {privacy.epsilon:g} (delta {privacy.delta:g}) would be {ratio:.2f} times as large "
            f"as the most that {setting.travelling:,} parameters can learn from {sum(setting.rows.values()):,} rows of "
            f"{len(setting.rows)} clients in {setting.rounds.number} rounds (noise multiplier {noise:.2f}); at most 1 "
            f"is accepted. What helps: fewer trained parameters (--train lora or head; Finetune(train=...)), {more} "
            "more clients, or a larger epsilon (--epsilon)."
        )


def noise_to_signal(privacy: Privacy, setting: Setting) -> tuple[float, float]:
    """Expected length of all noise in the model over the longest way that clipped gradients can lead; and the (largest)
    noise multiplier s.

    A step of row-level privacy adds noise of length s * clip * sqrt(d) / B, and at most clip of signal, which is
    reached where all rows agree. Over T_k steps of client k noise grows with sqrt(T_k), signal with T_k. The server's
    weights p_k (shares of the rows) average both; of clients that take part in a share r of the rounds a round's
    weights are 1 / r as large:

        ratio = sqrt(d / r * sum_k p_k^2 T_k s_k^2 / B_k^2) / sum_k p_k T_k

    Client-level, with m clients in each of R rounds: ratio = s * sqrt(d) / (m * sqrt(R)). Above 1 the noise is longer
    than the longest possible signal, so that the refusal is deserved; below 1 it promises nothing.
    """
    d, rounds = setting.travelling, setting.rounds.number
    if isinstance(privacy, ClientLevel):
        noise = client_noise(privacy.epsilon, privacy.delta, rounds)
        return noise * math.sqrt(d) / (least(privacy, setting) * math.sqrt(rounds)), noise
    every = sum(setting.rows.values())
    apart, along, most = 0.0, 0.0, 0.0
    for rows in setting.rows.values():
        steps = planned(rows, setting.plan.epochs / rounds, setting.plan.batch_size) * rounds
        noise = row_noise(privacy.epsilon, privacy.delta, rows, setting.plan.batch_size, steps)
        apart += (rows / every) ** 2 * steps * (noise / min(rows, setting.plan.batch_size)) ** 2
        along += rows / every * steps
        most = max(most, noise)
    share = setting.cohort / len(setting.rows)
    return math.sqrt(d / share * apart) / along, most


def planned(rows: int, epochs: float, batch_size: int) -> int:
    """Steps of a fit, as the loop counts them."""
    return max(1, round(epochs * math.ceil(rows / batch_size)))


@lru_cache(maxsize=512)
def row_noise(epsilon: float, delta: float, rows: int, batch_size: int, steps: int) -> float:
    """Noise multiplier of a client with so many rows."""
    return noise_for(epsilon, delta, min(1.0, batch_size / rows), steps)


@lru_cache(maxsize=64)
def client_noise(epsilon: float, delta: float, rounds: int) -> float:
    """Noise multiplier of the sum of a round; every client may be in every round, since draws are no secret."""
    return noise_for(epsilon, delta, 1.0, rounds)


def statement(privacy: Privacy, spent: float, in_all: float) -> str:
    """What was promised and what it cost, for the report."""
    hidden = "the server saw sums of updates only" if privacy.secure else "the server saw each client's update"
    others = f", {in_all:.2f} with all earlier fits on these rows" if in_all > spent * (1 + 1e-9) else ""
    return (
        f"{privacy.unit}-level: one {privacy.unit} more or less changes what is told by a factor of exp(epsilon) at "
        f"most; epsilon spent {spent:.2f} of {privacy.epsilon:g} at delta {privacy.delta:g}{others}; {hidden}"
    )
