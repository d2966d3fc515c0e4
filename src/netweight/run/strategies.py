"""Which seams a strategy has."""

from __future__ import annotations

from collections.abc import Callable

import torch

from netweight.errors import OptionError
from netweight.run.commands import Setup, Strategy
from netweight.run.ddp import Ddp
from netweight.seams import Lost, Seams

# Strategies whose every process holds all that a fit goes on from.
WHOLE = ("ddp",)


def seams_of(strategy: Strategy, setup: Setup, device: torch.device, rejoin: Callable[[Lost], None] | None) -> Seams:
    """Seams of this process, which is in a group. Raises OptionError for a strategy that is not known."""
    if strategy == "ddp":
        return Ddp(device, setup.balance, rejoin)
    raise OptionError(f"unknown strategy {strategy!r}; use ddp.")
