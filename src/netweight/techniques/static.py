"""A student without attention, distilled from an encoder.

Per-token vectors come from the teacher's own encoder, one token at a time, and are reduced by PCA, as in
model2vec (Tulkens and van Dongen, 2024); token weights start from smooth inverse frequency (Arora et al.,
2017); hashed bigrams as in fastText (Joulin et al., 2016). All of it is then trained on the teacher's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from netweight.errors import OptionError
from netweight.loss import Batch, SoftTargets
from netweight.model import Model
from netweight.network import Network, Transformer
from netweight.network import Static as StaticNetwork
from netweight.run import Run
from netweight.techniques.base import planned, transformer
from netweight.train import Plan

_CHUNK = 512


@dataclass(frozen=True)
class Static:
    """Distil the model into a weighted mean of token vectors with a small head.

    `width` is the vectors' size during training. A linear head over no more labels than that is folded into the table
    when exported, but for pairs of texts, and costs nothing at run time. `buckets` hold hashed bigrams (0: none).
    `hidden` adds a ReLU layer. `filters` adds a convolution of `reach` neighbouring tokens, which sees negations and
    idioms, and of each filter the largest value (Kim, EMNLP 2014); exported, it is a table of what each token adds, for
    those that occur `least` times. `splice` synthetic rows for each real one are labelled by the teacher: a student of
    this kind has many parameters and few rows to fit them to (augmentation as in Tang et al., 2019, with halves of rows
    instead of masked words). `reads`: tokens of a text, where they are not as many as the model reads; tokens more cost
    this student microseconds.
    """

    width: int = 256
    buckets: int = 2**15
    hidden: int = 0
    filters: int = 0
    reach: int = 5
    least: int = 2
    epochs: float = 30.0
    batch_size: int = 128
    learning_rate: float = 5e-3
    temperature: float = 2.0
    token_dropout: float = 0.2
    splice: float = 4.0
    sif: float = 1e-3
    reads: int | None = None

    def __post_init__(self) -> None:
        for name in ("reach", "least"):
            if not self.filters and getattr(self, name) != getattr(Static, name):
                raise OptionError(f"{name} is for filters; with none of them leave it out.")

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        teacher = transformer(model, "Static")
        loss = SoftTargets(model.task, (model,), self.temperature)
        reading = model.reading(self.reads)
        counts = run.reduce(reading, TokenCounts(model.encoder.vocabulary))["tokens"]
        share = (counts + 1) / (counts + 1).sum()
        vectors = principal(token_vectors(model, teacher), share, self.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            segments = bool((run.reduce(model, SecondText(), limit=64)["second"] > 0).item())
            network = StaticNetwork(
                len(counts),
                self.buckets,
                vectors.shape[1],
                model.task.outputs,
                self.hidden,
                segments,
                self.filters,
                self.reach,
            )
        weight = torch.log(self.sif / (self.sif + share))
        with torch.no_grad():
            network.table[: len(counts)] = vectors
            network.weight[: len(counts)] = weight - weight.mean()
            if self.filters:
                network.windows.words.copy_(vectors)
                network.windows.known.copy_(counts >= self.least)
        return run.fit(reading.with_network(network), loss, planned(plan, self), "static student")


@dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs."""

    vocabulary: int
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        seen = batch.ids[batch.mask > 0].long()
        return {"tokens": torch.bincount(seen, minlength=self.vocabulary).double()}


@dataclass(frozen=True)
class SecondText:
    """Whether any row is a pair."""

    combine: Literal["sum", "max"] = "max"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        return {"second": batch.types.max()}


def token_vectors(model: Model, teacher: Transformer) -> Tensor:
    """The teacher's pooled features of every token of the vocabulary alone (vocabulary, hidden)."""
    ids = torch.arange(model.encoder.vocabulary)
    around = torch.tensor(model.encoder.specials, dtype=ids.dtype).expand(len(ids), -1)
    first = around.shape[1] - model.encoder.closing
    text = torch.cat([around[:, :first], ids[:, None], around[:, first:]], dim=1)
    teacher.eval()
    with torch.no_grad():
        parts = [teacher.features(t, torch.ones_like(t), torch.zeros_like(t)).float() for t in text.split(_CHUNK)]
    return torch.cat(parts)


def principal(vectors: Tensor, share: Tensor, width: int) -> Tensor:
    """The first `width` principal components under the tokens' frequencies, scaled to a mean length of one."""
    p = share.to(vectors.dtype)[:, None]
    centred = vectors - (vectors * p).sum(dim=0)
    covariance = centred.T @ (p * centred)
    _, directions = torch.linalg.eigh(covariance.double())
    reduced: Tensor = centred @ directions.flip(1)[:, :width].to(vectors.dtype)
    scaled: Tensor = reduced / reduced.norm(dim=1).mean()
    return scaled
