"""Exports for other runtimes: what was written answers as the artifact does, and what does not is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save
from tokenizers import Tokenizer

import netweight
from conftest import Say, Shop, tiny_model, tiny_rows, write_table
from netweight import artifact, convert
from netweight.artifact import Manifest, Tier
from netweight.convert import Converted, Format
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.deliver import export
from netweight.engine import TierEngine, load
from netweight.engine.static import FACTORS, StaticEngine
from netweight.errors import ArtifactError, MissingExtra, OptionError, StoreError
from netweight.export import export as exported
from netweight.export import lowered
from netweight.litert import example, program
from netweight.model import Model
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.store import Store, store_of
from netweight.techniques import EarlyExit, Quantize, Static
from netweight.train import Plan
from test_habits import _BLOCKED, _CONNECTIONS, python

PLAN = Plan(batch_size=16, precision="fp32")


def shipped(folder: Path, models: dict[str, Model], static_threshold: float = 0.0) -> Path:
    """An artifact of these models, with a run store that keeps them."""
    tiers, contents = [], {}
    first = next(iter(models.values()))
    with Store(store_of(folder), {"a": "job"}) as store:
        for i, (name, model) in enumerate(models.items()):
            made = exported(model)
            file = artifact.tier_file(i, name, made.kind)
            contents[file] = made.data
            numbers = (1.0, 0.0, 0.4) if i else (1.0, static_threshold, 0.0)
            tiers.append(Tier(name, made.kind, file, made.options, *numbers))
            model.save(store.model_folder(name))
    contents[artifact.TOKENIZER] = first.encoder.definition.encode()
    artifact.save(folder, Manifest(first.task, first.encoder.max_length, first.encoder.pad, tuple(tiers)), contents)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade of a static student and an int8 encoder."""
    rows = tiny_rows()
    run = Local(Dataset(rows, rows.take(range(9)), rows.take(range(9)), Sealed(rows)))
    model = tiny_model()
    models = {
        "static": Static(width=8, buckets=64, epochs=1, batch_size=16)(model, run, PLAN),
        "full-int8": Quantize(rows=40)(model, run, PLAN),
    }
    sure = model.task.confidence(logits_of(models["static"], model.encoder.encode(rows.text)).numpy())
    return shipped(tmp_path_factory.mktemp("shipped") / "made.nw", models, float(np.median(sure)))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "rows.tsv", tiny_rows())


def spec_of(done: Converted) -> dict[str, Any]:
    return dict(json.loads((done.folder / convert.SPEC).read_text(encoding="utf-8")))


def test_onnx_is_the_tiers_own_file_and_runs_by_the_spec_alone(made: Path, table: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    done = export(made, "onnx", tmp_path / "out", str(table))
    assert [c.distance for c in done.compared] == [0.0, 0.0]
    spec = spec_of(done)
    static, encoder = spec["tiers"]
    names = {"spec.json", "tokenizer.json", static["file"], encoder["file"]}
    assert {path.name for path in done.folder.iterdir()} == names
    tokenizer = Tokenizer.from_file(str(done.folder / spec["tokenizer"]))
    tokenizer.enable_truncation(spec["max_length"])
    session = ort.InferenceSession(done.folder / encoder["file"])
    assert {i["name"] for i in encoder["inputs"]} == {i.name for i in session.get_inputs()}
    arrays = load_arrays((done.folder / static["file"]).read_bytes())
    wanted = netweight.load(made, 1).predict(tiny_rows().text)
    seen = set()
    for text, said in zip(tiny_rows().text, wanted, strict=True):
        ids = tokenizer.encode(text).ids
        logits, name = by_hand(arrays, static, ids), "static"
        if softmax(logits / static["temperature"]).max() < static["threshold"]:
            given = {"ids": ids, "mask": [1] * len(ids), "types": [0] * len(ids)}
            fed = {i["name"]: np.array([given[i["name"]]], np.int32) for i in encoder["inputs"]}
            logits, name = session.run(["logits"], fed)[0][0] + encoder["before"] * logits, "full-int8"
        assert (spec["task"]["labels"][int(np.argmax(logits))], name) == (said.label, said.tier)  # type: ignore[union-attr]
        seen.add(name)
    assert seen == {"static", "full-int8"}


def softmax(x: Any) -> Any:
    shifted = np.exp(x - np.max(x))
    return shifted / shifted.sum()


def by_hand(arrays: dict[str, Any], spec: dict[str, Any], ids: list[int]) -> Any:
    """What `maths` says, feature by feature."""
    table, norm = arrays["table"], arrays["norm"]
    v, a, b = len(table) - spec["buckets"], 1_000_003, 7_919
    assert f"t[i] * {a} + t[i + 1] * {b}" in spec["maths"][1]
    found = ids + [v + (one * a + two * b) % spec["buckets"] for one, two in pairwise(ids)]
    weight = [float(norm[f]) if f < len(norm) else 0.0 for f in found]
    assert spec["maths"][3].endswith("the sum of norm[f].")
    x = sum(table[f].astype(np.float64) * arrays["scale"][f] for f in found) / max(sum(weight), 1e-6)
    for i in range(sum(name.startswith("bias.") for name in arrays)):
        x = np.maximum(x, 0) if i else x
        x = (x @ arrays[f"matrix.{i}"] if f"matrix.{i}" in arrays else x) + arrays[f"bias.{i}"]
    return x


def test_openvino(made: Path, table: Path, tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino", reason="the extra `openvino` is not installed here")
    done = export(made, "openvino", tmp_path / "out", str(table))
    encoder = spec_of(done)["tiers"][1]
    assert encoder["format"] == "openvino"
    assert (done.folder / encoder["weights"]).stat().st_size > 0
    model = ov.Core().read_model(done.folder / encoder["file"])
    held = {node.get_element_type().to_string() for node in model.get_ops() if node.get_type_name() == "Constant"}
    assert "f16" not in held, "weights were rounded to fp16"
    assert done.compared[1].rows == 120
    assert 0 <= done.compared[1].distance < 0.05
    assert done.sentences[1].startswith("1-full-int8.xml: the same answers as full-int8 on 120 rows")


@pytest.mark.parametrize(
    "technique",
    [
        Quantize(rows=40),
        Quantize(rows=40, symmetric=False),
        Quantize(activations="none", weight_bits=4, granularity="group", group=16),
        Quantize(activations="none", weight_bits=8, symmetric=False),
    ],
    ids=["int8", "asymmetric", "4-bit groups", "weights alone"],
)
def test_converters_meet_operators_of_torch_alone(technique: Quantize, dataset: Dataset) -> None:
    model = technique(tiny_model(), Local(dataset), PLAN)
    given = example(8)
    made = program(model, given)
    assert not any("netweight" in str(node.target) for node in made.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(made.module()(**given)["logits"], lowered(model)(**given))


@pytest.mark.slow  # the converter alone takes seconds
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_litert(family: str, dataset: Dataset, table: Path, tmp_path: Path) -> None:
    reason = "the extra `litert` is not installed here"
    pytest.importorskip("litert_torch", reason=reason)
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason=reason)
    model = tiny_model(family=family)
    if family == "bert":
        model = Quantize(rows=40)(model, Local(dataset), PLAN)
    folder = shipped(tmp_path / "made.nw", {"encoder": model})
    done = export(folder, "litert", tmp_path / "out", str(table))
    (tier,) = spec_of(done)["tiers"]
    assert tier["inputs"][0] | {"meaning": ""} == {"name": "ids", "dtype": "int32", "shape": [1, 32], "meaning": ""}
    runner = interpreter.Interpreter(str(done.folder / tier["file"])).get_signature_runner()
    assert set(runner.get_input_details()) == {i["name"] for i in tier["inputs"]}
    assert done.compared[0].distance < 0.01


def test_the_jobs_dev_rows_are_compared_without_a_table(shop: Shop, tmp_path: Path, say: Say) -> None:
    said = say("export", shop.folder, "--to", "onnx", "--out", tmp_path / "out")
    assert said.status == 0, said.err
    assert f"on {len(shop.dev):,} rows" in said.out
    assert (tmp_path / "out" / "spec.json").exists()


@dataclass(frozen=True)
class Skewed:
    """A runtime that answers otherwise."""

    by: float
    turned: bool = False
    format: Format = "onnx"

    def write(self, stem: Path, manifest: Manifest, tier: Tier, onnx: bytes) -> tuple[TierEngine, dict[str, Any]]:
        inner, said = convert.Onnx().write(stem, manifest, tier, onnx)
        by, turned = self.by, self.turned

        class Engine:
            def logits(self, tokens: Any, batch: int) -> Any:
                found = inner.logits(tokens, batch) + np.float32(by)
                return found[:, ::-1] if turned else found

        return Engine(), said


def test_an_export_may_differ_by_two_percent(made: Path, tmp_path: Path) -> None:
    engine, rows = load(made, 1), tiny_rows()
    spread = float(np.ptp(engine.logits(1, engine.encoder.encode(rows.text))))
    convert.convert(made, tmp_path / "close", Skewed(0.01 * spread), rows)
    with pytest.raises(ArtifactError, match="does not answer as the artifact's full-int8 does"):
        convert.convert(made, tmp_path / "far", Skewed(0.03 * spread), rows)


@pytest.mark.parametrize("writer", [Skewed(5.0), Skewed(0.0, turned=True), Skewed(float("nan"))])
def test_an_export_that_answers_otherwise_is_refused(made: Path, writer: Skewed, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"1-full-int8.onnx does not answer as the artifact's full-int8 does: another"
    ):
        convert.convert(made, tmp_path / "out", writer, tiny_rows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dangling", "dangling is a link to .*gone, which is not there; remove it, or choose another folder"),
        ("linked", "linked exists and is not an empty folder; choose another one"),
        ("mounted", "mounted is a mount point, which cannot be exchanged; name a folder inside it"),
    ],
)
def test_an_output_that_cannot_be_replaced_is_refused_before_any_work(
    name: str, said: str, made: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "linked").symlink_to(tmp_path / "mounted")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    monkeypatch.setattr(artifact, "read_file", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ArtifactError, match=said):
        export(made, "onnx", tmp_path / name, str(table))


def test_wrong_requests(made: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no export to 'coreml'; use onnx, openvino or litert"):
        export(made, "coreml", tmp_path / "out", str(table))  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="exists and is not an empty folder; choose another one"):
        export(made, "onnx", made, str(table))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"the folder '\.' has no name of its own"):
        export(made, "onnx", ".", str(table))
    manifest = artifact.read_manifest(made)
    contents = {name: artifact.read_file(made, manifest, name) for name in manifest.files}
    artifact.save(tmp_path / "two.nw", replace(manifest, provenance={"pairs": True}), contents)
    with pytest.raises(OptionError, match="two.nw answers pairs of texts; give the second text of each too"):
        export(tmp_path / "two.nw", "onnx", tmp_path / "out", str(table))
    with pytest.raises(
        OptionError, match="^--text and the like name columns of --input; without a table, leave them out"
    ):
        export(made, "onnx", tmp_path / "out", text="words")
    with pytest.raises(StoreError, match="is not there: without the run store"):
        export(shutil.copytree(made, tmp_path / "alone.nw"), "onnx", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingExtra,
        match=r"exporting to OpenVINO needs an extra; in a clone of Netweight: pip install '\.\[openvino\]'",
    ):
        export(made, "openvino", tmp_path / "out", str(table))
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(
        MissingExtra, match=r"exporting to LiteRT needs an extra; in a clone of Netweight: pip install '\.\[litert\]'"
    ):
        export(made, "litert", tmp_path / "out", str(table))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", get_args(Format))
def test_early_exits_are_refused(to: Format, table: Path, tmp_path: Path) -> None:
    run = Local(Dataset(*(tiny_rows(),) * 3, Sealed(tiny_rows())))
    folder = shipped(tmp_path / "made.nw", {"exits-0": EarlyExit((1,), epochs=0.1)(tiny_model(), run, PLAN)})
    with pytest.raises(ArtifactError, match="tier 'exits-0' has early exits, which no export holds; run the artifact"):
        export(folder, to, tmp_path / "out", str(table))
    assert not (tmp_path / "out").exists()


def test_exports_need_no_torch_and_no_network(made: Path, table: Path, tmp_path: Path) -> None:
    code = (
        _BLOCKED
        + _CONNECTIONS
        + """
from importlib.util import find_spec
from netweight.deliver import export
from netweight.errors import MissingExtra
for to in ["onnx"] + ["openvino"] * bool(find_spec("openvino")):
    print(len(export(sys.argv[1], to, sys.argv[2] + to, sys.argv[3]).compared))
try:
    export(sys.argv[1], "litert", sys.argv[2], sys.argv[3])
except MissingExtra as problem:
    print(problem)
assert "torch" not in sys.modules
"""
    )
    *counts, last = python(code, made, tmp_path / "out-", table).splitlines()
    assert set(counts) == {"2"}
    assert last == "exporting to LiteRT needs an extra; in a clone of Netweight: pip install '.[litert]'"


def test_tables_of_pairs_and_of_tf_idf_say_their_maths(tmp_path: Path) -> None:
    options = {"buckets": 0, "norm": "l2", "segments": True}
    arrays = {"table": np.ones((3, 2), np.int8), "scale": np.ones(3, np.float32), "norm": np.ones(3, np.float32)}
    data = save(arrays | {"bias.0": np.zeros(2, np.float32), "matrix.0": np.zeros((8, 2), np.float32)})
    engine, said = convert._table(tmp_path / "0-x", Tier("x", "static", "", options), data)
    assert isinstance(engine, StaticEngine)
    text = " ".join(said["maths"])
    assert "the root of the sum of norm[f]^2" in text
    assert "[u, w, |u - w|, u * w]" in text
    assert "neighbours" not in text


def test_windows_say_their_maths(tmp_path: Path) -> None:
    """What the sentences say, token by token, gives the engine's logits."""
    rows = tiny_rows()
    run = Local(Dataset(rows, rows.take(range(9)), rows.take(range(9)), Sealed(rows)))
    model = tiny_model()
    made = exported(Static(width=8, buckets=64, filters=6, reach=3, epochs=1, batch_size=16)(model, run, PLAN))
    whole, said = convert._table(tmp_path / "0-x", Tier("x", "static", "", made.options), made.data)
    assert "k = 0 to 2 of windows.table[k, p[i + k - 1]]" in said["maths"][-2]
    arrays = load_arrays((tmp_path / "0-x.safetensors").read_bytes())
    assert not set(arrays) & set(FACTORS)
    place = {int(token): i for i, token in enumerate(arrays["windows.known"])}
    tokens = model.encoder.encode(rows.text[:20])
    logits = StaticEngine(made.data, made.options).logits(tokens, 7)
    np.testing.assert_array_equal(whole.logits(tokens, 7), logits)
    for row, start in enumerate(tokens.offsets[:-1]):
        ids = tokens.ids[start : tokens.offsets[row + 1]].tolist()
        z = [
            sum(
                arrays["windows.table"][k, place[ids[i + k - 1]]].astype(int)
                for k in range(3)
                if 0 <= i + k - 1 < len(ids) and ids[i + k - 1] in place
            )
            for i in range(len(ids))
        ]
        y = np.maximum(np.max(z, axis=0) * arrays["windows.scale"] + arrays["windows.bias"], 0)
        wanted = by_hand(arrays, said, ids) + y @ arrays["windows.matrix"] + arrays["windows.offset"]
        assert logits[row] == pytest.approx(wanted, abs=1e-4)


def test_a_packed_table_is_written_unpacked(made: Path, tmp_path: Path) -> None:
    rows = Rows(("great zip", "torn shoe"))
    manifest = artifact.read_manifest(made)
    done = convert.convert(made, tmp_path / "out", convert.Onnx(), rows)
    for i, tier in enumerate(manifest.tiers):
        data = artifact.read_file(made, manifest, tier.file)
        written = (done.folder / done.compared[i].file).read_bytes()
        assert (written == data) is not bool(tier.options.get("packed"))


def test_a_causal_models_file_takes_any_number_of_rows(tmp_path: Path, table: Path) -> None:
    folder = shipped(tmp_path / "made.nw", {"encoder": tiny_model(family="qwen3")})
    done = export(folder, "onnx", tmp_path / "out", str(table))
    assert done.compared[0].rows == 120
