"""Write the table of predicted noise to signal in docs/federated-privacy.md; with --check, say whether it is fresh.

.venv/bin/python scripts/noise.py [--check]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from netweight.loss import Loss
from netweight.model import Model, pretrained
from netweight.run.federated import Automatic, Rounds
from netweight.run.federated.privacy import Setting, noise_to_signal
from netweight.task import Classify
from netweight.techniques import Finetune
from netweight.techniques.finetune import Trained
from netweight.train import Plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "federated-privacy.md"
BEGIN, END = "<!-- noise -->\n", "<!-- /noise -->\n"
ROUNDS = 10


@dataclass(frozen=True)
class Case:
    """Clients with so many rows each, labels, and what is trained for how long."""

    clients: int
    rows: int
    labels: int
    train: Trained
    batch: int = 32
    epochs: float = 5.0

    @property
    def where(self) -> str:
        """The first column."""
        if self.clients >= 100:
            return f"{self.clients:,} clients, client-level"
        return (
            f"{self.clients} {'shops' if self.labels == 2 else 'clients'} of {self.rows:,} rows, {self.labels} labels"
        )


CASES = (
    Case(4, 2500, 2, "head"),
    Case(4, 2500, 2, "lora"),
    Case(4, 2500, 2, "full"),
    Case(4, 2500, 2, "full", 128, 10.0),
    Case(10, 900, 77, "lora"),
    Case(10, 900, 77, "full"),
    Case(100, 900, 2, "head"),
    Case(100, 900, 2, "lora"),
    Case(1000, 900, 2, "lora"),
)


class Counting:
    """A run that trains nothing and counts what would travel."""

    travelling = 0

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        """The model as it came."""
        self.travelling = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
        return model


def travelling(model: Model, train: Trained) -> int:
    """Parameters that `Finetune` trains, with the rank of adapters that the benchmark has."""
    run: Any = Counting()
    Finetune(train=train, rank=6 if train == "lora" else None, probe=False)(model, run, Plan())
    return int(run.travelling)


def table() -> str:
    """The table's lines."""
    models = {labels: pretrained("starter", Classify(tuple(map(str, range(labels))))) for labels in (2, 77)}
    lines = ["| setting | trained | parameters | batch, epochs | noise s | ratio |", "|---|---|---|---|---|---|"]
    before = ""
    for case in CASES:
        count = travelling(models[case.labels], case.train)
        rows = {str(i): case.rows for i in range(case.clients)}
        plan = replace(Plan(), batch_size=case.batch, epochs=case.epochs)
        privacy = Automatic().among(case.clients)
        ratio, noise = noise_to_signal(privacy, Setting(plan, Rounds(ROUNDS), rows, count))
        where = "" if case.where == before else case.where
        before = case.where
        steps = f"{case.batch}, {case.epochs:g}" if privacy.unit == "row" else ""
        name = {"head": "head", "lora": "LoRA, rank 6", "full": "full"}[case.train]
        verdict = f"{ratio:.2f}: refused" if ratio > 1 else f"{ratio:.2f}"
        lines.append(f"| {where} | {name} | {count:,} | {steps} | {noise:.2f} | {verdict} |")
    return "".join(f"{line}\n" for line in lines)


def page(text: str) -> str:
    """The page with a fresh table. Raises SystemExit where its markers are not there."""
    head, begin, rest = text.partition(BEGIN)
    _, end, foot = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{PAGE.name} has no {BEGIN.strip()} and {END.strip()}")
    return f"{head}{begin}{table()}{end}{foot}"


def main(arguments: list[str]) -> int:
    """Write the page, or compare."""
    now = PAGE.read_text(encoding="utf-8")
    fresh = page(now)
    if "--check" not in arguments:
        PAGE.write_text(fresh, encoding="utf-8")
    elif fresh != now:
        print(f"docs/{PAGE.name} is not what the formula says; run `make docs` and commit it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
