"""Every engine that can ship keeps the contract; the cascade equals a loop; errors say what came."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

from conftest import BAD, GOOD, THINGS, many_rows, net, tiny_encoder, tiny_model
from netweight.artifact import Tier
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.engine import Engine, Outputs
from netweight.engine.cascade import cascade, tier_engine
from netweight.engine.exits import ExitsEngine, sure
from netweight.engine.onnx import OnnxEngine, OpenvinoEngine
from netweight.engine.static import window_table
from netweight.errors import ArtifactError, CorruptArtifact, MissingExtra, OptionError
from netweight.export import export
from netweight.model import Model
from netweight.packing import packed, unpacked_file
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.task import Classify, Prediction, Score, ScorePrediction
from netweight.techniques import EarlyExit, LinearFloor, Quantize, Static, Technique
from netweight.testing import EngineContract, TechniqueContract
from netweight.train import Plan

WORDS = (*GOOD, *BAD, *THINGS)


def mixed_rows(n: int, pairs: bool = False, scores: bool = False) -> Rows:
    """Texts of 0 to 25 words, so that batches must pad; empty ones among them."""
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(0, 25)))) for _ in range(n)]
    other = tuple(" ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) for _ in range(n)) if pairs else None
    labels = [sum(w in GOOD for w in t.split()) - sum(w in BAD for w in t.split()) for t in texts]
    return Rows(tuple(texts), tuple(f"{v}" if scores else "good" if v > 0 else "bad" for v in labels), other)


def data_of(rows: Rows) -> Dataset:
    return Dataset(rows.take(range(120)), rows.take(range(120, 140)), rows.take(range(140, 160)), Sealed(rows))


TIERS: dict[str, tuple[Technique, bool, bool]] = {
    "static": (Static(width=8, buckets=64, epochs=4, batch_size=16), False, False),
    "static, no bigrams": (Static(width=8, buckets=0, epochs=4, batch_size=16), False, False),
    "static, hidden head": (Static(width=8, buckets=64, hidden=6, epochs=4, batch_size=16), False, False),
    "static, windows": (Static(width=8, buckets=64, filters=8, epochs=4, batch_size=16), False, False),
    "static, windows of pairs": (Static(width=8, filters=8, reach=3, epochs=4, batch_size=16), True, False),
    "static, pairs": (Static(width=8, buckets=64, epochs=4, batch_size=16), True, False),
    "static, scores": (Static(width=8, buckets=64, epochs=4, batch_size=16), False, True),
    "linear": (LinearFloor(buckets=64), False, False),
    "linear, without pairs": (LinearFloor(buckets=0), False, False),
    "onnx int8": (Quantize(rows=60), False, False),
    "onnx int8, pairs": (Quantize(rows=60), True, False),
}


@cache
def tier_of(name: str) -> tuple[Model, Tier, bytes]:
    technique, pairs, scores = TIERS[name]
    rows = mixed_rows(160, pairs, scores)
    model = tiny_model(Score(0.0, 2.0) if scores else None, layers=1)
    made = technique(model, Local(data_of(rows)), Plan(batch_size=16, precision="fp32"))
    exported = export(made)
    return made, Tier("only", exported.kind, "file", exported.options), exported.data


def engine_of(name: str, engine: str | None = None) -> Engine:
    model, tier, data = tier_of(name)
    tier = replace(tier, engine=engine or tier.engine)
    return Engine(model.task, model.encoder, [(tier, tier_engine(tier, data, model.encoder.pad, 1))], name)


@pytest.mark.parametrize("name", TIERS)
def test_contract(name: str) -> None:
    _, pairs, scores = TIERS[name]
    rows = mixed_rows(500, pairs, scores)
    EngineContract(engine_of(name), rows.text, rows.pair).check()


@pytest.mark.parametrize("name", [name for name in TIERS if not name.startswith("onnx")])
def test_tables_say_what_the_network_says(name: str) -> None:
    """But for their rounding to int8."""
    model = tier_of(name)[0]
    rows = mixed_rows(200, *TIERS[name][1:])
    tokens = model.encoder.encode(rows.text, rows.pair)
    wanted, found = logits_of(model, tokens).numpy(), engine_of(name).logits(0, tokens)
    assert np.abs(found - wanted).max() < 0.03 * np.ptp(wanted)


@pytest.mark.parametrize("name", ["onnx int8", "onnx int8, pairs"])
def test_contract_of_openvino(name: str) -> None:
    pytest.importorskip("openvino")
    rows = mixed_rows(500, TIERS[name][1])
    EngineContract(engine_of(name, "openvino"), rows.text, rows.pair).check()


def test_contract_of_a_cascade() -> None:
    model, cheap, table = tier_of("static")
    _, strong, onnx = tier_of("onnx int8")
    rows = mixed_rows(500)
    tiers = [
        (replace(cheap, name="cheap", threshold=0.55), tier_engine(cheap, table, 0, 1)),
        (replace(strong, name="strong"), tier_engine(strong, onnx, 0, 1)),
    ]
    engine = Engine(model.task, model.encoder, tiers, "both")
    said = {p.tier for p in engine.predict(rows.text)}
    assert said == {"cheap", "strong"}, "the case tests nothing unless both tiers answer"
    EngineContract(engine, rows.text).check()


@pytest.mark.parametrize("quantized", [False, True])
def test_contract_of_exits(quantized: bool) -> None:
    model, run, plan = tiny_model(), Local(data_of(mixed_rows(160))), Plan(batch_size=16, precision="fp32")
    model = EarlyExit((1,), epochs=1, splice=0.0)(model, run, plan)
    exported = export(Quantize(rows=60)(model, run, plan) if quantized else model)
    rows = mixed_rows(500)
    stages = ExitsEngine(exported.data, exported.options, model.encoder.pad, 1)
    confidence = np.sort(sure(stages.stages(model.encoder.encode(rows.text), 32)[0]))[100:400]
    widest = int(np.diff(confidence).argmax())
    threshold = float(confidence[widest : widest + 2].mean())
    tier = Tier("exits", exported.kind, "file", {**exported.options, "thresholds": [threshold]})
    engine = Engine(
        model.task, model.encoder, [(tier, tier_engine(tier, exported.data, model.encoder.pad, 1))], "exits"
    )
    EngineContract(engine, rows.text).check()


def test_the_contract_sees_an_engine_that_looks_at_its_neighbours() -> None:
    class Neighbourly:
        def logits(self, tokens: object, batch: int) -> np.ndarray:
            n = len(tokens)  # type: ignore[arg-type]
            return np.stack([np.arange(n) % 2, np.full(n, 0.5)], axis=1).astype(np.float32)

    engine = Engine(Classify(("a", "b")), tiny_encoder(), [(Tier("t", "static", "f"), Neighbourly())], "bad")
    with pytest.raises(AssertionError, match="answers differ"):
        EngineContract(engine, mixed_rows(20).text).check()


def test_predictions_have_label_confidence_and_tier() -> None:
    (found,) = engine_of("static").predict(["great lovely zip"])
    assert isinstance(found, Prediction)
    assert found.label in ("bad", "good")
    assert 0.5 <= found.confidence <= 1
    assert found.tier == "only"
    (value,) = engine_of("static, scores").predict(["great lovely zip"])
    assert isinstance(value, ScorePrediction)


def slow_cascade(task: Classify, tiers: list[Tier], logits: list[np.ndarray]) -> Outputs:
    """Row by row."""
    n = len(logits[0])
    out = Outputs(np.zeros((n, task.outputs), np.float32), np.zeros(n), np.zeros(n, np.int64))
    for row in range(n):
        for i, tier in enumerate(tiers):
            out.logits[row] = logits[i][row] + np.float32(tier.before) * out.logits[row]
            z = out.logits[row].astype(np.float64) / tier.temperature
            p = float((np.exp(z - z.max()) / np.exp(z - z.max()).sum()).max())
            if p >= tier.threshold or i == len(tiers) - 1:
                out.confidence[row], out.tier[row] = p, i
                break
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_the_cascade_equals_a_loop(n: int, depth: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    task = Classify(("a", "b", "c"))
    logits = [rng.normal(size=(n, 3)).astype(np.float32) for _ in range(depth)]
    numbers = st.lists(st.tuples(st.floats(0.2, 5), st.floats(0, 1), st.floats(0, 2)), min_size=depth, max_size=depth)
    tiers = [
        Tier(f"{i}", "static", "f", {}, heat, level if i < depth - 1 else 0.0, weight)
        for i, (heat, level, weight) in enumerate(data.draw(numbers))
    ]
    asked: list[int] = []

    def answer(i: int, rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return logits[i][rows]

    found, wanted = cascade(task, tiers, n, answer), slow_cascade(task, tiers, logits)
    assert (found.tier == wanted.tier).all()
    assert (found.logits == wanted.logits).all()
    assert np.allclose(found.confidence, wanted.confidence)
    assert asked == [int((wanted.tier >= i).sum()) for i in range(len(asked))], "a tier saw rows that were not its own"


def test_scores_never_hand_over() -> None:
    tiers = [Tier("cheap", "static", "f", {}, 1.0, 0.99), Tier("strong", "static", "f")]
    found = cascade(Score(), tiers, 3, lambda i, rows: np.full((len(rows), 1), float(i)))
    assert found.tier.tolist() == [0, 0, 0]


def test_errors_say_what_came() -> None:
    engine = engine_of("static")
    with pytest.raises(OptionError, match="texts is one string"):
        engine.predict("great")
    with pytest.raises(OptionError, match=r"texts\[1\] is of type int; pass a string for every row"):
        engine.predict(["great", 3])  # type: ignore[list-item]
    # Python 3.12 takes a slice for a key, and some tokenizers take a list of two strings for a pair.
    for row in ({"text": "great"}, ["great", "zip"], None, float("nan"), b"great"):
        with pytest.raises(OptionError, match=r"texts\[0\] is of type"):
            engine.predict([row])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="texts is of type NoneType; pass a list of strings"):
        engine.predict(None)  # type: ignore[arg-type]
    for table in ({"review": ["great"]}, SimpleNamespace(columns=["review"])):
        with pytest.raises(OptionError, match=r"texts is a table; pass one column, for example df\['review'\]"):
            engine.predict(table)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pairs is one string"):
        engine.predict(["a", "b"], "cd")
    with pytest.raises(OptionError, match=r"pairs\[1\] is of type NoneType"):
        engine.predict(["a", "b"], ["c", None])  # type: ignore[list-item]
    assert engine.predict(np.array(["great"], object)) == engine.predict(["great"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="valid Unicode"):
        engine.predict(["\ud800"])
    with pytest.raises(OptionError, match="one pair text for each"):
        engine.predict(["a", "b"], ["c"])
    with pytest.raises(OptionError, match="batch is -1"):
        engine.predict(["a"], batch=-1)
    with pytest.raises(ArtifactError, match="bad has no tier"):
        Engine(engine.task, engine.encoder, [], "bad")
    with pytest.raises(ArtifactError, match="wants engine 'quantum'"):
        tier_engine(Tier("t", "quantum", "f"), b"", 0, 1)
    with pytest.raises(CorruptArtifact, match="lacks what its engine needs"):
        tier_engine(Tier("t", "static", "f", {"buckets": 0}), b"nothing", 0, 1)
    stages = packed({"first": np.zeros(3, np.uint8)})
    for options in ({}, {"thresholds": None}, {"thresholds": []}):
        with pytest.raises(CorruptArtifact, match="exits need thresholds, and stages that are numbered"):
            tier_engine(Tier("t", "exits", "f", options), stages, 0, 1)
    with pytest.raises(CorruptArtifact, match="OverflowError"):
        tier_engine(Tier("t", "exits", "f", {"thresholds": [10**400]}), stages, 0, 1)
    _, tier, data = tier_of("static")
    for wrong in (None, "many", 10**30, -1, float("inf")):
        with pytest.raises(CorruptArtifact, match="lacks what its engine needs"):
            tier_engine(replace(tier, options={**tier.options, "buckets": wrong}), data, 0, 1)
    flat = load_arrays(unpacked_file(data) if tier.options.get("packed") else data) | {"table": np.zeros(99, np.int8)}
    with pytest.raises(CorruptArtifact, match="lacks what its engine needs: IndexError"):
        tier_engine(replace(tier, options={**tier.options, "packed": False}), save(flat), 0, 1)
    with pytest.raises(CorruptArtifact, match="'norm'"):
        tier_engine(replace(tier, options={"buckets": 64}), data, 0, 1)
    _, tier, data = tier_of("static, windows")
    for name, value in {
        "windows.known": np.array([1_000_000], np.int32),
        "windows.taps": np.zeros(3, np.int8),
    }.items():
        with pytest.raises(CorruptArtifact, match="lacks what its engine needs"):
            tier_engine(tier, save(load_arrays(data) | {name: value}), 0, 1)


def test_windows_do_not_look_beyond_a_row_and_whole_numbers_do_not_depend_on_the_batch() -> None:
    _, tier, data = tier_of("static, windows")
    engine = tier_engine(tier, data, 0, 1)
    encoder = tiny_encoder()
    texts = mixed_rows(60).text
    together = engine.logits(encoder.encode(texts), 512)
    for size in (1, 7):
        assert np.array_equal(
            engine._windows(encoder.encode(texts)),
            np.concatenate(  # type: ignore[attr-defined]
                [engine._windows(encoder.encode(texts[i : i + size])) for i in range(0, len(texts), size)]  # type: ignore[attr-defined]
            ),
        )
        np.testing.assert_allclose(engine.logits(encoder.encode(texts), size), together, atol=1e-5)


def test_threads_that_share_rows_say_what_one_says() -> None:
    """Whatever the number of rows, and whoever else asks at the same time, also for the first time."""
    model, tier, data = tier_of("onnx int8")
    data = unpacked_file(data) if tier.options else data
    tokens = model.encoder.encode(mixed_rows(90).text)
    alone, shared = (OnnxEngine(data, model.encoder.pad, threads) for threads in (1, 3))
    wanted = alone.logits(tokens, 1)

    def asked(n: int) -> None:
        found = shared.logits(tokens.take(np.arange(n)), 32)
        np.testing.assert_allclose(found, wanted[:n], atol=1e-5)
        assert (found.argmax(1) == wanted[:n].argmax(1)).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(asked, [90, 41, 7, 2, 1, 0, 90, 13]))


def test_a_warm_engine_makes_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tier, data = tier_of("onnx int8")
    engine = Engine(model.task, model.encoder, [(tier, tier_engine(tier, data, model.encoder.pad, 2))], "warm")
    engine.warm()

    def made(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("netweight.engine.onnx.session", made)
    for n in (1, 2, 40):
        assert len(engine.predict(mixed_rows(n).text)) == n


def test_openvino_tiers_run_on_onnx_runtime_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tier_of("onnx int8")[2]
    rows = mixed_rows(60)
    usual = engine_of("onnx int8").predict(rows.text)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"'\.\[openvino\]'"):
        OpenvinoEngine(data, 0, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"certified on OpenVINO, which is not installed; ONNX Runtime runs the same"):
        engine = engine_of("onnx int8", "openvino")
    assert engine.predict(rows.text) == usual


def test_temperature_moves_confidence_and_no_label() -> None:
    model, tier, data = tier_of("static")
    rows = many_rows(50)
    cool, warm = (
        Engine(model.task, model.encoder, [(replace(tier, temperature=t), tier_engine(tier, data, 0, 1))], "t").predict(
            rows.text
        )
        for t in (0.5, 5.0)
    )
    assert [p.label for p in cool] == [p.label for p in warm]
    assert all(a.confidence >= b.confidence for a, b in zip(cool, warm))  # type: ignore[union-attr]


@pytest.mark.parametrize("width", [8, 2_000])
def test_the_table_of_windows_is_the_product_of_its_factors(width: int) -> None:
    """Whole numbers in fp32 or, where they are too many for it, in fp64: exactly what int64 gives."""
    rng = np.random.default_rng(width)
    held = {
        "windows.words": rng.integers(-127, 128, (5, width), np.int8),
        "windows.taps": rng.integers(-127, 128, (3, width, 4), np.int8),
        "windows.word_scale": rng.uniform(0.1, 1, (5, 1)).astype(np.float32),
        "windows.tap_scale": rng.uniform(0.1, 1, 4).astype(np.float32),
        "windows.scale": np.full(4, 127 * width**0.5, np.float32),
    }
    whole = held["windows.words"].astype(np.int64) @ held["windows.taps"].astype(np.int64)
    expected = whole * held["windows.word_scale"] * (held["windows.tap_scale"] / held["windows.scale"])
    table = window_table(held)
    assert table.dtype == np.int8
    assert np.abs(table - expected).max() <= 0.5 + 1e-4
    assert len(np.unique(table)) > 5


@pytest.mark.parametrize("technique", [Quantize(rows=60), EarlyExit((1,), epochs=1, splice=0.0)], ids=["onnx", "exits"])
def test_encoders_tell_the_second_text_from_the_first(technique: Technique) -> None:
    rows, model = mixed_rows(160, pairs=True), tiny_model(layers=2)
    with torch.no_grad():
        net(model).backbone.embeddings.token_type_embeddings.weight[1] += 1.0  # type: ignore[union-attr,index,operator]
    data, plan = data_of(rows), Plan(batch_size=16, precision="fp32")
    made = technique(model, Local(data), plan)
    texts, pairs = rows.text[:40], (rows.pair or ())[:40]
    TechniqueContract(technique, made, lambda: Local(data), plan, texts, pairs).survives_export(made)
    tokens = made.encoder.encode(texts, pairs)
    alone = replace(tokens, types=np.zeros_like(tokens.types))
    assert not torch.allclose(logits_of(made, tokens), logits_of(made, alone), atol=1e-2)
