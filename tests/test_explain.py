"""What each step bought, and scores over scenarios: against what the engines themselves say."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import COSTS, Say, Shop, store_of, tiny_dataset, tiny_model, tiny_rows, write_table
from netweight import artifact
from netweight.artifact import Manifest, Tier
from netweight.certify import Candidate, Certificate, Estimate, Outcomes, Registration
from netweight.certify import Tested as Result
from netweight.data import Rows
from netweight.engine import Engine, TierEngine, load
from netweight.engine.cascade import tier_engine
from netweight.errors import DataError, OptionError, StoreError
from netweight.evaluate import Cell, Evaluation, Scenario, _parts, _quality, evaluate, suite
from netweight.explain import Explanation, Step, Tried, _times, _took, _tried, _why, _words, explain
from netweight.export import export
from netweight.measure import Timing
from netweight.model import Model
from netweight.network import Exits
from netweight.pipeline import _lines
from netweight.run import Local
from netweight.store import DEV, JOURNAL, Store
from netweight.task import Classify, Score
from netweight.techniques import EarlyExit, Quantize, Recipe, describe
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")


@pytest.mark.usefixtures("quick")
def test_every_step_of_every_tier_is_explained(shop: Shop, copied: Path, say: Say) -> None:
    found = explain(copied, 1)
    manifest = artifact.read_manifest(copied)
    recipes = manifest.provenance["recipes"]
    teacher, *steps, whole = found.steps
    # What an encoder is made of is shown in the runtime that ships before any technique is.
    runtime = {t.name: [] if t.engine == "static" else ["the"] for t in manifest.tiers}
    done = {t.name: [*runtime[t.name], *(r["technique"] for r in recipes[t.name])] for t in manifest.tiers}
    wanted = [(t.name, word) for t in manifest.tiers for word in done[t.name]]
    assert [(s.tier, s.done.split(" ")[0]) for s in steps] == wanted
    assert teacher.bytes == shop.result.measurements.reference.bytes
    assert teacher.quality == pytest.approx(shop.result.measurements.reference.quality)
    assert whole.quality == pytest.approx(shop.result.measurements.shipped.quality)
    assert whole.bytes == artifact.size(copied, manifest)
    assert not whole.stops, "it is timed in batches"
    points = {m.name: m for m in shop.result.measurements.candidates}
    for tier in manifest.tiers:
        last = [s for s in steps if s.tier == tier.name][-1]
        assert (last.bytes, last.quality) == (points[tier.name].bytes, pytest.approx(points[tier.name].quality))
    assert {t.name for t in found.tried} == set(points) - {t.name for t in manifest.tiers}
    assert all(t.quality == pytest.approx(points[t.name].quality) for t in found.tried)
    # Each as the job took it.
    assert {t.name: (t.bytes, t.microseconds) for t in found.tried} == {
        t.name: (points[t.name].bytes, pytest.approx(1e6 * COSTS[t.name])) for t in found.tried
    }
    ships = [t.name for t in manifest.tiers]
    assert found.parts == {name or "tokenization": pytest.approx(1e6 * COSTS[name]) for name in ("", *ships)}
    certificate = shop.result.certificate
    others = [c.name for c in certificate.registration.candidates if c != certificate.shipped]
    assert [c.name for c in found.candidates] == others

    # Each tier's first step is compared with the teacher, later ones with the step before.
    before = teacher
    for i, (step, sentence) in enumerate(zip(steps, found.sentences[1:])):
        before = teacher if i == 0 or steps[i - 1].tier != step.tier else steps[i - 1]
        assert f"({100 * (step.quality - before.quality):+.2f} points)" in sentence
        ratio = before.bytes / step.bytes
        assert (f"({ratio:.1f}x smaller)" if ratio >= 1 else f"({1 / ratio:.1f}x larger)") in sentence

    said = say("explain", copied, "--threads", "1")
    assert said.status == 0
    assert said.out.count("\n") == len(found.sentences)
    assert said.out.startswith("The teacher reaches accuracy ")
    assert "points" in said.out
    assert "Times of what was tried are microseconds of a row in batches of 32 at most, without token" in said.out
    shown = json.loads(say("explain", copied, "--json").out)
    assert shown["metric"] == "accuracy"
    assert shown["timed"] == found.timed
    assert [t["microseconds"] for t in shown["tried"]] == [t.microseconds for t in found.tried]

    name = found.tried[0].name
    with Store(store_of(copied), None) as store:
        assert name in _took(store, manifest)
        store.put(f"point {name}", store.get(f"point {name}") | {"file": "0" * 64})
        assert name not in _took(store, manifest), "by this name there is another point now, which nobody timed"


def test_errors_are_said_as_errors() -> None:
    steps = (Step("", "teacher", -0.5, 4_000_000, 2.0), Step("small", "Quantize()", -0.51, 1_000_000, 1.0))
    found = Explanation(Score(3.0, 1.0, "mae"), 100, 1, steps, (), (), ())
    first, second = found.sentences
    assert "reaches mae 0.5000 on 100 dev rows" in first
    assert "mae 0.5100 (-2.00 points), 1.0 MB (4.0x smaller), 1.000 ms a row (2.0x faster)" in second
    assert json.loads(found.to_json())["point"] == pytest.approx(0.005)


def test_ratios_are_said_from_above_one() -> None:
    assert _times(4.0, "smaller", "larger") == "4.0x smaller"
    assert _times(0.25, "smaller", "larger") == "4.0x larger"


CASCADES = ("half > small (20 %)", "conv > small (10 %)")


def certified() -> Certificate:
    """Two that passed, of which the cheaper one ships, one that failed, and one that was not reached."""
    full, small, half, _ = candidates = tuple(Candidate(name, name) for name in ("full", "small", *CASCADES))
    registration = Registration(Candidate("teacher", ""), candidates, tiny_model().task, 1.0, 0.95, "", 500)
    some = Estimate(0.9, 0.8, 1.0)
    tested = [
        Result(candidate, some, Estimate(drop, drop - 0.01, drop + 0.01), 0.01, p, p < 0.025, 5, 5)
        for candidate, drop, p in ((full, 0.0, 0.001), (small, 0.0, 0.02), (half, 0.0125, 0.4))
    ]
    return Certificate(registration, "certified", small, some, tuple(tested), 0.9, (None, None))


def made_of(folder: Path, engine: str, options: dict[str, Any], recipe: Recipe, models: list[Model]) -> Path:
    """An artifact of one tier, made of the first of the models by the steps of the recipe, with its run store."""
    teacher, *steps = models
    names = [*(f"part-{i}" for i in range(len(steps) - 1)), "small"]
    rows, made = tiny_rows(9), export(steps[-1])
    with Store(store_of(folder), {"a": "job"}) as store:
        for name, model in zip(["teacher", *names], models, strict=True):
            model.save(store.model_folder(name))
        store.put("steps small", names)
        store.write_arrays("points/small", {"logits": np.zeros((9, 2), np.float32)})
        file = hashlib.sha256(made.data).hexdigest()
        store.put("point small", {"engine": "onnx", "bytes": len(made.data), "file": file})
        lines = [json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(rows.text, rows.label or (), strict=True)]
        store.write(DEV, "".join(lines).encode())
    tier = Tier("small", engine, artifact.tier_file(0, "small", engine), made.options | options)
    contents = {artifact.TOKENIZER: teacher.encoder.definition.encode(), tier.file: made.data}
    contents[artifact.CERTIFICATE] = certified().to_json().encode()
    contents[artifact.OUTCOMES] = Outcomes((), np.zeros((0, 2)), {}, np.zeros(0)).to_json().encode()
    encoder, provenance = teacher.encoder, {"recipes": {"small": describe(recipe)}, "measured": "costs of these"}
    provenance |= {"plans": {"small": {"batch_size": 64, "schedule": "linear"}}}
    provenance |= {"command": "optimize --effort standard", "shares": {"small": [*([1.0] * (len(steps) - 1)), 0.083]}}
    artifact.save(folder, Manifest(teacher.task, encoder.max_length, encoder.pad, (tier,), provenance), contents)
    return folder


@pytest.mark.usefixtures("quick")
def test_rows_leave_early_as_they_do_in_what_ships(tmp_path: Path) -> None:
    teacher, run = tiny_model(), Local(tiny_dataset())
    recipe: Recipe = (EarlyExit((1,), epochs=0.1), Quantize(rows=16))
    early = recipe[0](teacher, run, PLAN)
    assert isinstance(early.network, Exits)
    with torch.no_grad():
        # The first exit is sure that all is good, the last that all is bad.
        for head, side in ((early.network.heads[0], 5.0), (early.network.head, -5.0)):
            head.weight.zero_()  # type: ignore[operator,union-attr]
            head.bias.copy_(torch.tensor([-side, side]))  # type: ignore[operator,union-attr]
    models = [teacher, early, recipe[1](early, run, PLAN)]
    folder = made_of(tmp_path / "made.nw", "exits", {"thresholds": [0.9]}, recipe, models)
    found = explain(folder, 1)
    assert [step.quality for step in found.steps[2:]] == [5 / 9, 5 / 9]
    runtime, first, last = (step.done for step in found.steps[1:])
    assert runtime == "the same, in ONNX Runtime"
    assert "time limit" not in first
    assert last.endswith("; 8.3 % of its epochs fit into the time limit)")
    assert first == (
        "EarlyExit (after [1], epochs 0.1, learning_rate 0.0001, temperature 2, hard 0.1, token_dropout 0.1, splice 4; "
        "plan: batch_size 64, schedule linear)"
    )
    assert "plan" not in last, "it trains nothing"


def test_steps_are_told_with_all_that_was_given() -> None:
    step = {"technique": "Distill", "layers": None, "epochs": 18.0, "aware": False, "teachers": ["f" * 64]}
    assert _words(step, 1.0, {}) == "Distill (epochs 18, aware False)"
    assert _words(step, 0.996, {}) == "Distill (epochs 18, aware False; 99.6 % of its epochs fit into the time limit)"
    plan = {"batch_size": 64, "schedule": "linear", "optimizer": "adam"}
    said = "Distill (epochs 18, aware False; plan: batch_size 64, schedule linear, optimizer adam)"
    assert _words(step, 1.0, plan) == said
    assert _words({**step, "epochs": 0}, 1.0, plan) == "Distill (epochs 0, aware False)"
    # What a technique says itself, the plan does not; but a schedule of pruning is another thing.
    own = {"technique": "Prune", "schedule": "oneshot", "epochs": 2.0, "batch_size": 128}
    assert _words(own, 1.0, plan) == (
        "Prune (schedule oneshot, epochs 2, batch_size 128; plan: schedule linear, optimizer adam)"
    )
    nested = {"technique": "QuantizeAware", "start": {"technique": "Quantize", "rows": 300, "group": None}}
    assert _words(nested, 1.0, {}) == "QuantizeAware (start Quantize (rows 300))"


@pytest.mark.usefixtures("quick")
def test_what_ships_on_openvino_is_timed_on_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed here")
    teacher, seen = tiny_model(), []

    def watched(tier: Tier, *given: Any) -> TierEngine:
        seen.append(tier.engine)
        return tier_engine(tier, *given)

    monkeypatch.setattr("netweight.explain.tier_engine", watched)
    recipe: Recipe = (Quantize(rows=16),)
    models = [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    steps = explain(made_of(tmp_path / "made.nw", "openvino", {}, recipe, models), 1).steps
    assert seen == ["openvino"] * 2
    assert steps[1].done == "the same, in OpenVINO"


@pytest.mark.usefixtures("quick")
def test_what_tiers_begin_with_is_measured_once_and_the_runtime_told_apart(tmp_path: Path) -> None:
    recipe: Recipe = (Quantize(rows=16),)
    teacher = tiny_model()
    models = [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    folder = made_of(tmp_path / "made.nw", "onnx", {}, recipe, models)
    manifest = artifact.read_manifest(folder)
    contents = {name: artifact.read_file(folder, manifest, name) for name in manifest.files}
    (tier,), known = manifest.tiers, manifest.provenance
    second = replace(tier, name="second", file=artifact.tier_file(1, "second", "onnx"))
    tier = replace(tier, threshold=2.0)  # of which no row is sure
    contents[second.file] = contents[tier.file]
    provenance = {key: {**known[key], "second": known[key]["small"]} for key in ("recipes", "shares")}
    asked = {"trimmed": True, "minimise": "latency"}
    two = replace(manifest, tiers=(tier, second), provenance={**known, **provenance, **asked})
    shutil.rmtree(folder)
    artifact.save(folder, two, contents)
    with Store(store_of(folder), None) as store:
        teacher.save(store.model_folder("trimmed"))
        store.put("steps second", store.get("steps small"))
        store.put("point second", store.get("point small"))
        store.write_arrays("points/second", store.read_arrays("points/small"))
    found = explain(folder, 1)
    _, *steps, whole = found.steps
    assert [step.tier for step in steps] == ["small"] * 3 + ["second"] * 3
    assert [step.stops for step in found.steps] == [*[""] * 7, "second"]
    assert f" p50 {whole.milliseconds:.3f} ms, mostly of rows that second answers (" in found.sentences[7]
    assert not any("mostly of rows" in sentence for sentence in found.sentences[:7])
    begun = ["Vocab, the tokens that occur and common ones", "the same, in ONNX Runtime"]
    assert [step.done for step in steps if not step.done.startswith("Quantize")] == begun * 2
    assert [replace(step, tier="small") for step in steps[3:5]] == steps[:2], "measured once"
    assert steps[0].quality == steps[1].quality
    assert steps[0].milliseconds != steps[1].milliseconds


@pytest.mark.usefixtures("quick")
def test_a_dev_row_without_text_is_a_row(tmp_path: Path) -> None:
    recipe: Recipe = (Quantize(rows=16),)
    teacher = tiny_model()
    models = [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    folder = made_of(tmp_path / "made.nw", "onnx", {}, recipe, models)
    rows = tiny_rows(9)
    with Store(store_of(folder), None) as store:
        store.write(DEV, _lines(Rows(("", *rows.text[1:]), rows.label)))
    assert explain(folder, 1).rows == 9


@pytest.mark.usefixtures("quick")
def test_why_each_thing_did_not_ship(tmp_path: Path) -> None:
    recipe: Recipe = (Quantize(rows=16),)
    teacher = tiny_model()
    models = [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    folder = made_of(tmp_path / "made.nw", "onnx", {}, recipe, models)
    targets = np.arange(9) % 2 == 0
    with Store(store_of(folder), None) as store:
        costs = {}
        # Right answers of 9 rows, bytes, and seconds of a row.
        for name, right, size, seconds in (
            ("full", 9, 90, 9.0),
            ("small", 8, 50, 5.0),
            ("half", 8, 60, 4.0),
            ("conv", 7, 30, 3.0),
            ("small-but-slow", 8, 40, 6.0),
            ("large-but-fast", 7, 95, 2.0),
            ("trial", 6, 80, None),
            ("for-bytes", 9, 20, None),
            ("again", 7, 10, 1.0),
        ):
            said = np.where(np.arange(9) < right, targets, ~targets)
            store.write_arrays(f"points/{name}", {"logits": np.eye(2, dtype=np.float32)[said.astype(int)]})
            store.put(f"point {name}", {**(store.get(f"point {name}") or {}), "engine": "onnx", "bytes": size})
            costs |= {} if seconds is None else {f"{name} onnx": [seconds, seconds]}
        store.put("trial trial", {"params": {"layers": 3, "learning_rate": 0.0004, "aware": False}})
        store.put("point again", store.get("point again") | {"file": "0" * 64})
        store.put("files costs of these", {"again": "f" * 64})
        store.put("costs of these", costs | {"small openvino": [4.9, 9.0], "": [1.0, 2.0]})
        store.put("costs of others", {"for-bytes onnx": [1.0, 1.0], "small onnx": [1.0, 1.0]})
        store.put("trial late", {})
        store.write_arrays("points/late", store.read_arrays("points/trial"))
        store.put("point late", store.get("point trial"))
        command = artifact.read_manifest(folder).provenance["command"]
        store.put("left out third", ["half, which is larger, would hardly pass", command])
        store.put("left out fourth", ["static will hardly fail", "optimize, asked for with another margin"])
        store.put("left out conv", ["the time limit was near; a later run made it", command])
    found = explain(folder, 1)
    assert {t.name: t.why for t in found.tried} == {
        "full": "passed, at a higher cost",
        "half": "half > small (20 %) failed the certificate",
        "conv": "conv > small (10 %) was not tested",
        "small-but-slow": "small is at least as good and costs no more",
        "large-but-fast": "the candidates that were registered promised more: they cost less, or are likelier to pass",
        "trial": "a trial that another one beats in agreement with the teacher and in size is not timed",
        "for-bytes": "it was made for another run of this job, which asked for something else, and not considered here",
        "again": "it was made after the points of this artifact were timed",
        "late": "it was made after the points of this artifact were timed",
    }
    untimed = dict.fromkeys(("trial", "for-bytes", "again", "late"))
    timed = {"full": 9e6, "half": 4e6, "conv": 3e6, "small-but-slow": 6e6, "large-but-fast": 2e6}
    assert {t.name: t.microseconds for t in found.tried} == timed | untimed
    assert (
        "Times of what was tried are microseconds of a row in batches of 32 at most, without tokenization, as the job "
        "timed them on its own machine (–: not timed). Timed beside them: tokenization 1,000,000, small 5,000,000."
    ) in found.sentences
    (said,) = (s for s in found.sentences if s.startswith("Tried and not taken: trial "))
    assert "MB, – us a row; layers 3, learning_rate 0.0004, aware False): a trial that another one beats" in said
    (said,) = (s for s in found.sentences if s.startswith("Tried and not taken: conv "))
    wanted = " MB, 3,000,000 us a row): conv > small (10 %) was not tested."
    assert said.endswith(wanted), "a rung of the ladder has no options of its own"
    assert json.loads(found.to_json())["tried"][-1]["params"] == {}
    manifest = artifact.read_manifest(folder)
    with Store(store_of(folder), None) as store:
        quick = replace(manifest, provenance=manifest.provenance | {"command": "optimize"})
        tried = {t.name: t.why for t in _tried(store, quick, certified(), targets)}
    assert tried["trial"] == tried["for-bytes"], "a job that walks the ladder looks at no trial"
    assert [s for s in found.sentences if s.startswith(("Candidate", "Not made"))] == [
        "Candidate full passed, and so did small, which costs less.",
        "Candidate half > small (20 %) failed: on 500 certify rows it loses 1.25 points, and 2.25 at most with 97.5 % "
        "confidence; 1.00 may be lost.",
        "Candidate conv > small (10 %) was not tested, since half > small (20 %) failed before it.",
        "Not made: third: half, which is larger, would hardly pass.",
    ]


def test_where_the_linear_model_is_the_reference_that_is_why() -> None:
    certificate = certified()
    alone = replace(certificate.registration, reference=Candidate("linear", ""), candidates=(Candidate("linear", ""),))
    point = Tried("static", 0.9, 10, "")
    said = _why(point, [point], {}, (), (), "cost", replace(certificate, registration=alone))
    assert said == "the linear model is the reference, and nothing else was considered"


@pytest.mark.usefixtures("quick")
def test_a_store_that_does_not_know_cannot_explain(copied: Path) -> None:
    path = store_of(copied) / JOURNAL
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if '"steps ' not in line]
    path.write_text("".join(kept), encoding="utf-8")
    with pytest.raises(StoreError, match="does not hold what tier .* was made of; optimize again"):
        explain(copied, 1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gone", ["the model", "the point", "the file"])
def test_a_store_that_holds_something_else_by_now_cannot_explain(tmp_path: Path, gone: str) -> None:
    """Another run of the job, killed before it shipped, may have removed the model, or made the tier anew."""
    recipe: Recipe = (Quantize(rows=16),)
    teacher = tiny_model()
    models = [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    folder = made_of(tmp_path / "made.nw", "onnx", {}, recipe, models)
    assert explain(folder, 1).steps[-1].tier == "small"
    with Store(store_of(folder), None) as store:
        if gone == "the model":
            store.discard("small")
        else:
            store.put("point small", None if gone == "the point" else store.get("point small") | {"file": "0" * 64})
    with pytest.raises(StoreError, match="does not hold what tier 'small' was made of; optimize again"):
        explain(folder, 1)


def test_without_its_run_store_nothing_is_explained(made: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no run store .*made\.nw\.run; run `netweight optimize` with that"):
        explain(made, 1)


def written(folder: Path, shop: Shop) -> Path:
    write_table(folder / "dev.tsv", shop.dev)
    write_table(folder / "few.tsv", shop.certify.take(range(40)))
    path = folder / "suite.toml"
    path.write_text(
        '[[scenario]]\nname = "dev"\ndata = "dev.tsv"\n[[scenario]]\nname = "few"\ndata = "few.tsv"\ntext = "text"\n',
        encoding="utf-8",
    )
    return path


def test_a_matrix_of_artifacts_and_scenarios(shop: Shop, made: Path, tmp_path: Path, say: Say) -> None:
    path = written(tmp_path, shop)
    scenarios = suite(path)
    assert scenarios == (Scenario("dev", str(tmp_path / "dev.tsv")), Scenario("few", str(tmp_path / "few.tsv")))
    found = evaluate([shop.folder, made], scenarios, 1)
    assert [(c.artifact, c.scenario) for c in found.cells] == [
        (str(f), s) for f in (shop.folder, made) for s in ("dev", "few")
    ]
    right = [p.label == label for p, label in zip(load(made, 1).predict(shop.dev.text), shop.dev.label)]  # type: ignore[union-attr,arg-type]
    assert found.cells[2].quality == pytest.approx(sum(right) / len(right))
    assert found.worst is not None
    assert found.worst.quality == min(c.quality for c in found.cells)
    said = say("evaluate", made, "--suite", path, "--threads", "1")
    assert said.status == 0
    assert "worst: " in said.out
    worst = found.cells[2] if found.cells[2].quality <= found.cells[3].quality else found.cells[3]
    assert json.loads(say("evaluate", made, "--suite", path, "--json").out)["worst"] == asdict(worst)
    with (tmp_path / "few.tsv").open("a", encoding="utf-8") as file:
        file.write("\tgood\n")
    said = say("evaluate", made, "--suite", path)
    assert said.err == "1 of 41 rows of few.tsv cannot be used (1 text is empty); the first is row 41.\n"


def test_what_cannot_be_scored_is_one_cell_and_not_the_end(shop: Shop, made: Path, tmp_path: Path, say: Say) -> None:
    path = written(tmp_path, shop)
    with (tmp_path / "few.tsv").open("a", encoding="utf-8") as file:
        file.write("a lovely lamp\tso so\n")
    few = shop.dev.take(range(9))
    write_table(tmp_path / "pairs.tsv", replace(few, pair=few.text))
    with path.open("a", encoding="utf-8") as file:
        file.write('[[scenario]]\nname = "pairs"\ndata = "pairs.tsv"\npair = "pair"\n')
    found = evaluate([shop.folder, made], suite(path), 1)
    assert [bool(cell.problem) for cell in found.cells] == [False, True, True] * 2
    assert [math.isnan(cell.quality) for cell in found.cells] == [False, True, True] * 2
    unknown, pairs = "1 label(s) do not occur in training: 'so so'.", "made.nw answers single texts; give no second one"
    wanted = [f"{folder} on few: {unknown}" for folder in (shop.folder, made)]
    wanted += [f"{folder} on pairs: {pairs}" for folder in (shop.folder, made)]
    assert [note[: len(start)] for note, start in zip(found.notes, wanted, strict=True)] == wanted
    assert found.sentence.endswith("; 4 of 6 cells could not be scored, see the notes")
    assert found.worst == found.cells[0]
    stored = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert [cell["problem"] for cell in stored["cells"][:2]] == ["", found.cells[1].problem]
    said = say("evaluate", made, "--suite", path, "--threads", "1")
    assert said.status == 1
    assert "worst: " in said.out, "what could be scored is there"
    assert f"{made} on few: {unknown}" in said.err
    assert say("evaluate", made, "--suite", path, "--json").status == 1
    none = Evaluation("spearman", (replace(found.cells[1], quality=math.nan),))
    assert none.sentence.endswith("undefined everywhere: 1 of 1 cells could not be scored, see the notes")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('data = "none.tsv"', "there is no file .*none.tsv"),
        ('data = "few.tsv"\nlabel = "intent"', "few.tsv has no column 'intent'"),
        ('data = "few.tsv"\nby = "shop"', "few.tsv has no column 'shop'"),
    ],
)
def test_a_scenario_that_cannot_be_read_is_told_before_any_is_scored(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, said: str
) -> None:
    path = written(tmp_path, shop)
    with path.open("a", encoding="utf-8") as file:
        file.write(f'[[scenario]]\nname = "bad"\n{bad}\n')
    monkeypatch.setattr(Engine, "outputs", lambda *_: pytest.fail("it was scored"))
    with pytest.raises(DataError, match=said):
        evaluate([shop.folder], suite(path), 1)


def test_an_error_and_a_correlation_in_a_matrix() -> None:
    cells = (Cell("a", "one", 9, -0.431), Cell("a", "two", 9, -0.5))
    errors = Evaluation("mae", cells)
    assert [line[2] for line in errors.rows()[1:]] == ["0.4310", "0.5000", "0.4655", "0.5000"]
    assert errors.sentence == "worst: a on two, mae 0.5000 on 9 rows"
    # Where all scores of a part are equal there is no correlation, and no worst cell.
    some = Evaluation("spearman", (replace(cells[0], quality=0.8), replace(cells[1], quality=math.nan)))
    assert [line[2] for line in some.rows()[1:]] == ["80.00", "–", "80.00", "80.00"]
    assert some.worst == some.cells[0]
    stored = json.loads(some.to_json(), parse_constant=pytest.fail)
    assert [cell["quality"] for cell in stored["cells"]] == [0.8, None]
    none = Evaluation("spearman", (replace(cells[1], quality=math.nan),))
    assert none.worst is None
    assert "undefined everywhere" in none.sentence
    assert [line[2] for line in none.rows()[1:]] == ["–"] * 3


def test_a_part_with_equal_scores_has_no_correlation() -> None:
    engine = SimpleNamespace(task=Score(3.0, 1.0))
    assert math.isnan(_quality(engine, ("a", "b"), None, ("4", "4")))  # type: ignore[arg-type]


def test_a_label_that_is_only_predicted_does_not_halve_a_cell() -> None:
    task = Classify(("neg", "pos"), "macro-f1")
    said = np.eye(2)[[0] + [1] * 999]
    engine = SimpleNamespace(task=task, outputs=lambda text, pair: SimpleNamespace(logits=said))
    rows = ("a text",) * 1000
    assert _quality(engine, rows, None, ("pos",) * 1000) == pytest.approx(2 * 999 / 1999)  # type: ignore[arg-type]
    # Where it also occurs as truth, it counts.
    both = _quality(engine, rows, None, ("neg", "neg", *("pos",) * 998))  # type: ignore[arg-type]
    assert both == pytest.approx((2 / 3 + 2 * 998 / 1997) / 2)


def test_a_scenario_for_each_value_of_a_column(shop: Shop, tmp_path: Path) -> None:
    rows = shop.dev.take(range(60))
    lines = [
        f"{t}\t{y}\t{'east' if i % 3 else 'west'}"
        for i, (t, y) in enumerate(zip(rows.text, rows.label or (), strict=True))
    ]
    (tmp_path / "all.tsv").write_text("\n".join(["text\tlabel\tshop", *lines]), encoding="utf-8")
    path = tmp_path / "suite.toml"
    path.write_text('[[scenario]]\nname = "all"\ndata = "all.tsv"\nby = "shop"\n', encoding="utf-8")
    cells = evaluate([shop.folder], suite(path), 1).cells
    assert [(cell.scenario, cell.rows) for cell in cells] == [("all, east", 40), ("all, west", 20)]
    whole = evaluate([shop.folder], [replace(suite(path)[0], by=None)], 1).cells[0].quality
    assert sum(cell.quality * cell.rows for cell in cells) / 60 == pytest.approx(whole)


def test_a_column_of_many_values_is_walked_once() -> None:
    """A row is compared with its own value, not with those of all customers."""

    class Counted(str):
        asked = 0

        def __eq__(self, other: object) -> bool:
            Counted.asked += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    values = tuple(Counted(f"{i % 100:03}") for i in range(1000))
    rows: Any = SimpleNamespace(slices={"shop": values}, take=list)
    found: Any = _parts(Scenario("all", "all.tsv", by="shop"), rows)
    assert [title for title, _ in found] == [f"all, {i:03}" for i in range(100)]
    assert found[7][1] == list(range(7, 1000, 100))
    assert Counted.asked < 5 * len(values)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a = [", "cannot be read"),
        ("", r"has no \[\[scenario\]\]"),
        ('[[scenario]]\nname = "a"', "scenario 1 of .* needs name and data"),
        ("scenario = [1]", "scenario 1 of .* is 1; write"),
        ('[[scenario]]\nname = "a"\ndata = "b"\ncolour = "c"', "has unknown colour"),
        ('[[scenario]]\nname = "a"\ndata = "b"\n[[scenario]]\nname = "a"\ndata = "b"', "two scenarios of one name"),
    ],
)
def test_bad_suites_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=match):
        suite(path)
    with pytest.raises(OptionError, match="cannot be read"):
        suite(tmp_path / "none.toml")


def test_artifacts_of_different_metrics_are_not_compared(shop: Shop, made: Path, tmp_path: Path) -> None:
    manifest = artifact.read_manifest(made)
    stored = manifest.to_dict()
    stored["task"]["metric"] = "macro-f1"
    (made / artifact.MANIFEST).write_bytes(artifact.sealed(stored))
    with pytest.raises(OptionError, match="these have accuracy and macro-f1"):
        evaluate([shop.folder, made], suite(written(tmp_path, shop)), 1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("minimise", "said"), [("latency", "takes no longer"), ("size", "is no larger")])
def test_what_was_minimised_decides_what_costs_no_more(
    minimise: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Recipe = (Quantize(rows=16),)
    teacher = tiny_model()
    models = [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    folder = made_of(tmp_path / "made.nw", "onnx", {}, recipe, models)
    manifest = artifact.read_manifest(folder)
    contents = {name: artifact.read_file(folder, manifest, name) for name in manifest.files}
    asked = replace(manifest, provenance={**manifest.provenance, "minimise": minimise})
    shutil.rmtree(folder)
    artifact.save(folder, asked, contents)
    targets = np.arange(9) % 2 == 0
    with Store(store_of(folder), None) as store:
        # Bytes, seconds of a row, seconds of a single request: by each of them another point is beaten by `small`.
        points = {"small": (50, 5.0, 5.0), "late": (40, 4.0, 6.0), "large": (60, 4.0, 4.0)}
        for name, (size, _, _) in points.items():
            store.write_arrays(f"points/{name}", {"logits": np.eye(2, dtype=np.float32)[targets.astype(int)]})
            store.put(f"point {name}", {**(store.get(f"point {name}") or {}), "engine": "onnx", "bytes": size})
        costs = {f"{name} onnx": [row, single] for name, (_, row, single) in points.items()}
        # Faster in batches only, so that it is not what runs `small` where latency is minimised.
        store.put("costs of these", costs | {"small openvino": [2.0, 9.0]})
    timing = Timing(1000.0, 900.0, 1100.0, 32, 7.0, 8.0, 9.0)
    monkeypatch.setattr("netweight.measure.speed", lambda engines, *_, **options: dict.fromkeys(engines, timing))
    found = explain(folder, 1)
    single = minimise == "latency"
    assert {step.milliseconds for step in found.steps} == {7.0 if single else 1.0}
    shown = "single requests p50 7.00{} ms" if single else "1.00{} ms a row"
    assert all(shown.format(more) in sentence for more, sentence in zip(("", "0"), found.sentences))
    assert json.loads(found.to_json())["minimise"] == minimise
    assert {t.name: t.microseconds for t in found.tried} == {"late": 6e6 if single else 4e6, "large": 4e6}
    assert found.parts == {"small": 5e6 if single else 2e6}, "on the engine that it would ship on"
    said_of = found.sentences[-1]
    assert said_of.startswith("Tried and not taken: large (")
    assert f", 4,000,000 us a {'request' if single else 'row'}): " in said_of
    assert ("of a single request, " if single else "of a row in batches of 32 at most, ") in found.timed
    beaten = {t.name: t.why for t in found.tried}
    name, by = ("late", "small") if minimise == "latency" else ("large", "small")
    assert beaten[name] == f"{by} is at least as good and {said}"


@pytest.mark.usefixtures("quick")
def test_a_store_that_does_not_say_what_was_timed(tmp_path: Path) -> None:
    recipe: Recipe = (Quantize(rows=16),)
    teacher = tiny_model()
    folder = made_of(
        tmp_path / "made.nw", "onnx", {}, recipe, [teacher, recipe[0](teacher, Local(tiny_dataset()), PLAN)]
    )
    manifest = artifact.read_manifest(folder)
    contents = {name: artifact.read_file(folder, manifest, name) for name in manifest.files}
    older = {key: value for key, value in manifest.provenance.items() if key != "measured"}
    shutil.rmtree(folder)
    artifact.save(folder, replace(manifest, provenance=older), contents)
    with pytest.raises(StoreError, match="does not say what was timed; optimize again to have it explained"):
        explain(folder, 1)
