"""Where a transformer layer keeps what: which linear layers make heads and neurons, in every family that is supported.

A block's attention is a few linear layers whose outputs are heads, and one that reads them; its feed-forward network
is one or two whose outputs are neurons, and one that reads those. Some families fuse several into one matrix: its
outputs are then `groups` stretches, one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from netweight.errors import ModelError
from netweight.network import Transformer


@dataclass(frozen=True)
class Names:
    """Names inside a layer; `qkv_groups` and `up_groups` count what one matrix holds."""

    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    qkv_groups: int = 1
    up_groups: int = 1


_FAMILIES = (
    # BERT, RoBERTa, XLM-R
    Names(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
    ),
    # DistilBERT
    Names(("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", ("ffn.lin1",), "ffn.lin2"),
    # ModernBERT
    Names(("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo", 3, 2),
    # GPT-2
    Names(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", 3),
    # Qwen3, Llama
    Names(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
)


# Norms over the width of one head, inside attention.
_NORMS_OF_HEADS = ("q_norm", "k_norm")
_POOLER = "pooler.dense"


@dataclass(frozen=True)
class Block:
    """One layer. `heads` counts what can be removed by itself: where several query heads share a key head, they go
    together. All names are those of the whole network's modules."""

    name: str
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    heads: int
    neurons: int
    qkv_groups: int
    up_groups: int


def blocks(network: Transformer) -> list[Block]:
    """Every layer, from the first. Raises ModelError for a family whose layers are built otherwise."""
    return [_block(network, f"{network.stack}.{i}") for i in range(len(network.layers()))]


def _block(network: Transformer, at: str) -> Block:
    layer = network.get_submodule(at)
    names = next((n for n in _FAMILIES if all(_has(layer, part) for part in (*n.qkv, n.out, *n.up, n.down))), None)
    if names is None:
        raise ModelError(
            f"Netweight does not know the parts of the layers of {network.config.model_type}; it knows those of BERT, "
            "RoBERTa, DistilBERT, ModernBERT, GPT-2 and Qwen3. Use one of these, or what takes layers whole."
        )
    attention = layer.get_submodule(names.qkv[0].rpartition(".")[0])
    width = int(getattr(attention, "attention_head_size", 0) or getattr(attention, "head_dim", 0))
    outputs = [out_features(layer.get_submodule(name)) for name in (*names.qkv, *names.up)]
    heads = outputs[min(1, len(names.qkv) - 1)] // (width * names.qkv_groups)
    return Block(
        at,
        tuple(f"{at}.{name}" for name in names.qkv),
        f"{at}.{names.out}",
        tuple(f"{at}.{name}" for name in names.up),
        f"{at}.{names.down}",
        heads,
        outputs[-1] // names.up_groups,
        names.qkv_groups,
        names.up_groups,
    )


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def out_features(module: nn.Module) -> int:
    """Width of what a linear layer, or what stands for one, gives."""
    found = getattr(module, "out_features", None)
    return int(found if found is not None else module.up.out_features)  # type: ignore[union-attr,arg-type]


def keep_heads(network: Transformer, block: Block, kept: Tensor) -> None:
    """Remove all heads of a block but those of these numbers, in place."""
    for name in block.qkv:
        _keep_outputs(network, name, block.qkv_groups, block.heads, kept)
    _keep_inputs(network, block.out, block.heads, kept)
    attention = block.out.rpartition(".")[0]
    if hasattr(network.get_submodule(attention), "split_size"):
        # GPT-2 takes queries, keys and values apart by this.
        width = out_features(network.get_submodule(block.qkv[0])) // block.qkv_groups
        network.set_attribute(f"{attention}.split_size", width)


def keep_neurons(network: Transformer, block: Block, kept: Tensor) -> None:
    """Remove all neurons of a block's feed-forward network but those of these numbers, in place."""
    for name in block.up:
        _keep_outputs(network, name, block.up_groups, block.neurons, kept)
    _keep_inputs(network, block.down, block.neurons, kept)


def norms(network: Transformer) -> dict[str, nn.Module]:
    """The norms over the residual stream, by name: every one but those that some families have inside attention."""
    return {
        name: module
        for name, module in network.named_modules()
        if (isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("RMSNorm"))
        and name.rpartition(".")[2] not in _NORMS_OF_HEADS
    }


@dataclass(frozen=True)
class Stream:
    """Everything that holds a unit of the residual stream, by name: tables and norms have a column for it, `reads`
    take it in, `writes` give it out."""

    width: int
    tables: tuple[str, ...]
    norms: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def stream(network: Transformer) -> Stream:
    """Where the residual stream is. Raises ModelError where a module holds it that is none of the known ones."""
    parts, width = blocks(network), network.width
    pooler = [f"backbone.{_POOLER}"] if _has(network.backbone, _POOLER) else []
    found = Stream(
        width,
        tuple(name for name, m in network.named_modules() if isinstance(m, nn.Embedding) and m.embedding_dim == width),
        tuple(norms(network)),
        (*(name for block in parts for name in (*block.qkv, *block.up)), *pooler, "head"),
        (*(name for block in parts for name in (block.out, block.down)), *pooler),
    )
    known = {*found.tables, *found.norms, *found.reads, *found.writes}
    for name, module in network.named_modules():
        holds = any(True for _ in module.parameters(recurse=False)) and name.rpartition(".")[2] not in _NORMS_OF_HEADS
        if holds and name not in known:
            raise ModelError(
                f"{name} holds hidden units in a way that Netweight cannot cut; cut the hidden width before layers "
                "are factored, or keep all of it."
            )
    return found


def keep_hidden(network: Transformer, kept: Tensor) -> None:
    """Remove all units of the residual stream but those of these numbers, in place.

    Heads keep their width, and the config its own: families derive the width of heads from it.
    """
    found = stream(network)
    for name in found.tables:
        table = cast(nn.Embedding, network.get_submodule(name)).weight.detach()
        network.replace(name, nn.Embedding.from_pretrained(table[:, kept], freeze=False))
    for name in found.norms:
        network.replace(name, _narrower(name, network.get_submodule(name), kept))
    for name in found.reads:
        _keep_inputs(network, name, found.width, kept)
    for name in found.writes:
        _keep_outputs(network, name, 1, found.width, kept)


def _narrower(name: str, norm: nn.Module, kept: Tensor) -> nn.Module:
    """A norm over fewer units."""
    weight, bias = cast(Tensor, norm.weight).detach(), cast("Tensor | None", getattr(norm, "bias", None))
    new: nn.LayerNorm | nn.RMSNorm
    if isinstance(norm, nn.LayerNorm):
        new = nn.LayerNorm(len(kept), norm.eps, bias=bias is not None)
    else:
        eps = float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 1e-6)
        probe = torch.linspace(-1.0, 2.0, len(weight))
        # Some families scale by 1 + weight under the same name.
        if not torch.allclose(norm(probe), torch.nn.functional.rms_norm(probe, weight.shape, weight, eps), atol=1e-5):
            raise ModelError(f"{name} is a {type(norm).__name__}, which is no plain RMSNorm; keep its hidden width.")
        new = nn.RMSNorm(len(kept), eps)
    with torch.no_grad():
        cast(Tensor, new.weight).copy_(weight[kept])
        if bias is not None:
            cast(Tensor, new.bias).copy_(bias.detach()[kept])
    return new


def _linear(network: Transformer, name: str) -> nn.Linear:
    module = network.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{name} is a {type(module).__name__}; cut heads and neurons before layers are factored.")
    return module


def _keep_outputs(network: Transformer, name: str, groups: int, units: int, kept: Tensor) -> None:
    old = _linear(network, name)
    weight = old.weight.detach().unflatten(0, (groups, units, -1))[:, kept].flatten(0, 2)
    bias = None if old.bias is None else old.bias.detach().unflatten(0, (groups, units, -1))[:, kept].flatten()
    network.replace(name, _filled(weight, bias))


def _keep_inputs(network: Transformer, name: str, units: int, kept: Tensor) -> None:
    old = _linear(network, name)
    weight = old.weight.detach().unflatten(1, (units, -1))[:, kept].flatten(1)
    network.replace(name, _filled(weight, None if old.bias is None else old.bias.detach()))


def _filled(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            cast(Tensor, new.bias).copy_(bias)
    return new
