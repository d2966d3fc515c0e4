"""Models from nothing but texts: repeatable, in every family, and able to learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import many_rows, tiny_rows
from netweight.data import Dataset
from netweight.encode import TextEncoder, Tokens
from netweight.errors import DataError, OptionError
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.scratch import Family, scratch, token_vectors, word_pieces
from netweight.task import Classify
from netweight.techniques import Finetune, Pretrain
from netweight.techniques.pretrain import special_ids
from netweight.train import Plan

TASK = Classify(("bad", "good"))
TEXTS = (*tiny_rows(40).text, "质量很好，物流也快！", "质量不好，太慢了 iPhone 13", "Très BON produit", "")
PLAN = Plan(batch_size=16, precision="fp32")
_SMALL = {"vocabulary": 300, "layers": 1, "hidden": 32, "heads": 2, "max_length": 24}


def small(family: Family = "bert", seed: int = 0) -> Model:
    return scratch(TEXTS, TASK, family=family, seed=seed, **_SMALL)  # type: ignore[arg-type]


def test_chinese_is_taken_apart_and_words_are_not() -> None:
    encoder = small().encoder
    names = encoder.tokens()
    said = [names[i] for i in encoder.encode(["质量好 ZIP was 13"]).ids]
    assert said == ["[CLS]", "质", "量", "好", "zip", "was", "13", "[SEP]"]
    assert names[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [names[i] for i in encoder.encode(["龘"]).ids] == ["[CLS]", "[UNK]", "[SEP]"]
    pair = encoder.encode(["zip"], ["was"])
    assert pair.types.tolist() == [0, 0, 0, 1, 1]
    assert special_ids(small()) == (4, (0, 2, 3, 4))


@pytest.mark.parametrize("word", ["バッグ", "ดีมาก", "tệ", "हिन्दी"])
def test_what_stands_on_letters_stays(word: str) -> None:
    made = word_pieces([word], 60)
    assert "".join(made.encode(word, add_special_tokens=False).tokens).replace("##", "") == word
    assert TextEncoder(made.to_str())._words is not None


def test_a_clause_without_spaces_is_not_one_unknown_word() -> None:
    made = word_pieces(["ดีมากดีมาก"], 60)
    assert "[UNK]" not in made.encode("ดีมาก" * 60).tokens
    # The table of words asks the same tokenizer.
    encoder = TextEncoder(word_pieces(["abcabc"], 60).to_str())
    assert encoder._words is not None
    assert encoder._words.ids("abc" * 60) is not None
    assert encoder.unknown not in encoder.encode(["abc" * 60]).ids


@pytest.mark.parametrize("family", get_args(Family))
def test_every_family_is_made_saved_and_exact(family: Family, tmp_path: Path) -> None:
    made = small(family)
    assert isinstance(made.network, Transformer)
    assert made.depth == 1
    assert made.network.head.weight.abs().sum() == 0
    assert made.network.pooling == ("last" if family in ("gpt2", "qwen3") else "mean")
    assert made.digest == small(family).digest
    assert made.digest != small(family, seed=1).digest
    assert made.encoder.vocabulary <= 300
    assert made.network.config.vocab_size == made.encoder.vocabulary
    torch.nn.init.normal_(made.network.head.weight)
    made = Model(made.network, made.encoder, made.task, made.base)
    made.save(tmp_path)
    # The longest row there can be, and one of no text.
    tokens = made.encoder.encode(["zip was great " * 30, "", "质量"])
    assert tokens.lengths.tolist()[0] == 24
    said = logits_of(Model.load(tmp_path), tokens)
    assert torch.equal(said, logits_of(made, tokens))
    assert said.isfinite().all()
    for i in range(3):
        alone = tokens.take(torch.tensor([i]).numpy())
        torch.testing.assert_close(logits_of(made, alone)[0], said[i], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_same_in_another_process() -> None:
    code = (
        "from netweight.scratch import scratch; from netweight.task import Classify; import sys, json;"
        "texts = json.loads(sys.stdin.read());"
        "print(scratch(texts, Classify(('bad', 'good')), vocabulary=400, layers=1, hidden=16, heads=2).digest)"
    )
    texts = list(many_rows(200).text)
    here = scratch(texts, TASK, vocabulary=400, layers=1, hidden=16, heads=2).digest
    given = json.dumps(texts)
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    there = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, check=True, env=environment
    )
    assert there.stdout.strip() == here


@settings(max_examples=25)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(20, 80))
def test_a_vocabulary_is_never_larger_than_asked_and_repeats(texts: list[str], size: int) -> None:
    one, two = word_pieces(texts, size), word_pieces(texts, size)
    assert one.get_vocab_size() <= size
    assert sorted(one.get_vocab().values()) == list(range(one.get_vocab_size()))
    assert one.to_str() == two.to_str()


def test_texts_may_come_one_by_one() -> None:
    assert scratch(iter(TEXTS), TASK, **_SMALL).digest == small().digest  # type: ignore[arg-type]


def test_ties_between_merges_are_broken_alike() -> None:
    texts = many_rows(300).text
    assert len({word_pieces(texts, 250).to_str() for _ in range(5)}) == 1


def test_the_global_random_state_neither_counts_nor_changes() -> None:
    torch.manual_seed(1)
    one, state = small().digest, torch.get_rng_state()
    torch.manual_seed(2)
    assert small().digest == one
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def tokens(*rows: tuple[int, ...]) -> Tokens:
    """Rows of ids."""
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    return Tokens(ids, np.zeros_like(ids), np.cumsum([0, *map(len, rows)]))


@given(st.lists(st.lists(st.integers(0, 11), max_size=9).map(tuple), min_size=1, max_size=12))
def test_token_vectors_are_those_of_the_dense_matrix(rows: list[tuple[int, ...]]) -> None:
    counts = np.zeros((12, 12))
    for row in rows:
        for i, one in enumerate(row):
            for j, other in enumerate(row):
                if 1 <= abs(i - j) <= 4 and min(one, other) >= 2:  # 0 and 1 are special
                    counts[one, other] += 1 / abs(i - j)
    often, context = counts.sum(axis=1, keepdims=True), counts.sum(axis=0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nan_to_num(np.log(counts * context.sum() / (often * context)), neginf=0).clip(0)
    found = token_vectors(tokens(*rows), 12, (0, 1), 12)
    if not information.any():
        assert not found.any()
        return
    # Rotations and signs of singular vectors are free, lengths and angles between tokens are not.
    u, s, _ = np.linalg.svd(information)
    expected = (u * np.sqrt(s))[:, s > 1e-9]
    near = often[:, 0] > 0
    expected[near] -= expected[near].mean(axis=0)
    expected[~near] = 0
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_words_in_like_places_start_near_each_other() -> None:
    texts = [f"the {word} broke after a {unit}" for word in ("zip", "strap") for unit in ("week", "month")] * 5
    texts += [f"very {word} to wear every day" for word in ("soft", "warm")] * 5
    made = scratch(texts, TASK, **_SMALL)  # type: ignore[arg-type]
    table = made.network.backbone.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    names = made.encoder.tokens()
    zip_, strap, soft = (table[names.index(word)] for word in ("zip", "strap", "soft"))
    near, far = (torch.cosine_similarity(zip_, other, dim=0).item() for other in (strap, soft))
    assert near > 0.8 > 0.3 > far
    # As large as random ones: layers start from the scale that they expect.
    assert 0.015 < table[len(made.encoder.specials) + 3 :].std() < 0.025


def test_pretraining_and_fine_tuning_go_on_from_it(dataset: Dataset) -> None:
    run, model = Local(dataset), small()
    pretrained = Pretrain(epochs=2, learning_rate=2e-3)(model, run, PLAN)
    tuned = Finetune(epochs=4, learning_rate=2e-3, freeze_embeddings=False)(pretrained, run, PLAN)
    assert run.quality(tuned) == 1.0
    assert tuned.base.name == "scratch"


def test_refusals() -> None:
    with pytest.raises(OptionError, match="family 't5' cannot be made from scratch; use bert, roberta"):
        scratch(TEXTS, TASK, family="t5")  # type: ignore[arg-type]
    for sizes in ({"hidden": 30, "heads": 4}, {"layers": 0}, {"heads": 0}):
        with pytest.raises(OptionError, match="do not go together; use at least one layer"):
            scratch(TEXTS, TASK, **sizes)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a vocabulary of 100 is too small; use 260"):
        scratch(TEXTS, TASK, vocabulary=100)
    with pytest.raises(OptionError, match="max_length is 2; use 4 to 8192"):
        scratch(TEXTS, TASK, max_length=2)
    with pytest.raises(OptionError, match="texts is one string; pass a list of strings"):
        scratch("great zip", TASK)
    with pytest.raises(OptionError, match=r"texts\[1\] is of type NoneType"):
        scratch(["great", None], TASK)  # type: ignore[list-item]
    for texts in ((), ("", "  ")):
        with pytest.raises(DataError, match="cannot be trained without texts"):
            scratch(texts, TASK)
