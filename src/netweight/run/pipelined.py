"""Pipeline parallel: consecutive layers live in consecutive processes, and micro-batches flow through them.

One forward, one backward (Narayanan et al., PipeDream, SOSP 2019, and Megatron-LM, SC 2021, section 2.2): a stage
starts with as many forward passes as there are stages behind it, then alternates, so that it holds the activations of
that many micro-batches and no more. With p equal stages and m micro-batches a process idles for (p - 1) / (m + p - 1)
of the time (Huang et al., GPipe, NeurIPS 2019).

Every stage evaluates the loss with a network that stops behind its own last layer. So a loss may change the tokens
(masked language modelling): all stages draw the same. Only the last stage's goes on to a value.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from netweight.anatomy import blocks
from netweight.errors import OptionError
from netweight.loss import Batch, Loss, PseudoLabels, SoftTargets, Supervised
from netweight.network import Exits, Transformer
from netweight.objectives import CausalLM, MaskedLM
from netweight.run.divided import Divided, clip, entry, from_all
from netweight.run.processes import shares
from netweight.seams import Ask

# What one forward pass is enough for, row by row.
_ONE_PASS = (Supervised, SoftTargets, PseudoLabels, MaskedLM, CausalLM)

Mode = Literal["relay", "train", "sums"]


class _Stopped(Exception):
    """The forward pass has reached the end of this stage."""


@dataclass
class _Flow:
    """What the hooks of a stage share. `relay`: evaluation, from stage to stage. `train`: `given` comes in, `taken` is
    what goes out. `sums`: layers do nothing; only what a loss divides by is asked."""

    mode: Mode = "relay"
    given: Tensor | None = None
    taken: Tensor | None = None
    seed: int = 0


@dataclass
class _Micro:
    """Some rows of a batch on their way through this stage: what came in and what went out, while both are needed."""

    batch: Batch
    seed: int
    given: Tensor | None = None
    out: Tensor | None = None


class Pipelined(Divided):
    """The layers of a network one behind the other in all processes; each sees every row.

    Args:
        micro_batches: parts that a batch is cut into; more leave less time idle, and smaller products.
        device, activation_checkpointing: see `Divided`.
        timeout: seconds after which a process that waits for another gives up.

    `busy` and `idle` are the seconds that `backward` has taken so far: computing, and waiting for other stages.
    """

    strategy = "pipeline"

    def __init__(
        self,
        micro_batches: int = 4,
        device: torch.device | None = None,
        activation_checkpointing: bool = False,
        timeout: float = 300.0,
    ) -> None:
        super().__init__(device, activation_checkpointing, lanes=1)
        self.stage, self.stages = dist.get_rank(), dist.get_world_size()
        self.last = self.stage == self.stages - 1
        self.micro_batches = micro_batches
        self.timeout = timedelta(seconds=timeout)
        self.down: dist.ProcessGroup | None = None
        self.up: dist.ProcessGroup | None = None
        self.busy = self.idle = 0.0
        self._flow = _Flow()
        self._owner: dict[str, int] = {}
        self._tied: tuple[str, ...] = ()
        self._ends: dist.ProcessGroup | None = None
        self._held: dict[str, nn.Parameter] = {}
        self._entries: frozenset[str] = frozenset()
        self._width = self._outputs = 0
        self._ties = False
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def admit(self, loss: Loss) -> None:
        super().admit(loss)
        if not isinstance(loss, _ONE_PASS):
            raise OptionError(
                f"{type(loss).__name__} needs more than one forward pass, or what is inside of layers, and under "
                "pipeline these are in several processes; use local, ddp or fsdp."
            )
        self._ties = isinstance(loss, MaskedLM | CausalLM)

    def divide(self, network: Transformer) -> None:
        if isinstance(network, Exits):
            raise OptionError("exits answer from layers of several stages; use local, ddp or fsdp.")
        self._owner = owners(network, self.stages)
        # Two groups, so that what goes down and what comes back up never wait for each other. Without a timeout of
        # their own they would wait for half an hour.
        self.down, self.up = (dist.new_group(timeout=self.timeout) for _ in range(2))
        self._ends = dist.new_group(sorted({0, self.stages - 1}), self.timeout)
        layers = network.layers()
        self._width, self._outputs = network.width, network.head.out_features
        table = cast(Any, network.backbone).get_input_embeddings()
        at = next(name for name, module in network.named_modules() if module is table)
        # A loss that multiplies with the token table needs it in the last stage as well.
        wanted = self._ties and self.stages > 1
        self._tied = tuple(name for name in self._owner if wanted and name.startswith(f"{at}."))
        sizes = shares(len(layers), [1.0] * self.stages)
        first = sum(sizes[: self.stage])
        final = first + sizes[self.stage] - 1
        for i in range(len(layers)):
            if not first <= i <= final:
                layers[i] = _Passed(layers[i])
        for i in range(first, final + 1):
            layer = layers[i]
            layer.forward = partial(self._layer, layer.forward, i == first, i == final)
        for name, module in list(network.named_modules()):
            entries = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
            leaves = any(True for _ in module.parameters(recurse=False))
            if leaves and self._there(network, name) and not any(self._mine(entry) for entry in entries):
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, _Passed(module))
        network.to(self.device)
        self._held, self._entries = dict(network.named_parameters()), frozenset(network.state_dict())
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._answer)

    def finish(self, network: nn.Module) -> None:
        super().finish(network)
        for group in (self.down, self.up, self._ends):
            dist.destroy_process_group(group)
        self.down = self.up = self._ends = None

    def _there(self, network: nn.Module, name: str) -> bool:
        """Whether a module has not gone with one that held it."""
        held = network
        for part in name.split("."):
            if isinstance(held, _Passed):
                return False
            held = cast(nn.Module, getattr(held, part))
        return True

    def _mine(self, name: str) -> bool:
        return self._owner.get(name) == self.stage or (self.last and name in self._tied)

    def _begin(self, network: nn.Module, given: tuple[Tensor, ...]) -> None:
        """What a loss draws is the same in all stages; what layers draw is not."""
        if self._flow.mode == "train":
            torch.manual_seed(_mixed(self._flow.seed, self.stage))

    def _layer(
        self, forward: Callable[..., Tensor], first: bool, final: bool, hidden: Tensor, *given: Any, **more: Any
    ) -> Tensor:
        """The first and the last layer of a stage take in, and give out, what flows between stages."""
        flow = self._flow
        if flow.mode == "sums":
            return hidden
        if first and self.stage:
            if flow.mode == "relay":
                size = (hidden.shape[0], hidden.shape[1])
                flow.given = self._received(size, self.stage - 1, self.down)
            assert flow.given is not None
            hidden = flow.given
        out = forward(hidden, *given, **more)
        if final and not self.last:
            flow.taken = out
            if flow.mode == "train":
                raise _Stopped
            dist.send(out.detach().float().contiguous(), self.stage + 1, group=self.down)
        return out

    def _answer(self, network: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """In evaluation the last stage tells the others."""
        if self._flow.mode != "relay":
            return None
        empty = torch.zeros(len(given[0]), self._outputs, device=self.device)
        said = out.detach().float().contiguous() if self.last else empty
        dist.broadcast(said, src=self.stages - 1)
        return said

    def backward(self, network: nn.Module, loss: Ask, batch: Batch, scale: float) -> float:
        began, waited = time.monotonic(), self.idle
        sizes = shares(len(batch), [1.0] * min(self.micro_batches, len(batch)))
        seed = torch.initial_seed()
        ends = np.cumsum(sizes).tolist()
        cuts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        # The first draws what a process that holds all of the batch would.
        micros = [_Micro(batch.part(cut), _mixed(seed, i) if i else seed) for i, cut in enumerate(cuts)]

        def ask(part: Batch) -> Tensor:
            return loss(network, part) * scale

        if self.last:
            self._add_up(micros, ask)
        self._flow.mode = "train"
        self._sending = []
        ahead = min(len(micros), self.stages - 1 - self.stage)
        total = 0.0
        for i in range(len(micros) + ahead):
            if i < len(micros):
                self._forward(micros[i], ask)
            if i >= ahead:
                total += self._back(micros[i - ahead])
        paused = time.monotonic()
        for work, _ in self._sending:
            work.wait()
        self.idle += time.monotonic() - paused
        # The next of the batches of one step draws others, and in all stages the same.
        torch.manual_seed(_mixed(seed, len(batch), 1))
        self._flow.mode = "relay"
        self.busy += time.monotonic() - began - (self.idle - waited)
        return total

    def _add_up(self, micros: list[_Micro], ask: Callable[[Batch], Tensor]) -> None:
        """Make every micro-batch know what the others add to the sums that the loss divides by."""
        asked: list[list[Tensor]] = []
        self._flow.mode = "sums"
        with torch.no_grad():
            for micro in micros:
                sums: list[Tensor] = []
                torch.manual_seed(micro.seed)
                ask(replace(micro.batch, everywhere=partial(_noted, sums)))
                asked.append(sums)
        totals = [torch.stack(some).sum(dim=0) for some in zip(*asked, strict=True)]
        for micro in micros:
            micro.batch = replace(micro.batch, everywhere=partial(_next, iter(totals)))

    def _forward(self, micro: _Micro, ask: Callable[[Batch], Tensor]) -> None:
        flow = self._flow
        if self.stage:
            size = (micro.batch.ids.shape[0], micro.batch.ids.shape[1])
            micro.given = flow.given = self._received(size, self.stage - 1, self.down).requires_grad_()
        flow.seed = micro.seed
        torch.manual_seed(micro.seed)
        try:
            micro.out = ask(micro.batch)
        except _Stopped:
            micro.out = flow.taken
            assert micro.out is not None
            self._send(micro.out, self.stage + 1, self.down)
        flow.given = flow.taken = None

    def _back(self, micro: _Micro) -> float:
        """The gradients of one micro-batch; its part of the loss where it is known."""
        assert micro.out is not None
        out, given = micro.out, micro.given
        if self.last:
            out.backward()
        else:
            slope = self._received((out.shape[0], out.shape[1]), self.stage + 1, self.up)
            if out.requires_grad:
                out.backward(slope.to(out.dtype))
        if given is not None:
            assert given.grad is not None
            self._send(given.grad, self.stage - 1, self.up)
        micro.out = micro.given = None
        return out.item() if self.last else 0.0

    def _send(self, value: Tensor, to: int, group: dist.ProcessGroup | None) -> None:
        """Begin to send hidden states, or gradients by them, in fp32."""
        held = value.detach().float().contiguous()
        work = dist.isend(held, to, group=group)
        assert work is not None
        self._sending.append((work, held))

    def _received(self, size: tuple[int, int], source: int, group: dist.ProcessGroup | None) -> Tensor:
        """Hidden states (rows, length, hidden) of another stage; waiting for them counts as idle."""
        began = time.monotonic()
        value = torch.empty(*size, self._width, device=self.device)
        dist.recv(value, source, group=group)
        self.idle += time.monotonic() - began
        return value

    def sync(self, network: nn.Module, value: float) -> float:
        for name in self._tied:
            parameter = self._held.get(name)
            if parameter is not None and parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self._ends)
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(said, src=self.stages - 1)
        return float(said)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        tied = {id(self._held[name]) for name in self._tied if self.stage and name in self._held}
        held = [p for p in parameters if p.grad is not None]
        mine = [cast(Tensor, p.grad) for p in held if id(p) not in tied]
        clip(mine, (), limit, None, self.device, [cast(Tensor, p.grad) for p in held if id(p) in tied])

    def whole(self, held: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
        # What two stages hold is the same in both.
        found = {name: value for part in from_all(held) for name, value in part.items()}
        return found if wanted else {}

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in whole.items() if entry(name) in self._entries}


def owners(network: Transformer, stages: int) -> dict[str, int]:
    """The stage that holds each entry of the network's state: layers in order, what families register before them in
    the first, and what stands behind them in the last. Raises OptionError for fewer layers than stages."""
    blocks(network)  # only families of which this order is known
    layers = len(network.layers())
    if layers < stages:
        raise OptionError(
            f"{layers} layers cannot be divided into {stages} stages; use as many processes as there are layers at "
            "most."
        )
    ends = list(itertools.accumulate(shares(layers, [1.0] * stages)))
    found: dict[str, int] = {}
    behind = False
    for name in network.state_dict():
        if name.startswith(f"{network.stack}."):
            behind = True
            layer = int(name[len(network.stack) + 1 :].partition(".")[0])
            found[name] = next(stage for stage, end in enumerate(ends) if layer < end)
        else:
            found[name] = stages - 1 if behind else 0
    return found


class _Passed(nn.Module):
    """Stands for what another stage holds: gives on what it is given, or for a table zeros of its width."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.width = held.embedding_dim if isinstance(held, nn.Embedding) else 0
        # What a backbone asks of a layer besides calling it: ModernBERT wants its kind of attention.
        for name, value in vars(held).items():
            if isinstance(value, int | float | str) and name != "training" and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, x: Tensor, *given: Any, **more: Any) -> Tensor:
        return torch.zeros(*x.shape, self.width, device=x.device) if self.width else x


def _noted(sums: list[Tensor], value: Tensor) -> Tensor:
    sums.append(value)
    return value


def _next(totals: Iterator[Tensor], value: Tensor) -> Tensor:
    return next(totals)


def _mixed(*numbers: int) -> int:
    """One seed from several."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1)[0])
