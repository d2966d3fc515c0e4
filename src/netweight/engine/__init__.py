"""Run an artifact over rows. No torch here."""

from netweight.engine.base import Outputs, TierEngine
from netweight.engine.cascade import Engine, load

__all__ = ["Engine", "Outputs", "TierEngine", "load"]
