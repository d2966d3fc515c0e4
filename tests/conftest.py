"""Small models built in memory; nothing is fetched."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

from netweight import cli, measure
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.encode import TextEncoder
from netweight.measure import Cost
from netweight.model import Base, Model
from netweight.network import Pooling, Transformer
from netweight.pipeline import optimize, store_of
from netweight.run import Local
from netweight.ship import Result
from netweight.store import JOURNAL, LOOKS
from netweight.task import Classify, Task
from netweight.train import Plan

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # some tests import OpenVINO themselves
torch.set_num_threads(1)
# A busy machine is no reason to fail.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

GOOD = ("great", "lovely", "perfect", "soft", "comfortable")
BAD = ("broken", "late", "torn", "wrong", "cheap")
THINGS = ("zip", "dress", "parcel", "shoe", "coat", "lamp", "the", "my", "was", "after", "week")


# Synonyms enough that a few hundred rows do not show each of them: a base that knows them beats counting words.
KIND = tuple(f"kind{i}" for i in range(150))
MEAN = tuple(f"mean{i}" for i in range(150))


def tiny_encoder(max_length: int = 32, more: Sequence[str] = ()) -> TextEncoder:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *THINGS, *more)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return TextEncoder(tokenizer.to_str(), max_length)


# What each family calls the sizes; causal ones pool the last token. Key heads are fewer than query heads in Qwen3.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 0},
    "distilbert": {"dim": 32, "n_heads": 4, "hidden_dim": 64},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 16},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_inner": 64, "n_positions": 40},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}


def tiny_model(
    task: Task | None = None, family: str = "bert", layers: int = 2, seed: int = 0, more: Sequence[str] = ()
) -> Model:
    encoder = tiny_encoder(more=more)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40}
    names = {"distilbert": "n_layers", "gpt2": "n_layer"}
    config = AutoConfig.for_model(
        family,
        vocab_size=encoder.vocabulary,
        **{names.get(family, "num_hidden_layers"): layers},
        **({} if family in names else sizes),
        **FAMILIES[family],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = task or Classify(("bad", "good"))
        pooling: Pooling = "last" if family in ("gpt2", "qwen3") else "mean"
        network = Transformer(AutoModel.from_config(config), task.outputs, pooling).eval()
    return Model(network, encoder, task, Base("tiny"))


def net(model: Model) -> Transformer:
    """The model's network, which is a transformer."""
    assert isinstance(model.network, Transformer)
    return model.network


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


def tiny_base(folder: Path, layers: int = 1, known: float = 0.1) -> Path:
    """A folder as `netweight.model.pretrained` loads it. Its model has "seen" KIND and MEAN words before: so far apart
    are they in its first dimension."""
    base = tiny_model(layers=layers, more=KIND + MEAN)
    network = base.network
    assert isinstance(network, Transformer)
    first = tiny_encoder().vocabulary
    with torch.no_grad():
        vectors = network.backbone.get_input_embeddings().weight  # type: ignore[operator]
        vectors[first : first + len(KIND), 0] += known
        vectors[first + len(KIND) :, 0] -= known
    network.backbone.save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text(base.encoder.definition, encoding="utf-8")
    return folder


def many_rows(n: int, seed: int = 0, noise: float = 0.0) -> Rows:
    """Distinct texts with some HTML whose label is the side with more words; `noise` of the labels are turned over."""
    rng = np.random.default_rng(seed)
    texts: dict[str, str] = {}
    while len(texts) < n:
        kind = bool(rng.random() < 0.5)
        right, wrong = (KIND, MEAN) if kind else (MEAN, KIND)
        words = [*rng.choice(right, 3), *rng.choice(wrong, int(rng.integers(0, 2))), *rng.choice(THINGS, 4)]
        texts.setdefault(
            "<i> & " + " ".join(rng.permutation(words)), "good" if kind != (rng.random() < noise) else "bad"
        )
    return Rows(tuple(texts), tuple(texts.values()))


def write_table(path: Path, rows: Rows) -> Path:
    """The rows as tab-separated text, label and, where there is one, pair."""
    columns = {"text": rows.text, "label": rows.label, "pair": rows.pair}
    there = {name: column for name, column in columns.items() if column}
    lines = ["\t".join(there), *("\t".join(cells) for cells in zip(*there.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


COSTS = {
    "exits": 3e-6,
    "shared": 2e-4,
    "": 1e-6,
    "linear": 1e-6,
    "static": 2e-6,
    "conv": 4e-6,
    "slim-int8": 7e-5,
    "thin-int8": 6e-5,
    "half-int8": 5e-5,
    "third-int8": 4e-5,
    "half-int4": 5e-5,
    "third-int4": 4e-5,
    "full-int8": 1e-4,
    "full-int4": 1e-4,
    "full-int3": 1e-4,
    "full-mixed": 1.1e-4,
}


def fixed_costs(tiers: Iterable[str], *_: object) -> dict[str, Cost]:
    """Stands for `measure.tier_costs`, so that no choice depends on how busy the machine is."""

    def cost(name: str) -> float:
        kind, _, number = name.split(" ")[0].partition("-")
        if kind in ("static", "encoder", "factored") and number:  # trials
            return (2e-6 if kind == "static" else 5e-5) * (1 + int(number[0]) / 100)
        return COSTS[name.split(" ")[0]]

    return {name: Cost(cost(name), 2 * cost(name)) for name in ("", *tiers)}


def quick_measuring(patch: pytest.MonkeyPatch) -> None:
    """Speeds of moments and costs that are made up: no test looks at a speed."""
    patch.setattr(measure, "tier_costs", fixed_costs)
    patch.setattr(measure, "_ROUND", 0.002)
    patch.setattr(measure, "_PILOT", 0.001)
    patch.setattr(measure, "_SINGLES", 3)
    fresh = measure.fresh
    patch.setattr(measure, "fresh", lambda folder, rows, threads: fresh(folder, rows, threads, rounds=1))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_measuring(monkeypatch)


@dataclass(frozen=True)
class Shop:
    """A finished job: its base, tables, options and result. Read only: tests copy what they change."""

    base: Path
    train: Rows
    dev: Rows
    certify: Rows
    options: dict[str, Any]
    result: Result

    @property
    def folder(self) -> Path:
        return self.result.folder


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """The main job, end to end, on tiny rows with a tiny base; made once."""
    folder = tmp_path_factory.mktemp("shop")
    base = tiny_base(folder / "base")
    rows = many_rows(1200, noise=0.02)
    train, dev, certify = (rows.take(range(a, b)) for a, b in ((0, 300), (300, 700), (700, 1200)))
    options: dict[str, Any] = {"model": str(base), "max_drop": 5.0, "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        quick_measuring(patch)
        result = optimize(train, dev=dev, certify=certify, out=folder / "made.nw", **options)
    return Shop(base, train, dev, certify, options, result)


def journal(out: Path) -> dict[str, Any]:
    """What decides in a run store: everything but the time that a model took."""
    lines = map(json.loads, (store_of(out) / JOURNAL).read_text(encoding="utf-8").splitlines())
    held = {line["key"]: line["value"] for line in lines}
    for value in held.values():
        if isinstance(value, dict):
            value.pop("seconds", None)
    return held


def looks(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store_of(out) / LOOKS).read_text(encoding="utf-8").splitlines()]


def again(shop: Shop, out: Path, **changed: Any) -> Result:
    return optimize(shop.train, dev=shop.dev, certify=shop.certify, out=out, **{**shop.options, **changed})


@pytest.fixture
def copied(shop: Shop, tmp_path: Path) -> Path:
    """The finished job in a folder of its own."""
    shutil.copytree(store_of(shop.folder), tmp_path / "made.nw.run")
    shutil.copytree(shop.folder, tmp_path / "made.nw")
    return tmp_path / "made.nw"


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    status: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs the command line as the console script does."""

    def run(*arguments: object, stdin: bytes = b"") -> Said:
        monkeypatch.setattr(sys, "argv", ["netweight", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            cli.main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def made(shop: Shop, tmp_path: Path) -> Path:
    shutil.copytree(shop.folder, tmp_path / "made.nw")
    return tmp_path / "made.nw"


def full_disk(held: object, path: Path, *_: object) -> None:
    """Stands for safetensors' `save_file` where there is no room."""
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class Killed(Exception):
    """What a `Killer` raises."""


@dataclass
class Killer:
    """A reporter that ends a fit at step `at`, and remembers after which step the last fit went on."""

    at: int
    resumed_at: int = -1

    def start(self, label: str, steps: int, done: int) -> None:
        self.resumed_at = done

    def step(self, step: int, loss: float, rate: float) -> None:
        if step == self.at:
            raise Killed

    def note(self, message: str) -> None:
        pass


class Asked(Local):
    """Keeps what each fit and each statistic was asked for, and trains nothing."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.fits: list[tuple[Model, Any, Plan]] = []
        self.limits: list[int | None] = []

    def fit(self, model: Model, loss: Any, plan: Plan, label: str = "fit") -> Model:
        self.fits.append((model, loss, plan))
        return model

    def reduce(self, model: Model, statistic: Any, limit: int | None = None, unlabelled: bool = False) -> Any:
        self.limits.append(limit)
        return super().reduce(model, statistic, limit, unlabelled)


@pytest.fixture
def model() -> Model:
    return tiny_model()


def tiny_dataset() -> Dataset:
    """80 rows to train on, 10 to select, 10 to calibrate, 20 to certify."""
    rows = tiny_rows()
    return Dataset(
        rows.take(range(80)), rows.take(range(80, 90)), rows.take(range(90, 100)), Sealed(rows.take(range(100, 120)))
    )


@pytest.fixture
def dataset() -> Dataset:
    return tiny_dataset()
