"""The options of a federated run: rounds, algorithms, and what travels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from netweight.errors import OptionError, within
from netweight.run.aggregate import Adam, Aggregator, Mean, Moments, Tensors
from netweight.run.federated.codecs import Codec, Full


@dataclass(frozen=True)
class Rounds:
    """How often, with whom, and for how long.

    `number` rounds share the epochs and the schedule of a plan. `share` of the clients that are there take part in
    each, drawn by seed; `minimum` of them must answer, within `seconds` (None waits; the exchanges of a secure sum
    share them), and `wait` seconds are given to them to appear. An update whose norm is more than `outlier` times the
    median of a round's norms is refused, and a client weighs at most `heaviest` times the median of all clients' rows.
    """

    number: int = 10
    share: float = 1.0
    minimum: int = 1
    seconds: float | None = None
    wait: float = 0.0
    outlier: float = 10.0
    heaviest: float = 10.0

    def __post_init__(self) -> None:
        checks = {
            "number": (self.number >= 1, "1 or more (--rounds)"),
            "share": (0 < self.share <= 1, "more than 0, and at most 1"),
            "minimum": (self.minimum >= 1, "1 client or more (--minimum)"),
            "seconds": (self.seconds is None or self.seconds > 0, "more than 0 (--deadline), or none to wait"),
            "wait": (self.wait >= 0, "0 seconds or more (--wait)"),
            "outlier": (self.outlier > 1, "more than 1"),
            "heaviest": (self.heaviest >= 1, "1 or more"),
        }
        within(self, "federated rounds", checks)


@dataclass(frozen=True)
class FedAvg:
    """w = aggregate of the clients' w_k; with the mean: sum_k (n_k / n) w_k (McMahan et al., AISTATS 2017)."""

    aggregate: Aggregator = field(default_factory=Mean)
    variates: ClassVar[bool] = False

    @property
    def proximal(self) -> float:
        """Strength of the pull towards the server's weights."""
        return 0.0

    def step(self, old: Tensors, mean: Tensors, moments: Moments | None) -> tuple[Tensors, Moments | None]:
        """New parameters from old ones and what the clients made of them."""
        return mean, moments


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients add mu / 2 * ||w - w_server||^2 to their loss (Li et al., MLSys 2020)."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise OptionError(f"mu of FedProx is {self.mu}; use a number above 0, or FedAvg.")

    @property
    def proximal(self) -> float:
        return self.mu


@dataclass(frozen=True)
class FedAdam(FedAvg):
    """The server takes an Adam step along what the clients agree on (Reddi et al., ICLR 2021); see `aggregate.Adam`."""

    server: Adam = field(default_factory=Adam)

    def step(self, old: Tensors, mean: Tensors, moments: Moments | None) -> tuple[Tensors, Moments | None]:
        return self.server(old, mean, moments)


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Gradients are corrected by c - c_k, what all clients' gradients are less this client's (Karimireddy et al., ICML
    2020, option II); c moves by the mean change of c_k, over all clients. Twice the bytes travel.

    Proven for SGD; with Adam or momentum on clients it is a heuristic."""

    variates: ClassVar[bool] = True


Algorithm = FedAvg | FedProx | FedAdam | Scaffold


@dataclass(frozen=True)
class Travel:
    """What goes from clients to the server: the trained parameters as `codec` encodes them; with `personal_head` not
    those of the head, of which each client has its own."""

    codec: Codec = field(default_factory=Full)
    personal_head: bool = False
