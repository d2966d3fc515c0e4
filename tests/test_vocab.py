"""Smaller token tables: kept texts keep their outputs, any text still encodes, in every kind of tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from conftest import FAMILIES, GOOD, net, tiny_model
from netweight.data import Dataset, Rows
from netweight.encode import TextEncoder
from netweight.engine.onnx import OnnxEngine
from netweight.errors import ModelError, OptionError
from netweight.export import QuantizedEmbedding, QuantizedLinear, export, lowered
from netweight.layers import FactoredEmbedding
from netweight.loss import SoftTargets
from netweight.model import Model
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.techniques import FactorEmbedding, Quantize, Static, Vocab
from netweight.techniques.vocab import smaller, token_table
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "a stitch in time saves nine, they say",
    "the zipper broke after the first week of wearing",
    "naïve cafés serve crème brûlée; señor",
    "孙悟空 打妖怪 and other stories",
    "running runner runs ran, swimming swimmer swims",
    "unhappiness unkindness unfairness happiness kindness fairness",
) * 3


# --- tokenizers ---


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=240, special_tokens=special))
    ids = [(t, tokenizer.token_to_id(t)) for t in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ids)
    return tokenizer


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<mask>", "<extra>"])
    roberta = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), roberta])
    return tokenizer


def suffix_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<unk>"], end_of_word_suffix="</w>", continuing_subword_prefix="##"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    return tokenizer


def wordlevel() -> Tokenizer:
    words = ["<pad>", "<unk>", *dict.fromkeys(word for text in CORPUS for word in text.split())]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


MAKERS = (wordpiece, byte_bpe, suffix_bpe, unigram, wordlevel)


@cache
def definition(kind: int) -> str:
    return MAKERS[kind]().to_str()


words = st.sampled_from([*" ".join(CORPUS).split(), "sunniness", "unfoxy", "zebra", "😀", "\x00", "ß", "孙空"])
texts = st.lists(st.one_of(words, st.text(max_size=6)), max_size=8).map(" ".join)


@pytest.mark.parametrize("kind", range(len(MAKERS)), ids=lambda i: MAKERS[i].__name__)
@settings(max_examples=30)
@given(data=st.data(), text=texts)
def test_kept_texts_keep_their_tokens(kind: int, data: st.DataObject, text: str) -> None:
    old = TextEncoder(definition(kind), 1024)
    seen = data.draw(st.lists(words, max_size=12))
    used = {int(i) for i in old.encode(seen).ids}
    written, ids = smaller(old.definition, used | {old.pad})
    new = TextEncoder(written, 1024)
    assert new.vocabulary == len(ids) == len(set(ids))
    assert new.tokens() == [old.tokens()[i] for i in ids]
    place = {i: at for at, i in enumerate(ids)}
    # Any text at all encodes, also as a pair, to ids that the smaller table has.
    before, after = old.encode([text]).ids.tolist(), new.encode([text]).ids.tolist()
    assert max([0, *after, *new.encode([text], [text]).ids.tolist()]) < len(ids)
    if set(before) <= set(ids):
        assert after == [place[i] for i in before]
    for word in seen:
        assert new.encode([word]).ids.tolist() == [place[i] for i in old.encode([word]).ids]
    # What falls apart still says the same, where nothing is unknown.
    a, b = (Tokenizer.from_str(d) for d in (old.definition, written))
    if kind == 1:
        assert a.decode(before) == b.decode(after)


def test_pieces_of_last_resort(dataset: Dataset) -> None:
    """A trimmed WordPiece tokenizer spells an unseen word; its [UNK] is for unseen characters only."""
    old = TextEncoder(definition(0), 64)
    new = TextEncoder(smaller(old.definition, set(old.encode(["lazy dog"]).ids.tolist()))[0], 64)
    names = new.tokens()
    assert [names[i] for i in new.encode(["lazy fox"]).ids] == ["[CLS]", "lazy", "f", "##o", "##x", "[SEP]"]
    assert [names[i] for i in new.encode(["dog 😀"]).ids] == ["[CLS]", "dog", "[UNK]", "[SEP]"]


@pytest.mark.parametrize("apart", [True, False])
def test_continuations_that_no_word_has_go(apart: bool) -> None:
    # BERT's Chinese vocabulary has each Han character twice, and its tokenizer makes each a word by itself.
    words = ["[UNK]", "好", "##好", "a", "##a", "##!", "ab", "##ab"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=apart)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    definition, ids = smaller(tokenizer.to_str(), set())
    left = [words[i] for i in ids]
    assert left == ["[UNK]", "好", *([] if apart else ["##好"]), "a", "##a"]
    for text in ("a好a", "好好", "aa好"):
        assert Tokenizer.from_str(definition).encode(text).tokens == tokenizer.encode(text).tokens


@pytest.mark.parametrize(
    ("cut", "character"),
    [
        (pre_tokenizers.Whitespace(), "!"),
        (pre_tokenizers.Digits(individual_digits=False), "1"),
        (pre_tokenizers.UnicodeScripts(), "б"),
    ],
    ids=["signs", "digits", "scripts"],
)
def test_continuations_behind_themselves_stay(cut: Any, character: str) -> None:
    words = ["[UNK]", "a", "##a", character, f"##{character}", "ab"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = cut
    definition, _ = smaller(tokenizer.to_str(), set())
    assert Tokenizer.from_str(definition).encode(character * 2).tokens == [character, f"##{character}"]


def test_merges_go_with_their_tokens() -> None:
    old = TextEncoder(definition(1), 64)
    whole = json.loads(old.definition)["model"]
    written, ids = smaller(old.definition, set(old.encode(["the"]).ids.tolist()))
    model = json.loads(written)["model"]
    assert ["t", "h"] in [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    assert len(model["merges"]) < 5 < len(whole["merges"])
    # 256 bytes, three special tokens, two added ones behind them, and what "the" is merged from.
    assert len(ids) == 256 + 5 + len(model["merges"])
    assert json.loads(written)["added_tokens"][-1] == {
        **json.loads(old.definition)["added_tokens"][-1],
        "id": len(ids) - 1,
    }


def test_merges_written_as_strings() -> None:
    stored = json.loads(definition(1))
    stored["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    one, other = smaller(json.dumps(stored), {70, 400}), smaller(definition(1), {70, 400})
    assert one[1] == other[1]
    assert TextEncoder(one[0]).encode(CORPUS).ids.tolist() == TextEncoder(other[0]).encode(CORPUS).ids.tolist()


def test_what_a_unigram_tokenizer_needs() -> None:
    stored = json.loads(definition(3))
    lowest = min(stored["model"]["vocab"], key=lambda item: item[1])
    written = json.loads(smaller(definition(3), {9})[0])
    assert lowest in written["model"]["vocab"], "the cost of an unknown character would change"
    assert written["model"]["vocab"][written["model"]["unk_id"]][0] == "<unk>"
    assert written["padding"]["pad_id"] == 1
    stored["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    stored["model"]["byte_fallback"] = True
    new = TextEncoder(smaller(json.dumps(stored), {9})[0])
    assert sum(name.startswith("<0x") for name in new.tokens()) == 256


def test_tokenizers_that_cannot_be_trimmed() -> None:
    stored = json.loads(definition(0))
    stored["model"]["unk_token"] = "[NONE]"
    with pytest.raises(ModelError, match="this WordPiece tokenizer has no token for unknown text"):
        smaller(json.dumps(stored), {1})
    stored["model"]["type"] = "Oracle"
    with pytest.raises(ModelError, match="a tokenizer of type 'Oracle' cannot be trimmed"):
        smaller(json.dumps(stored), {1})


def test_odd_numbers_of_added_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netweight.techniques.vocab._renumber", lambda stored, place: None)
    with pytest.raises(ModelError, match="numbers its added tokens in a way that Netweight cannot repeat"):
        smaller(definition(0), {150, 239})


# --- models ---


@pytest.fixture
def pooled(dataset: Dataset) -> Dataset:
    """Training rows without some words, and a pool that has one of them."""
    rows = Rows(
        tuple(text.replace("dress", "zip").replace("parcel", "zip") for text in dataset.train.text), dataset.train.label
    )
    return replace(dataset, train=rows, pool=Rows(("my parcel", "the zip")))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, pooled: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family)
    small = Vocab()(model, Local(pooled), PLAN)
    names = small.encoder.tokens()
    assert "parcel" in names, "the pool counts"
    assert "dress" not in names
    assert small.encoder.vocabulary == len(names) < model.encoder.vocabulary
    assert net(small).config.vocab_size == len(names) == token_table(net(small))[1].num_embeddings
    for text in pooled.train.text[:8]:
        before = logits_of(model, model.encoder.encode([text]))
        assert torch.equal(logits_of(small, small.encoder.encode([text])), before)
    assert logits_of(small, small.encoder.encode(["a dress that nobody knows"])).isfinite().all()
    small.save(tmp_path)
    again = Model.load(tmp_path)
    assert again.digest == small.digest
    assert (small.encoder.max_length, small.encoder.pad) == (again.encoder.max_length, names.index("[PAD]"))


def test_a_least_count(pooled: Dataset) -> None:
    model = tiny_model()
    counts = np.bincount(model.encoder.encode([*pooled.train.text, *pooled.pool.text]).ids)  # type: ignore[union-attr]
    small = Vocab(least=10)(model, Local(pooled), PLAN)
    wanted = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} | {model.encoder.tokens()[i] for i in np.flatnonzero(counts >= 10)}
    assert set(small.encoder.tokens()) == wanted


def test_common_tokens_stay(model: Model, pooled: Dataset) -> None:
    """The first ones, and behind them what is used."""
    run = Local(pooled)
    names, used = model.encoder.tokens(), Vocab()(model, run, PLAN).encoder.tokens()
    for common in range(0, len(names), 5):
        kept = {*names[:common], *used}
        if len(kept) < len(names):
            assert Vocab(common=common)(model, run, PLAN).encoder.tokens() == [n for n in names if n in kept]
    with pytest.raises(OptionError, match="every token occurs 1 times, is among the first 99 or is needed"):
        Vocab(common=99)(model, run, PLAN)


def test_places_held_for_words_to_come_are_not_common(pooled: Dataset) -> None:
    """What the tokenizer itself cuts apart is given by no text."""
    held = ["[unused0]", "zip-lock"]
    model = tiny_model(more=[*held, "unseen"])
    names = model.encoder.tokens()
    small = Vocab(common=len(names))(model, Local(pooled), PLAN)
    assert small.encoder.tokens() == [name for name in names if name not in held]
    given = model.encoder.encode(names).ids.tolist()
    assert names.index("unseen") in given
    assert not {names.index(name) for name in held} & set(given)


def test_contract_of_vocab(model: Model, pooled: Dataset, tmp_path: Path) -> None:
    TechniqueContract(Vocab(), model, lambda: Local(pooled), PLAN, pooled.train.text[:16]).check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_contracts_of_every_family(family: str, pooled: Dataset, tmp_path: Path) -> None:
    for technique in (Vocab(), FactorEmbedding(4)):
        folder = tmp_path / type(technique).__name__
        model = tiny_model(family=family)
        TechniqueContract(technique, model, lambda: Local(pooled), PLAN, pooled.train.text[:16]).check(folder)


def test_ranges_outlive_a_trim(model: Model, pooled: Dataset) -> None:
    run = Local(pooled)
    one = Vocab()(Quantize(rows=40)(model, run, PLAN), run, PLAN)
    other = Quantize(rows=40)(Vocab()(model, run, PLAN), run, PLAN)
    assert one.ranges == other.ranges
    assert one.digest == other.digest


def test_padding_moves_with_its_token(pooled: Dataset) -> None:
    model = tiny_model()
    stored = json.loads(model.encoder.definition)
    dress, vocab = model.encoder.tokens().index("dress"), stored["model"]["vocab"]
    vocab["[PAD]"], vocab["dress"] = dress, 0
    model = replace(model, encoder=TextEncoder(json.dumps(stored), 32))
    net(model).config.pad_token_id = dress
    small = Vocab()(model, Local(pooled), PLAN)
    assert small.encoder.pad == net(small).config.pad_token_id == small.encoder.tokens().index("[PAD]") == dress - 1
    assert token_table(net(small))[1].padding_idx == dress - 1
    roberta = replace(tiny_model(family="roberta"), encoder=model.encoder)
    net(roberta).config.pad_token_id = dress
    with pytest.raises(ModelError, match="roberta counts positions from its padding token's id"):
        Vocab()(roberta, Local(pooled), PLAN)


def test_refusals(model: Model, pooled: Dataset) -> None:
    run = Local(pooled)
    with pytest.raises(OptionError, match="least is 0"):
        Vocab(least=0)(model, run, PLAN)
    with pytest.raises(OptionError, match="common is -1; use 0"):
        Vocab(common=-1)(model, run, PLAN)
    small = Vocab()(model, run, PLAN)
    with pytest.raises(OptionError, match="every token occurs 1 times or is needed"):
        Vocab()(small, run, PLAN)
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    for technique in (Vocab(), FactorEmbedding(4)):
        with pytest.raises(ModelError, match=f"{type(technique).__name__} works on a transformer"):
            technique(static, run, PLAN)
    with pytest.raises(OptionError, match="rank is 33; the table of 25 tokens and width 32 has 1 to 25"):
        FactorEmbedding(33)(model, run, PLAN)
    factored = FactorEmbedding(4)(model, run, PLAN)
    for technique in (Vocab(), FactorEmbedding(2)):
        with pytest.raises(ModelError, match="the token table is a FactoredEmbedding already"):
            technique(factored, run, PLAN)
    with pytest.raises(OptionError, match="teachers must share the vocabulary"):
        run.fit(small, SoftTargets(model.task, (model,)), replace(PLAN, splice=1.0))


# --- factors ---


def test_contract_of_factors(model: Model, pooled: Dataset, tmp_path: Path) -> None:
    TechniqueContract(FactorEmbedding(4), model, lambda: Local(pooled), PLAN, pooled.train.text[:16]).check(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_changes_rounding_only(family: str, pooled: Dataset) -> None:
    model = tiny_model(family=family, more=[f"word{i}" for i in range(20)])
    run = Local(pooled)
    torch.testing.assert_close(
        run.outputs(FactorEmbedding(32)(model, run, PLAN)), run.outputs(model), atol=1e-5, rtol=1e-4
    )


def test_factors_are_the_weighted_best(model: Model, pooled: Dataset) -> None:
    """The weighted error is the sum of the singular values that were left out, squared (Eckart and Young, 1936)."""
    factored = FactorEmbedding(6)(model, Local(pooled), PLAN)
    table = token_table(net(model))[1].weight.detach().double()
    got = net(factored).get_submodule("backbone.embeddings.word_embeddings")
    assert isinstance(got, FactoredEmbedding)
    approximate = got(torch.arange(len(table))).detach().double()
    pool = pooled.pool.text if pooled.pool else ()
    counts = np.bincount(model.encoder.encode([*pooled.train.text, *pool]).ids, minlength=len(table))
    weight = torch.from_numpy(counts + 1.0).sqrt()[:, None]
    singular = torch.linalg.svdvals(weight * table)
    error = (weight * (approximate - table)).square().sum()
    torch.testing.assert_close(error, singular[6:].square().sum(), rtol=1e-4, atol=0.0)


# --- int8 behind both ---


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 32], ids=["trimmed", "factored"])
def test_large_tables_are_int8_in_the_file(rank: int | None, dataset: Dataset) -> None:
    more = [f"w{i}" for i in range(4000)]
    model = tiny_model(more=more)
    texts = tuple(" ".join((GOOD[i % 5], *more[20 * i : 20 * i + 20])) for i in range(160))
    run = Local(replace(dataset, train=Rows(texts, ("good", "bad") * 80)))
    small = Vocab()(model, run, PLAN)
    assert small.encoder.vocabulary == 4 + 5 + 3200
    if rank:
        small = FactorEmbedding(rank)(small, run, PLAN)
    quantized = Quantize(rows=40)(small, run, PLAN)
    network = lowered(quantized)
    name = "backbone.embeddings.word_embeddings"
    kinds: dict[str, type[Any]] = {f"{name}.table": QuantizedEmbedding, f"{name}.project": QuantizedLinear}
    for at, kind in kinds.items() if rank else [(name, QuantizedEmbedding)]:
        assert isinstance(network.get_submodule(at), kind)
    exported = export(quantized)
    tables = [t for t in onnx.load_from_string(exported.plain).graph.initializer if 3209 in t.dims and 32 in t.dims]
    assert [t.data_type for t in tables] == [onnx.TensorProto.INT8]
    engine = OnnxEngine(exported.plain, quantized.encoder.pad, 1)
    tokens = quantized.encoder.encode(texts[:32])
    wanted = logits_of(replace(quantized, network=network), tokens).numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(engine.logits(tokens, 8), wanted, atol=0.02 * np.abs(wanted).max())
    near = logits_of(small, tokens).numpy()
    np.testing.assert_allclose(wanted, near, atol=0.1 * np.abs(near).max())
