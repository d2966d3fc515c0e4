"""What a server checks of what comes from clients: that they speak of the same thing, and that updates are sound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch

from netweight.run.federated.codecs import Codec, Decoded, Full, parts_of
from netweight.run.federated.messages import Fitted, Joined, Lost, Manifest, Scored, Tensors

_ROWS = 10**12  # that a client may claim: steps over many more are no numbers that privacy can be counted with
_CUT = 60  # characters of a value in a message


def differing(server: Manifest, client: Joined) -> str:
    """A sentence on the first field in which a client's manifest differs, or on what no client can have; empty where
    all fits."""
    if not 0 <= client.rows <= _ROWS:
        return f"it says that it has {client.rows} training rows."
    for f in fields(Manifest):
        mine, theirs = getattr(server, f.name), getattr(client.manifest, f.name)
        if mine != theirs:
            return f"{f.name} differs: the server has {_short(mine)}, the client {_short(theirs)}."
    if client.unknown:
        known = _short(server.labels) if server.labels else "numbers"
        return (
            f"labels differs: the server has {known}, the client {client.unknown} that are not among them; it names "
            "them where it runs."
        )
    return ""


def unlikely(answer: Fitted, rows: int, private: bool) -> str:
    """A sentence on a number that no sound client reports, which had so many rows; empty where there is none."""
    if answer.rows != rows:
        return f"it joined with {rows} rows and now has {answer.rows}; it is asked anew what it has."
    if not all(0 <= spent < math.inf for spent in (answer.epsilon, answer.in_all)):
        return f"it reports epsilon {answer.epsilon:g} for this fit and {answer.in_all:g} for all."
    if not private and not math.isfinite(answer.loss):
        return f"it reports a loss of {answer.loss:g}."
    return ""


def measured(answer: Scored) -> bool:
    """Whether its quality, where there is one, is a number that was measured on rows."""
    return answer.quality is None or (answer.rows > 0 and math.isfinite(answer.quality))


def missing(name: str, answer: object) -> Lost:
    """Why a client that was asked is not among those that answered."""
    if isinstance(answer, Lost):
        return answer
    return Lost(name, "no answer." if answer is None else f"it answered with {type(answer).__name__}.")


def capped(rows: Mapping[str, int], heaviest: float) -> dict[str, float]:
    """Weights by rows, by client, none above `heaviest` times their median: nobody can check how many rows a client
    has."""
    most = heaviest * statistics.median(rows.values()) if rows else 0.0
    return {name: min(float(n), most) for name, n in rows.items()}


def _short(value: object) -> str:
    said = str(list(value)) if isinstance(value, tuple) else repr(value)
    return said if len(said) <= _CUT else f"{said[: _CUT - 4]} ..."


@dataclass(frozen=True)
class Round:
    """What updates of a round must fit: how they are encoded, the tensors that they hold, the names of those that are
    trained, the seed that clients share, how far from the median norm is too far, what they are called, and a norm
    that is usual whatever the median."""

    codec: Codec
    old: Tensors
    differences: frozenset[str]
    shared: int
    outlier: float
    what: str = "update"
    usual: float = 0.0

    def accepted(self, sent: Mapping[str, Tensors]) -> tuple[dict[str, Decoded], tuple[Lost, ...]]:
        """Decoded updates by client, and who was refused and why."""
        refused: list[Lost] = []
        sound: dict[str, Decoded] = {}
        norms: dict[str, float] = {}
        for client in sorted(sent):
            problem = self._misfit(sent[client])
            if not problem:
                update = Decoded(self.codec, sent[client], self.old, self.differences, self.shared)
                norms[client] = self.norm(update)
                problem = "" if math.isfinite(norms[client]) else "values that are not finite."
            if problem:
                refused.append(Lost(client, f"the {self.what} has {problem}"))
                continue
            sound[client] = update
        far = _far({client: norms[client] for client in sound}, self.outlier, f"the {self.what} has a norm", self.usual)
        kept = {client: update for client, update in sound.items() if client not in far}
        return kept, _in_order([*refused, *far.values()])

    def norm(self, update: Tensors) -> float:
        """L2 norm of the change of the parameters; NaN or infinite where a value is not finite."""
        total = 0.0
        for name in sorted(self.differences & set(self.old)):
            total += float(torch.linalg.vector_norm(update[name] - self.old[name], dtype=torch.float64)) ** 2
        return math.sqrt(total) if total >= 0 else math.nan

    def _misfit(self, sent: Tensors) -> str:
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, old in self.old.items():
            wanted |= parts_of(self.codec if name in self.differences else Full(), name, old)
        if problem := _differs(wanted, sent):
            return problem
        for name in sorted(set(self.old) - self.differences):
            # Nothing that is trained here moves a buffer, and no norm would tell what another one does.
            if not torch.equal(sent[name], self.old[name]):
                return f"another {name} than it was given, which training does not change."
        for name, (_, dtype) in wanted.items():
            got = sent[name]
            parameter = name.partition("/")[0]
            # Places are the only integers that are looked up.
            if name != parameter and dtype == torch.int32 and got.numel():
                n = self.old[parameter].numel()
                if not (int(got.min()) >= 0 and int(got.max()) < n):
                    return f"places outside of {parameter}, which has {n} values."
        return ""


def sound_parts(
    form: Tensors, sent: Mapping[str, Tensors], rows: Mapping[str, float], outlier: float
) -> tuple[dict[str, Tensors], tuple[Lost, ...]]:
    """Parts of a statistic that look like `form` and are finite, by client, and who was refused and why.

    `rows` divide what a client sent (1 where it is no sum). A norm may be the square of `outlier` times the median:
    squares of gradients are among what is summed up.
    """
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in form.items()}
    refused: list[Lost] = []
    norms: dict[str, float] = {}
    for client in sorted(sent):
        problem = _differs(wanted, sent[client])
        if not problem:
            norms[client] = math.hypot(*(float(v.double().norm()) for v in sent[client].values())) / rows[client]
            problem = "" if math.isfinite(norms[client]) else "values that are not finite."
        if problem:
            norms.pop(client, None)
            refused.append(Lost(client, f"the statistic has {problem}"))
    far = _far(norms, outlier**2, "the statistic has a norm (for each row, if it is a sum)")
    return {c: sent[c] for c in norms if c not in far}, _in_order([*refused, *far.values()])


def _differs(wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]], sent: Tensors) -> str:
    """What is wrong with the names, shapes or types of tensors; empty where nothing is."""
    for name in sorted(wanted.keys() ^ set(sent)):
        return f"no tensor {name}." if name in wanted else f"a tensor {name} that nobody asked for."
    for name, (shape, dtype) in wanted.items():
        got = sent[name]
        if tuple(got.shape) != shape or got.dtype != dtype:
            return f"{name} as {got.dtype} {tuple(got.shape)}, which should be {dtype} {shape}."
    return ""


def _far(norms: Mapping[str, float], times: float, what: str, least: float = 0.0) -> dict[str, Lost]:
    """Clients whose norm is so many times the median, which is taken to be `least` at least."""
    # Two cannot tell which of them is odd.
    usual = max(least, statistics.median(norms.values())) if len(norms) > 2 else 0.0
    return {
        client: Lost(
            client, f"{what} of {norm:.3g}, more than {times:g} times {usual:.3g}, what is usual in the round."
        )
        for client, norm in norms.items()
        if usual and norm > times * usual
    }


def _in_order(lost: Iterable[Lost]) -> tuple[Lost, ...]:
    return tuple(sorted(lost, key=lambda one: one.client))
