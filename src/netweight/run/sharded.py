"""Fully sharded data parallel: each process holds rows of its own and a share of every parameter.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al., PyTorch FSDP, VLDB 2023; Rajbhandari et al., ZeRO, SC 2020,
stage 3): before a layer runs, its parameters are gathered, and afterwards dropped; gradients are summed and scattered,
so that each process keeps, and steps, its share of parameters, gradients and optimizer state only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from netweight.errors import OptionError
from netweight.loss import Loss
from netweight.matching import Matching
from netweight.network import Exits, Transformer
from netweight.run.divided import Divided


class Fsdp(Divided):
    """One share of a network among the processes of a group, each of which holds different rows of a batch.

    Args:
        device, activation_checkpointing: see `Divided`.
        offload: keep parameters, gradients and optimizer state in the memory of the host, and send a layer's to the
            device when it runs.
    """

    strategy = "fsdp"

    def __init__(
        self,
        device: torch.device | None = None,
        activation_checkpointing: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(device, activation_checkpointing)
        self.keeps = torch.device("cpu") if offload else self.device
        self.policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        self.mesh = init_device_mesh(self.device.type, (self.lanes,))
        self._shards: dict[str, DTensor] = {}

    def admit(self, loss: Loss) -> None:
        super().admit(loss)
        if self.activation_checkpointing and isinstance(loss, Matching) and "attention" in loss.match:
            raise OptionError(
                "attention maps are matched with the plain kernel, which a layer that is computed again would not use; "
                "leave activation_checkpointing out, or match relations."
            )

    def divide(self, network: Transformer) -> None:
        # Layer by layer this goes to the device of the mesh, is cut there, and with offload goes back.
        for module in (*network.layers(), network):
            fully_shard(module, mesh=self.mesh, offload_policy=self.policy)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                # The losses of the parts add up to that of the whole batch, so their gradients do too.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if isinstance(network, Exits):
            # Parameters are gathered where `forward` is called; this is another way in.
            register_fsdp_forward_method(network, "stages")
        self._shards = {name: p.data for name, p in network.named_parameters() if isinstance(p.data, DTensor)}

    def sync(self, network: torch.nn.Module, value: float) -> float:
        return float(self.everywhere(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def joined(self, name: str, part: Tensor) -> Tensor:
        return part.full_tensor() if isinstance(part, DTensor) else part

    def own(self, name: str, whole: Tensor) -> Tensor:
        shard = self._shards.get(name)
        if shard is None or shard.shape != whole.shape:
            return whole.to(self.keeps)
        # Every process reads the same file: nothing has to be sent.
        part = distribute_tensor(whole.to(self.device), self.mesh, shard.placements, src_data_rank=None)
        return part.to(self.keeps)
