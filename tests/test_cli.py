"""Every command on a tiny artifact: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import Say, Shop, tiny_rows, write_table
from netweight import artifact, load
from netweight import summary as summary_module
from netweight.certify import Estimate
from netweight.cli.make import seconds_of
from netweight.data import Rows, concat
from netweight.engine import Engine, Outputs
from netweight.errors import ArtifactError, OptionError
from netweight.pipeline import store_of
from netweight.predict import predict
from netweight.progress import Parts
from netweight.ship import Result
from netweight.summary import certificate_of, summary
from netweight.task import Score

ROWS = tiny_rows(9)


def expected(shop: Shop, rows: Rows) -> list[tuple[str, float, str]]:
    said = load(shop.folder, threads=1).predict(rows.text)
    return [(p.label, round(p.confidence, 4), p.tier) for p in said]  # type: ignore[union-attr]


def answers(table: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    return [(row["prediction"], float(row["confidence"]), row["tier"]) for row in table]


# --- predict ---


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("compressed", [False, True])
def test_predict_from_text_files(say: Say, shop: Shop, tmp_path: Path, form: str, compressed: bool) -> None:
    table = [{"id": f"{i}", "words": text} for i, text in enumerate(ROWS.text)]
    out = io.StringIO()
    if form == "jsonl":
        out.writelines(json.dumps(row) + "\n" for row in table)
    else:
        writer = csv.DictWriter(out, ["id", "words"], delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(table)
    path = tmp_path / f"rows.{form}{'.gz' if compressed else ''}"
    path.write_bytes(gzip.compress(out.getvalue().encode()) if compressed else out.getvalue().encode())
    said = say("predict", shop.folder, path, "--text", "words", "--threads", 1)
    assert said.status == 0
    assert re.match(r"9 rows in [\d.]+ s", said.err)
    if form == "jsonl":
        found = list(map(json.loads, said.out.splitlines()))
    else:
        found = list(csv.DictReader(io.StringIO(said.out), delimiter="\t" if form == "tsv" else ","))
    assert [(row["id"], row["words"]) for row in found] == [(row["id"], row["words"]) for row in table]
    assert answers(found) == expected(shop, ROWS)


def test_predict_from_parquet(say: Say, shop: Shop, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": list(ROWS.text), "price": [1.5] * 9}), tmp_path / "rows.parquet")
    said = say("predict", shop.folder, tmp_path / "rows.parquet", "--out", tmp_path / "out.parquet", "--threads", 1)
    assert (said.status, said.out) == (0, "")
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["text", "price", "prediction", "confidence", "tier"]
    assert answers(found.to_pylist()) == expected(shop, ROWS)


def test_a_date_that_python_has_not_is_told_by_its_column(say: Say, shop: Shop, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    table, out = tmp_path / "rows.parquet", tmp_path / "out.csv"
    for value, zone in ((253402300799, "Asia/Shanghai"), (253402300800, None), (0, "Nowhere/Here")):
        when = pyarrow.array([0, value], pyarrow.timestamp("s", tz=zone))
        parquet.write_table(pyarrow.table({"text": ["great zip", "torn coat"], "when": when}), table)
        said = say("predict", shop.folder, table, "--out", out)
        assert said.status == 1
        wanted = r"netweight: the column 'when' of rows\.parquet has a value that cannot be read as a date \(.+\); leave the column out, or cast it to text\.\n"
        assert re.fullmatch(wanted, said.err), said.err
        assert not out.exists()


def test_predict_from_standard_input(say: Say, shop: Shop) -> None:
    said = say("predict", shop.folder, "-", "--threads", 1, stdin="\n".join(ROWS.text).encode())
    assert said.status == 0
    named = say("predict", shop.folder, "-", "--threads", 1, "--out", "-", stdin="\n".join(ROWS.text).encode())
    assert named.out == said.out
    found = list(csv.DictReader(io.StringIO(said.out), delimiter="\t"))
    assert [row["text"] for row in found] == list(ROWS.text)
    assert answers(found) == expected(shop, ROWS)


def test_predict_says_how_many_rows_had_no_text(say: Say, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,n\ngreat zip,1\n"",2\ntorn coat,3\n', encoding="utf-8")
    said = say("predict", shop.folder, tmp_path / "rows.csv")
    assert "1 rows could not be used and have no prediction." in said.err
    assert [bool(row["prediction"]) for row in csv.DictReader(io.StringIO(said.out))] == [True, False, True]


def test_predict_tells_how_far_it_is(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netweight.predict._CHUNK", 4)
    seen: list[int] = []
    table = write_table(tmp_path / "rows.tsv", ROWS)
    predict(shop.folder, table, out=tmp_path / "out.tsv", threads=1, progress=seen.append)
    assert seen == [4, 8, 9]


def test_without_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netweight.progress._EVERY", -1.0)
    said = io.StringIO()
    for what, total in (("rows", None), ("texts", 30)):
        with Parts(what, Console(file=said)) as bar:
            for done in (10, 20, 30):
                bar(done * 1000, total and total * 1000)
    wanted = r"rows: 20,000\nrows: 30,000\ntexts: 20,000 of 30,000, \d+ s left\ntexts: 30,000 of 30,000, 0 s left\n"
    assert re.fullmatch(wanted, said.getvalue())


# --- inspect, verify, report ---


def test_inspect_as_json(say: Say, shop: Shop) -> None:
    found = json.loads(say("inspect", shop.folder, "--json").out)
    assert found == json.loads(json.dumps(summary(shop.folder)))
    assert found["certificate"]["verdict"] == "certified"
    assert found["certificate"]["drop"]["value"] <= found["certificate"]["drop"]["high"]
    assert [tier["name"] for tier in found["tiers"]] == [tier.name for tier in shop.result.manifest.tiers]
    assert sum(tier["answered"] for tier in found["tiers"]) == pytest.approx(1)
    assert found["bytes"] == artifact.size(shop.folder, shop.result.manifest)
    assert found["version"] == load(shop.folder).version


def test_inspect_for_people(say: Say, shop: Shop) -> None:
    said = say("inspect", shop.folder)
    assert said.status == 0
    words = " ".join(said.out.split())
    assert "CERTIFIED: accuracy drops by less than 5 points (95 % confidence, 500 rows that no search saw)" in words
    assert shop.result.certificate.shipped.name in words
    measured = shop.result.measurements
    shipped, reference = (m.timing.batch for m in (measured.shipped, measured.reference) if m.timing)
    money = dict(summary_module.lines(shop.folder))["money"]
    assert re.fullmatch(
        rf"\$[\d.]+ for a million rows in batches of {shipped}, reference \$[\d.]+ in batches of {reference} "
        r"\(a vCPU hour at \$[\d.]+\)",
        money,
    )
    assert money in words


def test_an_error_is_written_in_its_own_units(monkeypatch: pytest.MonkeyPatch, shop: Shop) -> None:
    certificate, outcomes = certificate_of(shop.folder)
    final = certificate.final
    eight = Estimate(-8.0, -8.4, -7.7)
    tested = replace(final, quality=eight, drop=Estimate(0.04, 0.01, 0.07), margin=0.08)
    registration = replace(certificate.registration, task=Score(50.0, 10.0, "mae"), max_drop=1.0)
    of_errors = replace(
        certificate, registration=registration, reference=eight, tested=(tested,), shipped=tested.candidate
    )
    manifest = replace(shop.result.manifest, task=registration.task)
    monkeypatch.setattr(summary_module, "certificate_of", lambda folder: (of_errors, outcomes))
    monkeypatch.setattr(summary_module.artifact, "check", lambda folder: manifest)
    found = dict(summary_module.lines(shop.folder))
    assert found["verdict"].startswith("CERTIFIED: mae rises by less than 1 points")
    assert (
        found["mae"] == "8.000 [7.700, 8.400], reference teacher 8.000 [7.700, 8.400]; drop 0.50 points, at most 0.88"
    )


def test_verify(say: Say, shop: Shop, tmp_path: Path) -> None:
    alone = say("verify", shop.folder)
    assert (alone.status, len(alone.out.splitlines())) == (0, 2)
    assert "The certificate follows from its 500 rows: certified" in alone.out
    rows = shop.certify
    data = write_table(tmp_path / "certify.tsv", rows.take(reversed(range(len(rows)))))
    said = say("verify", shop.folder, "--data", data)
    assert said.status == 0
    assert said.out.endswith("all 500 certify rows match in label and prediction.\n")
    with data.open("a", encoding="utf-8") as file:
        file.write("\tgood\n")
    assert (
        "1 of 501 rows of certify.tsv cannot be used (1 text is empty)"
        in say("verify", shop.folder, "--data", data).out
    )
    labels = list(rows.label or ())
    labels[3] = "good" if labels[3] == "bad" else "bad"
    changed = say("verify", shop.folder, "--data", write_table(tmp_path / "other.tsv", Rows(rows.text, tuple(labels))))
    assert changed.status == 1
    assert changed.err.startswith("netweight: the labels of 1 of 500 certify rows differ from the given ones")
    fewer = say("verify", shop.folder, "--data", write_table(tmp_path / "fewer.tsv", rows.take(range(490))))
    assert "10 of 500 certify rows are not among the 490 given rows" in fewer.err
    assert "No table has texts that are empty, NULL or very long, which Rows from Python may have." in fewer.err


def test_verify_names_both_processors_where_answers_differ(
    say: Say, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, then = write_table(tmp_path / "a.tsv", shop.certify), shop.result.measurements.machine.cpu
    usual = Engine.outputs

    def rounded_otherwise(*given: Any) -> Outputs:
        out = usual(*given)
        return replace(out, logits=-out.logits)

    monkeypatch.setattr(Engine, "outputs", rounded_otherwise)
    monkeypatch.setattr("netweight.measure.cpu", lambda: then)
    differs = "than when it was certified; check that files, engine and machine are those of the certificate."
    assert say("verify", shop.folder, "--data", data).err.endswith(f"{differs}\n")
    monkeypatch.setattr("netweight.measure.cpu", lambda: "an abacus")
    told = say("verify", shop.folder, "--data", data).err
    assert told.endswith(f"{differs} It was certified on {then}; this is an abacus.\n")


def test_of_a_larger_table_only_certify_rows_are_answered(
    say: Say, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    outputs = Engine.outputs

    def counted(engine: Engine, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Outputs:
        asked.append(len(texts))
        return outputs(engine, texts, pairs)

    monkeypatch.setattr(Engine, "outputs", counted)
    data = write_table(tmp_path / "all.tsv", concat(concat(shop.train, shop.certify), shop.dev))
    said = say("verify", shop.folder, "--data", data)
    assert said.out.endswith("all 500 certify rows match in label and prediction; 700 further rows were ignored.\n")
    fewer = write_table(tmp_path / "fewer.tsv", concat(shop.train, shop.certify.take(range(490))))
    said = say("verify", shop.folder, "--data", fewer)
    assert "10 of 500 certify rows are not among the 790 given rows" in said.err
    other = say("verify", shop.folder, "--data", write_table(tmp_path / "dev.tsv", shop.dev))
    assert "500 of 500 certify rows are not among the 400 given rows" in other.err
    assert asked == [500, 490, 0]
    # A report shows what was answered when the artifact was certified.
    monkeypatch.setattr(summary_module, "load", lambda *_: pytest.fail("nobody asks for new answers"))
    assert say("report", shop.folder, "--out", tmp_path / "r.html", "--examples", data).status == 0


def test_verify_sees_another_model_than_the_one_certified(say: Say, made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    manifest["tiers"][0]["threshold"] = 0.123
    manifest.pop("sha256")
    (made / "manifest.json").write_bytes(artifact.sealed(manifest))
    said = say("verify", made)
    assert said.status == 1
    wanted = r"netweight: the certificate is for [0-9a-f]{12}, the folder holds [0-9a-f]{12}\. Files .*; copy the folder again\.\n$"
    assert re.match(wanted, said.err)


def test_verify_sees_a_forged_certificate(say: Say, made: Path) -> None:
    manifest, (certificate, _) = artifact.read_manifest(made), certificate_of(made)
    contents = {name: (made / name).read_bytes() for name in manifest.files}
    stored = json.loads(certificate.to_json())
    stored["tested"][0]["p_value"] /= 10
    artifact.save(made, manifest, contents | {"certificate.json": json.dumps(stored).encode()})
    said = say("verify", made)
    assert said.status == 1
    assert said.err.startswith("netweight: tested[0].p_value is ")


def test_report_escapes_what_customers_wrote(say: Say, shop: Shop, tmp_path: Path) -> None:
    data = write_table(tmp_path / "certify.tsv", shop.certify)
    out = tmp_path / "page.html"
    said = say("report", shop.folder, "--out", out, "--examples", data)
    assert (said.status, said.out) == (0, f"wrote {out}\n")
    page = out.read_text(encoding="utf-8")
    assert "&lt;i&gt; &amp; " in page, "no row flipped, so nothing was tested"
    assert "<i> &" not in page
    assert say("report", shop.folder, "--out", out).status == 0
    assert "&lt;i&gt;" not in out.read_text(encoding="utf-8"), "customers' words appear only if asked for"
    # Without examples it is the report that was shipped, and its command too.
    assert out.read_bytes() == (shop.folder / artifact.REPORT).read_bytes()
    assert "netweight optimize TRAIN --max-drop 5 " in out.read_text(encoding="utf-8")
    assert "is the input itself" in say("report", shop.folder, "--out", data, "--examples", data).err
    assert data.read_text(encoding="utf-8").startswith("text")
    refused = say("report", shop.folder, "--out", shop.folder / "again.html")
    assert (refused.status, "is inside the artifact, whose files never change" in refused.err) == (1, True)
    refused = say("report", shop.folder, "--out", out, "--examples", write_table(tmp_path / "dev.tsv", shop.dev))
    assert (refused.status, "is a certify row; give the table that was certified" in refused.err) == (1, True)


def test_artifacts_without_a_certificate(say: Say, made: Path, shop: Shop) -> None:
    manifest = artifact.read_manifest(made)
    names = ["tokenizer.json", *(tier.file for tier in manifest.tiers)]
    artifact.save(made, manifest, {name: (made / name).read_bytes() for name in names})
    for command in ("inspect", "verify", "report"):
        said = say(command, made)
        assert said.status == 1
        assert "has no certificate; artifacts of `netweight optimize` have one." in said.err
    assert len(load(made).predict(ROWS.text)) == 9


# --- optimize and demo ---


@pytest.mark.usefixtures("quick")
def test_optimize_from_tables(say: Say, shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(store_of(shop.folder), tmp_path / "made.nw.run")
    paths = [write_table(tmp_path / f"{name}.tsv", getattr(shop, name)) for name in ("train", "dev", "certify")]
    said = say(
        *("optimize", paths[0], "--dev", paths[1], "--certify", paths[2], "--text", "text", "--label", "label"),
        *("--out", tmp_path / "made.nw", "--model", shop.base, "--max-drop", 5, "--threads", 1, "--time-limit", "5m"),
    )
    assert said.status == 0
    assert "CERTIFIED: accuracy" in said.out
    assert "registered" in said.err
    assert artifact.check(tmp_path / "made.nw").digest == shop.result.manifest.digest


def test_demo_uses_the_sample(say: Say, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stand_in(train: Rows, **options: Any) -> Result:
        given.update(options, train=train)
        return shop.result

    monkeypatch.setattr("netweight.demo.optimize", stand_in)
    said = say("demo", "--out", tmp_path / "demo.nw", "--seed", 3)
    assert said.status == 0
    assert "The sample is synthetic" in said.err
    assert "CERTIFIED" in said.out
    assert (given["seed"], given["out"]) == (3, tmp_path / "demo.nw")
    texts = [set(given[name].text) for name in ("train", "dev", "certify")]
    assert [len(given[name]) for name in ("train", "dev", "certify")] == [3000, 1200, 5000]
    assert not texts[0] & texts[2]


def test_every_option_of_optimize_arrives(
    say: Say, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stand_in(train: str, **options: Any) -> Result:
        given.update(options, train=train)
        return shop.result

    monkeypatch.setattr("netweight.pipeline.optimize", stand_in)
    names = {
        "text": "t",
        "label": "l",
        "pair": "p",
        "group": "g",
        "dev": "d",
        "certify": "c",
        "pool": "q",
        "model": "m",
    }
    kinds = {"task": "score", "metric": "mae", "minimise": "size", "effort": "thorough", "vocabulary": "whole"}
    asked = names | kinds | {"max_length": 64, "confidence": 0.9, "seed": 3, "threads": 1}
    words = [word for key, value in asked.items() for word in (f"--{key.replace('_', '-')}", value)]
    limits = ("--max-drop", "2.5", "--time-limit", "2m", "--slice", "a", "--slice", "b")
    said = say("optimize", "rows.csv", "--out", tmp_path / "o", *words, *limits)
    assert said.status == 0, said.err
    asked |= {"train": "rows.csv", "out": tmp_path / "o", "max_drop": 2.5, "seconds": 120.0}
    assert {key: given[key] for key in asked} == asked
    assert list(given["slices"]) == ["a", "b"]


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90s", 90), ("20m", 1200), ("2h", 7200), ("1.5h", 5400), ("3", 180), (" 10m ", 600), ("0.5m", 30)],
)
def test_time_limits(given: str, seconds: float) -> None:
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", ["", "soon", "-5m", "5 minutes", "1e3s", "m", "5d", "nan", "1.m"])
def test_what_is_no_time_limit(given: str) -> None:
    with pytest.raises(OptionError, match="a time limit is a number with s, m or h"):
        seconds_of(given)


def test_refusals_are_one_sentence_and_status_1(say: Say, shop: Shop, made: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "rows.tsv", shop.train)
    (made / shop.result.manifest.tiers[0].file).write_bytes(b"damaged")
    (folder := tmp_path / "o.csv").mkdir()
    optimize = ("optimize", table, "--text", "text", "--label", "label", "--out")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("predict", tmp_path, table), "is no artifact: it has no manifest.json"),
        (("predict", made, table), "is damaged: its SHA-256 is"),
        (("export", tmp_path, "--to", "onnx", "--out", tmp_path / "x"), "is no artifact: it has no manifest.json"),
        (("explain", tmp_path), "is no artifact: it has no manifest.json"),
        (("predict", shop.folder, tmp_path / "row.tsv"), "Did you mean 'rows.tsv'?"),
        (("predict", shop.folder, table, "--text", "words"), "has no column 'words'"),
        (("predict", shop.folder, table, "--out", table), "is the input itself"),
        (("predict", shop.folder, table, "--pair", "label"), "made.nw answers single texts; give no second one"),
        (("predict", shop.folder, "-", "--text", "words"), "have no columns, and so none called 'words'"),
        ((*optimize, "."), "the folder '.' has no name of its own"),
        ((*optimize, "/"), "the folder '/' has no name of its own"),
        (("serve", shop.folder, "--log-rate", 1), "come from a log; name one with --log"),
        (("serve", shop.folder, "--false-alarms", 1), "come from a log; name one with --log"),
        (("serve", shop.folder, "--mode", "canary"), "are those of a candidate; name one with --candidate"),
        (("serve", shop.folder, "--share", 0.5), "are those of a candidate; name one with --candidate"),
        (("keys", tmp_path / "gone" / "keys.jsonl", "--add", "shop"), "No such file or directory"),
        (("report", shop.folder, "--out", tmp_path / "gone" / "r.html"), "of the output does not exist; create it"),
        (("report", shop.folder, "--out", tmp_path), "is a folder; name a file"),
        (("predict", shop.folder, table, "--out", folder), "o.csv is a folder; name a file"),
        (("select", shop.folder, table, "--count", 1, "--out", folder), "o.csv is a folder; name a file"),
        ((*optimize, tmp_path / "o.nw", "--seed", -1), "seed is -1; use 0 or more"),
        (("verify", shop.folder, "--label", "intent"), "name columns of --data; without a table, leave them out"),
        (("report", shop.folder, "--pair", "b"), "name columns of --examples; without a table, leave them out"),
        (
            ("select", shop.folder, table, "--count", 1, "--out", tmp_path / "s.csv", "--label", "intent"),
            "--label names a column of --labelled; without that table, leave it out",
        ),
        (("inspect", made), "is damaged"),
        (("verify", made), "is damaged"),
        (("report", made), "is damaged"),
        (("bench", made), "is damaged"),
        ((*optimize, tmp_path / "o.nw", "--time-limit", "soon"), "given was 'soon'"),
        ((*optimize, tmp_path / "o.nw", "--time-limit", "5s"), "use at least 10 s"),
        ((*optimize, tmp_path / "o.nw", "--max-drop", "0"), "max_drop is 0.0 points"),
        (
            (*optimize, tmp_path / "o.nw", "--max-drop", "few"),
            "--max-drop is a number of points, or auto; given was 'few'",
        ),
        ((*optimize, tmp_path, "--model", shop.base), "exists and is not an artifact"),
        ((*optimize, tmp_path / "o.nw", "--metric", "spearman"), "metric 'spearman' is not for classification"),
    ]
    for arguments, wanted in cases:
        said = say(*arguments)
        assert said.status == 1, arguments
        assert wanted in said.err, (arguments, said.err)
        assert said.err.startswith("netweight: ")
        assert said.err.count("\n") == 1
        assert "Traceback" not in said.err
        assert said.out == ""


def test_wrong_options_are_usage_errors(say: Say, shop: Shop) -> None:
    for arguments in (
        ("predict",),
        ("inspect", shop.folder, "--shiny"),
        ("nonsense",),
        ("bench", shop.folder, "--against", "x"),
    ):
        assert say(*arguments).status == 2


def test_help_shows_how_tables_of_the_hub_are_named(say: Say) -> None:
    # What stands between brackets would be markup to rich.
    assert "hf:NAME[:CONFIG][@SPLIT]." in say("optimize", "--help").out


def test_missing_trackers_name_their_extra(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wandb", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    table = write_table(tmp_path / "rows.tsv", ROWS)
    for name in ("wandb", "mlflow", "tensorboard"):
        said = say("optimize", table, "--text", "text", "--label", "label", "--out", tmp_path / "o.nw", "--track", name)
        assert said.status == 1
        assert "pip install '.[track]'" in said.err


def test_examples_of_scores(monkeypatch: pytest.MonkeyPatch, shop: Shop, tmp_path: Path) -> None:
    certificate, outcomes = certificate_of(shop.folder)
    scored = replace(certificate, registration=replace(certificate.registration, task=Score()))
    monkeypatch.setattr(summary_module, "certificate_of", lambda folder: (scored, outcomes))
    with pytest.raises(ArtifactError, match="examples of flips exist for labels only"):
        summary_module.write_report(shop.folder, tmp_path / "r.html", "rows.csv")


@pytest.mark.parametrize("words", ["--version", "inspect DIR --json"])
def test_what_cannot_be_written_at_the_end_is_told_once(shop: Shop, words: str) -> None:
    """Python keeps the last of an output to its exit, where it would tell of it in its own words, with status 120."""
    run = [sys.executable, "-c", "from netweight.cli import main; main()"]
    run += [str(shop.folder) if word == "DIR" else word for word in words.split()]
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=usual) as piped:
        assert piped.stdout is not None
        piped.stdout.close()
        _, error = piped.communicate()
    assert (piped.returncode in (1, 141), error) == (True, b"")
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=usual)
    assert (done.returncode, done.stderr) == (1, "netweight: [Errno 28] No space left on device\n")


def test_who_stops_a_command_is_told_whether_it_goes_on(
    say: Say, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("netweight.pipeline.optimize", "netweight.summary.summary", "netweight.cluster.predict_parts"):
        monkeypatch.setattr(place, stopped)
    monkeypatch.setattr("netweight.predict.predict", stopped)
    optimize = ("optimize", "rows.csv", "--text", "text", "--label", "label", "--out", tmp_path / "o.nw")
    predict = ("predict", shop.folder, "in", "--out", tmp_path / "out")
    for words in (optimize, (*predict, "--ray", "local")):
        said = say(*words)
        assert (said.status, said.err) == (130, "netweight: stopped; the same command goes on where it was.\n")
    for words in (predict, ("inspect", shop.folder, "--json")):
        said = say(*words)
        assert (said.status, said.err) == (130, "netweight: stopped.\n")


def test_the_console_script(shop: Shop, tmp_path: Path) -> None:
    run = [sys.executable, "-c", "from netweight.cli import main; main()"]
    wrong = subprocess.run([*run, "inspect", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == f"netweight: {tmp_path} is no artifact: it has no manifest.json.\n"
    rows = "\n".join(shop.train.text * 30).encode()
    with subprocess.Popen(
        [*run, "predict", str(shop.folder), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as piped:
        assert piped.stdout is not None
        piped.stdout.close()  # as `| head` does
        _, error = piped.communicate(rows)
    # Click ends with 1 before `main` can say 141.
    assert piped.returncode in (1, 141)
    assert error == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gb2312"])
def test_what_an_encoding_lacks_is_escaped(made: Path, tmp_path: Path, encoding: str) -> None:
    words = "好 é 🙂 “x”"
    folder = made.rename(tmp_path / f"{words}.nw")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["said"] = words
    manifest.pop("sha256")
    (folder / "manifest.json").write_bytes(artifact.sealed(manifest))
    run = [sys.executable, "-c", "from netweight.cli import main; main()", "inspect", str(folder)]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    for more, expected in (["--json"], words), ([], "\\ud83d\\ude42"):
        done = subprocess.run([*run, *more], capture_output=True, check=False, env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        said = done.stdout.decode(encoding)
        assert expected in (json.loads(said)["provenance"]["said"] if more else said)
