"""A trained model becomes the files that an engine runs.

Transformers become ONNX; ranges and weights' specs on the model become the modules of `lower`, whether they came from
calibration or from training. Static and linear models become tables.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from netweight.errors import ModelError
from netweight.layers import put
from netweight.lower import (
    TRANSLATIONS,
    DynamicLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    Signed,
    Unsigned,
    WeightOnlyLinear,
)
from netweight.model import Model, Range, Weights
from netweight.network import Exits, Linear, Static, Transformer
from netweight.packing import packed, packed_file, unpacked_file
from netweight.techniques.quantize import OUT

Kind = Literal["static", "onnx", "exits"]

# An ONNX file is packed where that leaves so little of it; weights of fewer bytes are left where they are.
_WORTH_PACKING = 0.9
_SMALL = 1024
# The largest integer of tables of static students, which takes 7 bits: with 6 the mean alone lost .1 and .4 points on
# BANKING77's dev, with 7 nothing. What windows read takes 6: there 8 brought nothing, nor on Amazon reviews.
_TOP, _TOP_OF_WORDS = 63, 31
# Tables of fewer values stay in fp32, unless the model says otherwise.
_LARGE_TABLE = 100_000


@dataclass(frozen=True)
class Exported:
    """One tier's file: `data` is safetensors (static) or ONNX, packed where that pays; `options` are what its engine
    must know."""

    kind: Kind
    data: bytes
    options: dict[str, Any]

    @property
    def plain(self) -> bytes:
        """The file, unpacked."""
        return unpacked_file(self.data) if self.options.get("packed") else self.data


def export(model: Model) -> Exported:
    """The file of this model. Raises ModelError for a network that no engine runs."""
    network = model.network
    if isinstance(network, Static):
        return _static(network)
    if isinstance(network, Linear):
        return _linear(network)
    if isinstance(network, Exits):
        return _exits(model)
    if isinstance(network, Transformer):
        proto = _onnx(lowered(model), model.encoder.max_length)
        data = proto.SerializeToString()
        return _small("onnx", data, _weights(proto, data), {})
    raise ModelError(f"no engine runs a {type(network).__name__}.")


def work(model: Model) -> int:
    """What a row's time grows with, to be compared within one engine: of tables, the numbers that are added up for each
    token; of transformers, bytes of all weights in fp32, since no engine is faster for fewer bits."""
    network = model.network
    if not isinstance(network, Static | Linear):
        return model.bytes
    features = 2 if network.buckets else 1  # of a token: it, and with the next one
    if isinstance(network, Linear):
        return features * len(network.bias)
    columns = cast(nn.Linear, network.head[-1]).out_features if _folds(network) else network.width
    return features * columns + network.filters * network.reach


def _folds(network: Static) -> bool:
    """Whether a linear head is multiplied into the table: where that makes its rows shorter."""
    first = cast(nn.Linear, network.head[0])
    return len(network.head) == 1 and not network.segments and first.out_features <= network.width


def _small(kind: Kind, data: bytes, arrays: Iterable[tuple[int, NDArray[Any]]], options: dict[str, Any]) -> Exported:
    """A file as it is, or packed."""
    small = packed_file(data, list(arrays))
    if len(small) < _WORTH_PACKING * len(data):
        return Exported(kind, small, {**options, "packed": True})
    return Exported(kind, data, options)


def _static(network: Static) -> Exported:
    """Weights are multiplied into the vectors; a linear head is folded in where that makes the rows shorter."""
    with torch.no_grad():
        weight = network.weight.exp()
        table = network.table * weight[:, None]
        layers = [(m.weight, m.bias) for m in network.head if isinstance(m, nn.Linear)]
        if _folds(network):
            table, layers = table @ layers[0][0].T, [(torch.empty(0), layers[0][1])]
        norm = weight[: network.vocabulary]
    held = {"norm": norm.numpy().astype(np.float32)} | _int8(table)
    for i, (matrix, bias) in enumerate(layers):
        held[f"bias.{i}"] = bias.detach().numpy().astype(np.float32)
        if matrix.numel():
            held[f"matrix.{i}"] = np.ascontiguousarray(matrix.detach().numpy().T, np.float32)
    options = {"buckets": network.buckets, "norm": "mean", "segments": network.segments}
    if network.filters:
        held |= _windows(network)
        options["reach"] = network.reach
    return _table(held, options)


def _windows(network: Static) -> dict[str, NDArray[Any]]:
    """The two factors of the table of what each known token adds to each filter, in int8, and that table's scales.

    The table has `reach` values for each one of a token's vector; the engine makes it once, when it loads.
    """
    windows = network.windows
    with torch.no_grad():
        words, taps = windows.words[windows.known > 0].float(), windows.taps.float()
        of_word = torch.from_numpy(_scale(words.abs().amax(dim=1, keepdim=True).numpy(), _TOP_OF_WORDS))
        of_tap = taps.abs().amax(dim=(0, 1)).clamp(min=1e-12) / 127
        words, taps = (words / of_word).round(), (taps / of_tap).round()
        largest = torch.stack([(words @ tap * of_word * of_tap).abs().amax(dim=0) for tap in taps]).amax(dim=0)
        return {
            "windows.words": words.to(torch.int8).numpy(),
            "windows.word_scale": of_word.numpy(),
            "windows.taps": taps.to(torch.int8).contiguous().numpy(),
            "windows.tap_scale": of_tap.numpy(),
            "windows.scale": (largest.clamp(min=1e-12) / 127).numpy(),
            "windows.bias": windows.bias.numpy().copy(),
            "windows.known": np.flatnonzero(windows.known.numpy()).astype(np.int32),
            "windows.matrix": np.ascontiguousarray(network.answers.weight.numpy().T),
            "windows.offset": network.answers.bias.numpy().copy(),
        }


def _linear(network: Linear) -> Exported:
    with torch.no_grad():
        table = network.table * network.weight[:, None]
    held = {"norm": network.weight.numpy().astype(np.float32), "bias.0": network.bias.detach().numpy()} | _int8(table)
    return _table(held, {"buckets": network.buckets, "norm": "l2", "segments": False})


def _table(held: Mapping[str, NDArray[Any]], options: dict[str, Any]) -> Exported:
    data = save(dict(held))
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    starts = {length + said["data_offsets"][0]: held[name].reshape(-1) for name, said in header.items()}
    return _small("static", data, sorted(starts.items(), key=lambda item: item[0]), options)


def _int8(table: Tensor) -> dict[str, NDArray[Any]]:
    """Symmetric, with one scale for each row."""
    values = table.numpy().astype(np.float32)
    scale = _scale(np.abs(values).max(axis=1), _TOP)
    return {"table": np.rint(values / scale[:, None]).astype(np.int8), "scale": scale}


def _scale(largest: NDArray[np.float32], top: int) -> NDArray[np.float32]:
    """What one step is where `top` of them reach `largest`, rounded up to what fp16 holds."""
    exact = (np.maximum(largest, 1e-12) / top).astype(np.float32)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(np.isfinite(half), half.astype(np.float32), exact)


def _weights(proto: onnx.ModelProto, data: bytes) -> Iterator[tuple[int, NDArray[Any]]]:
    """Where the weights stand in a serialised model."""
    at = 0
    for held in proto.graph.initializer:
        if len(held.raw_data) >= _SMALL:
            at = data.index(held.raw_data, at)
            yield at, np.frombuffer(held.raw_data, onnx.helper.tensor_dtype_to_np_dtype(held.data_type))
            at += len(held.raw_data)


# --- ONNX ---


class Gelu(nn.Module):
    """x (1 + erf(x / sqrt(2))) / 2, with the products in the order that ONNX Runtime fuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.erf(x / math.sqrt(2.0)) + 1.0) * 0.5


_ATTENTION = "netweight_plain"
_SHARES = Unsigned(Range(0.0, 1.0))


def _plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v for (n, heads, length, width); returns (n, length, heads, width).

    The graph that fused attention exports to carries shape arithmetic and checks for NaN that hide this pattern
    from both engines. Where the layer's value is rounded, so are the softmax's shares.
    """
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    shares = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    if any(isinstance(m, QuantizedLinear) and isinstance(m.out, Signed) for m in module.modules()):
        shares = _SHARES(shares)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), None


def _plain_mask(*args: Any, **options: Any) -> Tensor | None:
    """What is added to the scores: (n, 1, 1, length) where every token sees all real ones, else transformers' own."""
    real = options.get("attention_mask")
    if real is None or options.get("mask_function") is not bidirectional_mask_function:
        return cast("Tensor | None", eager_mask(*args, **options))
    dtype = options.get("dtype", torch.float32)
    return _added(real, dtype)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(mask.bool()[:, None, None, :], torch.zeros((), dtype=dtype), hidden)


def lowered(model: Model) -> nn.Module:
    """The network with every layer that has a range or a spec in its quantized form; the input is untouched."""
    network = copy.deepcopy(model.network)
    network.eval()
    if isinstance(network, Transformer) and getattr(network.backbone, "_supports_sdpa", False):
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _plain_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, _plain_mask)
        cast(Any, network.backbone).set_attn_implementation(_ATTENTION)
    for name, module in list(network.named_modules()):
        if isinstance(module, GELUActivation):
            put(network, name, Gelu())
    if model.ranges or model.weights:
        for name, module in list(network.named_modules()):
            new = _quantized(model, name, module)
            if new is not None:
                put(network, name, new)
    return network


def _quantized(model: Model, name: str, module: nn.Module) -> nn.Module | None:
    """The form of a layer that has a range or a spec; None where it stays."""
    given, spec = model.ranges.get(name), model.weights.get(name, Weights())
    if isinstance(module, nn.Embedding) and (name in model.weights or module.weight.numel() > _LARGE_TABLE):
        return QuantizedEmbedding(module, spec)
    if isinstance(module, nn.Linear) and given is not None:
        return QuantizedLinear(module, given, model.ranges.get(name + OUT), spec)
    if isinstance(module, nn.Linear) and name in model.weights:
        return DynamicLinear(module, spec) if spec.dynamic else WeightOnlyLinear(module, spec)
    return None


def _onnx(network: nn.Module, max_length: int, width: int = 0, hidden: bool = False) -> onnx.ModelProto:
    """A graph of a network over token ids, or, with `width`, over hidden states of that width and a mask; `hidden`:
    hidden states are an output as well."""
    rows, length = 2, min(8, max_length)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=max_length)
    # Each its own tensor: one that is given twice would become one input.
    example = tuple(torch.ones(rows, length, dtype=torch.int32) for _ in range(3))
    if width:
        example = (torch.zeros(rows, length, width), example[1])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=["hidden", "mask"] if width else ["ids", "mask", "types"],
            output_names=["logits", "states"] if hidden else ["logits"],
            dynamic_shapes=({0: batch, 1: tokens},) * len(example),
            custom_translation_table=TRANSLATIONS,
        )
    proto = cast(onnx.ModelProto, cast(Any, program).model_proto)
    _forget(proto)
    onnx.checker.check_model(proto)
    return proto


def _forget(proto: onnx.ModelProto) -> None:
    """Take out where each node comes from: a tenth of a small file, and paths of the machine that made it."""
    graph = proto.graph
    held = (graph.node, graph.value_info, graph.input, graph.output, graph.initializer, proto.functions)
    inside = (node for function in proto.functions for node in function.node)
    for part in (proto, graph, *chain.from_iterable(held), *inside):
        del part.metadata_props[:]
        part.doc_string = ""


class _First(nn.Module):
    """Token ids to the logits of the first exit and the hidden states that it read."""

    def __init__(self, network: Exits) -> None:
        super().__init__()
        self.network = network
        del network.layers()[network.after[0] :]

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network.states(ids, mask, types)
        return self.network.heads[0](self.network.pooled(hidden, mask)), hidden


class _Next(nn.Module):
    """Hidden states of one exit to the logits, and the hidden states, of the next."""

    def __init__(self, layers: Sequence[nn.Module], network: Exits, head: nn.Module, last: bool) -> None:
        super().__init__()
        self.layers, self.head, self.last = nn.ModuleList(layers), head, last
        self._pooled = network.pooled

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        added = _added(mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, added)
        logits = self.head(self._pooled(hidden, mask))
        return (logits,) if self.last else (logits, hidden)


def _exits(model: Model) -> Exported:
    """One file with a graph for each stretch of layers between exits."""
    network = cast(Exits, lowered(model))
    stack, ends = list(network.layers()), (*network.after, len(network.layers()))
    most, width = model.encoder.max_length, network.width
    graphs = []
    for i, (start, end) in enumerate(pairwise(ends)):
        last = end == ends[-1]
        stretch = _Next(stack[start:end], network, network.head if last else network.heads[i + 1], last)
        graphs.append(_onnx(stretch.eval(), most, width, not last))
    graphs.insert(0, _onnx(_First(network).eval(), most, hidden=True))
    stages = {}
    for i, proto in enumerate(graphs):
        data = proto.SerializeToString()
        stages[str(i)] = np.frombuffer(packed_file(data, list(_weights(proto, data))), np.uint8)
    # Until thresholds are fitted on dev, nothing exits early.
    return Exported("exits", packed(stages), {"thresholds": [2.0] * len(network.after)})
