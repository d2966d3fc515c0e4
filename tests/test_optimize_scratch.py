"""`--model scratch`: the main job without any pretrained model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from conftest import GOOD, Shop, again, journal, many_rows
from netweight import build
from netweight.build import PRETRAINED, TEACHER, Builder, Clock
from netweight.choose import Minimise
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.encode import TextEncoder
from netweight.errors import OptionError
from netweight.job import Budget, Job, Options, Tables
from netweight.model import Model
from netweight.reporter import Silent
from netweight.run import Local
from netweight.scratch import scratch
from netweight.search import Rung
from netweight.ship import _remarks
from netweight.store import Store
from netweight.task import Classify
from netweight.techniques import Quantize, Recipe, Static

SMALL = partial(scratch, vocabulary=600, layers=1, hidden=32, heads=2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "scratch", SMALL)


def test_the_teacher_is_pretrained_on_train_and_pool_and_then_tuned(tmp_path: Path) -> None:
    rows = many_rows(80)
    train, dev, certify, pool = (rows.take(range(a, a + 20)) for a in (0, 20, 40, 60))
    pool = pool.unlabelled()
    data = Dataset(train, dev, dev, Sealed(certify), pool)
    task, job = (
        Classify(("bad", "good")),
        Job(Tables(train), options=Options(model="scratch", max_length=32, threads=1)),
    )
    with Store(tmp_path, {"a": 1}) as store:
        teacher = Builder(job, data, task, store, Silent(), Clock(8), Local(data, store.folder / "work")).teacher
        first = Model.load(store.model_folder(PRETRAINED))
        start = SMALL((*train.text, *pool.text), task, max_length=32)
        assert first.encoder.fingerprint == teacher.encoder.fingerprint == start.encoder.fingerprint
        assert store.get(f"model {PRETRAINED}")["digest"] == first.digest != start.digest
        assert store.get(f"model {TEACHER}")["digest"] == teacher.digest != first.digest
        assert first.network.head.weight.abs().sum() == 0  # type: ignore[union-attr,operator]
        again = Builder(job, data, task, store, Silent(), Clock(8), Local(data, store.folder / "work"))
        assert again.teacher.digest == teacher.digest


@pytest.mark.parametrize(
    ("word", "told"), [(GOOD[0], []), ("好用", ["50 % of the tokens of dev are unknown to starter, such as '好用'; "])]
)
def test_a_model_of_another_language_is_told_of(
    word: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, dataset: Dataset
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(build, "pretrained", lambda *_: model)
    monkeypatch.setattr(Silent, "note", lambda _, message: notes.append(message))
    texts = replace(dataset.select, text=(f"{word} {word}",) * len(dataset.select))
    data = replace(dataset, select=texts, calibrate=texts)
    with Store(tmp_path, {"a": 1}) as store:
        builder = Builder(Job(Tables(data.train)), data, model.task, store, Silent(), Clock(8), Local(data))
        builder._pretrained()
        # A job that is resumed reads its teacher from the store: the result says it again.
        monkeypatch.setattr(Builder, "teacher", model)
        passed = SimpleNamespace(verdict="certified", registration=SimpleNamespace(task=model.task), reference=None)
        remarks = _remarks(builder, SimpleNamespace(floor_wins=False), passed, None)  # type: ignore[arg-type]
        away = replace(builder, job=Job(Tables(None, dev=texts, certify=texts))).foreign(model.encoder)
    assert [remark for remark in remarks if "--model scratch" in remark] == notes
    assert [note[: len(start)] for note, start in zip(notes, told, strict=True)] == told
    assert all("--model scratch" in note for note in notes)
    assert away == "".join(f"{start}if labels depend on them, name a model that knows them." for start in told)


def test_where_a_model_lies_is_nobodys_business(tmp_path: Path, model: Model, dataset: Dataset) -> None:
    base = tmp_path / "secret" / "bert"
    base.mkdir(parents=True)
    texts = replace(dataset.select, text=("好用",) * len(dataset.select))
    data = replace(dataset, select=texts, calibrate=texts)
    job = Job(Tables(data.train), options=Options(model=str(base)))
    with Store(tmp_path, {"a": 1}) as store:
        builder = Builder(job, data, model.task, store, Silent(), Clock(8), Local(data))
        said = builder.foreign(model.encoder)
    assert " % of the tokens of dev are unknown to bert, such as '好用'; if labels " in said


def test_of_what_a_tokenizer_does_not_know_the_most_frequent_is_named(model: Model) -> None:
    texts = [f"{GOOD[0]} 👍", "👍 “好用”", "好用 iphone13", f"{'x' * 30} 👍 好用"]
    assert model.encoder.missing(texts, 2) == ["👍", "好用"]
    assert model.encoder.missing(texts[3:]) == ["x" * 20, "👍", "好用"]
    assert model.encoder.missing([GOOD[0]]) == []


def test_rows_that_a_model_from_scratch_does_not_know_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda _, message: notes.append(message))
    texts = replace(dataset.select, text=("好用",) * len(dataset.select))
    data = replace(dataset, select=texts, calibrate=texts)
    job = Job(Tables(data.train), options=Options(model="scratch"))
    with Store(tmp_path, {"a": 1}) as store:
        builder = Builder(job, data, Classify(("bad", "good")), store, Silent(), Clock(8), Local(data))
        builder._scratch()
    (said,) = notes
    assert said.startswith("50 % of the tokens of dev are unknown to scratch, such as '")
    assert said.endswith("; if labels depend on them, name a model that knows them.")


@pytest.mark.parametrize(("few", "trimmed"), [(0.5, False), (0.99, True)])
def test_a_vocabulary_of_which_most_would_stay_is_not_trimmed(
    few: float, trimmed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, dataset: Dataset
) -> None:
    for name, value in (("_COMMON", 0), ("_FEW", few)):
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(Builder, "teacher", model)
    train = replace(dataset.train, text=tuple(text.replace("dress", "zip") for text in dataset.train.text))
    with Store(tmp_path, {"a": 1}) as store:
        run = Local(replace(dataset, train=train))
        source = Builder(Job(Tables(train)), dataset, model.task, store, Silent(), Clock(8), run).source
    assert ("dress" not in source.encoder.tokens()) == trimmed
    assert (source is model) == (not trimmed)


@pytest.mark.parametrize("minimise", ["cost", "size"])
def test_where_bytes_count_fewer_common_words_stay(
    minimise: Minimise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, dataset: Dataset
) -> None:
    names = model.encoder.tokens()
    for name, value in (("_COMMON", len(names)), ("_COMMONEST", names.index("dress")), ("_FEW", 1.0)):
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(Builder, "teacher", model)
    train = replace(dataset.train, text=tuple(text.replace("dress", "zip") for text in dataset.train.text))
    with Store(tmp_path, {"a": 1}) as store:
        job = Job(Tables(train), budget=Budget(minimise=minimise))
        run = Local(replace(dataset, train=train))
        source = Builder(job, dataset, model.task, store, Silent(), Clock(8), run).source
    assert ("dress" in source.encoder.tokens()) == (minimise == "cost")


def test_a_tokenizer_that_cannot_be_trimmed_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, dataset: Dataset
) -> None:
    stored = json.loads(model.encoder.definition)
    stored["model"]["unk_token"] = "[nowhere]"
    model = replace(model, encoder=TextEncoder(json.dumps(stored), 32))
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda _, message: notes.append(message))
    monkeypatch.setattr(Builder, "teacher", model)
    with Store(tmp_path, {"a": 1}) as store:
        builder = Builder(Job(Tables(dataset.train)), dataset, model.task, store, Silent(), Clock(8), Local(dataset))
        assert builder.source is model
    assert [note.split(":")[0] for note in notes] == ["tiers have the teacher's whole vocabulary"]
    with pytest.raises(OptionError, match="vocabulary is 'small'; use trimmed or whole"):
        Options(vocabulary="small")  # type: ignore[arg-type]


class Seen(Exception):
    """With the time box of a model."""


def test_what_the_teacher_says_is_not_taken_from_the_first_students_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, dataset: Dataset
) -> None:
    now = [0.0]

    class Slow(Local):
        def outputs(self, model: Model, unlabelled: bool = False, half: bool = False) -> Tensor:
            assert (unlabelled, half) == (True, True), "as a student's fit will ask for it"
            now[0] += 40
            return super().outputs(model, unlabelled, half)

    def made(self: Builder, name: str, base: object, recipe: Recipe, seconds: float, *_: object) -> Model:
        raise Seen(seconds)

    monkeypatch.setattr(build.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Builder, "model", made)
    monkeypatch.setattr(Builder, "teacher", model)
    monkeypatch.setattr(Builder, "source", model)
    with Store(tmp_path, {"a": 1}) as store:
        builder = Builder(Job(Tables(dataset.train)), dataset, model.task, store, Silent(), Clock(100), Slow(dataset))
        for rung, left in ((Rung("whole", (Quantize(),), 0.5), 100), (Rung("student", (Static(),), 0.5), 60)):
            with pytest.raises(Seen) as seen:
                builder.point(rung)
            assert seen.value.args == (0.5 * left,)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_whole_job(shop: Shop, tmp_path: Path) -> None:
    made = again(shop, tmp_path / "made.nw", model="scratch", seconds=60.0)
    assert made.manifest.provenance["base"]["name"] == "scratch"
    assert {f"model {PRETRAINED}", f"model {TEACHER}"} < set(journal(tmp_path / "made.nw"))


@pytest.mark.parametrize(("cut", "pair", "reads"), [(0.06, None, 128), (0.05, None, None), (0.06, ("x",), None)])
def test_single_texts_that_are_long_are_read_farther(
    cut: float, pair: tuple[str, ...] | None, reads: int | None
) -> None:
    teacher = SimpleNamespace(encoder=SimpleNamespace(max_length=32))
    builder = SimpleNamespace(cut=cut, teacher=teacher, data=SimpleNamespace(dev=Rows(("a",), pair=pair)))
    assert Builder.reads.fget(builder) == reads  # type: ignore[attr-defined]
