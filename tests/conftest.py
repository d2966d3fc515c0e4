"""Small models built in memory; nothing is fetched."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.encode import TextEncoder
from netweight.model import Base, Model
from netweight.network import Transformer
from netweight.task import Classify, Task

torch.set_num_threads(1)

GOOD = ("great", "lovely", "perfect", "soft", "comfortable")
BAD = ("broken", "late", "torn", "wrong", "cheap")
THINGS = ("zip", "dress", "parcel", "shoe", "coat", "lamp", "the", "my", "was", "after", "week")


def tiny_encoder(max_length: int = 32) -> TextEncoder:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *THINGS)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return TextEncoder(tokenizer.to_str(), max_length)


def tiny_model(task: Task | None = None, family: str = "bert", layers: int = 2, seed: int = 0) -> Model:
    encoder = tiny_encoder()
    config = AutoConfig.for_model(
        family,
        vocab_size=encoder.vocabulary,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = task or Classify(("bad", "good"))
        network = Transformer(AutoModel.from_config(config), task.outputs, "mean").eval()
    return Model(network, encoder, task, Base("tiny"))


def tiny_rows(n: int = 120) -> Rows:
    texts, labels = [], []
    for i in range(n):
        good = i % 2 == 0
        words = GOOD if good else BAD
        texts.append(
            f"{THINGS[i % 6]} was {words[i % 5]} {THINGS[(i * 7) % 11]} {words[(i // 3) % 5]} {'my ' * (i % 4)}"
        )
        labels.append("good" if good else "bad")
    return Rows(tuple(texts), tuple(labels))


@pytest.fixture
def model() -> Model:
    return tiny_model()


@pytest.fixture
def dataset() -> Dataset:
    rows = tiny_rows()
    return Dataset(
        rows.take(range(80)), rows.take(range(80, 90)), rows.take(range(90, 100)), Sealed(rows.take(range(100, 120)))
    )
