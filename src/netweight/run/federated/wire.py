"""Messages as JSON and tensors, and back: nothing that is read can name code.

Values are plain ones and frozen dataclasses of an allow-list. A model is the description of its network with its
tensors, which stand in a message once however often it is named. What arrives is checked before it is built: sizes,
hash, kinds, names and types of fields, names and shapes of tensors.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from netweight.encode import TextEncoder
from netweight.errors import NetweightError, WireError
from netweight.loss import Penalized, PseudoLabels, SoftTargets, Supervised
from netweight.matching import Matching
from netweight.model import Base, Model, Range, Weights
from netweight.network import Network, build, tensors
from netweight.objectives import Adversarial, CausalLM, Contrastive, MaskedLM, RDrop
from netweight.run.federated.codecs import Full, Int8, RandomK, TopK
from netweight.run.federated.membership import Membership
from netweight.run.federated.messages import (
    Advertise,
    Advertised,
    AttackTask,
    FitTask,
    Fitted,
    Join,
    Joined,
    Manifest,
    Reduced,
    ReduceTask,
    RowNoise,
    Scored,
    ScoreTask,
    Seat,
    Share,
    Shared,
    Told,
    Unmask,
    UpdateNoise,
)
from netweight.task import Classify, Score
from netweight.train import Plan

MESSAGES: tuple[type, ...] = (
    *(Join, Joined, FitTask, Fitted, ReduceTask, Reduced, ScoreTask, Scored, AttackTask, Membership),
    *(Advertise, Advertised, Share, Shared, Unmask, Told),
)
KINDS: tuple[type, ...] = (
    *MESSAGES,
    *(RowNoise, UpdateNoise, Seat),
    *(Manifest, Plan, Classify, Score, Base, Range, Weights),
    *(Full, Int8, RandomK, TopK),
    *(Supervised, SoftTargets, Penalized, PseudoLabels, Matching),
    *(MaskedLM, CausalLM, Contrastive, RDrop, Adversarial),
)
_HEADER = 16 << 20  # characters of JSON; a tokenizer of 250,000 words takes 10 to 17 million, and travels beside it
_DEPTH = 24
_LAYERS = "num_hidden_layers"  # what transformers calls it; GPT-2 says n_layer, DistilBERT n_layers
_WHOLE, _EXACT = 2**63, 2**53  # whole numbers lie below the one; those that a float holds exactly, up to the other
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
# What odd values may raise where a message, or a network that it describes, is made of them.
UNREADABLE = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    NetweightError,
)


@dataclass(frozen=True)
class Packed:
    """A message that can travel: a JSON text, and tensors that it names."""

    header: str
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of what travels, without what a transport adds."""
        return len(self.header.encode()) + sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class Patch:
    """What a technique puts into a network for the time of a fit, and a spec does not tell.

    `found` gives plain values where it is there, else None; `put` repeats it in a network that lacks it, in place.
    """

    name: str
    found: Callable[[Network], Any]
    put: Callable[[Network, Any], None]


@dataclass(frozen=True)
class Wire:
    """Packs and unpacks messages.

    Args:
        kinds: the dataclasses that may travel besides those of every message (`KINDS`): losses and statistics.
        patches: what may be in a network besides its spec, in the order in which it is repeated.
        most: bytes of tensors that a message may have.
    """

    kinds: tuple[type, ...] = ()
    patches: tuple[Patch, ...] = ()
    most: int = 8 << 30

    @property
    def known(self) -> dict[str, type]:
        """Kinds by the name under which they travel."""
        return {kind.__name__: kind for kind in (*KINDS, *self.kinds)}

    def pack(self, message: Any) -> Packed:
        """Raises WireError for what cannot travel: another kind of value, or a network that cannot be rebuilt."""
        packing = _Packing(self)
        plain = packing.plain(message, 0)
        if type(message) not in MESSAGES:
            raise WireError(f"a {type(message).__name__} is no message; use one of {_names(MESSAGES)}.")
        body = {"message": plain, "models": packing.models}
        text = json.dumps(body)
        return Packed(json.dumps({"sha256": digest(text, packing.tensors), "body": text}), packing.tensors)

    def unpack(self, packed: Packed, answer: bool = False) -> Any:
        """Inverse of `pack`. Raises WireError for everything that `pack` would not have made, and for models in what
        is to be an `answer`: clients send none, so a server builds none."""
        try:
            size = packed.bytes
            if len(packed.header) > _HEADER or size > self.most:
                raise WireError(f"a message has {size:,} bytes; {self.most:,} are allowed.")
            outer = json.loads(packed.header)
            text = outer["body"]
            if outer["sha256"] != digest(text, packed.tensors):
                raise WireError("a message was changed on its way: its hash does not hold.")
            body = json.loads(text)
            if answer and body["models"]:
                raise WireError("an answer came with a model; clients send tensors only.")
            reading = _Reading(self, packed.tensors, body["models"])
            message = reading.value(body["message"], 0)
        except WireError:
            raise
        except UNREADABLE as problem:
            raise WireError(f"a message cannot be read: {type(problem).__name__}: {problem}") from problem
        if type(message) not in MESSAGES:
            raise WireError(f"a {type(message).__name__} came where a message was expected.")
        return message


def digest(text: str, given: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors with their names, dtypes and shapes."""
    h = hashlib.sha256(text.encode())
    for name, value in sorted(given.items()):
        h.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        h.update(raw(value))
    return h.hexdigest()


def raw(value: Tensor) -> memoryview:
    """The bytes of a tensor."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """Inverse of `raw`. Raises WireError where the three do not fit together."""
    if dtype not in _DTYPES or any(n < 0 for n in shape):
        raise WireError(f"a tensor of dtype {dtype!r} and shape {shape} came; allowed are {', '.join(_DTYPES)}.")
    size = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
    if len(data) != size:
        raise WireError(f"a tensor {shape} of {dtype} came in {len(data)} bytes; it has {size}.")
    if not size:
        return torch.zeros(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(shape)


class _Packing:
    """One message on its way out."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.known = wire, wire.known
        self.tensors: dict[str, Tensor] = {}
        self.models: dict[str, Any] = {}

    def plain(self, value: Any, depth: int) -> Any:
        """JSON for a value; plain ones stand for themselves, others are an object of one entry that says what it is."""
        if depth > _DEPTH:
            raise WireError(f"a message is nested more than {_DEPTH} deep.")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            name = f"t{len(self.tensors)}"
            self.tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, Model):
            return {"model": self.model(value, depth)}
        if isinstance(value, tuple | list):
            return {"tuple": [self.plain(v, depth + 1) for v in value]}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise WireError("a mapping whose keys are no strings cannot travel.")
            return {"map": {key: self.plain(v, depth + 1) for key, v in value.items()}}
        if self.known.get(type(value).__name__) is not type(value):
            raise WireError(
                f"a {type(value).__name__} cannot travel: a federated run sends {_names(self.known.values())}."
            )
        kind = self.known[type(value).__name__]
        held = {name: self.plain(getattr(value, name), depth + 1) for name in _travelling(kind)}
        return {"kind": kind.__name__, "fields": held}

    def model(self, model: Model, depth: int) -> str:
        """Its name in the message."""
        network = model.network
        patches = {p.name: given for p in self.wire.patches if (given := p.found(network)) is not None}
        held = tensors(network)
        spec = {"network": network.spec(), "patches": patches}
        _fits_spec(self.wire, spec, held)
        definition = hashlib.sha256(model.encoder.definition.encode()).hexdigest()
        self.tensors[f"text/{definition}"] = _as_tensor(model.encoder.definition)
        described = {
            **spec,
            "frozen": sorted(name for name, p in network.named_parameters() if not p.requires_grad),
            "encoder": [definition, model.encoder.max_length, model.encoder.pad],
            "values": {
                name: self.plain(getattr(model, name), depth + 1) for name in ("task", "base", "ranges", "weights")
            },
        }
        name = digest(json.dumps(described), held)[:32]
        if name not in self.models:
            self.models[name] = {**described, "names": list(held)}
            self.tensors |= {f"{name}/{key}": value for key, value in held.items()}
        return name


class _Reading:
    """One message on its way in."""

    def __init__(self, wire: Wire, given: Mapping[str, Tensor], models: Any) -> None:
        self.wire, self.known, self.tensors = wire, wire.known, given
        self.models = models
        self.built: dict[str, Model] = {}

    def value(self, plain: Any, depth: int) -> Any:
        if depth > _DEPTH:
            raise WireError(f"a message is nested more than {_DEPTH} deep.")
        if plain is None or isinstance(plain, bool | int | float | str):
            return plain
        match plain:
            case {"tensor": str(name)} if len(plain) == 1:
                return self.tensors[name]
            case {"model": str(name)} if len(plain) == 1:
                return self.model(name, depth)
            case {"tuple": list(items)} if len(plain) == 1:
                return tuple(self.value(v, depth + 1) for v in items)
            case {"map": dict(items)} if len(plain) == 1:
                return {str(key): self.value(v, depth + 1) for key, v in items.items()}
            case {"kind": str(kind), "fields": dict(given)} if len(plain) == 2:
                return self.made(kind, {name: self.value(v, depth + 1) for name, v in given.items()})
        raise WireError(f"a message holds {str(plain)[:80]!r}, which stands for nothing.")

    def made(self, name: str, given: dict[str, Any]) -> Any:
        kind = self.known.get(name)
        if kind is None:
            raise WireError(f"a message holds a {name!r}; this version knows {_names(self.known.values())}.")
        hints = _travelling(kind)
        if set(given) != set(hints):
            raise WireError(f"a {name} came with the fields {sorted(given)}; it has {sorted(hints)}.")
        for field, hint in hints.items():
            if not fits(given[field], hint):
                raise WireError(
                    f"field {field} of a {name} is a {type(given[field]).__name__}; expected: {hint}, of whole numbers "
                    "those of 64 bits (53 where numbers may have a fraction)."
                )
        try:
            return kind(**given)
        except NetweightError as problem:
            raise WireError(f"a {name} came with values that it refuses: {problem}") from problem

    def model(self, name: str, depth: int) -> Model:
        if name in self.built:
            return self.built[name]
        given = self.models[name]
        held = {key: self.tensors[f"{name}/{key}"] for key in given["names"]}
        spec = {"network": given["network"], "patches": given["patches"]}
        _fits_spec(self.wire, spec, held)
        with torch.random.fork_rng(devices=[]):
            network = _rebuilt(self.wire, spec)
        network.load_state_dict({key: value.clone() for key, value in held.items()})
        frozen = set(given["frozen"])
        for key, parameter in network.named_parameters():
            parameter.requires_grad_(key not in frozen)
        network.eval()
        definition, max_length, pad = given["encoder"]
        text = bytes(raw(self.tensors[f"text/{definition}"]))
        if hashlib.sha256(text).hexdigest() != definition:
            raise WireError("the tokenizer of a message was changed on its way: its hash does not hold.")
        values = {key: self.value(value, depth + 1) for key, value in given["values"].items()}
        encoder = TextEncoder(text.decode(), max_length, pad)
        self.built[name] = Model(network, encoder, **values)
        return self.built[name]


def _rebuilt(wire: Wire, spec: dict[str, Any]) -> Network:
    network = build(spec["network"])
    for patch in wire.patches:
        if patch.name in spec["patches"]:
            patch.put(network, spec["patches"][patch.name])
    return network


def _fits_spec(wire: Wire, spec: dict[str, Any], held: Mapping[str, Tensor]) -> None:
    """Raises WireError where a network of this description has other tensors; nothing is allocated for it."""
    unknown = set(spec["patches"]) - {p.name for p in wire.patches}
    if unknown:
        raise WireError(f"a network with {', '.join(sorted(unknown))} came; this client does not know how to build it.")
    # An honest network has at least a tensor in each layer: building a billion of them ends here.
    for layers in _layers(spec["network"].get("config", {})):
        if not isinstance(layers, int) or layers > len(held):
            raise WireError(f"a network of {layers} layers came with {len(held)} tensors.")
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            wanted = {name: value.shape for name, value in _rebuilt(wire, spec).state_dict().items()}
    except NetweightError as problem:
        raise WireError(f"a network cannot be rebuilt: {problem}") from problem
    odd = sorted(set(wanted) ^ set(held)) or [n for n in wanted if wanted[n] != held[n].shape]
    if odd:
        raise WireError(
            f"{odd[0]} of a network is not as its description says ({len(odd)} tensor(s) differ): what was put into it "
            "cannot be rebuilt by a client, so it cannot be trained in a federated run."
        )


def _layers(config: Mapping[str, Any]) -> list[Any]:
    """What a configuration says of its number of layers, under each name that its family has for it. Of the text, not
    of what is built: some configurations hold a list with an entry for each layer."""
    known = CONFIG_MAPPING[config["model_type"]].attribute_map if config else {}
    return [config[name] for name in {_LAYERS, known.get(_LAYERS, _LAYERS)} & set(config)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. A protocol is met by every dataclass: only allowed ones are built."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == known and type(value) is type(known) for known in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        every = len(inner) == 2 and inner[1] is Ellipsis
        wanted = inner[:1] * len(value) if every and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(fits, value, wanted))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(v, inner[1]) for v in value.values())
    if getattr(hint, "_is_protocol", False):
        return hasattr(type(value), "__dataclass_fields__")
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and (abs(value) < _WHOLE if hint is int else abs(value) <= _EXACT)
    return hint is Any or isinstance(value, hint)


@lru_cache(maxsize=4)
def _as_tensor(text: str) -> Tensor:
    """A text as bytes: a transport may know of tensors that they were sent before."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@cache
def _travelling(kind: type) -> dict[str, Any]:
    """Types of the fields of a dataclass by name; without those that do not count in comparisons, such as where a fit
    says how it goes."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.init and f.compare}


def _names(kinds: Any) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))
