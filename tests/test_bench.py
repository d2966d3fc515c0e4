"""Benches: figures of the artifact and of baselines beside it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import Say, Shop, tiny_encoder, tiny_model, tiny_rows, write_table
from netweight import artifact, bench, load, measure
from netweight.baselines import baseline, nncf_int8, teacher_engine
from netweight.errors import ArtifactError, MissingExtra, OptionError, StoreError
from netweight.export import export
from netweight.measure import Measurement
from netweight.run.local import logits_of
from netweight.store import DEV, store_of
from netweight.task import Classify

ROWS = tiny_rows(9)


@pytest.mark.usefixtures("quick")
def test_bench(say: Say, shop: Shop, tmp_path: Path) -> None:
    rows = shop.dev.take(range(60))
    table = write_table(tmp_path / "rows.tsv", rows)
    said = say("bench", shop.folder, "--input", table, "--label", "label", "--threads", 1, "--json")
    found = json.loads(said.out)
    (mine,) = found["measured"]
    assert found["metric"] == "accuracy"
    assert (mine["name"], mine["rows"], mine["agreement"]) == ("made.nw", 60, 1.0)
    right = [p.label == y for p, y in zip(load(shop.folder).predict(rows.text), rows.label or ())]  # type: ignore[union-attr]
    assert mine["quality"] == pytest.approx(sum(right) / 60)
    assert mine["bytes"] == artifact.size(shop.folder, shop.result.manifest)
    assert mine["dollars_per_million"] == pytest.approx(0.04 * 1e6 / 3600 / mine["timing"]["rows_per_second"])
    people = say("bench", shop.folder, "--input", table, "--threads", 1)
    assert "rows/s, median" in people.out
    assert "accuracy" not in people.out, "without labels there is no quality"


@pytest.mark.usefixtures("quick")
def test_an_error_is_no_share(say: Say, shop: Shop, tmp_path: Path) -> None:
    one = Measurement("a", ("a",), 9, -0.431, 0.9876, 0.1, (1.0,), 10)
    machine = measure.machine(1)
    rows = bench.Bench(machine, "mae", True, (one, one)).rows()
    assert rows[1:3] == [["mae", "0.4310", "0.4310"], ["agreement with a", "0.988", "0.988"]]
    stored = json.loads(
        bench.Bench(machine, "mae", False, (replace(one, quality=math.nan),)).to_json(), parse_constant=pytest.fail
    )
    assert stored["measured"][0]["quality"] is None
    assert (stored["reference"], stored["note"]) == ("a", "")
    table = write_table(tmp_path / "rows.tsv", shop.dev.take(range(30)))
    with table.open("a", encoding="utf-8") as file:
        file.write("\tgood\n")
    said = say("bench", shop.folder, "--input", table, "--threads", 1)
    assert "1 of 31 rows of rows.tsv cannot be used" in " ".join(said.out.split())
    found = json.loads(say("bench", shop.folder, "--input", table, "--threads", 1, "--json").out)
    assert found["note"].startswith("1 of 31 rows of rows.tsv cannot be used")


def test_the_teacher_computes_on_the_threads_that_are_said() -> None:
    model, seen, before = tiny_model(), [], torch.get_num_threads()
    model.network.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    for threads in (1, 2):
        teacher_engine(model, threads).predict(["soft zip"])
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("quick")
def test_bench_against_the_teacher(say: Say, shop: Shop) -> None:
    said = say("bench", shop.folder, "--against", "teacher", "--threads", 1, "--json")
    found = json.loads(said.out)
    mine, teacher = found["measured"]
    assert found["reference"] == "teacher"
    assert (mine["name"], teacher["name"]) == ("made.nw", "teacher")
    assert mine["rows"] == len(shop.dev)
    assert teacher["agreement"] == 1.0
    assert teacher["quality"] == pytest.approx(shop.result.measurements.reference.quality)
    assert teacher["bytes"] == shop.result.measurements.reference.bytes
    assert (mine["memory"] or 0) > 0
    assert teacher["memory"] is None
    people = say("bench", shop.folder, "--against", "teacher", "--threads", 1)
    assert "throughput ratio" in people.out
    assert "agreement with teacher" in people.out


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["onnx", "onnx-int8", "openvino-int8"])
def test_bench_against_what_engineers_deploy(say: Say, shop: Shop, name: str) -> None:
    if name == "openvino-int8":
        pytest.importorskip("nncf")
        pytest.importorskip("openvino")
    said = say("bench", shop.folder, "--against", "teacher", "--against", name, "--threads", 1, "--json")
    _, teacher, other = json.loads(said.out)["measured"]
    assert other["name"] == name
    assert other["agreement"] > (0.999 if name == "onnx" else 0.95)
    assert other["quality"] == pytest.approx(teacher["quality"], abs=0.03)


def test_labels_that_are_not_known_are_told_of_before_anything_is_timed(
    say: Say, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("speed", "fresh"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("it was timed"))
    table = write_table(tmp_path / "rows.tsv", replace(ROWS, label=("so so",) * 9))
    said = say("bench", shop.folder, "--input", table, "--label", "label", "--threads", 1)
    assert (said.status, "1 label(s) do not occur in training: 'so so'" in said.err) == (1, True)


def test_bench_without_a_store(say: Say, made: Path) -> None:
    said = say("bench", made, "--threads", 1)
    assert said.status == 1
    assert (
        "without the run store of `netweight optimize` there are no dev rows and no teacher for baselines" in said.err
    )
    said = say("bench", made, "--input", "x.csv", "--against", "teacher")
    assert (said.status, "there is no file x.csv" in said.err) == (1, True)
    with pytest.raises(OptionError, match="the artifact is called 'made.nw', as a baseline is; rename its folder"):
        bench.bench(made, None, against=["made.nw"])
    with pytest.raises(
        OptionError, match="there is no baseline 'onnx-int4'; use teacher, onnx, onnx-int8, openvino-int8"
    ):
        baseline("onnx-int4", tiny_model(), ROWS, 1)
    assert "name columns of --input; without a table" in say("bench", made, "--label", "intent").err
    with pytest.raises(StoreError, match="there is no run store"):
        bench.bench(made, str(write_table(made.parent / "rows.tsv", ROWS)), against=["teacher"])


@pytest.mark.parametrize("held", ["", "3\n"])
def test_damaged_dev_rows_are_told_of(say: Say, made: Path, held: str) -> None:
    store_of(made).mkdir()
    (store_of(made) / DEV).write_text(held, encoding="utf-8")
    for words in (("bench", made), ("export", made, "--to", "onnx", "--out", made.parent / "x")):
        found = say(*words)
        assert (found.status, found.err.count("\n")) == (1, 1)
        assert "dev.jsonl is empty or damaged; the same `netweight optimize` writes it anew" in found.err


def test_the_openvino_baseline_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(
        MissingExtra,
        match=r"baseline openvino-int8 needs an extra; in a clone of Netweight: pip install '\.\[openvino\]'",
    ):
        nncf_int8(b"", tiny_encoder().encode([]), 0, tmp_path)


def test_measuring_says_what_is_wrong(tmp_path: Path) -> None:
    nothing = np.zeros((0, 2))
    with pytest.raises(OptionError, match="quality needs at least one row"):
        measure.quality(Classify(("a", "b")), nothing, nothing, None)
    with pytest.raises(ArtifactError, match=r"measurements cannot be read: KeyError\('machine'\)"):
        measure.from_dict({})
    with pytest.raises(ArtifactError, match=r"(?s)cannot be loaded in a fresh process: .*it has no manifest.json"):
        measure.fresh(tmp_path, ROWS, 1, rounds=1)


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ("VmPeak:\t 9 kB\nVmHWM:\t 2048 kB\nVmRSS:\t 1024 kB\n", 2 << 20),
        ("VmSize:\t 9 kB\nVmRSS:\t 1024 kB\n", 1 << 20),
        ("Name:\tpython\n", None),
    ],
)
def test_a_kernel_may_keep_no_peak_of_memory(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, memory: int | None
) -> None:
    (tmp_path / "status").write_text(said)
    monkeypatch.setattr(measure, "_FRESH", measure._FRESH.replace("/proc/self/status", str(tmp_path / "status")))
    assert measure.fresh(shop.folder, shop.dev, 1, rounds=1).memory == memory


def test_a_fresh_process_imports_nothing_from_the_folder_it_starts_in(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert measure.fresh(shop.folder, shop.dev, 1, rounds=1).cold_start > 0


def test_processors_without_a_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    def cpu(part: str, features: str) -> str:
        text = f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\nCPU revision\t: 1\n\n"
        monkeypatch.setattr(measure, "Path", lambda _: SimpleNamespace(read_text=lambda encoding: 2 * text))
        return measure.cpu()

    assert cpu("0xd0c", "fp asimd") == "aarch64 implementer 0x41 part 0xd0c"
    assert cpu("0xd40", "asimddp i8mm bf16") == "aarch64 implementer 0x41 part 0xd40 with i8mm, asimddp, bf16"


def test_the_best_batch_is_not_that_of_one_lucky_or_busy_moment(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([10, 20, 5, 20, 90, 20, 30, 20, 10, 20, 30, 20])  # three times 1, 8, 32 and 128 rows
    monkeypatch.setattr(measure, "_rate", lambda *_: next(looks))
    assert measure._best_batch(load(made), ROWS) == 32


def test_a_sparse_teachers_file_is_unpacked_for_baselines() -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.ndim == 2 and parameter.numel() > 500:
                parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 0
    assert export(model).options == {"packed": True}
    engine, size = baseline("onnx", model, ROWS, 1)
    assert size == len(export(model).plain) > len(export(model).data)
    tokens = model.encoder.encode(ROWS.text)
    np.testing.assert_allclose(engine.run(tokens).logits, logits_of(model, tokens), atol=1e-5)


def test_a_measurement_names_the_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results written beside it do not count as changes of the code; outside a checkout there is no name."""
    package = tmp_path / "src" / "netweight"
    package.mkdir(parents=True)
    code, result = package / "measure.py", tmp_path / "result.json"
    monkeypatch.setattr(measure, "__file__", str(code))
    code.write_text("1", encoding="utf-8")
    result.write_text("1", encoding="utf-8")
    assert measure.machine(1).commit == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    name = subprocess.run([*git, "describe", "--always"], check=True, capture_output=True, text=True).stdout.strip()
    result.write_text("2", encoding="utf-8")
    assert measure.machine(1).commit == name
    code.write_text("2", encoding="utf-8")
    assert measure.machine(1).commit == f"{name}-dirty"
