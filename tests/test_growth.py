"""The benchmarks of how cost grows and of how near an encoder comes to the machine's peak, on the session's job."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from conftest import Shop, tiny_model
from netweight.data import Dataset
from netweight.export import export
from netweight.network import Transformer
from netweight.run import Local
from netweight.techniques import Quantize
from netweight.train import Plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch, *words: Any) -> ModuleType:
    """A benchmark as a module, with a command line for its `main`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return import_module(name)


def test_operations_are_those_of_the_int8_matrices(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = script("roofline", monkeypatch)
    model = Quantize(rows=16)(tiny_model(layers=2), Local(dataset), Plan(batch_size=16))
    assert isinstance(model.network, Transformer)
    work = roofline.work_of(export(model).plain)
    assert work.token == sum(layer.weight.numel() for layer in model.network.linears().values())
    lengths = np.array([3, 5])
    assert work.of(lengths) == 2 * (8 * work.token + 2 * work.row)
    assert work.others >= 2 * 2, "each layer's two products of attention hold no weights"


def test_an_encoder_is_timed_beside_the_peak(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = script("roofline", monkeypatch, shop.folder, "--threads", 1, "--results", tmp_path)
    monkeypatch.setattr(roofline, "SHAPES", ((64, 64, 64), (8, 16, 16)))
    monkeypatch.setattr(roofline, "ROUNDS", 1)
    monkeypatch.setattr(roofline.seconds_of, "__defaults__", (0.001,))
    roofline.main()
    found = json.loads((tmp_path / "roofline.json").read_text(encoding="utf-8"))
    assert found["peak"]["operations"] == max(found["peaks"].values())
    assert len(found["peaks"]) == 4
    assert found["tiers"]
    for tier in found["tiers"].values():
        assert tier["share"] == pytest.approx(tier["operations"] / found["peak"]["operations"])
        assert tier["rows_per_second"] * tier["operations_per_row"] == pytest.approx(tier["operations"])
        assert 0 <= tier["padding"] < 1
    assert "billion int8 operations a second" in capsys.readouterr().out


def test_predict_is_timed_on_repeated_rows_and_finished_steps_are_kept(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table, rows = tmp_path / "rows.csv", shop.dev.take(range(40))
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(rows.text, rows.label or (), strict=True)])
    words = ("predict", shop.folder, table, "--threads", 1, "--work", tmp_path, "--results", tmp_path)
    scaling = script("scaling", monkeypatch, *words)
    monkeypatch.setattr(scaling, "TIMES", (1, 2))
    scaling.main()
    path = tmp_path / "scaling-predict.json"
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    assert [step["rows"] for step in steps] == [40, 80]
    assert all(step["seconds"] > 0 and step["memory"] > 1e7 for step in steps)
    with (tmp_path / "scaling-out.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 80
    monkeypatch.setattr(scaling, "run", lambda words: pytest.fail("a finished step ran again"))
    scaling.main()
    assert json.loads(path.read_text(encoding="utf-8"))["steps"] == steps


def test_parts_of_train_are_nested_and_stratified(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train.csv.gz", "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(shop.train.text, shop.train.label or (), strict=True)])
    scaling = script("scaling", monkeypatch, "optimize", tmp_path, "--work", tmp_path, "--results", tmp_path)
    seen: list[list[dict[str, str]]] = []

    def run(words: list[Any]) -> tuple[float, int]:
        seen.append(scaling.rows_of(Path(words[1]))[1])
        return 1.0, 2

    monkeypatch.setattr(scaling, "run", run)
    scaling.main()
    assert [len(rows) for rows in seen] == [30, 60, 150, 300]
    whole = Counter(row["label"] for row in seen[-1])
    for fewer, more in pairwise(seen):
        assert more[: len(fewer)] == fewer
        for label, count in Counter(row["label"] for row in fewer).items():
            assert abs(count / len(fewer) - whole[label] / len(seen[-1])) < 0.1
    assert [step["rows"] for step in json.loads((tmp_path / "scaling-optimize.json").read_text())["steps"]] == [
        *(30, 60, 150, 300)
    ]
