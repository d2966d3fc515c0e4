"""Losses that look inside a network: language modelling, two views of a row, and perturbed embeddings.

What is inside is read by hooks while the network's own forward runs, whatever a run has done to its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.errors import ModelError
from netweight.layers import FactoredEmbedding
from netweight.loss import Batch, Supervised, matching, mean
from netweight.model import Model
from netweight.network import Transformer

# Devlin et al. (2019), section 3.1: of the chosen tokens, so many become [MASK] and so many a random one.
_MASKED, _RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class MaskedLM:
    """Masked language modelling (Devlin et al., BERT, NAACL 2019): cross entropy of the hidden tokens.

    Each token that is neither special nor padding is chosen with probability `share`; of those, 80 % become `mask_id`,
    10 % a random one of `vocabulary`, 10 % stay. Logits come from the token table itself, at chosen places only.
    """

    mask_id: int
    specials: tuple[int, ...]
    vocabulary: int
    share: float = 0.15
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = True

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        ids, chosen = self.hide(batch.ids, batch.mask)
        hidden = hidden_states(network, ids, batch.mask, batch.types)
        logits = vocabulary_logits(network, hidden[chosen])
        per_token = F.cross_entropy(logits.float(), batch.ids[chosen].long(), reduction="none")
        return mean(per_token, batch.weight[chosen.nonzero()[:, 0]], batch.everywhere)

    def hide(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids with some of them changed, and which were chosen, both (n, length)."""
        special = torch.isin(ids, torch.tensor(self.specials, dtype=ids.dtype, device=ids.device))
        chance, what = torch.rand((2, *ids.shape), device=ids.device)
        chosen = (chance < self.share) & (mask > 0) & ~special
        other = torch.randint(self.vocabulary, ids.shape, dtype=ids.dtype, device=ids.device)
        new = torch.where(what < _MASKED, torch.full_like(ids, self.mask_id), ids)
        new = torch.where((what >= _MASKED) & (what < _MASKED + _RANDOM), other, new)
        return torch.where(chosen, new, ids), chosen


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction (Radford et al., 2019) over all tokens that have one before them, tied to the table."""

    teachers: tuple[Model, ...] = ()
    unlabelled: bool = True

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        hidden = hidden_states(network, batch.ids, batch.mask, batch.types)
        real = (batch.mask[:, 1:] > 0) & (batch.mask[:, :-1] > 0)
        logits = vocabulary_logits(network, hidden[:, :-1][real])
        per_token = F.cross_entropy(logits.float(), batch.ids[:, 1:][real].long(), reduction="none")
        return mean(per_token, batch.weight[real.nonzero()[:, 0]], batch.everywhere)


@dataclass(frozen=True)
class Contrastive:
    """Unsupervised SimCSE (Gao et al., EMNLP 2021): a row's two views under dropout are closer than any other row's.

    Cross entropy of cos(view, other views) / temperature over the rows of a batch, on pooled features. Other rows are
    those that the same process holds.
    """

    temperature: float = 0.05
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = True

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        one, two = (F.normalize(pooled(network, batch).float(), dim=1) for _ in range(2))
        similar = one @ two.T / self.temperature
        per_row = F.cross_entropy(similar, torch.arange(len(batch), device=similar.device), reduction="none")
        return mean(per_row, batch.weight, batch.everywhere)


@dataclass(frozen=True)
class RDrop:
    """R-Drop (Liang et al., NeurIPS 2021): two passes under dropout, both trained on the labels, that must agree.

    loss = (L1 + L2) / 2 + kl_weight * (KL(p1, p2) + KL(p2, p1)) / 2. For scores, where outputs are no distribution, the
    second term is the squared difference.
    """

    supervised: Supervised
    kl_weight: float = 1.0
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = False

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        task = self.supervised.task
        one, two = (network(batch.ids, batch.mask, batch.types).float() for _ in range(2))
        labels = (self.supervised.of(one, batch) + self.supervised.of(two, batch)) / 2
        first, second = (matching(task, a, b, batch.weight, 1.0, batch.everywhere) for a, b in ((one, two), (two, one)))
        return labels + self.kl_weight * (first + second) / 2


@dataclass(frozen=True)
class Adversarial:
    """Adversarial training, FGM (Miyato, Dai and Goodfellow, ICLR 2017): also right where the embeddings are moved.

    loss = L(x) + L(x + r), with r = epsilon * g / ||g||: g is the gradient of L by the embeddings of a row's tokens,
    (length, hidden), and its norm is taken over the whole row. Two forward passes and two and a half backward: the half
    one is g's, which needs no gradients of weights.
    """

    supervised: Supervised
    epsilon: float = 1.0
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = False

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        with embeddings_moved(network) as added:
            plain = self.supervised(network, batch)
        (gradient,) = torch.autograd.grad(plain, added, retain_graph=True)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        with embeddings_moved(network, self.epsilon * gradient / norm[:, None, None]):
            return plain + self.supervised(network, batch)


def inner(network: nn.Module) -> Transformer:
    """The network as a transformer. Raises ModelError where it is none."""
    if not isinstance(network, Transformer):
        raise ModelError(f"this loss reads a transformer's hidden states; {type(network).__name__} has none.")
    return network


def hidden_states(network: nn.Module, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    """What the last layer says of every token (n, length, hidden)."""
    found: list[Tensor] = []
    with inner(network).backbone.register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state)):
        network(ids, mask, types)
    return found[0]


def pooled(network: nn.Module, batch: Batch) -> Tensor:
    """What the head is given (n, hidden)."""
    found: list[Tensor] = []
    with inner(network).head.register_forward_pre_hook(lambda _, given: found.append(given[0])):
        network(batch.ids, batch.mask, batch.types)
    return found[0]


@contextmanager
def embeddings_moved(network: nn.Module, by: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Within, `by` (n, length, hidden) is added to the embeddings of the tokens. Without it a zero is, which the list
    then holds: gradients by it are those by the embeddings, also where the token table is frozen."""
    added: list[Tensor] = []

    def move(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        added.append(torch.zeros_like(out, requires_grad=True) if by is None else by.to(out.dtype))
        return out + added[-1]

    with cast(Any, inner(network).backbone).get_input_embeddings().register_forward_hook(move):
        yield added


def vocabulary_logits(network: nn.Module, hidden: Tensor) -> Tensor:
    """Logits over the vocabulary (n, vocabulary) of hidden states (n, hidden): products with the token table."""
    table = cast(Any, inner(network).backbone).get_input_embeddings()
    if isinstance(table, FactoredEmbedding):
        return F.linear(hidden @ table.project.weight, table.table.weight)
    return F.linear(hidden, table.weight)


def drops_out(network: Transformer) -> bool:
    """Whether two passes over the same row differ in training, so that two views of it are worth comparing."""
    ids, was = torch.ones((4, 2), dtype=torch.long), network.training  # no model reads fewer than two tokens
    network.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        one, two = (network.features(ids, torch.ones_like(ids), torch.zeros_like(ids)) for _ in range(2))
    network.train(was)
    return not torch.allclose(one, two, atol=1e-6)
