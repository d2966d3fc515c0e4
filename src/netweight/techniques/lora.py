"""Low-rank adapters (Hu et al., LoRA, ICLR 2022), put in by `peft` and multiplied out again."""

from __future__ import annotations

from typing import cast

from torch import nn

from netweight.anatomy import blocks
from netweight.layers import put
from netweight.network import Transformer


def adapt(network: Transformer, rank: int, alpha: float) -> None:
    """Put an adapter beside every linear layer of attention and feed-forward, in place: W x + alpha / rank * B A x.

    Only the adapters require gradients then. B starts at zero, A from torch's generator. Raises ModelError for a family
    whose layers are not known.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted = [name for b in blocks(network) for name in (*b.qkv, b.out, *b.up, b.down)]
    # What was factored holds linear layers of its own.
    targets = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(name == w or name.startswith(f"{w}.") for w in wanted)
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0), network)


def merge(network: Transformer) -> None:
    """Inverse of `adapt`, in place, with what the adapters learned added to the layers: W + alpha / rank * B A."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            put(network, name, cast(nn.Module, module.get_base_layer()))
    del network.peft_config
