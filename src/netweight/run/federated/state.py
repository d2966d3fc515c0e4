"""What a server knows after a round, on disk: one file, whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from netweight.data.files import beside
from netweight.errors import StoreError
from netweight.run.aggregate import Moments
from netweight.run.federated.messages import Tensors
from netweight.run.federated.report import RoundReport


@dataclass(frozen=True)
class State:
    """The tensors that travel, the server's moments and SCAFFOLD variate, the best tensors so far and their quality
    (early stopping), a report of each finished round, and what privacy settled when the fit began: the unit ("" is
    none), how many clients a round needs, and how many rows count at most, which hold whoever comes or leaves."""

    values: Tensors
    moments: Moments | None = None
    variate: Tensors | None = None
    best: Tensors | None = None
    quality: float = float("-inf")
    stale: int = 0
    rounds: tuple[RoundReport, ...] = ()
    unit: str = ""
    least: int = 0
    most: float = 0.0

    def save(self, path: Path, fit: str) -> None:
        """Write the state of a fit (SHA-256); atomic."""
        held: dict[str, Tensor] = {}
        for kind, tensors in self._kinds().items():
            held |= {f"{kind}/{name}": value.clone().contiguous() for name, value in tensors.items()}
        plain = {name: getattr(self, name) for name in ("quality", "stale", "unit", "least", "most")}
        about = {**plain, "rounds": [asdict(r) for r in self.rounds]}
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as new:
            save_file(held, new, {"fit": fit, "about": json.dumps(about)})

    @staticmethod
    def load(path: Path, fit: str) -> State:
        """Inverse of `save`. Raises StoreError for a damaged file, and for one of another fit."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as problem:
            raise StoreError(f"round state {path} is damaged ({problem}); delete it to begin that fit again.") from None
        if meta.get("fit") != fit:
            raise StoreError(f"round state {path} belongs to another fit; delete it, or use another folder.")
        about = json.loads(meta["about"])

        def kind(name: str) -> dict[str, Tensor]:
            return {n[len(name) + 1 :]: t for n, t in held.items() if n.startswith(f"{name}/")}

        first = kind("first")
        return State(
            kind("values"),
            Moments(first, kind("second")) if first else None,
            kind("variate") or None,
            kind("best") or None,
            about["quality"],
            about["stale"],
            tuple(map(RoundReport.of, about["rounds"])),
            about["unit"],
            about["least"],
            about.get("most", 0.0),  # files of earlier releases have none
        )

    def _kinds(self) -> dict[str, Tensors]:
        found: dict[str, Tensors | None] = {"values": self.values, "variate": self.variate, "best": self.best}
        if self.moments:
            found |= {"first": self.moments.first, "second": self.moments.second}
        return {name: tensors for name, tensors in found.items() if tensors}


def distance(values: Tensors, start: Tensors) -> float:
    """Relative L2 distance of floating tensors from where they began; absolute where that was zero."""
    apart, size = 0.0, 0.0
    for name, was in start.items():
        if was.is_floating_point():
            apart += float((values[name].double() - was.double()).square().sum())
            size += float(was.double().square().sum())
    return math.sqrt(apart / (size or 1.0))


def once(path: Path, ask: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, or what is asked for now and kept there. Raises StoreError for a damaged file."""
    if path.exists():
        try:
            return load_file(path)
        except SafetensorError as problem:
            raise StoreError(f"statistic {path} is damaged ({problem}); delete it to ask for it again.") from None
    found = ask()
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as new:
        save_file({name: value.contiguous() for name, value in found.items()}, new)
    return found
