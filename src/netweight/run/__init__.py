"""Runs own the rows and say where computation on them happens."""

from netweight.run.base import InOnePlace, Run, Runs, Statistic
from netweight.run.local import Local

__all__ = ["InOnePlace", "Local", "Run", "Runs", "Statistic"]
