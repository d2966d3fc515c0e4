"""Runs own the rows and say where computation on them happens."""

from netweight.run.base import Accounting, InOnePlace, Keeping, Run, Runs, Speaking, Statistic
from netweight.run.commands import Setup
from netweight.run.local import Local
from netweight.run.named import named
from netweight.run.parallel import Parallel
from netweight.run.pool import Pool
from netweight.run.raytrain import RayPool

__all__ = [
    "Accounting",
    "InOnePlace",
    "Keeping",
    "Local",
    "Parallel",
    "Pool",
    "RayPool",
    "Run",
    "Runs",
    "Setup",
    "Speaking",
    "Statistic",
    "named",
]
