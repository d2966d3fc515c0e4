"""The networks that techniques edit: torch modules `(ids, mask, types) -> (n, outputs)` logits.

Each one describes itself in a plain `spec`, so that it can be rebuilt without pickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from netweight.errors import ModelError, OptionError
from netweight.features import BIGRAM_A, BIGRAM_B
from netweight.layers import describe, make, plain, put

Pooling = Literal["mean", "first", "last"]
_DROPOUT = 0.2  # of what windows found
_REACH = 255  # so many int8 values add up in int16, as engines do


class Network(nn.Module):
    """What every network offers beyond `forward`."""

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Logits (n, outputs) of padded token ids, attention mask and token types, each (n, length)."""
        raise NotImplementedError

    @property
    def sparse(self) -> frozenset[str]:
        """Parameters whose gradients touch few rows in a batch; the loop updates only those rows."""
        return frozenset()

    @property
    def pruned(self) -> frozenset[str]:
        """Parameters in which what is zero stays zero, whatever trains them."""
        return frozenset()

    def spec(self) -> dict[str, Any]:
        """Plain values from which `build` makes the same architecture."""
        raise NotImplementedError


class Transformer(Network):
    """A pretrained backbone, pooling over tokens, and a linear head.

    `edits` notes what techniques put in the place of the backbone's own modules, so that the spec can repeat it. Where
    `zeros_stay`, the layers' linear weights are pruned.
    """

    def __init__(self, backbone: nn.Module, outputs: int, pooling: Pooling) -> None:
        super().__init__()
        plain(backbone)
        self.backbone = backbone
        self.pooling = pooling
        self.edits: dict[str, dict[str, Any]] = {}
        self.zeros_stay = False
        self.config = cast(Any, backbone).config
        # A table of one row, as RoBERTa's, knows no second text.
        self._takes_types = (getattr(self.config, "type_vocab_size", 0) or 0) > 1
        self.head = nn.Linear(self.config.hidden_size, outputs)

    def features(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Pooled hidden states (n, hidden)."""
        return self.pooled(self.states(ids, mask, types), mask)

    def states(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Hidden states (n, length, hidden)."""
        kinds = {"token_type_ids": types.long()} if self._takes_types else {}
        return cast(Tensor, self.backbone(input_ids=ids.long(), attention_mask=mask.long(), **kinds).last_hidden_state)

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """One vector (n, hidden) of hidden states (n, length, hidden)."""
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            # Not the number of tokens less one: token dropout leaves holes.
            last = (mask.long() * torch.arange(hidden.shape[1], device=hidden.device)).amax(dim=1)
            # Not len(hidden): the exporter would take the number of rows for a constant.
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(ids, mask, types)))

    @property
    def width(self) -> int:
        """Hidden units of a token. The config keeps the number from before any were cut: heads' width hangs on it."""
        return self.head.in_features

    @property
    def causal(self) -> bool:
        """Whether tokens see only what stands before them."""
        return causal(self.config)

    def layers(self) -> nn.ModuleList:
        """The stack of transformer layers. Raises ModelError where it is not one plain list."""
        depth = self.config.num_hidden_layers
        found = [m for m in self.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not found:
            raise ModelError(f"{self.config.model_type} keeps its {depth} layers in no single list; it cannot be cut.")
        return found[0]

    @property
    def stack(self) -> str:
        """Name of the module that `layers` gives: those inside the layers begin with it and a dot."""
        layers = self.layers()
        return next(str(name) for name, module in self.named_modules() if module is layers)

    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers of the transformer's layers by name. Embeddings, a pooler whose output nobody reads, and the
        head are none of them. Raises ModelError where the layers are in no single list."""
        inside = self.layers().named_modules()
        return {f"{self.stack}.{name}": m for name, m in inside if isinstance(m, nn.Linear)}

    @property
    def pruned(self) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in self.linears()) if self.zeros_stay else frozenset()

    def replace(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of the one of this name. Raises ModelError where it could not be rebuilt."""
        self.edits = {**self.edits, name: describe(new)}
        put(self, name, new)

    def set_attribute(self, name: str, value: int) -> None:
        """Set a number that a module keeps beside its parameters."""
        self.edits = {**self.edits, name: {"kind": "attribute", "value": value}}
        where, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(where), leaf, value)

    def edit(self, edits: dict[str, dict[str, Any]]) -> None:
        """Repeat noted edits; the modules they make have fresh weights."""
        for name, given in edits.items():
            if given.get("kind") == "attribute":
                self.set_attribute(name, int(given["value"]))
            else:
                self.replace(name, make(given))

    def spec(self) -> dict[str, Any]:
        return {
            "network": "transformer",
            "config": self.config.to_dict(),
            "pooling": self.pooling,
            "outputs": self.head.out_features,
            "edits": self.edits,
            # Left out elsewhere: networks keep the digests that they had before any were pruned.
            **({"zeros_stay": True} if self.zeros_stay else {}),
        }


class Exits(Transformer):
    """A transformer that can also answer from the hidden states after some of its layers, each by a head of its own
    (Teerapittayanon et al., BranchyNet, 2016; Xin et al., DeeBERT, ACL 2020).

    `after` counts layers, ascending. `forward` gives the last exit's logits, `stages` those of all, first to last.
    """

    def __init__(self, backbone: nn.Module, outputs: int, pooling: Pooling, after: Sequence[int]) -> None:
        super().__init__(backbone, outputs, pooling)
        self.after = tuple(after)
        if not self.after or not self.after[0] > 0 or sorted(set(self.after)) != list(self.after):
            raise OptionError(f"exits after layers {self.after}: name some layers, ascending, from 1 on.")
        if self.after[-1] >= len(self.layers()):
            depth = len(self.layers())
            raise OptionError(f"an exit after layer {self.after[-1]} of {depth} is none; choose an earlier one.")
        self.heads = nn.ModuleList([nn.Linear(self.config.hidden_size, outputs) for _ in self.after])

    def stages(self, ids: Tensor, mask: Tensor, types: Tensor) -> list[Tensor]:
        """Logits (n, outputs) of every exit, the last layer's at the end."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, given: Any, out: Tensor) -> None:
            seen.append(out)

        layers = self.layers()
        with ExitStack() as hooks:
            for i in self.after:
                hooks.enter_context(layers[i - 1].register_forward_hook(keep))
            last = self.forward(ids, mask, types)
        return [*(head(self.pooled(h, mask)) for head, h in zip(self.heads, seen, strict=True)), last]

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"network": "exits", "after": list(self.after)}


def _features(ids: Tensor, mask: Tensor, vocabulary: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Rows of a table for every token and, behind the vocabulary, every pair of neighbours (n, features), and whether
    each is there."""
    if not buckets:
        return ids, mask
    pairs = vocabulary + (ids[:, :-1] * BIGRAM_A + ids[:, 1:] * BIGRAM_B) % buckets
    return torch.cat([ids, pairs], dim=1), torch.cat([mask, mask[:, :-1] * mask[:, 1:]], dim=1)


class Static(Network):
    """A student without attention: a weighted mean of per-feature vectors, then a small head.

    Features of a text are its tokens and, hashed into `buckets` rows, its pairs of adjacent tokens.
    With `segments` (text pairs) each text is pooled by itself and the head sees [u, v, |u - v|, u * v].
    With `filters`, a convolution over every token and its neighbours, `reach` tokens in all, adds its strongest answers
    (`Windows`) to the logits.

    Shapes: table (vocabulary + buckets, width), weight (vocabulary + buckets,).
    """

    def __init__(
        self,
        vocabulary: int,
        buckets: int,
        width: int,
        outputs: int,
        hidden: int = 0,
        segments: bool = False,
        filters: int = 0,
        reach: int = 5,
    ) -> None:
        super().__init__()
        self.vocabulary, self.buckets, self.width = vocabulary, buckets, width
        self.hidden, self.segments, self.filters, self.reach = hidden, segments, filters, reach
        self.table = nn.Parameter(torch.zeros(vocabulary + buckets, width))
        self.weight = nn.Parameter(torch.zeros(vocabulary + buckets))
        parts = 4 if segments else 1
        if hidden:
            self.head = nn.Sequential(nn.Linear(parts * width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        else:
            self.head = nn.Sequential(nn.Linear(parts * width, outputs))
        if filters:
            self.windows = Windows(vocabulary, width, filters, reach)
            self.answers = nn.Linear(parts * filters, outputs)

    def pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Weighted mean of the features' vectors (n, width); bigrams add to the sum but not to the norm."""
        features, present = _features(ids.long(), mask.to(self.table.dtype), self.vocabulary, self.buckets)
        weight = self.weight[features].exp() * present
        total = F.embedding_bag(
            features, self.table, mode="sum", per_sample_weights=weight, sparse=self.table.requires_grad
        )
        return total / weight[:, : ids.shape[1]].sum(dim=1, keepdim=True).clamp(min=1e-6)

    @property
    def sparse(self) -> frozenset[str]:
        return frozenset({"table", "windows.words"} if self.filters else {"table"})

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        logits = cast(Tensor, self.head(self._texts(self.pool, ids, mask, types)))
        return logits + self.answers(self._texts(self.windows, ids, mask, types)) if self.filters else logits

    def _texts(self, pool: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """What a pooling says of each row; of pairs, of both texts and how they differ."""
        if not self.segments:
            return pool(ids, mask)
        u, v = pool(ids, mask * (types == 0)), pool(ids, mask * (types == 1))
        return torch.cat([u, v, (u - v).abs(), u * v], dim=1)

    def spec(self) -> dict[str, Any]:
        spec = {
            "network": "static",
            "vocabulary": self.vocabulary,
            "buckets": self.buckets,
            "width": self.width,
            "outputs": cast(nn.Linear, self.head[-1]).out_features,
            "hidden": self.hidden,
            "segments": self.segments,
        }
        return spec | ({"filters": self.filters, "reach": self.reach} if self.filters else {})


class Windows(nn.Module):
    """A convolution over a text, and of each filter the largest value (Kim, EMNLP 2014).

    What a token adds to a filter at each place of the window depends on nothing else: products of `words` and `taps`
    are a table, so that an engine adds and compares, and never multiplies. Tokens that are not `known` count as none.

    Shapes: words (vocabulary, width), taps (reach, width, filters), bias (filters,), known (vocabulary,) of 0 and 1.
    """

    known: Tensor

    def __init__(self, vocabulary: int, width: int, filters: int, reach: int) -> None:
        super().__init__()
        if not 1 <= reach <= _REACH or reach % 2 == 0:
            raise OptionError(f"a window of {reach} tokens; use an odd number, which has a middle, up to {_REACH}.")
        self.reach = reach
        self.words = nn.Parameter(torch.zeros(vocabulary, width))
        self.taps = nn.Parameter(torch.empty(reach, width, filters).uniform_(-1, 1) / math.sqrt(reach * width))
        self.bias = nn.Parameter(torch.zeros(filters))
        self.register_buffer("known", torch.ones(vocabulary, dtype=torch.uint8))
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Largest values (n, filters) over windows whose middle is a token, 0 at least."""
        ids, side = ids.long(), self.reach // 2
        present = mask.to(self.words.dtype).unsqueeze(-1)
        words = F.embedding(ids, self.words, sparse=self.words.requires_grad) * present
        padded = F.pad(words * self.known[ids].unsqueeze(-1), (0, 0, side, side))
        beside = torch.cat([padded[:, k : k + ids.shape[1]] for k in range(self.reach)], dim=2)
        values = (beside @ self.taps.flatten(0, 1)).masked_fill(present == 0, -math.inf)
        # The bias and the rectifier change no order, so they may follow the maximum.
        return cast(Tensor, self.dropout(F.relu(values.amax(dim=1) + self.bias)))


class Linear(Network):
    """The floor: TF-IDF over tokens and hashed bigrams, L2-normalised, times one matrix.

    Shapes: table (vocabulary + buckets, outputs), weight (vocabulary + buckets,) holding the idf.
    """

    def __init__(self, vocabulary: int, buckets: int, outputs: int) -> None:
        super().__init__()
        self.vocabulary, self.buckets = vocabulary, buckets
        self.table = nn.Parameter(torch.zeros(vocabulary + buckets, outputs))
        self.weight = nn.Parameter(torch.zeros(vocabulary + buckets), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        features, present = _features(ids.long(), mask.to(self.table.dtype), self.vocabulary, self.buckets)
        idf = self.weight[features] * present
        total = torch.einsum("nl,nld->nd", idf, self.table[features])
        return total / idf.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6) + self.bias

    def spec(self) -> dict[str, Any]:
        return {
            "network": "linear",
            "vocabulary": self.vocabulary,
            "buckets": self.buckets,
            "outputs": self.table.shape[1],
        }


def build(spec: dict[str, Any]) -> Network:
    """An uninitialised network of a stored spec. Raises ModelError for a kind this version does not know."""
    options = {name: value for name, value in spec.items() if name != "network"}
    if spec.get("network") == "static":
        return Static(**options)
    if spec.get("network") == "linear":
        return Linear(**options)
    if spec.get("network") in ("transformer", "exits"):
        given = dict(options["config"])
        config = AutoConfig.for_model(given.pop("model_type"), **given)
        backbone = AutoModel.from_config(config, trust_remote_code=False)
        network = Transformer(backbone, options["outputs"], options["pooling"])
        if spec["network"] == "exits":
            network = Exits(backbone, options["outputs"], options["pooling"], options["after"])
        network.edit(options["edits"])
        network.zeros_stay = options.get("zeros_stay", False)
        return network
    known = "transformer, exits, static and linear"
    raise ModelError(f"unknown network {spec.get('network')!r}; this version knows {known}.")


def causal(config: Any) -> bool:
    """Whether in a backbone of this configuration tokens see only what stands before them: GPT-2, Qwen3, not BERT."""
    if getattr(config, "is_decoder", False):
        return True
    kind = config.model_type
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return generates and getattr(config, "use_bidirectional_attention", None) is not True


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached and contiguous."""
    return {name: value.detach().contiguous() for name, value in network.state_dict().items()}
