"""What is watched of answered rows after deployment, and how it was distributed on the rows of the certificate.

Numbers only: no text can be had back from them. How far a row lies from the certified ones is seen in a random
projection of its bag of tokens (Achlioptas, 2003), which needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight.encode import TextEncoder, Tokens
from netweight.engine import Outputs
from netweight.errors import CorruptArtifact

NAMES = ("length", "unknown", "distance", "confidence", "tier")
AGREES = "agrees"  # whether the strongest tier says the same; known of a sample only
_WIDTH = 16
_BINS = 50  # of about equal mass, fewer where values are few
_HELD = 50_000  # tokens whose signs are held at a time: 6 MB, of which a sum makes some copies
_NEAR = 1e-6  # a value and itself in another batch, whose sums differ in a last bit, are nearer

Floats = NDArray[np.float64]
Values = Mapping[str, Floats]


@dataclass(frozen=True)
class Histogram:
    """Counts (k,) of values up to and including each of `edges` (k - 1,), and beyond the last."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(values: Floats) -> Histogram:
        """Bins of about equal mass. A value that many rows share has one of its own: what comes to lie beneath it must
        not be taken for it, as where all rows agreed, and later none does."""
        cuts = np.quantile(values, np.linspace(0, 1, _BINS + 1)[1:-1], method="inverted_cdf")
        edges, times = np.unique(cuts, return_counts=True)
        edges = np.union1d(edges, edges[times > 1] - _NEAR)
        found = np.searchsorted(edges, values, "left")
        return Histogram(tuple(edges.tolist()), tuple(np.bincount(found, minlength=len(edges) + 1).tolist()))

    def bin(self, value: float) -> int:
        """Where a value falls."""
        return int(np.searchsorted(self.edges, value, "left"))

    def quantile(self, share: float) -> float:
        """The upper end of the bin in which the smallest `share` of values ends."""
        at = int(np.searchsorted(np.cumsum(self.counts), share * sum(self.counts)))
        return self.edges[at] if at < len(self.edges) else float("inf")


@dataclass(frozen=True)
class Fingerprint:
    """`center` and `scale` of the projections of n rows (16 each), a Histogram of each of their signals, and, for
    cascades, of whether the strongest tier agreed."""

    rows: int
    center: tuple[float, ...]
    scale: tuple[float, ...]
    histograms: Mapping[str, Histogram]

    @staticmethod
    def of(
        encoder: TextEncoder, tokens: Tokens, outputs: Outputs, strongest: NDArray[Any] | None = None
    ) -> Fingerprint:
        """Of answered rows; `strongest` (n,) are the labels that the last tier gives them."""
        found = projected(tokens)
        center, scale = found.mean(axis=0), found.std(axis=0) + 1e-6
        blank = Fingerprint(len(tokens), tuple(center.tolist()), tuple(scale.tolist()), {})
        values = dict(blank.signals(encoder, tokens, outputs))
        if strongest is not None:
            values[AGREES] = (strongest == outputs.logits.argmax(axis=1)).astype(np.float64)
        return Fingerprint(blank.rows, blank.center, blank.scale, {k: Histogram.of(v) for k, v in values.items()})

    def signals(self, encoder: TextEncoder, tokens: Tokens, outputs: Outputs) -> Values:
        """Of each row (n,): tokens, share of them that is unknown, distance from the certified rows in standard
        deviations, confidence, tier that answered."""
        lengths = np.maximum(tokens.lengths, 1)

        def known(part: Tokens) -> Floats:
            unknown = np.zeros(len(part.ids), bool) if encoder.unknown is None else part.ids == encoder.unknown
            return np.where(unknown, 0.0, 1.0)[:, None]

        off = (projected(tokens) - self.center) / self.scale
        return {
            "length": tokens.lengths.astype(np.float64),
            "unknown": 1.0 - _sums(known, tokens)[:, 0] / lengths,
            "distance": np.sqrt((off**2).mean(axis=1)),
            "confidence": np.asarray(outputs.confidence, np.float64),
            "tier": outputs.tier.astype(np.float64),
        }

    def to_json(self) -> bytes:
        """As it lies in an artifact."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> Fingerprint:
        """Raises CorruptArtifact."""
        try:
            stored = json.loads(data)
            held = {
                str(name): Histogram(tuple(map(float, h["edges"])), tuple(map(int, h["counts"])))
                for name, h in stored["histograms"].items()
            }
            center, scale = (tuple(map(float, stored[key])) for key in ("center", "scale"))
            rows = int(stored["rows"])
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CorruptArtifact(f"the fingerprint cannot be read: {problem!r}") from problem
        wrong = [n for n, h in held.items() if len(h.counts) != len(h.edges) + 1 or sum(h.counts) != rows]
        if wrong or not set(NAMES) <= set(held) or (len(center), len(scale)) != (_WIDTH, _WIDTH):
            raise CorruptArtifact("the fingerprint does not hold what its version should.")
        return Fingerprint(rows, center, scale, held)


def projected(tokens: Tokens) -> Floats:
    """Mean over each row's tokens of a vector of signs that belongs to the token (n, 16)."""
    return _sums(_signs, tokens) / np.maximum(tokens.lengths, 1)[:, None]


def _signs(tokens: Tokens) -> Floats:
    # SplitMix64's finalizer: every bit of an id's hash is a fair coin, the same everywhere.
    x = (tokens.ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    bits = (x[:, None] >> np.arange(_WIDTH, dtype=np.uint64)) & np.uint64(1)
    return np.asarray(2.0 * bits.astype(np.float64) - 1.0)


def _sums(of: Callable[[Tokens], Floats], tokens: Tokens) -> Floats:
    """Sums over the tokens of each row (n, width) of the whole numbers that `of` gives tokens (t, width), which are
    exact whichever rows are summed together."""

    def summed(part: Tokens) -> Floats:
        found = of(part)
        total = np.vstack([np.zeros((1, found.shape[1])), np.cumsum(found, axis=0)])
        return np.asarray(total[part.offsets[1:]] - total[part.offsets[:-1]])

    starts = np.searchsorted(tokens.offsets, np.arange(0, max(1, len(tokens.ids)), _HELD))
    return np.concatenate([summed(tokens.stretch(*ends)) for ends in pairwise([*starts, len(tokens)])])
