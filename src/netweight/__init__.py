"""Netweight: the lightest model that provably still does the job.

Training names load on first use, so that serving an artifact never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from netweight.engine import Engine, load
from netweight.errors import MissingExtra, NetweightError
from netweight.task import Classify, Prediction, Score, ScorePrediction

if TYPE_CHECKING:
    from netweight.job import Budget
    from netweight.model import Model, pretrained
    from netweight.pipeline import optimize
    from netweight.ship import Result

__all__ = [
    "Budget",
    "Classify",
    "Engine",
    "Model",
    "NetweightError",
    "Prediction",
    "Result",
    "Score",
    "ScorePrediction",
    "load",
    "optimize",
    "pretrained",
]

_LAZY = {
    "Budget": "netweight.job",
    "Model": "netweight.model",
    "Result": "netweight.ship",
    "optimize": "netweight.pipeline",
    "pretrained": "netweight.model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'netweight' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as problem:
        if (problem.name or "").startswith("netweight"):
            raise
        raise MissingExtra(f"netweight.{name} (it imports {problem.name})", "train") from problem
    return getattr(module, name)
