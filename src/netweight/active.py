"""Active learning: which rows of a pool a person should label next, and when to stop.

Uncertain rows teach most (entropy, margin: Settles, 2009), but many of them say the same; rows that cover the pool do
not ("coreset": greedy k-center, Sener and Savarese, ICLR 2018). "badge" wants both: k-means++ over the gradients that
the last layer would get if the model's answer were right (Ash et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from netweight.data import Rows
from netweight.encode import TextEncoder
from netweight.engine import Engine
from netweight.errors import ModelError, OptionError
from netweight.features import features
from netweight.task import Classify, Task, softmax

if TYPE_CHECKING:
    from netweight.model import Model

Method = Literal["entropy", "margin", "coreset", "badge"]
Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

_WIDTH = 256
_BUCKETS = 2**20


def select(model: Model, rows: Rows, count: int, seed: int = 0, method: Method = "badge") -> Indices:
    """Positions of `count` rows to label, the most wanted first; of equal texts only the first is taken.

    Coverage is over the encoder's pooled features. Raises OptionError, and ModelError for a network without any.
    """
    import torch

    from netweight.network import Transformer

    network = model.network
    if not isinstance(network, Transformer):
        raise ModelError(
            f"selection needs pooled features; {type(network).__name__} has none. Use select_with an engine."
        )
    at = distinct(rows)
    part = rows.take(at)
    tokens = model.encoder.encode(part.text, part.pair)
    pooled = torch.zeros(len(part), network.config.hidden_size)
    network.eval()
    with torch.no_grad():
        for batch in tokens.buckets(64):
            pooled[torch.from_numpy(batch)] = network.features(
                *map(torch.from_numpy, tokens.padded(batch, model.encoder.pad))
            ).float()
        logits = network.head(pooled).numpy()
    chosen = choose(_probabilities(model.task, logits), pooled.numpy().astype(np.float64), count, seed, method)
    return at[chosen]


def select_with(engine: Engine, rows: Rows, count: int, seed: int = 0, method: Method = "badge") -> Indices:
    """`select` without torch: an artifact's calibrated probabilities, and hashed tokens as features."""
    at = distinct(rows)
    part = rows.take(at)
    said = engine.run(engine.encoder.encode(part.text, part.pair))
    temperature = np.array([tier.temperature for tier in engine.tiers])[said.tier]
    probabilities = _probabilities(engine.task, said.logits / temperature[:, None])
    return at[choose(probabilities, hashed(engine.encoder, part), count, seed, method)]


def distinct(rows: Rows) -> Indices:
    """Position of the first row of each normalised text."""
    first: dict[str, int] = {}
    for i, key in enumerate(rows.keys()):
        first.setdefault(key, i)
    return np.array(sorted(first.values()), np.int64)


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
    return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True).clip(min=1e-12))


def choose(probabilities: Floats | None, features: Floats, count: int, seed: int, method: Method) -> Indices:
    """Positions of `count` of n rows, from probabilities (n, labels) and features (n, width).

    Raises OptionError for an unknown method, a count that is not within 1 to n, and a method that needs probabilities
    where there are none.
    """
    n = len(features)
    if method not in get_args(Method):
        raise OptionError(f"unknown method {method!r}; use one of {', '.join(get_args(Method))}.")
    if not 1 <= count <= n:
        raise OptionError(f"cannot choose {count} rows of {n:,} distinct ones; choose 1 to {n:,}.")
    if method == "coreset":
        return k_center(features, count, seed)
    if probabilities is None:
        raise OptionError(f"method {method!r} needs probabilities, and scores have none; use coreset.")
    if method == "badge":
        return badge(probabilities, features, count, seed)
    return np.argsort(-uncertainty(probabilities, method), kind="stable")[:count]


def uncertainty(probabilities: Floats, method: Literal["entropy", "margin"]) -> Floats:
    """Entropy in nats, or one minus the gap between the two largest probabilities: (n,), higher is less certain."""
    p = np.asarray(probabilities, np.float64)
    if method == "entropy":
        return np.asarray(-(p * np.log(p.clip(min=1e-300))).sum(axis=1))
    top = np.partition(p, -2, axis=1)[:, -2:]
    return np.asarray(1 - (top[:, 1] - top[:, 0]))


def k_center(features: Floats, count: int, seed: int) -> Indices:
    """Greedy k-center from a random first row: each next one is the farthest from all that are chosen.

    The largest distance of a row to its nearest chosen one is at most twice the smallest possible (Gonzalez, 1985).
    """
    chosen = [int(np.random.default_rng([seed, 3]).integers(len(features)))]
    nearest = np.full(len(features), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.square(features - features[chosen[-1]]).sum(axis=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def badge(probabilities: Floats, features: Floats, count: int, seed: int) -> Indices:
    """k-means++ over gradient embeddings g = (p - onehot(argmax p)) outer x; the first has the longest.

    Embeddings (n, labels * width) are never made: a product of two is the product of their factors' products.
    """
    rng = np.random.default_rng([seed, 4])
    p = np.asarray(probabilities, np.float64)
    error = p - np.eye(p.shape[1])[p.argmax(axis=1)]
    square = np.square(error).sum(axis=1) * np.square(features).sum(axis=1)
    chosen = [int(square.argmax())]
    nearest = np.full(len(features), np.inf)
    while len(chosen) < count:
        last = chosen[-1]
        product = (error @ error[last]) * (features @ features[last])
        nearest = np.minimum(nearest, (square + square[last] - 2 * product).clip(min=0.0))
        nearest[chosen] = 0.0
        # Where all that is left lies on what is chosen, any of it will do.
        weight = nearest if nearest.sum() > 0 else np.isin(np.arange(len(nearest)), chosen, invert=True).astype(float)
        chosen.append(int(rng.choice(len(weight), p=weight / weight.sum())))
    return np.array(chosen)


def kappa(first: Sequence[Any] | NDArray[Any], second: Sequence[Any] | NDArray[Any]) -> float:
    """Cohen's kappa of two models' labels on the same rows: agreement beyond that of chance."""
    one, two = np.asarray(first), np.asarray(second)
    if one.shape != two.shape or not one.size:
        raise OptionError(
            f"agreement needs two labellings of the same rows; given were {one.size} and {two.size} labels."
        )
    agreed = float((one == two).mean())
    chance = sum(float((one == label).mean() * (two == label).mean()) for label in np.unique(one))
    return 1.0 if chance >= 1 else (agreed - chance) / (1 - chance)


def settled(rounds: Sequence[NDArray[Any]], threshold: float = 0.99, window: int = 3) -> bool:
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
