"""What works under which strategy: every technique, one short fit each, works or is refused with a sentence.

`scripts/parallel_techniques.py` writes docs/parallel-techniques.md from `table`; a slow test holds the page to it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import tiny_model
from netweight.errors import NetweightError
from netweight.network import tensors
from netweight.run import Local, Parallel, Pool, Run, Setup
from netweight.run.commands import Strategy
from netweight.techniques import Distill, Finetune, Pretrain, Quantize, QuantizeAware, Technique
from netweight.testing import fresh_digest
from netweight.train import Plan
from quick import TECHNIQUES
from test_compose import few

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel-techniques.md"
STRATEGIES: tuple[Strategy | None, ...] = (None, "ddp", "fsdp", "tensor", "pipeline")
PLAN = Plan(batch_size=16, precision="fp32")
ALL: dict[str, Technique] = {
    **{type(technique).__name__: technique for technique in TECHNIQUES},
    "Pretrain, masked": Pretrain("masked", epochs=1),
    "Pretrain, contrastive": Pretrain("contrastive", epochs=1),
    "Finetune, lora": Finetune(epochs=1, train="lora"),
    "Finetune, head": Finetune(epochs=1, train="head"),
    "Finetune, r-drop": Finetune(epochs=1, regularizer="r-drop"),
    "Finetune, adversarial": Finetune(epochs=1, regularizer="adversarial"),
    "Distill": Distill(layers=2, epochs=1, splice=1.0),
    "Distill, hidden states": Distill(layers=2, epochs=1, splice=0.0, match=("logits", "hidden")),
    "Distill, attention": Distill(layers=2, epochs=1, splice=0.0, match=("attention",)),
    "Distill, relations": Distill(layers=2, epochs=1, splice=0.0, match=("relations",), relation_heads=4),
    "QuantizeAware, fixed": QuantizeAware(Quantize(weight_bits=4, rows=16), epochs=1, ranges="fixed"),
}
ALL.pop("Pretrain")


def outcome(technique: Technique, strategy: Strategy | None, pool: Pool) -> str:
    """Nothing where it works, else the sentence with which it was refused."""
    data, model = few(), tiny_model(layers=3, more=("never", "nowhere", "[MASK]"))
    setup = Setup(timeout=60)
    run: Run = Local(data) if strategy is None else Parallel(data, strategy=strategy, setup=setup, pool=pool)
    before = fresh_digest(model)
    try:
        made = technique(model, run, PLAN)
    except NetweightError as refusal:
        return str(refusal)
    finally:
        if isinstance(run, Parallel):
            run.close()
    assert fresh_digest(model) == before != made.digest, "it did nothing, or to the given model"
    assert all(t.isfinite().all() for t in tensors(made.network).values() if t.is_floating_point())
    assert len(pool.members) in (0, pool.processes), "a process was lost: it did not work, nor was it refused"
    return ""


def table() -> str:
    """The page: a matrix with a number for each sentence."""
    sentences: dict[str, int] = {}
    lines = ["| technique | local | ddp | fsdp | tensor | pipeline |", "|---|---|---|---|---|---|"]
    with Pool(2) as pool:
        for name, technique in ALL.items():
            cells = []
            for strategy in STRATEGIES:
                said = outcome(technique, strategy, pool)
                assert not said or len(said.split()) > 5, f"{name} under {strategy}: {said!r} is no sentence"
                cells.append(f"[{sentences.setdefault(said, len(sentences) + 1)}]" if said else "yes")
            lines.append(f"| **{name}** | {' | '.join(cells)} |")
    notes = [f"- [{number}] {said}" for said, number in sentences.items()]
    head = (
        "# What works under which strategy\n\nEvery technique on one tiny BERT of three layers, one short fit each, alone "
        "and on two processes. What is refused is\nrefused with the sentence of its number. Written by "
        "`scripts/parallel_techniques.py`.\n"
    )
    return "\n".join([head, *lines, "", *notes, ""])


@pytest.mark.slow
def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run scripts/parallel_techniques.py and commit it"
