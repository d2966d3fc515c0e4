"""Active learning: which rows of a pool a person should label next, and when to stop.

Uncertain rows teach most (entropy, margin: Settles, 2009), but many of them say the same; rows that cover the pool do
not ("coreset": greedy k-center, Sener and Savarese, ICLR 2018). "badge" wants both: k-means++ over the gradients that
the last layer would get if the model's answer were right (Ash et al., ICLR 2020).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from netweight.certify.match import row_keys
from netweight.data import Rows
from netweight.data.files import atomic
from netweight.encode import TextEncoder
from netweight.engine import Engine
from netweight.errors import ModelError, OptionError, StoreError
from netweight.features import features
from netweight.task import Classify, Task, softmax

if TYPE_CHECKING:
    from netweight.model import Model

Method = Literal["entropy", "margin", "coreset", "badge"]
Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

_WIDTH = 256
_BUCKETS = 2**20
_MOST = 500_000  # rows that are looked at: the features of so many take a gigabyte
_WATCHED = 2000  # rows; Bloodgood and Vijay-Shanker (2009)
_THRESHOLD, _WINDOW = 0.99, 3


def select(
    model: Model, rows: Rows, count: int, seed: int = 0, method: Method = "badge", labelled: Rows | None = None
) -> Indices:
    """Positions of `count` rows to label, the most wanted first; of equal texts only the first is taken, and none that
    is `labelled` already. What those cover needs no other. Of more than 500,000 texts a sample is looked at, with a
    warning.

    Coverage is over the encoder's pooled features. Raises OptionError, and ModelError for a network without any.
    """
    import torch

    from netweight.network import Transformer

    network = model.network
    if not isinstance(network, Transformer):
        raise ModelError(
            f"selection needs pooled features; {type(network).__name__} has none. Use select_with an engine."
        )
    at, known, part = _candidates(rows, labelled)
    tokens = model.encoder.encode(part.text, part.pair)
    pooled = torch.zeros(len(part), network.width)
    network.eval()
    with torch.no_grad():
        for batch in tokens.buckets(64):
            pooled[torch.from_numpy(batch)] = network.features(
                *map(torch.from_numpy, tokens.padded(batch, model.encoder.pad))
            ).float()
        logits = network.head(pooled).numpy()
    chosen = choose(_probabilities(model.task, logits), pooled.numpy().astype(np.float64), count, seed, method, known)
    return at[chosen]


def select_with(
    engine: Engine, rows: Rows, count: int, seed: int = 0, method: Method = "badge", labelled: Rows | None = None
) -> Indices:
    """`select` without torch: an artifact's calibrated probabilities, and hashed tokens as features."""
    at, known, part = _candidates(rows, labelled)
    said = engine.outputs(part.text, part.pair)
    temperature = np.array([tier.temperature for tier in engine.tiers])[said.tier]
    probabilities = _probabilities(engine.task, said.logits / temperature[:, None])
    return at[choose(probabilities, hashed(engine.encoder, part), count, seed, method, known)]


def _candidates(rows: Rows, labelled: Rows | None) -> tuple[Indices, int, Rows]:
    """Where the rows stand that may be chosen; how many labelled ones there are; and the latter, then the former."""
    there = Rows((), pair=None if rows.pair is None else ()) if labelled is None else labelled.take(labelled.distinct())
    if (there.pair is None) != (rows.pair is None):
        raise OptionError("of the pool and the labelled rows, one has pairs of texts and the other has not.")
    taken, keys = set(there.keys), rows.keys
    at = np.array([i for i in rows.distinct() if keys[i] not in taken], np.int64)
    if len(at) > _MOST:
        warnings.warn(
            f"rows to label are chosen among {_MOST:,} of {len(at):,} distinct ones, those whose texts have the "
            "smallest hashes: more would take too much memory.",
            stacklevel=3,
        )
        at = at[rows.take(at).sample(_MOST)]
    new = rows.take(at)
    pair = None if new.pair is None else (*(there.pair or ()), *new.pair)
    return at, len(there), Rows((*there.text, *new.text), pair=pair)


def _probabilities(task: Task, logits: NDArray[Any]) -> Floats | None:
    return softmax(logits) if isinstance(task, Classify) else None


def hashed(encoder: TextEncoder, rows: Rows, width: int = _WIDTH) -> Floats:
    """Counts of tokens and bigrams, hashed into `width` signed columns and of length one (n, width).

    Weinberger et al. (ICML 2009): products of such rows are those of the full counts, on average.
    """
    tokens = encoder.encode(rows.text, rows.pair)
    columns, starts = features(tokens, encoder.vocabulary, _BUCKETS)
    row = np.repeat(np.arange(len(tokens)), np.diff(np.append(starts, len(columns))))
    # Knuth's multiplicative hash; its top bits are the best ones.
    mixed = columns.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    out = np.zeros((len(tokens), width))
    sign = 1.0 - 2.0 * (mixed >> np.uint64(63)).astype(np.float64)
    np.add.at(out, (row, ((mixed >> np.uint64(32)) % np.uint64(width)).astype(np.int64)), sign)
    # In place: of many rows this is gigabytes.
    out /= np.sqrt(np.einsum("ij,ij->i", out, out)).clip(min=1e-12)[:, None]
    return out


def choose(
    probabilities: Floats | None, features: Floats, count: int, seed: int, method: Method, known: int = 0
) -> Indices:
    """Positions of `count` of n rows, from probabilities (known + n, labels) and features (known + n, width), of which
    the first `known` are of rows that have labels.

    Raises OptionError for an unknown method, a count that is not within 1 to n, and a method that needs probabilities
    where there are none.
    """
    n = len(features) - known
    if method not in get_args(Method):
        raise OptionError(f"unknown method {method!r}; use one of {', '.join(get_args(Method))}.")
    if seed < 0:
        raise OptionError(f"seed is {seed}; use 0 or more.")
    if not 1 <= count <= n:
        raise OptionError(f"cannot choose {count} rows of {n:,} distinct ones; choose 1 to {n:,}.")
    if method == "coreset":
        return k_center(features, count, seed, known)
    if probabilities is None:
        raise OptionError(f"method {method!r} needs probabilities, and scores have none; use coreset.")
    if method == "badge":
        return badge(probabilities, features, count, seed, known)
    return np.argsort(-uncertainty(probabilities[known:], method), kind="stable")[:count]


def uncertainty(probabilities: Floats, method: Literal["entropy", "margin"]) -> Floats:
    """Entropy in nats, or one minus the gap between the two largest probabilities: (n,), higher is less certain."""
    p = np.asarray(probabilities, np.float64)
    if method == "entropy":
        return np.asarray(-(p * np.log(p.clip(min=1e-300))).sum(axis=1))
    top = np.partition(p, -2, axis=1)[:, -2:]
    return np.asarray(1 - (top[:, 1] - top[:, 0]))


def k_center(features: Floats, count: int, seed: int, known: int = 0) -> Indices:
    """Greedy k-center from the first `known` rows, or else from a random one: each next one is the farthest from all
    that are there. Positions are counted behind the known ones.

    The largest distance of a row to its nearest centre is at most twice the smallest possible (Gonzalez, 1985).
    """
    chosen = list(range(known)) or [int(np.random.default_rng([seed, 3]).integers(len(features)))]
    nearest = np.full(len(features), np.inf)
    for centre in chosen[:-1]:
        nearest = np.minimum(nearest, np.square(features - features[centre]).sum(axis=1))
    while len(chosen) < known + count:
        nearest = np.minimum(nearest, np.square(features - features[chosen[-1]]).sum(axis=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return np.array(chosen[known:]) - known


def badge(probabilities: Floats, features: Floats, count: int, seed: int, known: int = 0) -> Indices:
    """k-means++ over gradient embeddings g = (p - onehot(argmax p)) outer x; the first has the longest, or else the
    first `known` rows are centres already. Positions are counted behind the known ones.

    Embeddings (n, labels * width) are never made: a product of two is the product of their factors' products.
    """
    rng = np.random.default_rng([seed, 4])
    p = np.asarray(probabilities, np.float64)
    error = p - np.eye(p.shape[1])[p.argmax(axis=1)]
    square = np.square(error).sum(axis=1) * np.square(features).sum(axis=1)
    chosen = list(range(known)) or [int(square.argmax())]
    nearest = np.full(len(features), np.inf)

    def nearer(centre: int) -> Floats:
        product = (error @ error[centre]) * (features @ features[centre])
        return np.asarray(np.minimum(nearest, (square + square[centre] - 2 * product).clip(min=0.0)))

    for centre in chosen[:-1]:
        nearest = nearer(centre)
    while len(chosen) < known + count:
        nearest = nearer(chosen[-1])
        nearest[chosen] = 0.0
        # Where all that is left lies on what is chosen, any of it will do.
        weight = nearest if nearest.sum() > 0 else np.isin(np.arange(len(nearest)), chosen, invert=True).astype(float)
        chosen.append(int(rng.choice(len(weight), p=weight / weight.sum())))
    return np.array(chosen[known:]) - known


def kappa(first: Sequence[Any] | NDArray[Any], second: Sequence[Any] | NDArray[Any]) -> float:
    """Cohen's kappa of two models' labels on the same rows: agreement beyond that of chance; 0 where both know one
    label only, since chance agrees as well."""
    one, two = np.asarray(first), np.asarray(second)
    if one.shape != two.shape or not one.size:
        raise OptionError(
            f"agreement needs two labellings of the same rows; given were {one.size} and {two.size} labels."
        )
    agreed = float((one == two).mean())
    chance = sum(float((one == label).mean() * (two == label).mean()) for label in np.unique(one))
    return 0.0 if chance >= 1 else (agreed - chance) / (1 - chance)


def settled(rounds: Sequence[NDArray[Any]], threshold: float = _THRESHOLD, window: int = _WINDOW) -> bool:
    """Whether labelling may stop: predictions have stabilised (Bloodgood and Vijay-Shanker, CoNLL 2009).

    `rounds` holds each round's predicted labels of one fixed set of rows, 2,000 or more, never labelled for training.
    True where the mean kappa of the last `window` pairs of consecutive rounds is at least `threshold`.
    """
    if window < 1 or not 0 < threshold <= 1:
        raise OptionError(f"window is {window} and threshold {threshold}; use 1 or more, and a kappa within 0 to 1.")
    if len(rounds) <= window:
        return False
    last = rounds[-window - 1 :]
    agreements = [kappa(one, two) for one, two in pairwise(last)]
    return float(np.mean(agreements)) >= threshold


@dataclass(frozen=True)
class Rounds:
    """What the model of each round says of rows that are set aside and never labelled.

    `number` of rounds, `kappas` of the last ones with those before, and whether labelling may stop.
    """

    number: int
    kappas: tuple[float, ...]
    settled: bool

    def __str__(self) -> str:
        if not self.kappas:
            return "round 1: from the next one on, models are compared"
        said = f"round {self.number}: kappa with the round before {self.kappas[-1]:.3f}"
        if self.settled:
            return f"{said}, {np.mean(self.kappas):.3f} in the mean of {_WINDOW}: labelling may stop"
        return f"{said}; go on labelling: the mean of the last {_WINDOW} must be at least {_THRESHOLD:g}"


def watched(rows: Rows) -> Indices:
    """Positions of rows to set aside, a fifth of the distinct ones and at most 2,000: those whose texts have the
    smallest hashes, so that they stay the same while others leave the pool."""
    at = rows.distinct()
    return at[rows.take(at).sample(min(_WATCHED, len(at) // 5))]


def judged(path: Path, engine: Engine, rows: Rows) -> Rounds:
    """Keep in a file of JSON lines what an artifact says of the rows that are set aside, a line for each round, and
    compare rounds. The artifact of the last line again is the same round.

    Raises OptionError where answers are scores, or where rounds have no row in common, and StoreError for a file that
    is none of these.
    """
    if not isinstance(engine.task, Classify):
        raise OptionError("rounds are compared by their labels, and scores have none; leave the file of rounds out.")
    if not len(rows):
        raise OptionError("the pool has fewer than 5 distinct rows to set a fifth of them aside; leave rounds out.")
    chosen = engine.outputs(rows.text, rows.pair).logits.argmax(axis=1)
    said = {key: engine.task.labels[i] for key, i in zip(row_keys(rows), chosen, strict=True)}
    new = {"artifact": engine.version, "labels": said}
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else None
        if text == "":
            raise ValueError("it is empty")
        lines = [json.loads(line) for line in (text or "").splitlines()]
        if lines and lines[-1]["artifact"] == new["artifact"]:
            lines.pop()
        lines.append(new)
        last = [dict(line["labels"]) for line in lines[-_WINDOW - 1 :]]
    except (ValueError, KeyError, TypeError) as problem:
        raise StoreError(f"{path} holds no rounds of labelling ({problem}); name another file.") from None
    common = sorted(set.intersection(*map(set, last)))
    if not common:
        raise OptionError(f"the rounds in {path} are of other rows; keep to one pool, or name another file.")
    with atomic(path) as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
    held = [np.array([labels[key] for key in common]) for labels in last]
    return Rounds(len(lines), tuple(kappa(one, two) for one, two in pairwise(held)), settled(held))
