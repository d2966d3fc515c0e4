"""Training that hides rows: gradients are clipped row by row, and noise is added (DP-SGD; Abadi et al., CCS 2016)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from netweight.errors import OptionError
from netweight.loss import Batch, Loss, PseudoLabels, SoftTargets, Supervised
from netweight.model import positions
from netweight.objectives import CausalLM
from netweight.seams import Ask, Seams, Source
from netweight.train import Plan

_AT_ONCE = 32  # rows whose activations are held together: 0.3 GB for a six-layer encoder of 64 tokens
_TRIED = 16  # tokens of the row on which a network is tried
_ALIKE = 1e-2  # relative difference of a norm taken in two ways that rounding may explain, also in bf16

# Losses that are sums over rows, once what they are divided by is a constant, and in which nothing is drawn: what
# MaskedLM hides and RDrop drops is drawn for a whole batch at once.
_BY_ROW = (Supervised, SoftTargets, PseudoLabels, CausalLM)


class RowPrivate(Seams):
    """DP-SGD in place of plain steps.

    Each step draws every row by itself with probability q = batch size / rows (and may draw none), clips each row's
    gradient to the norm `clip`, adds Gaussian noise of standard deviation noise * clip to the sum and divides by the
    expected number of rows. Gradients of rows come from one forward and one backward pass of the batch: what goes into
    a layer and the gradient of what comes out of it tell the norm of each row's part ("ghost clipping", Li et al., ICLR
    2022) and, scaled, the clipped sum itself ("book-keeping", Bu et al., ICML 2023).

    One row more must change that sum by `clip` at most, so that a row's gradient may hang on no other row. Dropout is
    off: a batch's masks come from one short stream, in which one row more moves those of all behind it. What
    `token_dropout` hides is drawn with the rows and the noise: each token for itself, out of a secret stream, so that
    the same may be hidden of all other rows, equally likely, whether one row is there or not. Of each such outcome the
    step is the sampled Gaussian mechanism, and no mixture of them tells more (divergences are quasi-convex).

    Args:
        inner: seams whose `correct` is applied to the noised gradient, which costs no privacy.
        seed: of all draws and the noise, for tests; None takes 128 bits of the operating system: whoever knows or
            guesses a seed can take the noise away again.
    """

    def __init__(
        self, noise: float, clip: float, rows: int, inner: Seams | None = None, seed: int | None = None
    ) -> None:
        if not (clip > 0 and noise >= 0):
            raise OptionError(f"clip is {clip} and noise {noise}; clip must be above 0, noise not below it.")
        self.noise, self.limit, self.rows = noise, clip, rows
        self.inner = inner or Seams()
        super().__init__(self.inner.device)
        # Not torch's generator, which looks at 32 bits of a seed on a CPU.
        self.drawn = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
        self.checked = False

    @property
    def terms(self) -> str:
        return f"noise {self.noise}, clip {self.limit}, rows {self.rows}; {self.inner.terms}"

    def share(self, source: Source, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        """A draw of its own: `rows` says only how many are expected, and that is the plan's batch size; the seed of
        `rng` is no secret."""
        rate = min(1.0, self.rows / len(source))
        mine = np.flatnonzero(self.drawn.random(len(source)) < rate)
        # An empty draw is a step of noise alone; a row that weighs nothing stands for it.
        batch = source.batch(mine if len(mine) else np.zeros(1, np.int64), self.drawn, hide).to(self.device)
        expected = rate * len(source)
        weight = batch.weight if len(mine) else torch.zeros_like(batch.weight)
        return replace(batch, weight=weight, everywhere=lambda total: torch.full_like(total, expected))

    def backward(self, network: nn.Module, loss: Ask, batch: Batch, scale: float) -> float:
        """Adds the sum of clipped gradients; `scale` is 1, since each step has one batch."""
        network.eval()  # no dropout
        self.expected = float(batch.everywhere(torch.ones(())))
        total = 0.0
        for part in parts(batch, _AT_ONCE):
            if not self.checked:
                self._check(network, loss, part)
            value, rows = by_row(network, loss, part)
            total += value
            norms = rows.norms() * self.expected
            shares = (self.limit / norms.clamp(min=1e-12)).clamp(max=1.0) * self.expected
            # No noise hides a row that makes the whole sum NaN.
            rows.add(torch.where(norms.isfinite(), shares, 0.0))
        return total

    def sync(self, network: nn.Module, value: float) -> float:
        """Noise, and the division that gives a mean."""
        for parameter in network.parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.from_numpy(self.drawn.standard_normal(parameter.shape, np.float32)).to(self.device)
            noise *= self.noise * self.limit
            total = noise if parameter.grad is None else parameter.grad + noise
            parameter.grad = total / self.expected
        return value

    def correct(self, network: nn.Module) -> None:
        self.inner.correct(network)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        """Nothing: rows are clipped already, and clipping noise would bias what is left."""

    def _check(self, network: nn.Module, loss: Ask, batch: Batch) -> None:
        """A parameter that is used outside of its own layer would escape clipping: compare one row with autograd."""
        self.checked = True
        length = min(_TRIED, positions(network.backbone) or _TRIED)
        one = nobodys(batch, length, len(cast(Any, network.backbone).get_input_embeddings().weight))
        trained = [p for p in network.parameters() if p.requires_grad]
        mine = float(by_row(network, loss, one)[1].norms()[0])
        found = torch.autograd.grad(loss(network, one), trained, allow_unused=True)
        theirs = float(torch.stack([g.norm() for g in found if g is not None]).norm())
        if not abs(mine - theirs) <= _ALIKE * theirs + 1e-9:
            raise OptionError(
                "the gradient of a row is not what its layers account for: something that is trained is used "
                "outside of its layer, where row-level privacy cannot reach it. Freeze it, train LoRA or the head, or "
                "turn privacy off."
            )


def require(network: nn.Module, loss: Loss, plan: Plan) -> None:
    """Refuse what row-level privacy cannot hide.

    Raises OptionError for a loss that is no sum over rows, a plan that mixes rows or splits steps, values that are not
    finite, and trained parameters of layers whose gradients by row are not known.
    """
    if not isinstance(loss, _BY_ROW):
        raise OptionError(
            f"{type(loss).__name__} is no sum over rows without draws of its own, so that clipping would not bound "
            f"what one row changes; row-level privacy knows {', '.join(kind.__name__ for kind in _BY_ROW)}. Use one of "
            "them, or turn privacy off."
        )
    if plan.splice:
        raise OptionError("spliced rows mix two rows each, so that clipping would not bound either; use splice=0.")
    if plan.accumulate > 1:
        raise OptionError(
            f"accumulate={plan.accumulate}: a step with row-level privacy has one batch, of any size (its rows are "
            f"worked on {_AT_ONCE} at a time); use batch_size={plan.batch_size * plan.accumulate} and accumulate=1."
        )
    if odd := [name for name, value in network.state_dict().items() if not value.isfinite().all()]:
        raise OptionError(f"{odd[0]} of the model has values that are not finite; begin with another model.")
    for name, module in _owners(network):
        if _kind(module) is None:
            advice = (
                "freeze_embeddings=True" if isinstance(module, nn.Embedding) else "train='lora' or 'head' (--train)"
            )
            raise OptionError(
                f"{name} is a {type(module).__name__}, whose gradients row by row are not known; use {advice}, or turn "
                "privacy off."
            )


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows of a batch, `size` at a time."""
    for start in range(0, len(batch), size):
        yield batch.part(slice(start, start + size))


def nobodys(batch: Batch, length: int, vocabulary: int) -> Batch:
    """A row that looks like those of a batch and has nothing of them: what is tried on it may be told."""
    ids = torch.arange(1, length + 1, dtype=batch.ids.dtype, device=batch.ids.device)[None] % vocabulary
    said = tuple(torch.arange(t.shape[1], dtype=t.dtype, device=t.device)[None] for t in batch.teachers)
    one = replace(batch, ids=ids, mask=torch.ones_like(ids), types=torch.zeros_like(ids), teachers=said)
    return replace(one, targets=torch.zeros_like(batch.targets[:1]), weight=torch.ones_like(batch.weight[:1]))


@dataclass
class Seen:
    """What went into a layer (n, ..., inputs) and the gradient of what came out (n, ..., outputs), call after call."""

    module: nn.Module
    inputs: list[Tensor]
    gradients: list[Tensor]

    def both(self) -> tuple[Tensor, Tensor]:
        """As (n, places, width), calls behind each other: a row's gradient is the sum over all of its places."""
        n = len(self.inputs[0])
        given, grad = (
            torch.cat([x.float().reshape(n, -1, x.shape[-1]) for x in xs], 1) for xs in (self.inputs, self.gradients)
        )
        return given, grad


class RowGradients:
    """Gradients of each row of a batch by the trained parameters, without holding them."""

    def __init__(self, seen: list[Seen], rows: int) -> None:
        self.seen, self.rows = seen, rows

    def norms(self) -> Tensor:
        """L2 norm (n,) of each row's gradient over all trained parameters."""
        total = torch.zeros(self.rows, device=self.seen[0].gradients[0].device)
        for layer in self.seen:
            given, grad = layer.both()
            weight, bias = _own(layer.module)
            if bias is not None:
                total += grad.sum(dim=1).square().sum(dim=1)
            if weight is not None:
                total += (
                    _linear_norms(given, grad)
                    if weight.ndim == 2
                    else ((grad * _normed(layer.module, given)).sum(dim=1).square().sum(dim=1))
                )
        return total.sqrt()

    def add(self, scale: Tensor) -> None:
        """Add the sum over rows of scale (n,) times each row's gradient to what the parameters hold. A row whose scale
        is 0 adds nothing, whatever is in it: 0 times NaN would be NaN."""
        kept = torch.arange(self.rows, device=scale.device) if (scale > 0).all() else (scale > 0).nonzero()[:, 0]
        for layer in self.seen:
            given, grad = (part if len(kept) == self.rows else part[kept] for part in layer.both())
            grad = grad * scale[kept, None, None]
            weight, bias = _own(layer.module)
            if bias is not None:
                _add(bias, grad.sum(dim=(0, 1)))
            if weight is not None and weight.ndim == 2:
                _add(weight, grad.flatten(0, 1).T @ given.flatten(0, 1))
            elif weight is not None:
                _add(weight, (grad * _normed(layer.module, given)).sum(dim=(0, 1)))


def by_row(network: nn.Module, loss: Ask, batch: Batch) -> tuple[float, RowGradients]:
    """The loss, and the gradients of each row's part of it."""
    with _watched(network, len(batch)) as calls:
        value = loss(network, batch)
    outputs = [out for _, _, out in calls]
    # Only gradients by outputs are asked for: those by parameters would be of all rows together.
    found = torch.autograd.grad(value, outputs, allow_unused=True)
    seen: dict[int, Seen] = {}
    for (module, given, out), gradient in zip(calls, found, strict=True):
        layer = seen.setdefault(id(module), Seen(module, [], []))
        layer.inputs.append(given)
        layer.gradients.append(torch.zeros_like(out) if gradient is None else gradient)
    return value.item(), RowGradients(list(seen.values()), len(batch))


@contextmanager
def _watched(network: nn.Module, rows: int) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Notes input and output of each call of a layer that is trained."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if len(given[0]) != rows:
                raise OptionError(f"{name} does not keep rows apart; row-level privacy cannot clip what it learns.")
            calls.append((module, given[0].detach(), out))

        return hook

    with ExitStack() as hooks:
        for name, module in _owners(network):
            hooks.enter_context(module.register_forward_hook(note(name)))
        yield calls


def _owners(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold a trained parameter of their own."""
    return [
        (name or "the network", module)
        for name, module in network.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def _kind(module: nn.Module) -> str | None:
    # Exact types: what inherits from them may use its weight in another way.
    if type(module) is nn.Linear or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "linear"
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return "norm"
    if type(module).__name__.endswith("RMSNorm") and {n for n, _ in module.named_parameters(recurse=False)} == {
        "weight"
    }:
        return "norm"
    return None


def _own(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, where they are trained."""
    held = dict(module.named_parameters(recurse=False))
    weight, bias = (p if p is not None and p.requires_grad else None for p in (held.get("weight"), held.get("bias")))
    return weight, bias


def _normed(module: nn.Module, given: Tensor) -> Tensor:
    """What a norm multiplies with its weight."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(given, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or torch.finfo(given.dtype).eps
    return given * torch.rsqrt(given.square().mean(dim=-1, keepdim=True) + float(eps))


def _linear_norms(given: Tensor, grad: Tensor) -> Tensor:
    """Squared norm (n,) of each row's sum over places of grad x given^T, by whichever way is shorter: of many places
    the matrices themselves, of few the products between places."""
    places, outputs, inputs = given.shape[1], grad.shape[2], given.shape[2]
    if places * (inputs + outputs) > inputs * outputs:
        return torch.einsum("npo,npi->noi", grad, given).square().sum(dim=(1, 2))
    return (torch.bmm(given, given.transpose(1, 2)) * torch.bmm(grad, grad.transpose(1, 2))).sum(dim=(1, 2))


def _add(parameter: Tensor, term: Tensor) -> None:
    parameter.grad = term.to(parameter.dtype) if parameter.grad is None else parameter.grad + term
