"""The main call, end to end, with a tiny base; killed, run again, out of time, and refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import GOOD, MEAN, THINGS, Shop, again, journal, looks, many_rows, tiny_base, write_table
from netweight import artifact, build, measure, pipeline, ship, summary
from netweight.bench import bench
from netweight.certify import Estimate, Outcomes, fit_temperature
from netweight.certify.match import row_keys
from netweight.convert import SPEC
from netweight.data import Columns, Dataset, Rows
from netweight.data.rows import Sealed
from netweight.deliver import export
from netweight.engine import Outputs, load
from netweight.errors import ArtifactError, CertificateError, DataError, ModelError, OptionError, StoreError
from netweight.explain import explain
from netweight.job import Budget, Job, Options, Tables, prepare
from netweight.model import Model, digests
from netweight.pipeline import optimize, store_of
from netweight.reporter import Silent
from netweight.run.local import logits_of
from netweight.search import Rung, ladder
from netweight.store import JOURNAL, Store, rows_of
from netweight.task import Classify, Score, Task
from netweight.techniques import Distill, EarlyExit, Factor, Quantize
from netweight.trials import _SHORT

# --- what comes out ---


def test_a_certified_artifact_comes_out(shop: Shop) -> None:
    result = shop.result
    assert result.certificate.verdict == "certified"
    assert result.certificate.registration.look == 1
    assert len(result.certificate.registration.candidates) > 2, "the case is to have cascades"
    assert artifact.check(shop.folder) == result.manifest
    assert result.manifest.digest == result.certificate.shipped.digest
    assert set(result.manifest.files) >= {"certificate.json", "outcomes.json", "measurements.json", "report.html"}
    assert "follows from its" in summary.verify(shop.folder, None)[1]
    assert result.manifest.provenance["data"]["rows"] == {
        "train": len(shop.train),
        "select": len(shop.dev) // 2,
        "calibrate": len(shop.dev) // 2,
        "certify": len(shop.certify),
        "pool": 0,
    }
    assert result.measurements.shipped.name == result.certificate.shipped.name
    assert result.measurements.reference.name == "teacher"


def test_the_artifact_answers_as_it_was_certified(shop: Shop) -> None:
    engine = load(shop.folder, threads=1)
    certificate, outcomes = summary.certificate_of(shop.folder)
    said = engine.predict(shop.certify.text)
    labels = dict(zip(shop.certify.text, [p.label for p in said]))  # type: ignore[union-attr]
    wanted = outcomes.candidates[certificate.shipped.name][:, 0]
    sealed = Sealed(shop.certify)
    assert len(sealed.rows) == len(wanted)
    counted = np.bincount(wanted.astype(int), minlength=2).tolist()
    assert [list(labels.values()).count(label) for label in engine.task.labels] == counted  # type: ignore[union-attr]
    right = float(np.mean([labels[t] == y for t, y in zip(shop.certify.text, shop.certify.label or ())]))
    assert right == pytest.approx(certificate.final.quality.value)


def test_candidates_were_tested_until_one_failed(shop: Shop) -> None:
    tested = shop.result.certificate.tested
    assert all(t.passed for t in tested[:-1])
    assert [t.candidate for t in tested] == list(shop.result.certificate.registration.candidates)[: len(tested)]


def test_measurements_are_of_what_ships(shop: Shop) -> None:
    measured = shop.result.measurements
    engine = load(shop.folder, threads=1)
    answers = engine.predict(shop.dev.text)
    right = np.mean([p.label == y for p, y in zip(answers, shop.dev.label or ())])  # type: ignore[union-attr]
    assert measured.shipped.quality == pytest.approx(float(right))
    tiers = [p.tier for p in answers]
    assert measured.shipped.answered == pytest.approx([tiers.count(t) / len(tiers) for t in measured.shipped.tiers])
    teacher = Model.load(store_of(shop.folder) / "models" / "teacher")
    said = logits_of(teacher, teacher.encoder.encode(shop.dev.text)).numpy().argmax(1)
    right = np.mean([teacher.task.labels[i] == y for i, y in zip(said, shop.dev.label or ())])  # type: ignore[union-attr]
    assert measured.reference.quality == pytest.approx(float(right))
    assert measured.reference.bytes == teacher.bytes


def test_a_certificate_that_a_single_label_would_get_says_so(shop: Shop) -> None:
    def said(good: int) -> list[str]:
        counts = {"bad": len(shop.certify) - good, "good": good}
        data = Dataset(shop.train, shop.dev, shop.dev, Sealed(shop.certify), counts=counts)
        builder = SimpleNamespace(run=None, data=data, teacher=SimpleNamespace(encoder=None), foreign=lambda _: "")
        found, ranked = summary.certificate_of(shop.folder), SimpleNamespace(floor_wins=False)
        remarks = ship._remarks(builder, ranked, *found)  # type: ignore[arg-type]
        return [remark for remark in remarks if remark.startswith("Always")]

    reference = 100 * shop.result.certificate.reference.value
    assert said(497) == [
        f"Always answering 'good' is right on 99.40 % of the certify rows, the reference on {reference:.2f} %, and 5 "
        "points may be lost: this certificate cannot tell it from a model."
    ]
    assert said(250) == []


@pytest.mark.parametrize(
    ("metric", "reference", "said"),
    [
        # The median of 0, 1, 2, 3 and 14 is 2, its mean absolute error 3.2; 5 points of 3.1 are 0.155.
        ("mae", Estimate(-3.1, -3.5, -2.7), "Always answering 2 errs by 3.2 on the certify rows, the reference by 3.1"),
        ("mae", Estimate(-3.0, -3.5, -2.7), ""),
        (
            "spearman",
            Estimate(0.2, 0.04, 0.4),
            "One answer to all rows has a correlation of 0, the reference one that may be as low as 0.0400",
        ),
        ("spearman", Estimate(0.2, 0.06, 0.4), ""),
    ],
)
def test_a_certificate_that_a_single_score_would_get_says_so(
    metric: str, reference: Estimate, said: str, shop: Shop
) -> None:
    task, made = Score(metric=metric), shop.result.certificate  # type: ignore[arg-type]
    final = replace(made.final, margin=task.margin(5.0, reference.value))
    asked = replace(made.registration, task=task, max_drop=5.0)
    made = replace(made, registration=asked, reference=reference, tested=(final,))
    true = np.array([0.0, 1.0, 2.0, 3.0, 14.0])
    outcomes = Outcomes(("k",) * 5, np.stack([true, true], axis=1), {}, np.ones(5))
    wanted = f"{said}, and 5 points may be lost: this certificate cannot tell it from a model." if said else ""
    assert ship._unread(Dataset(shop.train, shop.dev, shop.dev, Sealed(shop.certify)), made, outcomes) == wanted


def test_a_result_that_could_not_be_certified_says_so(shop: Shop) -> None:
    """At the 11th look no bootstrap shows anything; the exact test has no such end."""
    data = Dataset(shop.train, shop.dev, shop.dev, Sealed(shop.certify))
    builder = SimpleNamespace(run=None, data=data, teacher=SimpleNamespace(encoder=None), foreign=lambda _: "")
    for metric, late in (("macro-f1", True), ("accuracy", False)):
        made = shop.result.certificate
        task = replace(made.registration.task, metric=metric)  # type: ignore[type-var]
        failed = replace(made, verdict="not certified", registration=replace(made.registration, task=task, look=11))
        ranked, outcomes = SimpleNamespace(floor_wins=False), summary.certificate_of(shop.folder)[1]
        remarks = ship._remarks(builder, ranked, failed, outcomes)  # type: ignore[arg-type]
        assert any("no candidate could pass. Give a fresh certify table" in remark for remark in remarks) == late


# --- running again ---


@pytest.mark.usefixtures("quick")
def test_a_finished_job_gives_the_same_look_and_the_same_artifact(shop: Shop, copied: Path) -> None:
    result = again(shop, copied, model=f"{shop.options['model']}/", seed=np.int64(0))
    assert result.certificate == shop.result.certificate
    assert result.manifest.digest == shop.result.manifest.digest
    assert journal(copied) == journal(shop.folder)
    assert len(looks(copied)) == 1


@pytest.mark.usefixtures("quick")
def test_a_finished_job_with_further_slices_is_the_same_job_and_the_same_look(shop: Shop, copied: Path) -> None:
    certify, size = shop.certify, tuple("SML"[i % 3] for i in range(len(shop.certify)))
    result = again(replace(shop, certify=replace(certify, slices={"size": size})), copied)
    assert result.certificate.registration == shop.result.certificate.registration
    assert result.manifest.digest == shop.result.manifest.digest
    assert "size" in {part.column for part in result.certificate.slices}
    assert journal(copied) == journal(shop.folder), "nothing was trained again"
    assert len(looks(copied)) == 1


@pytest.mark.usefixtures("quick")
def test_another_budget_is_another_look(shop: Shop, copied: Path) -> None:
    result = again(shop, copied, max_drop=4.0)
    assert result.certificate.registration.look == 2
    assert result.certificate.registration.level == pytest.approx(0.0125)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the verdict on")
        assert again(shop, copied).certificate.registration.look == 1, "the first question was asked before"
    assert len(looks(copied)) == 2
    made = {key: value for key, value in journal(shop.folder).items() if key.startswith(("model", "point"))}
    assert {key: journal(copied)[key] for key in made} == made, "nothing was trained again"


@pytest.mark.usefixtures("quick")
def test_who_asked_without_a_reporter_is_warned_where_nothing_passed(shop: Shop, copied: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"the verdict on .* is '(not certified|worse)': no candidate passed, and .* ships"
    ):
        result = again(shop, copied, max_drop=0.1)
    assert result.certificate.verdict != "certified"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the verdict on")
        again(shop, copied, max_drop=0.1, reporter=Silent())


@pytest.mark.usefixtures("quick")
def test_a_margin_that_dev_finds_is_fixed_before_labels_are_read(copied: Path, shop: Shop) -> None:
    told: list[str] = []
    reporter = Silent()
    reporter.note = told.append  # type: ignore[method-assign]
    result = again(shop, copied, max_drop="auto", reporter=reporter)
    points = result.certificate.registration.max_drop
    assert 1.0 <= points <= 10.0
    assert points == pytest.approx(round(points, 1))
    assert result.manifest.provenance["max_drop"] == points
    assert f"max drop: {points:g} points, from dev and {len(shop.certify):,} certify rows" in told
    assert looks(copied)[-1]["max_drop"] == points
    assert "--max-drop auto" in (copied / "report.html").read_text(encoding="utf-8")


# --- other ways ---


@pytest.mark.usefixtures("quick")
def test_nothing_beats_linear_and_labels_open_after_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    register, unseal = ship.register, Sealed.unseal

    def registered(*args: Any, **options: Any) -> Any:
        made = register(*args, **options)
        events.append(("registered", made.digest))
        return made

    def opened(self: Sealed, registration: str) -> Rows:
        events.append(("opened", registration))
        return unseal(self, registration)

    monkeypatch.setattr(ship, "register", registered)
    monkeypatch.setattr(Sealed, "unseal", opened)
    base = tiny_base(tmp_path / "secret" / "bert", known=0.0)
    result = optimize(many_rows(900, seed=4), out=tmp_path / "made.nw", model=str(base), max_drop=5.0, threads=1)
    assert [kind for kind, _ in events] == ["registered", "opened"]
    assert len({digest for _, digest in events}) == 1
    assert events[0][1] == result.certificate.registration.digest
    assert result.certificate.registration.reference.name == "linear"
    assert [tier.name for tier in result.manifest.tiers] == ["linear"]
    assert result.certificate.verdict == "certified"
    assert result.certificate.final.drop.value == 0
    assert any("Nothing beats TF-IDF" in note for note in result.notes)
    assert any("cut from train for certify" in note for note in result.notes)
    assert [point.name for point in result.measurements.candidates] == ["linear"], "no time went into anything else"
    held = journal(tmp_path / "made.nw")
    why = "linear, which costs least, is as good as the teacher"
    assert held["left out static"] == [why, result.manifest.provenance["command"]]
    assert result.measurements.reference.name == "linear"
    assert result.manifest.provenance["base"]["name"] == "bert"
    assert not any(b"secret" in artifact.read_file(result.folder, result.manifest, f) for f in result.manifest.files)
    assert b"secret" not in (result.folder / artifact.MANIFEST).read_bytes()


@pytest.mark.usefixtures("quick")
def test_out_of_time_the_first_three_rungs_are_made_and_no_more(
    shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Silent):
        said: list[str] = []  # noqa: RUF012

        def note(self, message: str) -> None:
            self.said.append(message)

    path = store_of(copied) / JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    gone = [f"{what} {name}" for what in ("point", "model") for name in ("static", "conv")]
    kept = [line for line in lines if json.loads(line)["key"] not in gone]
    assert len(kept) <= len(lines) - 2
    path.write_text("".join(kept), encoding="utf-8")
    fourth = Rung("half-int8", (Distill(layers=1), Quantize()), 0.5)
    monkeypatch.setattr(pipeline, "ladder", lambda teacher, _: (*ladder(teacher)[:3], fourth))
    monkeypatch.setattr(build.Clock, "left", property(lambda self: -1.0))
    result = again(shop, copied, reporter=Notes())
    assert {m.name for m in result.measurements.candidates} == {"linear", "full-int8", "static"}
    said = "the time limit was near; what follows it is not tried either"
    assert f"half-int8 is not made: {said}" in Notes.said
    assert journal(copied)["left out half-int8"] == [said, result.manifest.provenance["command"]]


@pytest.mark.usefixtures("quick")
def test_a_rung_that_cannot_be_made_is_left_out_and_the_others_are_not(
    shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Rung("odd", (Distill(layers=99), Quantize()), 0.5)
    smaller = Rung("half-int8", (Distill(layers=1, epochs=1), Quantize()), 0.5, after="odd")
    monkeypatch.setattr(pipeline, "ladder", lambda teacher, _: (*ladder(teacher)[:3], odd, smaller))
    result = again(shop, copied)
    assert {"linear", "static", "half-int8"} <= {one.name for one in result.measurements.candidates}
    said = "cannot keep 99 layers of 1; choose 1 to 1."
    assert journal(copied)["left out odd"] == [said, result.manifest.provenance["command"]]
    monkeypatch.setattr(pipeline, "ladder", lambda teacher, _: (odd,))
    with pytest.raises(OptionError, match="cannot keep 99 layers"):  # nothing can be answered
        again(shop, copied)


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_damaged_is_no_rung_that_cannot_be_made(shop: Shop, copied: Path) -> None:
    path = store_of(copied) / JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(ln for ln in lines if json.loads(ln)["key"] != "point static"), encoding="utf-8")
    (store_of(copied) / "models" / "static" / "model.safetensors").write_bytes(b"")
    before = looks(copied)
    with pytest.raises(StoreError, match="what was made is damaged"):
        again(shop, copied)
    assert looks(copied) == before


@pytest.mark.usefixtures("quick")
def test_a_trial_that_cannot_be_made_ends_no_job(shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_SHORT, "standard", 1)
    monkeypatch.setattr(pipeline, "ladder", lambda teacher, _: ladder(teacher)[:3])

    def refused(*_: Any) -> Any:
        raise ModelError("its layers are odd.")

    monkeypatch.setattr(Factor, "__call__", refused)
    again(shop, copied, effort="standard")
    held = journal(copied)
    assert held["left out factored-1-short"][0] == "its layers are odd."
    assert "point encoder-1-short" in held


@pytest.mark.usefixtures("quick")
def test_a_search_that_the_clock_ended_is_over_after_a_kill_too(
    shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels have been opened by then: another rung would be another plan, and another look."""
    fourth = Rung("half-int8", (Distill(layers=1, epochs=1), Quantize()), 0.5)
    monkeypatch.setattr(pipeline, "ladder", lambda teacher, _: (*ladder(teacher)[:3], fourth))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.Clock, "left", property(lambda self: -1.0))
        patch.setattr(ship, "_measured", killed)
        with pytest.raises(KeyboardInterrupt):
            again(shop, copied)
    before = looks(copied)
    again(shop, copied)
    assert looks(copied) == before
    assert "point half-int8" not in journal(copied)
    assert journal(copied)[pipeline.CLOSED] is None
    again(shop, copied)
    assert "point half-int8" in journal(copied), "a job that has ended goes on where it is asked again"


@pytest.mark.usefixtures("quick")
def test_where_bytes_count_few_bits_are_tried_and_the_smallest_that_passes_ships(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_PASSES", 2.0)  # made, however well the static student does
    monkeypatch.setattr(pipeline, "_MAY_PASS", -1.0)
    out = tmp_path / "made.nw"
    result = again(shop, out, minimise="size", max_drop=40.0)
    kept = journal(out)
    sizes = {name: kept[f"point {name}"]["bytes"] for name in ("full-int8", "full-int4", "full-int3")}
    assert sorted(sizes, key=sizes.__getitem__) == ["full-int3", "full-int4", "full-int8"]
    assert "point full-mixed" not in kept
    (tier,) = result.manifest.tiers
    points = [value for key, value in kept.items() if key.startswith("point ")]
    assert kept[f"point {tier.name}"]["bytes"] == min(point["bytes"] for point in points)


@pytest.mark.usefixtures("quick")
def test_a_tier_with_exits_ships_and_what_recipes_share_is_made_once(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = EarlyExit((1,), epochs=1, splice=0.0)
    more = (Rung("exits", (exits, Quantize()), 0.5), Rung("shared", (exits, Quantize(method="minmax")), 0.5))
    monkeypatch.setattr(pipeline, "ladder", lambda teacher, _: (*ladder(teacher)[:3], *more))
    # Whatever its dev quality: only a cascade that ends in the exits is left to choose.
    usual = ship.plan
    monkeypatch.setattr(ship, "plan", lambda found: usual([c for c in found if c.choice.points[-1].name == "exits"]))
    base = tiny_base(tmp_path / "base", layers=2)
    out = tmp_path / "made.nw"
    result = again(shop, out, model=str(base), max_drop=40.0)
    held = journal(out)
    steps = held["steps exits"]
    assert steps[0] == held["steps shared"][0], "recipes that begin alike share it"
    assert len([key for key in held if key.startswith("model part-")]) == 1
    tier = result.manifest.tiers[-1]
    assert (tier.name, tier.engine) == ("exits", "exits")
    assert result.manifest.provenance["plans"] == {tier.name: {} for tier in result.manifest.tiers}
    (threshold,) = tier.options["thresholds"]
    assert 0.5 <= threshold <= 1.0, "fitted on dev: some rows leave early"
    assert len(load(out, 1).predict(shop.certify.text)) == len(shop.certify)
    assert len(summary.verify(out, None)) == 2


@pytest.mark.usefixtures("quick")
def test_tiers_without_attention_read_texts_to_their_end(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    tails = [" ".join(rng.choice(THINGS, int(rng.integers(0, 30)))) for _ in range(1200)]
    rows = many_rows(1200, noise=0.02)
    rows = Rows(tuple(f"{text} {tail}" for text, tail in zip(rows.text, tails)), rows.label)
    train, dev, certify = (rows.take(range(a, b)) for a, b in ((0, 300), (300, 700), (700, 1200)))
    far = tuple(f"{' ' * 300}{text}" if i < 20 else text for i, text in enumerate(certify.text))
    certify = replace(certify, text=far)
    usual = ship.plan
    cascades = lambda found: usual([c for c in found if c.choice.name.startswith("static > full")])  # noqa: E731
    monkeypatch.setattr(ship, "plan", cascades)
    options: dict[str, Any] = shop.options | {"max_length": 16, "max_drop": 20.0}
    out = tmp_path / "made.nw"
    result = optimize(train, dev=dev, certify=certify, out=out, **options)
    first, last = result.manifest.tiers
    assert (first.engine, last.name) == ("static", "full-int8")
    assert first.before == 0.0
    assert last.before > 0.0, "what hands over has its vote in what ships"
    assert result.manifest.max_length == 64
    assert "reads" not in first.options
    assert last.options["reads"] == [16, 1]
    engine = load(out, threads=1)
    texts = certify.text[20:]
    tokens = engine.encoder.encode(texts)
    assert int(tokens.lengths.max()) > 30
    short = engine.encoder.reading(16)
    np.testing.assert_array_equal(engine.logits(1, tokens), engine.logits(1, short.encode(texts)))
    assert not np.array_equal(engine.logits(0, tokens), engine.logits(0, short.encode(texts)))
    # Alone, the encoder reads no text farther than it was trained to, in tokens and in characters: what is certified is
    # what the artifact sees, not what another one with the same tier would.
    alone = tmp_path / "alone.nw"
    only = lambda found: usual([c for c in found if c.choice.name == "full-int8"])  # noqa: E731
    monkeypatch.setattr(ship, "plan", only)
    shutil.copytree(store_of(out), store_of(alone))
    short_alone = optimize(train, dev=dev, certify=certify, out=alone, **options)
    assert short_alone.manifest.max_length == 16
    _, outcomes = summary.certificate_of(alone)
    labels = short_alone.manifest.task.labels  # type: ignore[union-attr]
    keys = row_keys(certify)
    once = [i for i in range(20) if keys.count(keys[i]) == 1]
    found = outcomes.candidates["full-int8"][[outcomes.keys.index(keys[i]) for i in once], 0]
    certified, seen = [labels[int(i)] for i in found], [far[i] for i in once]
    assert certified == [p.label for p in load(alone, 1).predict(seen)]  # type: ignore[union-attr]
    assert len(set(certified)) == 1, "it sees no word of them"
    assert len({p.label for p in engine.predict(seen)}) == 2, "and the other one does"  # type: ignore[union-attr]
    # Others may run it: the spec says how far each tier reads.
    spec = json.loads((export(out, "onnx", tmp_path / "onnx").folder / SPEC).read_text(encoding="utf-8"))
    assert [(t.get("tokens"), t.get("closing")) for t in spec["tiers"]] == [(None, None), (16, 1)]
    assert spec["max_length"] == 64
    measured = {point.name: point.quality for point in result.measurements.candidates}
    last_steps = {step.tier: step.quality for step in explain(out, 1).steps}
    assert {name: last_steps[name] for name in ("static", "full-int8")} == {
        n: measured[n] for n in ("static", "full-int8")
    }


@pytest.mark.usefixtures("quick")
def test_tiers_know_the_tokens_that_texts_use_and_the_reference_all(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words beyond the part that encoders read count too; words that training has not seen are spelled."""
    monkeypatch.setattr(build, "_COMMON", 0)
    monkeypatch.setattr(build, "_FEW", 1.0)
    rows = many_rows(1200, noise=0.02)
    far = " ".join([THINGS[0]] * 5 + [GOOD[0]])
    rows = Rows(tuple(f"{text} {far}" if i % 2 else text for i, text in enumerate(rows.text)), rows.label)
    train, dev, certify = (rows.take(range(a, b)) for a, b in ((0, 300), (300, 700), (700, 1200)))
    seldom = [i for i, text in enumerate(train.text) if MEAN[0] not in text]
    out = tmp_path / "made.nw"
    result = optimize(train.take(seldom), dev=dev, certify=certify, out=out, **shop.options | {"max_length": 16})
    assert result.certificate.verdict == "certified"
    engine, teacher = load(out, 1), Model.load(store_of(out) / "models" / "teacher")
    all_of_them, known = teacher.encoder.vocabulary, engine.encoder.vocabulary
    assert known < all_of_them
    assert result.manifest.provenance["tokens"] == {"known": known, "teacher": all_of_them}
    assert set(engine.encoder.tokens()) < set(teacher.encoder.tokens())
    assert MEAN[0] in teacher.encoder.tokens()
    assert MEAN[0] not in engine.encoder.tokens()
    assert GOOD[0] in engine.encoder.tokens(), "encoders do not read so far, but others do"
    assert GOOD[1] not in engine.encoder.tokens()
    # The reference is the teacher with all of its tokens.
    assert result.certificate.registration.reference.digest == teacher.digest

    def quality(rows: Rows) -> float:
        said = logits_of(teacher, teacher.encoder.encode(rows.text)).numpy()
        return float(teacher.task.quality(teacher.task.outcomes(said, teacher.task.targets(rows.label or ()))))

    assert result.certificate.reference.value == quality(certify)
    # What all tiers read cannot be replaced by what the teacher reads when it is damaged.
    before = looks(out)
    weights = store_of(out) / "models" / build.TRIMMED / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    with pytest.raises(StoreError, match=r"what was made is damaged: .* but keep its looks\.jsonl"):
        optimize(train.take(seldom), dev=dev, certify=certify, out=out, **shop.options | {"max_length": 16})
    assert looks(out) == before
    weights.write_bytes(whole)
    assert result.measurements.reference.quality == quality(dev)
    measured = {point.name: point.quality for point in result.measurements.candidates}
    steps = explain(out, 1).steps
    explained = {step.tier: step.quality for step in steps if step.tier}
    assert explained == {name: measured[name] for name in explained}
    firsts = [step for before, step in itertools.pairwise(steps) if step.tier and step.tier != before.tier]
    assert [(step.done, step.bytes < steps[0].bytes) for step in firsts] == [
        ("Vocab, the tokens that occur and common ones", True) for _ in result.manifest.tiers
    ]
    assert export(out, "onnx", tmp_path / "onnx").compared
    ours, teachers = bench(out, None, against=["teacher"], threads=1).measured
    assert (ours.quality, teachers.quality) == (result.measurements.shipped.quality, quality(dev))
    # A job that was begun for something else keeps the tokens that it was begun with, and says so.
    told = Told()
    given = shop.options | {"max_length": 16, "minimise": "size", "reporter": told}
    for_bytes = optimize(train.take(seldom), dev=dev, certify=certify, out=out, **given)
    assert for_bytes.manifest.provenance["tokens"] == {"known": known, "teacher": all_of_them}
    assert any(note.startswith("tiers know the 0 most common tokens, as this job was begun") for note in told.notes)
    # Nothing is left out where that is asked for, and it is another job.
    whole = optimize(
        train, dev=dev, certify=certify, out=tmp_path / "whole.nw", vocabulary="whole", **shop.options
    ).manifest
    assert whole.provenance["tokens"] == {"known": all_of_them, "teacher": all_of_them}
    with pytest.raises(StoreError, match="vocabulary: 'trimmed' there, 'whole' now"):
        optimize(train.take(seldom), dev=dev, certify=certify, out=out, vocabulary="whole", **shop.options)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_run_store_holds_of_another_recipe_is_made_anew(
    shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, or a trial that was begun otherwise, may mean something else by the same name."""
    point = store_of(copied) / "points" / "static.bin"
    before = point.stat().st_mtime_ns
    again(shop, copied)
    assert point.stat().st_mtime_ns == before
    with Store(store_of(copied), None) as store:
        recipe = store.get("recipe static")
        store.put("recipe static", "part-of-another-version")
    with monkeypatch.context() as killing:
        killing.setattr(build, "export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again(shop, copied)
    assert point.stat().st_mtime_ns == before
    again(shop, copied)
    assert point.stat().st_mtime_ns > before
    with Store(store_of(copied), None) as store:
        assert store.get("recipe static") == recipe
        costs = len(store.keys("costs "))
        store.put("point static", store.get("point static") | {"file": "0" * 64})
    again(shop, copied)
    with Store(store_of(copied), None) as store:
        assert len(store.keys("costs ")) == costs + 1, "another file is timed"


@pytest.mark.usefixtures("quick")
def test_a_job_that_moves_to_another_processor_is_timed_there(
    shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, taken = shop.result.manifest.provenance["measured"], looks(copied)
    assert again(shop, copied).manifest.provenance["measured"] == before
    monkeypatch.setattr(measure, "cpu", lambda: "another processor with avx512_vnni")
    moved = again(shop, copied)
    assert moved.measurements.machine.cpu == "another processor with avx512_vnni"
    with Store(store_of(copied), None) as store:
        assert [before, moved.manifest.provenance["measured"]] == store.keys("costs ")
    assert looks(copied) == taken, "costs that say the same are the same look"


def test_another_model_under_the_same_path_is_another_job(shop: Shop, copied: Path, tmp_path: Path) -> None:
    weights = shop.base / "model.safetensors"
    base = tmp_path / "base"
    shutil.copytree(shop.base, base)
    first, second = (digests(str(folder)) for folder in (shop.base, base))
    assert first == second
    assert first["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    (base / "model.safetensors").write_bytes(weights.read_bytes() + b"x")
    assert digests(str(base))["weights"] != first["weights"]
    assert digests("starter") == digests("org/name") == {}
    # Weights may lie in several files, none of which is called like a single one, or in one of another name.
    several, found = tmp_path / "several", list[str]()
    several.mkdir()
    assert digests(str(several)) == {}, "no weights yet"
    for name, data in (("1-of-2", b"a"), ("2-of-2", b"b"), ("2-of-2", b"c"), ("1-of-2", b"c")):
        (several / f"model-0000{name}.safetensors").write_bytes(data)
        found.append(digests(str(several))["weights"])
    assert found[0] == hashlib.sha256(b"a").hexdigest()
    assert len({*found, ""}) == 5
    with Store(store_of(copied), None) as store:
        assert store.job.items() >= first.items()


def test_another_tokenizer_under_the_same_path_is_another_job(shop: Shop, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shop.base, base)
    tables, out = Tables(shop.train, Columns("text", "label"), shop.dev, shop.certify), tmp_path / "made.nw"
    job = Job(tables, options=Options(model=str(base)))
    data, task, *_ = prepare(job, store_of(out))
    Store(store_of(out), job.identity(data, task)).close()
    (base / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (base / "results.json").write_text("{}", encoding="utf-8")
    Store(store_of(out), job.identity(data, task)).close()  # no part of the model
    seen = [digests(str(base))]
    for name in ("tokenizer.json", "config.json", "1_Pooling/config.json", "special_tokens_map.json", "vocab.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        with (base / name).open("a", encoding="utf-8") as file:
            file.write(" ")
        seen.append(digests(str(base)))
        with pytest.raises(StoreError, match="model's other files: '.*' there, '.*' now"):
            again(shop, out, model=base)
    assert len({found["model's other files"] for found in seen}) == 6
    assert len({found["weights"] for found in seen}) == 1


class Told(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def scored(rows: Rows) -> Rows:
    """The label becomes a number: how many words of the text are not MEAN."""
    mean = set(MEAN)
    return Rows(rows.text, tuple(f"{-sum(w in mean for w in t.split()) / 2}" for t in rows.text))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_scores_end_to_end(shop: Shop, tmp_path: Path) -> None:
    result = optimize(
        scored(many_rows(900, seed=6)),
        out=tmp_path / "made.nw",
        task="score",
        model=str(shop.base),
        max_drop=10.0,
        threads=1,
    )
    assert result.manifest.task.metric == "spearman"
    assert result.certificate.verdict == "certified"
    (value,) = load(result.folder).predict(["mean1 mean2 mean3 zip"])
    (other,) = load(result.folder).predict(["kind1 kind2 kind3 zip"])
    assert value.value < other.value  # type: ignore[union-attr]
    assert len(summary.verify(result.folder, None)) == 2
    assert dict(summary.lines(result.folder))["verdict"].startswith("CERTIFIED: spearman")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_pairs_end_to_end(shop: Shop, tmp_path: Path) -> None:
    rows = many_rows(900, seed=7)
    pairs = Rows(rows.text, rows.label, tuple(f"the zip was {i % 7} weeks late" for i in range(len(rows))))
    result = optimize(pairs, out=tmp_path / "made.nw", model=str(shop.base), max_drop=5.0, threads=1)
    assert result.certificate.verdict == "certified"
    engine = load(result.folder)
    said = engine.predict(pairs.text, pairs.pair)
    assert np.mean([p.label == y for p, y in zip(said, pairs.label or ())]) > 0.9  # type: ignore[union-attr]
    with pytest.raises(OptionError, match=r"made.nw answers pairs of texts; give the second text of each too \(--pair"):
        engine.predict(pairs.text)


# --- refusals ---


def test_another_job_in_the_same_store_is_refused(shop: Shop, copied: Path) -> None:
    before, threads = journal(copied), torch.get_num_threads()
    with pytest.raises(StoreError, match=r"belongs to another job \(.*seed: 0 there, 3 now"):
        again(shop, copied, seed=3, threads=threads + 1)
    assert torch.get_num_threads() == threads
    with pytest.raises(StoreError, match=r"data: '[0-9a-f.]{28}' there, '[0-9a-f.]{28}' now"):
        optimize(shop.train.take(range(299)), dev=shop.dev, certify=shop.certify, out=copied, **shop.options)
    assert journal(copied) == before


def test_a_refused_job_leaves_what_the_other_set_aside(shop: Shop, copied: Path, tmp_path: Path) -> None:
    kept = [store_of(copied) / f"quarantine-{name}.jsonl" for name in ("train", "contradictions")]
    for path in kept:
        path.write_text("of the other job")
    table = write_table(tmp_path / "train.tsv", shop.train.take(range(299)))
    good = table.read_text()
    for bad in ("", "\tgood\n"):
        table.write_text(good + bad)
        with pytest.raises(StoreError, match="belongs to another job"):
            optimize(table, dev=shop.dev, certify=shop.certify, out=copied, **shop.options)
    table.write_text("text\tlabel\n\tgood\n")
    with pytest.raises(DataError, match=r"none of the 1 rows of .* can be used: .* Row 1 has"):
        optimize(table, dev=shop.dev, certify=shop.certify, out=copied, **shop.options)
    assert [path.read_text() for path in kept] == ["of the other job"] * 2


def test_what_is_set_aside_is_written_whenever_the_job_runs(shop: Shop, tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "train.tsv", shop.train), tmp_path / "made.nw"
    good = table.read_text() + "odd one\tgood\nodd one\tgood\nodd one\tbad\n"
    bad_rows, contradictions = (store_of(out) / f"quarantine-{name}.jsonl" for name in ("train", "contradictions"))
    options = {**shop.options, "runs": interrupt}
    for bad in ("\tgood\n", "", "\tbad\n"):  # the second and the third time there is a journal
        contradictions.unlink(missing_ok=True)
        table.write_text(good + bad)
        with pytest.raises(KeyboardInterrupt):
            optimize(table, dev=shop.dev, certify=shop.certify, out=out, **options)
        assert json.loads(contradictions.read_text())["columns"] == {"text": "odd one", "label": "bad"}
        assert bad_rows.exists() == bool(bad)
    assert json.loads(bad_rows.read_text())["columns"] == {"text": "", "label": "bad"}


def test_what_is_no_artifact_is_never_overwritten(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear", encoding="utf-8")
    with pytest.raises(ArtifactError, match="thesis exists and is not an artifact"):
        again(shop, tmp_path / "thesis")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["chapter.tex", "thesis"], "refused before any work"


@pytest.mark.usefixtures("quick")
def test_an_artifact_that_answers_otherwise_is_not_certified(
    shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ship.cascade

    def turned(*args: Any) -> Outputs:
        said = usual(*args)
        logits = said.logits.copy()
        logits[:7] = -logits[:7]
        return Outputs(logits, said.confidence, said.tier)

    monkeypatch.setattr(ship, "cascade", turned)
    before = artifact.check(copied)
    with pytest.raises(CertificateError, match="answers 7 of 500 certify rows otherwise than the candidate"):
        again(shop, copied)
    assert artifact.check(copied) == before


def test_an_artifact_that_says_no_number_is_not_what_was_tested() -> None:
    rows = ("a", "b", "c")
    builder: Any = SimpleNamespace(task=Score(), data=SimpleNamespace(certify=SimpleNamespace(rows=rows)))
    tested = Outcomes(rows, np.zeros((3, 2)), {"one": np.zeros((3, 2))}, np.ones(3))
    said = Outputs(np.array([[0.0], [np.nan], [np.nan]]), np.ones(3), np.zeros(3, np.int64))
    with pytest.raises(CertificateError, match="answers 2 of 3 certify rows otherwise than the candidate"):
        ship._held(builder, said, tested, "one")


@pytest.mark.parametrize(
    ("task", "tested", "logits"),
    [
        (Score(scale=1e-3), 0.0, np.array([[1e-4], [0.05], [-0.05]])),  # by 5 % of the labels' spread
        (Classify(tuple(map(str, range(20_000)))), 15_000.0, -abs(np.arange(-15_000.0, 5_000) - [[0], [1], [-1]])),
    ],
    ids=["small scores", "many labels"],
)
def test_what_is_held_is_the_label_or_a_score_in_its_own_unit(task: Task, tested: float, logits: np.ndarray) -> None:
    rows = ("a", "b", "c")
    builder: Any = SimpleNamespace(task=task, data=SimpleNamespace(certify=SimpleNamespace(rows=rows)))
    outcomes = Outcomes(rows, np.zeros((3, 2)), {"one": np.array([[tested, 0.0]] * 3)}, np.ones(3))
    with pytest.raises(CertificateError, match="answers 2 of 3 certify rows otherwise than the candidate"):
        ship._held(builder, Outputs(logits, np.ones(3), np.zeros(3, np.int64)), outcomes, "one")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Budget(max_drop=0), "max_drop is 0.0 points; use more than 0"),
        (lambda: Budget(max_drop=51), "at most 50"),
        (lambda: Budget(max_drop="most"), "max_drop is 'most'; use a number of points, or auto"),  # type: ignore[arg-type]
        (lambda: Budget(confidence=1.0), "confidence is 1.0; use 0.5 up to"),
        (lambda: Budget(minimise="fame"), "minimise is 'fame'; use cost, latency or size"),  # type: ignore[arg-type]
        (lambda: Options(threads=0), "threads is 0; use 1 or more"),
        (lambda: Options(seed=1.5), "seed is 1.5; use a whole number"),  # type: ignore[arg-type]
        (lambda: Options(max_length="128"), "max_length is '128'; use a whole number"),  # type: ignore[arg-type]
        (lambda: Budget(max_drop=[1]), r"max_drop is \[1\]; use a number"),  # type: ignore[arg-type]
        (lambda: Budget(confidence="high"), "confidence is 'high'; use a number"),  # type: ignore[arg-type]
        (lambda: Options(seconds=9), "the time limit is 9 s; use at least 10 s"),
        (lambda: Options(seconds=math.nan), "the time limit is nan s; use at least 10 s"),
        (lambda: Options(seconds=math.inf), "the time limit is inf s; use at least 10 s, a finite number"),
        (lambda: Options(seconds="20m"), "seconds is '20m'; use a number"),  # type: ignore[arg-type]
    ],
)
def test_options_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make()


def test_options_are_plain_values() -> None:
    given: dict[str, Any] = {
        "model": Path("base"),
        "max_length": np.int64(64),
        "threads": np.int32(2),
        "seed": np.int64(1),
        "seconds": np.int64(60),
    }
    options = Options(**given)
    assert json.loads(json.dumps({name: getattr(options, name) for name in given})) == {
        "model": "base",
        "max_length": 64,
        "threads": 2,
        "seed": 1,
        "seconds": 60,
    }
    numbers: tuple[Any, ...] = (1, np.int64(1), np.float32(1))
    for one in numbers:
        assert json.dumps(asdict(Budget(one, one / 2))) == json.dumps(asdict(Budget(1.0, 0.5)))
    assert Budget("auto").max_drop == "auto"


def test_a_folder_has_one_spelling_and_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "starter"):
        (tmp_path / name).mkdir()
    for given, kept in (("base/", "base"), ("./base", "base"), (f"{tmp_path}//base/", f"{tmp_path}/base")):
        assert Options(model=given).model == kept
    for name in ("base", "starter", "./starter", "scratch", "org/name", "org/name/", ""):
        assert Options(model=name).model == name


_NAMES = """
import netweight
{first}
for _ in range(2):
    assert callable(netweight.optimize), netweight.optimize
    assert netweight.Budget().max_drop == 1.0
try:
    netweight.nonsense
except AttributeError as problem:
    assert "has no attribute 'nonsense'" in str(problem)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "",
        "import netweight.bench",
    ],
)
def test_lazy_names(first: str) -> None:
    subprocess.run([sys.executable, "-c", _NAMES.format(first=first)], check=True, capture_output=True)


@pytest.mark.parametrize(("needs", "points"), [(0.0121, 1.3), (0.012, 1.2), (0.7, 10.0)])
def test_a_margin_of_dev_is_rounded_up(needs: float, points: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "provable", lambda _: needs)
    job, rows = SimpleNamespace(budget=Budget("auto")), SimpleNamespace(certify=range(9))
    builder = SimpleNamespace(job=job, data=rows, task=Classify(("a", "b")), quality=lambda _: 0.9, reporter=Silent())
    ranked: Any = SimpleNamespace(builder=builder, reference=None)
    assert ship.Ranked._allowed(ranked, []) == points


def test_temperatures_are_those_of_the_calibrate_rows(shop: Shop) -> None:
    rows, task = rows_of(shop.folder, None, Columns()).rows, shop.result.manifest.task
    targets, half = task.targets(rows.label or ()), slice(len(rows) // 2, None)
    with Store(store_of(shop.folder), None) as store:
        for name in ("linear", "static", "full-int8"):
            logits = store.read_arrays(f"points/{name}")["logits"]
            found = store.get(f"point {name}")["temperature"]
            assert found == fit_temperature(logits[half], targets[half], task)
            assert found != fit_temperature(logits, targets, task)


@pytest.mark.usefixtures("quick")
def test_a_quick_job_looks_at_two_tiers(shop: Shop, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, usual = list[int](), ship.choices
    monkeypatch.setattr(ship, "choices", lambda *given: (asked.append(given[-1]), usual(*given))[1])
    again(shop, copied)
    assert set(asked) == {2}
