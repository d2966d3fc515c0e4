"""A training step on tensors that have shapes and no data (torch's fake tensors): the bytes that activations take.

The network itself is run, so this counts what its family, its activation function, its dropout and its precision keep
for the gradient, and which attention this processor has: where attention drops out, the one for CPUs keeps its maps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netweight.network import Transformer
from netweight.run.tensor import cuts_of, narrow


@dataclass(frozen=True)
class Kept:
    """Bytes of activations: kept `before` the first layer, by one `layer` on average, and `behind` the last (negative
    where something is let go there: keys and values for generation). `state`: the hidden states that go from one layer
    to the next. `spike`: what the backward pass takes more before it has let much go."""

    before: int
    layer: int
    behind: int
    state: int
    spike: int


def rehearse(
    network: Transformer, rows: int, length: int, ways: int = 1, half: bool = False, fused: bool = False
) -> Kept:
    """What a step on rows of so many tokens keeps, where `ways` processes divide heads and neurons. As in most batches
    some rows are taken to be padded, for which some families keep more.

    Args:
        network: on any device, also on torch's meta device; it is not changed.
        half: under autocast to bf16.
        fused: with dropout inside the kernels, as on graphics cards: attention keeps no maps, and a mask is one byte.

    Raises OptionError where heads or neurons cannot be divided.
    """
    mode, marks, states = FakeTensorMode(), list[int](), list[int]()
    with mode:
        new = _faked(network, ways).train()
        ids = torch.zeros((rows, length), dtype=torch.long)
        mask = torch.ones_like(ids)
    live = _Live((*new.parameters(), *new.buffers(), ids, mask))

    def mark(_: nn.Module, __: object, out: object = None) -> None:
        marks.append(live.now)
        states.extend(t.untyped_storage().nbytes() for t in tree_leaves(out)[:1] if isinstance(t, Tensor))

    layers = new.layers()
    layers[0].register_forward_pre_hook(mark)
    for layer in layers:
        layer.register_forward_hook(mark)
    with mode, live, _Fused() if fused else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = new(ids, mask, ids).float().sum()
        forward = live.now
        loss.backward()
    gradients = [p.grad for p in new.parameters() if p.grad is not None]
    each = (marks[-1] - marks[0]) // len(layers)
    return Kept(marks[0], each, forward - marks[-1], states[-1], max(live.peak(gradients) - forward, 0))


def _faked(network: Transformer, ways: int) -> Transformer:
    """A copy, or one process's share of it, on the CPU, without data."""
    cuts = cuts_of(network, ways) if ways > 1 else {}
    known: dict[int, Any] = {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        shape, cut = list(tensor.shape), cuts.get(name)
        if cut and cut.dim is not None:
            shape[cut.dim] //= ways
        empty = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    new = copy.deepcopy(network, known)
    narrow(new, ways)
    return new


class _Live(TorchDispatchMode):
    """Notes when each storage comes and goes, but those of `known`, which are there before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._events: list[tuple[int, int]] = []  # the number of a storage, and the bytes that came or went
        self._numbers = {id(tensor.untyped_storage()): -1 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._met(tensor.untyped_storage())
        return out

    def _met(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._numbers:
            number, size = len(self._events), storage.nbytes()
            self._numbers[id(storage)] = number
            self._note(number, size)
            weakref.finalize(storage, self._ended, id(storage), number, size)

    def _ended(self, at: int, number: int, size: int) -> None:
        del self._numbers[at]
        self._note(number, -size)

    def _note(self, number: int, size: int) -> None:
        self.now += size
        self._events.append((number, size))

    def peak(self, without: Iterable[Tensor]) -> int:
        """The most bytes that were there at once, leaving out the storages of some tensors."""
        out = {self._numbers.get(id(tensor.untyped_storage())) for tensor in without}
        now = most = 0
        for number, size in self._events:
            now += 0 if number in out else size
            most = max(most, now)
        return most


class _Fused(TorchFunctionMode):
    """Dropout as kernels of graphics cards do it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            # Without dropout the CPU's keeps what theirs keep with it.
            kwargs = kwargs | {"dropout_p": 0.0}
        if func is F.dropout:
            return _dropped(*args, **kwargs)
        return func(*args, **kwargs)


def _dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x
