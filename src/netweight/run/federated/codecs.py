"""How updates are encoded for the way from a client to its server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from netweight.errors import OptionError


@dataclass(frozen=True)
class Full:
    """New values as they are, 4 bytes each in fp32."""


@dataclass(frozen=True)
class Int8:
    """Differences in 8 bits with one scale for each row of a matrix or for a whole tensor; rounded to the nearest, or
    stochastically, which is unbiased (Alistarh et al., QSGD, 2017)."""

    scale: Literal["row", "tensor"] = "row"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.scale not in ("row", "tensor") or self.rounding not in ("nearest", "stochastic"):
            raise OptionError(
                f"Int8 has scale {self.scale!r} and rounding {self.rounding!r}; "
                "use scale row or tensor, rounding nearest or stochastic."
            )


@dataclass(frozen=True)
class RandomK:
    """A share of the differences, at places that all clients draw alike in a round: only values travel, and sums of
    updates are updates (Konecny et al., 2016, "random mask")."""

    share: float = 0.1

    def __post_init__(self) -> None:
        _check(self.share, "RandomK")


@dataclass(frozen=True)
class TopK:
    """The share of the differences that are largest, with their places (Aji and Heafield, 2017)."""

    share: float = 0.01

    def __post_init__(self) -> None:
        _check(self.share, "TopK")


Codec = Full | Int8 | RandomK | TopK


def _check(share: float, name: str) -> None:
    if not 0 < share <= 1:
        raise OptionError(f"share of {name} is {share}; use a number above 0, at most 1.")
