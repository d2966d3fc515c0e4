"""Checkpoints of every supported family, as folders: loaded, pooled over padding, and fine-tuned on a small task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from conftest import BAD, FAMILIES, GOOD, THINGS, net, tiny_encoder, tiny_model
from netweight.artifact import Tier
from netweight.data import Dataset
from netweight.encode import TextEncoder, Tokens
from netweight.engine.cascade import tier_engine
from netweight.export import export
from netweight.model import Model, pretrained
from netweight.run import Local, local
from netweight.run.local import logits_of, spliced
from netweight.task import Classify
from netweight.techniques import Distill, Finetune, Static
from netweight.train import Plan

TASK = Classify(("bad", "good"))
PLAN = Plan(batch_size=16, precision="fp32")
EVERY = tuple(FAMILIES)
CAUSAL, ROBERTAS = ("gpt2", "qwen3"), ("roberta", "xlm-roberta")
PADS = {"roberta": 1, "xlm-roberta": 1}


def bare(words: tuple[str, ...] = ("<|endoftext|>",)) -> str:
    """A tokenizer that adds nothing around a text, as those of GPT-2 and Qwen3."""
    names = [*words, "[UNK]", *GOOD, *BAD, *THINGS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


def with_s() -> str:
    """RoBERTa's order of special tokens: the padding is the second."""
    tokenizer = Tokenizer.from_str(bare(("<s>", "<pad>", "</s>")))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return str(tokenizer.to_str())


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ROBERTAS:
        monkeypatch.setitem(FAMILIES, family, {"pad_token_id": 1, "type_vocab_size": 1})


def saved(family: str, folder: Path, **files: Any) -> Path:
    """A folder as the Hub has them: random weights, a tokenizer of the family's kind."""
    tiny: Any = tiny_model(family=family)
    tiny.network.backbone.config.architectures = None
    if family == "gpt2":
        # Undo `plain`: the files hold GPT-2's layers transposed.
        held = {
            n: v.T if "c_" in n and n.endswith("weight") else v for n, v in tiny.network.backbone.state_dict().items()
        }
        backbone = type(tiny.network.backbone)(tiny.network.config)
        backbone.load_state_dict(held)
        backbone.save_pretrained(folder)
    else:
        tiny.network.backbone.save_pretrained(folder)
    definition = bare() if family in CAUSAL else with_s() if family in ROBERTAS else tiny_encoder().definition
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def without_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Model:
    """As RoBERTa's checkpoints are: one row in the table of types, and a tokenizer that marks no second text."""
    monkeypatch.setitem(FAMILIES, "roberta", {"pad_token_id": 1, "type_vocab_size": 1})
    made = pretrained(str(saved("roberta", tmp_path)), TASK, max_length=38)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(net(made).head.weight)
    return made


def paired(data: Dataset, other: tuple[str, ...]) -> Dataset:
    return replace(data, train=replace(data.train, pair=other))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("family", EVERY)
def test_a_checkpoint_is_loaded_as_it_was_saved(family: str, tmp_path: Path) -> None:
    made = pretrained(str(saved(family, tmp_path)), TASK, max_length=64)
    tiny = tiny_model(family=family)
    assert net(made).pooling == ("last" if family in CAUSAL else "mean")
    assert made.encoder.pad == PADS.get(family, 0)
    for name, value in net(tiny).backbone.state_dict().items():
        assert torch.equal(net(made).backbone.state_dict()[name], value), name
    limit = {"roberta": 38, "xlm-roberta": 38, "distilbert": 64}.get(family, 40)
    assert made.encoder.max_length == limit


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("family", EVERY)
def test_rows_in_a_batch_are_answered_as_if_they_were_alone(family: str, tmp_path: Path) -> None:
    made = pretrained(str(saved(family, tmp_path)), TASK, max_length=64)
    torch.nn.init.normal_(net(made).head.weight)
    # As long as the positions there are, and empty.
    texts = ["great zip", "", "the dress was late after my week", "my " * 100, "zip"]
    tokens = made.encoder.encode(texts)
    assert tokens.lengths.max() == made.encoder.max_length
    assert tokens.lengths.min() >= 1
    together = logits_of(made, tokens)
    assert together.isfinite().all()
    for i in range(len(texts)):
        alone = logits_of(made, tokens.take(torch.tensor([i]).numpy()))
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-4)
    pairs = made.encoder.encode(["", "zip"], ["", ""])
    assert logits_of(made, pairs).isfinite().all()


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("family", EVERY)
def test_every_family_learns_a_small_task(family: str, dataset: Dataset, tmp_path: Path) -> None:
    made, run = pretrained(str(saved(family, tmp_path)), TASK, max_length=32), Local(dataset)
    assert run.quality(made) < 0.8, "there is nothing to learn"
    tuned = Finetune(epochs=6, learning_rate=5e-3, probe=False, freeze_embeddings=False)(made, run, PLAN)
    assert run.quality(tuned) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_without_special_tokens_go_all_the_way(family: str, dataset: Dataset, tmp_path: Path) -> None:
    made, run = pretrained(str(saved(family, tmp_path)), TASK, max_length=32), Local(dataset)
    tuned = Finetune(epochs=6, learning_rate=5e-3, freeze_embeddings=False)(made, run, PLAN)
    student = Static(width=8, buckets=64, epochs=20, batch_size=16)(tuned, run, PLAN)
    assert run.quality(tuned) >= 0.9
    assert run.quality(student) >= 0.9
    assert export(tuned).kind == "onnx"


def test_the_last_token_is_found_behind_hidden_ones() -> None:
    network = net(tiny_model(family="gpt2", layers=1)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 0]])
    holes, whole = torch.tensor([[1, 0, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    for mask in (holes, whole):
        states: Any = network.backbone(input_ids=ids, attention_mask=mask)
        found = network.features(ids, mask, torch.zeros_like(ids))
        assert torch.equal(found, states.last_hidden_state[:, 3])


def test_pooling_is_what_the_folder_states(tmp_path: Path) -> None:
    folder = saved("qwen3", tmp_path)
    (folder / "1_Pooling").mkdir()
    for mode, pooling in (("cls_token", "first"), ("lasttoken", "last"), ("mean_tokens", "mean")):
        stated = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "lasttoken", "mean_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(stated), encoding="utf-8")
        assert net(pretrained(str(folder), TASK)).pooling == pooling


@pytest.mark.parametrize("stated", [5000, -1, None])
def test_a_padding_id_outside_the_vocabulary_is_not_used(stated: int | None, tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": stated}), encoding="utf-8")
    assert pretrained(str(folder), TASK).encoder.pad == 0
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}), encoding="utf-8")
    assert pretrained(str(folder), TASK).encoder.pad == 3


def test_a_second_text_is_marked_whatever_the_tokenizer() -> None:
    """With what closes it, as BERT's tokenizers do, so that each text is one stretch; and nothing else is."""
    texts, others = ["great zip", "my", "", ""], ["late dress", "", "zip", ""]
    for definition, closes in ((with_s(), ["</s>"]), (bare(), [])):
        encoder = TextEncoder(definition, 16)
        names, tokens = encoder.tokens(), encoder.encode(texts, others)
        rows = [tokens.stretch(i, i + 1) for i in range(len(tokens))]
        marked = [[names[i] for i in row.ids[row.types == 1]] for row in rows]
        assert marked == [["late", "dress", *closes], [], ["zip", *closes], []]
        assert all((np.diff(row.types.astype(int)) >= 0).all() for row in rows)
        assert not encoder.encode(texts).types.any()


def test_a_table_of_one_type_answers_pairs_as_if_there_were_none(without_types: Model) -> None:
    tokens = without_types.encoder.encode(["great zip", "", "my coat"], ["late dress after my week", "zip", ""])
    assert tokens.types.any()
    found = logits_of(without_types, tokens)
    assert found.isfinite().all()
    assert torch.equal(found, logits_of(without_types, replace(tokens, types=np.zeros_like(tokens.types))))
    made = export(without_types)
    engine = tier_engine(Tier("t", made.kind, "f", made.options), made.data, without_types.encoder.pad, 1)
    np.testing.assert_allclose(engine.logits(tokens, 8), found, atol=1e-4)


def test_a_table_of_types_that_its_tokenizer_never_used_begins_as_it_was_trained(tmp_path: Path) -> None:
    """As multilingual students of BERT's family have it, with XLM-R's tokenizer."""
    folder = saved("bert", tmp_path)
    assert len(net(pretrained(str(folder), TASK)).backbone.embeddings.token_type_embeddings.weight.unique(dim=0)) == 2  # type: ignore[operator,union-attr]
    (folder / "tokenizer.json").write_text(with_s(), encoding="utf-8")
    made = pretrained(str(folder), TASK, max_length=38)
    torch.nn.init.normal_(net(made).head.weight)
    tokens = made.encoder.encode(["great zip"], ["late dress"])
    assert tokens.types.any()
    none = replace(tokens, types=np.zeros_like(tokens.types))
    assert torch.equal(logits_of(made, tokens), logits_of(made, none))


def test_a_static_student_pools_both_texts_of_pairs_without_types(without_types: Model, dataset: Dataset) -> None:
    data = paired(dataset, dataset.train.text[::-1])
    technique = Static(width=8, buckets=64, filters=8, reach=3, epochs=4, batch_size=16)
    student = technique(without_types, Local(data), PLAN)
    assert student.network.spec()["segments"]
    # An engine pools each text by itself, so bigrams and windows must not see what stands behind the other text.
    made, tokens = export(student), student.encoder.encode(data.train.text, data.train.pair)
    engine = tier_engine(Tier("t", made.kind, "f", made.options), made.data, student.encoder.pad, 1)
    wanted = logits_of(student, tokens).numpy()
    assert np.abs(engine.logits(tokens, 8) - wanted).max() < 0.03 * np.ptp(wanted)


def test_pairs_without_types_are_not_spliced(
    without_types: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where nothing of a second text is left to be marked."""
    asked: list[int] = []

    def seen(texts: Tokens, count: int, longest: int, seed: int) -> Tokens:
        asked.append(count)
        return spliced(texts, count, longest, seed)

    monkeypatch.setattr(local, "spliced", seen)
    technique = Distill(layers=1, epochs=1, splice=2.0)
    for other in (dataset.train.text[::-1], ("",) * len(dataset.train)):
        technique(without_types, Local(paired(dataset, other)), PLAN)
    assert asked == [0, 0]
    technique(without_types, Local(dataset), PLAN)
    assert asked[2] > 0
