"""Runs own the rows and say where computation on them happens."""

from netweight.run.base import Run, Statistic
from netweight.run.local import Local

__all__ = ["Local", "Run", "Statistic"]
