"""What works after what: every ordered pair of techniques, one step each, composes or is refused with a sentence.

`scripts/compose.py` writes docs/techniques/compose.md from `table`, and a test holds the page to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, tiny_model, tiny_rows
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import NetweightError
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import MixedBits, Quantize, Shrink, Technique
from netweight.testing import TechniqueContract
from netweight.train import Plan
from quick import TECHNIQUES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "techniques" / "compose.md"
PLAN = Plan(batch_size=32, precision="fp32")


def few() -> Dataset:
    rows = tiny_rows(80)
    parts = [rows.take(range(a, b)) for a, b in ((0, 32), (32, 42), (42, 52), (52, 60), (60, 80))]
    return Dataset(parts[0], parts[1], parts[2], Sealed(parts[3]), parts[4].unlabelled())


@cache
def first(family: str, technique: Technique) -> Model:
    # Two words that no row has, for Vocab to drop.
    return technique(tiny_model(family=family, layers=3, more=("never", "nowhere")), Local(few()), PLAN)


def pair(family: str, one: Technique, two: Technique) -> Model | str:
    """The model that two made of one's, or the sentence with which it was refused."""
    try:
        model = two(first(family, one), Local(few()), PLAN)
    except NetweightError as refusal:
        return str(refusal)
    assert logits_of(model, model.encoder.encode(few().train.text)).isfinite().all()
    return model


def rounding(model: Model) -> dict[str, str]:
    """How the numbers of a model are rounded, and what to do where that is lost."""
    held = {}
    if model.ranges or model.weights:
        held["integers"] = "quantize last"
    floats = [p for p in model.network.parameters() if p.is_floating_point()]
    if all(torch.equal(p, p.half().to(p.dtype)) for p in floats):
        held["fp16"] = "round last"
    return held


def lost(one: Model, made: Model) -> str:
    """What of the first technique is no longer there, or nothing. Other networks are made anew anyhow."""
    gone = rounding(one).keys() - rounding(made).keys() if isinstance(made.network, Transformer) else ()
    return "; ".join(f"works, without the {kind} of the first: {rounding(one)[kind]}." for kind in sorted(gone))


def survives(technique: Technique, made: Model, folder: Path) -> None:
    """Saved and loaded, and exported, it says the same."""
    contract = TechniqueContract(technique, made, lambda: Local(few()), PLAN, few().train.text)
    contract.survives_saving(made, folder)
    contract.survives_export(made)


def everywhere(technique: Technique) -> Technique:
    """Without weights of 8 bits: sums of their products overflow on x86 without VNNI."""
    if isinstance(technique, MixedBits):
        return replace(technique, choices=(2, 3, 4, 6, 7))
    return replace(technique, weight_bits=7) if isinstance(technique, Quantize) else technique


def name(technique: Technique) -> str:
    return type(technique).__name__


def table(family: str = "bert") -> str:
    """The page: a matrix with a number for each sentence."""
    sentences: dict[str, int] = {}
    lines = [f"| first, then | {' | '.join(map(name, TECHNIQUES))} |", "|---" * (len(TECHNIQUES) + 1) + "|"]
    for one in TECHNIQUES:
        cells = []
        for two in TECHNIQUES:
            made = pair(family, one, two)
            said = made if isinstance(made, str) else lost(first(family, one), made)
            number = f"[{sentences.setdefault(said, len(sentences) + 1)}]" if said else ""
            cells.append(number if isinstance(made, str) else f"yes {number}".strip())
        lines.append(f"| **{name(one)}** | {' | '.join(cells)} |")
    notes = [f"- [{number}] {said}" for said, number in sentences.items()]
    head = (
        "# What works after what\n\nEvery ordered pair on one tiny BERT, one short step each: the row's technique first, "
        "then the column's. What is refused is\nrefused with the sentence of its number. Static and LinearFloor make a network of "
        "their own: Static learns from the model it is given,\nLinearFloor from the labels alone. Written by "
        "`scripts/compose.py`.\n"
    )
    return "\n".join([head, *lines, "", *notes, ""])


@pytest.mark.slow
@pytest.mark.parametrize("one", TECHNIQUES, ids=name)
def test_what_comes_of_a_pair_is_saved_and_exported(one: Technique, tmp_path: Path) -> None:
    for two in TECHNIQUES:
        made = pair("bert", one, two)
        if isinstance(made, Model):
            survives(two, made, tmp_path / name(two))
        else:
            assert len(made.split()) > 5, f"{name(one)} then {name(two)}: {made!r} is no sentence"


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_every_family_takes_each_technique_once(family: str, tmp_path: Path) -> None:
    refused = {}
    for technique in map(everywhere, TECHNIQUES):
        try:
            model = first(family, technique)
        except NetweightError as refusal:
            refused[name(technique)] = str(refusal)
            continue
        survives(technique, model, tmp_path / name(technique))
    assert len(refused) <= 3, refused
    assert all(len(said.split()) > 5 for said in refused.values()), refused


def test_every_pair_composes_or_says_why_not_as_the_page_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run scripts/compose.py and commit it"


def test_the_same_pair_says_the_same() -> None:
    one, two = Shrink(neurons=0.5, rows=16, epochs=0), Quantize(rows=16)
    again = replace(two)
    assert first("bert", one) is first("bert", replace(one)), "equal options are one technique"
    assert two(first("bert", one), Local(few()), PLAN).digest == again(first("bert", one), Local(few()), PLAN).digest
