"""The benchmarks of one artifact, one store or one set of tables, on the session's job: growth, peak, techniques."""

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

from conftest import Asked, Shop, tiny_model
from netweight.active import select
from netweight.data import Dataset, Rows
from netweight.export import export
from netweight.model import pretrained
from netweight.network import Transformer
from netweight.pipeline import store_of
from netweight.run import Local
from netweight.techniques import Finetune, Quantize, SelfTrain
from netweight.train import Plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch, *words: Any) -> ModuleType:
    """A benchmark as a module, with a command line for its `main`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return import_module(name)


def tables(folder: Path, **sets: Rows) -> None:
    for name, rows in sets.items():
        with gzip.open(folder / f"{name}.csv.gz", "wt", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(rows.text, rows.label or (), strict=True)])


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
    tables(tmp_path, train=shop.train)
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


def test_examples_of_techniques_are_made_once_and_timed_together(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tables(tmp_path, train=shop.train, dev=shop.dev, test=shop.certify)
    words = (tmp_path, store_of(shop.folder), "--seconds", 2, "--work", tmp_path / "work", "--results", tmp_path)
    techniques = script("techniques", monkeypatch, *words)
    monkeypatch.setattr(techniques, "cores", lambda: 1)
    monkeypatch.setattr(techniques, "pretrained", lambda name, task, seed: pretrained(str(shop.base), task, seed=seed))
    examples = (
        ("", "the teacher", techniques.TEACHER, ()),
        ("quantize", "int8", techniques.TEACHER, (Quantize(rows=64),)),
        ("semi-supervised", "few, then its own", "few", (Finetune(1, 1e-3), SelfTrain(floor=0.6, epochs=1, drift=1.0))),
        next(one for one in techniques.GROUPS["pool"] if one[2] == "scratch"),
    )
    monkeypatch.setitem(techniques.GROUPS, "techniques", examples)
    techniques.main()
    path = tmp_path / "techniques.json"
    first = json.loads(path.read_text(encoding="utf-8"))
    assert first["rows"] == len(shop.dev)
    teacher, int8, few, scratch = first["examples"]
    assert [(e["page"], e["name"]) for e in first["examples"]] == [(page, name) for page, name, _, _ in examples]
    assert teacher["agreement"] == 1
    assert int8["agreement"] > 0.9
    assert int8["bytes"] < teacher["bytes"]
    assert int8["recipe"] == [repr(Quantize(rows=64))]
    assert [one.partition("(")[0] for one in few["recipe"]] == ["Finetune", "SelfTrain"]
    assert few["agreement"] < 1
    assert all(e["row"] > 0 for e in (teacher, int8, few))
    assert "row" not in scratch, "its rows are cut into other tokens than the teacher's"
    monkeypatch.setattr(techniques, "make", lambda *_: pytest.fail("an example was made twice"))
    techniques.main()
    for before, after in zip(first["examples"], json.loads(path.read_text())["examples"], strict=True):
        assert {**after, "row": 0} == {**before, "row": 0}


def test_every_example_has_a_place_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    for group in script("recipes", monkeypatch).GROUPS.values():
        assert group[0][3] == (), "what the others are held against"
        assert len({(page, name) for page, name, _, _ in group}) == len(group)
        for page in {page for page, *_ in group[1:]}:
            text = (BENCHMARKS.parent / "docs" / "techniques" / f"{page}.md").read_text(encoding="utf-8")
            assert "<!-- measured -->" in text, page


def test_few_labels_of_each_class_and_the_rest_a_pool(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    techniques = script("techniques", monkeypatch)
    found = techniques.few(dataset)
    assert set(Counter(found.train.label).values()) == {techniques.FEW}
    assert Counter(found.train.text) + Counter(found.pool.text) == Counter(dataset.train.text)
    assert found.pool.label is None


@pytest.mark.parametrize("method", [None, "margin", "badge"])
def test_labels_are_revealed_of_rows_that_a_model_asked_for(
    method: str | None, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = script("recipes", monkeypatch)
    trained: list[Rows] = []

    class Watched(Asked):
        def __init__(self, data: Dataset) -> None:
            super().__init__(data)
            trained.append(data.train)

    def choosing(model: Any, rows: Rows, *how: Any) -> Any:
        assert rows.label is None
        return select(model, rows, *how)

    monkeypatch.setattr(recipes, "Local", Watched)
    monkeypatch.setattr(recipes, "select", choosing)
    recipes.Revealed(method)(tiny_model(), Watched(dataset), Plan(seed=1))
    _, *asking, last = trained
    each = dict.fromkeys(("good", "bad"), recipes.ASKED)
    assert [Counter(rows.label) for rows in asking] == ([] if method is None else [each])
    assert len(last) == recipes.FEW * 2
    assert not Counter(zip(last.text, last.label or ())) - Counter(zip(dataset.train.text, dataset.train.label or ()))
    assert min(Counter(last.label).values()) >= recipes.ASKED


def test_a_student_from_scratch_knows_the_teacher_by_its_outputs(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, run = tiny_model(), Asked(dataset)
    student = script("recipes", monkeypatch).FromScratch()(teacher, run, Plan())
    ((_, loss, plan),) = run.fits
    assert student.encoder.definition != teacher.encoder.definition
    assert loss.teachers == (teacher,)
    assert plan.splice == 0, "spliced rows would be of the teacher's tokens"


def test_an_ordinary_fine_tune_is_timed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables(tmp_path, train=shop.train, dev=shop.dev, test=shop.certify)
    files = [tmp_path / f"{name}.csv.gz" for name in ("train", "test", "dev")]
    words = (*files[:2], "--dev", files[2], "--epochs", 3, "--learning-rate", 3e-3, "--results", tmp_path)
    finetune = script("finetune", monkeypatch, *words)
    monkeypatch.setattr(finetune, "cores", lambda: 1)
    monkeypatch.setattr(finetune, "pretrained", lambda name, task, seed: pretrained(str(shop.base), task, seed=seed))
    finetune.main()
    found = json.loads((tmp_path / "finetune.json").read_text(encoding="utf-8"))
    assert found["epochs"] == 3
    assert found["quality"] > 0.6
    assert f"{found['quality']:.4f} on dev" in capsys.readouterr().out
