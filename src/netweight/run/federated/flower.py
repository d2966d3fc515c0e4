"""Messages over Flower: how they look in its records, and a channel over its Grid.

Simulation and deployment of Flower have different grids behind the same two calls, push and pull. flwr is imported
where it is used.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from traceback import format_tb
from typing import Any

from netweight.errors import NetweightError, WireError
from netweight.quiet import flower
from netweight.run.federated.client import Client
from netweight.run.federated.messages import Answer, Lost, Task
from netweight.run.federated.wire import UNREADABLE, Packed, Wire, raw, tensor

log = logging.getLogger("netweight.federate")
QUERY = "query"  # the one type of message: what is asked stands inside
_LOOK = 0.05  # seconds between two looks for answers
_SMALL = 4096  # bytes of a tensor that is sent again rather than remembered
_AGAIN = 3  # times that a task is sent again because it, or its answer, did not come through
_TEXT = 2000  # characters of what is told of a client's failure
_STYPE = "netweight"  # a tensor's bytes, without the header that Flower's own type of array has


@dataclass(frozen=True)
class Node:
    """A client as Flower knows it. `session` grows whenever it connects anew: it has forgotten what it was asked."""

    id: int
    session: int = 0


Nodes = Callable[[], Mapping[str, Node]]
# Arrays by the memory of their tensors, their hashes once they are known, and the tensors, so that no other one can
# take that memory.
Made = dict[Any, tuple[Any, list[str], Any]]


class FlowerChannel:
    """Tasks to clients over a Flower Grid.

    Args:
        grid: of a running simulation or deployment, with its run set.
        nodes: the clients that are there now, by name.
        wire: what may travel.
        patience: seconds that a client may be away while it is asked; then it is `Lost`.
        remembers: whether clients have a `Memory`: tensors that they hold already are then named and not sent.
    """

    def __init__(self, grid: Any, nodes: Nodes, wire: Wire, patience: float = 60.0, remembers: bool = False) -> None:
        self.grid, self.nodes, self.wire, self.patience = grid, nodes, wire, patience
        self.remembers = remembers
        self._held: dict[Node, Recent] = {}

    def clients(self) -> tuple[str, ...]:
        return tuple(sorted(self.nodes()))

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        distinct = {id(task): task for task in tasks.values()}
        made: Made = {}
        records = {key: to_record(self.wire.pack(task), made) for key, task in distinct.items()}
        hashes = {key: hashes_of(record, made) if self.remembers else {} for key, record in records.items()}
        asked = {
            name: _Asked(addressed(records[id(task)], name), hashes[id(task)]) for name, task in sorted(tasks.items())
        }
        answers: dict[str, Answer | Lost] = {}
        end = None if seconds is None else time.monotonic() + seconds
        while len(answers) < len(asked):
            waiting = {name: one for name, one in asked.items() if name not in answers}
            self._ask_again(waiting, seconds, answers)
            answers |= self._pulled(waiting)
            if len(answers) < len(asked):
                if end is not None and time.monotonic() >= end:
                    break
                time.sleep(_LOOK)
        late = f"no answer within {seconds:g} s." if seconds is not None else ""
        return {name: answers.get(name, Lost(name, late)) for name in asked}

    def dismiss(self, reasons: Mapping[str, str], others: str | None = "", seconds: float = 5.0) -> None:
        """Tell clients that the run has ended, and why not well: some by name, and all others unless that is None. Then
        wait for them to leave: who is on its way out answers no more."""
        from flwr.app import ConfigRecord, RecordDict

        asked = {
            name: _Asked(RecordDict({"end": ConfigRecord({"reason": reason})}), {})
            for name in self.nodes()
            if (reason := reasons.get(name, others)) is not None
        }
        self._ask_again(asked, seconds, {})
        end = time.monotonic() + seconds
        while asked.keys() & self.nodes().keys() and time.monotonic() < end:
            time.sleep(_LOOK)

    def _ask_again(self, waiting: Mapping[str, _Asked], seconds: float | None, lost: dict[str, Answer | Lost]) -> None:
        """Send to those that were not asked in their present session; give up those that are away for long."""
        there = self.nodes()
        for name, one in waiting.items():
            node = there.get(name)
            if node is None:
                one.away = one.away or time.monotonic()
                if time.monotonic() - one.away >= self.patience:
                    lost[name] = Lost(name, f"it left, and was away for {self.patience:g} s.")
            else:
                one.away = None
                if node != one.node:
                    one.node, one.message = node, self._push(one, node, seconds)

    def _push(self, one: _Asked, node: Node, seconds: float | None) -> str | None:
        from flwr.app import Message

        record = one.record
        if one.hashes:
            recent = self._held.setdefault(node, Recent())
            record = shortened(record, {n: h for n, h in one.hashes.items() if h in recent.all()})
            recent.add(one.hashes.values())
        message = Message(record, node.id, QUERY, ttl=None if seconds is None else seconds + self.patience)
        return next(iter(self.grid.push_messages([message])), None)

    def _pulled(self, waiting: Mapping[str, _Asked]) -> dict[str, Answer | Lost]:
        """Answers that are there, each that of the client that was asked, whatever it says of itself. One that cannot
        be read costs its sender the round, not the others."""
        found: dict[str, Answer | Lost] = {}
        for name, one in waiting.items():
            try:
                for reply in self.grid.pull_messages([one.message]) if one.message else ():
                    why = _fell_through(reply)
                    if why is None:
                        found[name] = self._read(name, reply)
                    elif one.again < _AGAIN:
                        self._held.pop(one.node or Node(0), None)
                        one.node, one.message, one.again = None, None, one.again + 1
                    else:
                        found[name] = Lost(name, why)
            except Exception as problem:  # Flower's own reading checks little, and may end in anything
                kind = "" if isinstance(problem, WireError) else f"{type(problem).__name__}: "
                found[name] = Lost(name, f"its answer cannot be read: {kind}{problem}"[:_TEXT])
        return found

    def _read(self, name: str, reply: Any) -> Answer | Lost:
        if reply.has_error():
            return Lost(name, f"Flower says: {reply.error.reason}")
        said = reply.content.config_records.get("error")
        if said is not None:
            return Lost(name, str(said.get("text", ""))[:_TEXT])
        answer: Answer = self.wire.unpack(from_record(reply.content), answer=True)
        return answer


def _fell_through(reply: Any) -> str | None:
    """Why a task must be asked again: the client left before or while it answered, or lacks what it was sent before."""
    from flwr.common.constant import ErrorCode

    if reply.has_error():
        codes = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        return f"Flower says: {reply.error.reason}" if reply.error.code in codes else None
    return "it keeps asking for tensors that it was sent." if "lacks" in reply.content.config_records else None


@dataclass
class _Asked:
    """A task on its way to a client: hashes of its tensors, to which session it was sent, as which message, and since
    when that is away."""

    record: Any
    hashes: Mapping[str, str]
    node: Node | None = None
    message: str | None = None
    away: float | None = None
    again: int = 0


class Recent:
    """Hashes of the tensors of the last two messages that had any: what a client's `Memory` holds. Two, since a round
    may train and then score, and a teacher is part of the first alone."""

    def __init__(self) -> None:
        self.last: deque[frozenset[str]] = deque(maxlen=2)

    def add(self, hashes: Iterable[str]) -> None:
        self.last.append(frozenset(hashes))

    def all(self) -> frozenset[str]:
        return frozenset().union(*self.last)


class Memory:
    """Tensors that a client received lately, by hash, so that frozen ones and teachers travel once."""

    def __init__(self) -> None:
        self.recent = Recent()
        self.arrays: dict[str, Any] = {}

    def completed(self, record: Any) -> Any:
        """The record with what was left out of it; None where this client does not have it."""
        from flwr.app import ArrayRecord, RecordDict

        known = record.config_records.get("known")
        named = dict(zip(known["names"], known["sha256"], strict=True)) if known else {}
        if not set(named.values()) <= set(self.arrays):
            return None
        arrays = dict(record.array_records.get("tensors", {})) | {n: self.arrays[h] for n, h in named.items()}
        whole = RecordDict({**record, "tensors": ArrayRecord(arrays)})
        hashes = hashes_of(whole)
        if hashes:
            self.recent.add(hashes.values())
            there = self.arrays | {h: arrays[n] for n, h in hashes.items()}
            self.arrays = {h: there[h] for h in self.recent.all()}
        return whole


def hashes_of(record: Any, made: Made | None = None) -> dict[str, str]:
    """SHA-256 of each of a record's larger tensors, by name; those in `made` are computed once."""
    arrays = record.array_records.get("tensors", {})
    known = {id(array.data): hashed for array, hashed, _ in (made or {}).values()}
    found = {}
    for name, array in arrays.items():
        if len(array.data) >= _SMALL:
            hashed = known.get(id(array.data), [])
            if not hashed:
                head = f"{array.dtype} {tuple(array.shape)}\n".encode()
                hashed.append(hashlib.sha256(head + array.data).hexdigest())
            found[name] = hashed[0]
    return found


def shortened(record: Any, known: Mapping[str, str]) -> Any:
    """The record without the tensors of these names, which are told by their hashes."""
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    if not known:
        return record
    left = ArrayRecord({name: a for name, a in record.array_records["tensors"].items() if name not in known})
    told = ConfigRecord({"names": list(known), "sha256": list(known.values())})
    return RecordDict({**record, "tensors": left, "known": told})


def to_record(packed: Packed, made: Made | None = None) -> Any:
    """A Flower RecordDict that holds a message. Tensors that are in `made` are not copied again: messages to many
    clients, each with a part of its own, share one copy of the model."""
    flower()
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    made = {} if made is None else made
    arrays = {}
    for name, t in packed.tensors.items():
        dtype, shape = str(t.dtype).removeprefix("torch."), tuple(t.shape)
        key = (t.data_ptr(), t.stride(), dtype, shape)
        if key not in made or not t.numel():
            made[key] = Array(dtype, shape, _STYPE, bytes(raw(t))), [], t
        arrays[name] = made[key][0]
    return RecordDict({"header": ConfigRecord({"json": packed.header}), "tensors": ArrayRecord(arrays)})


def addressed(record: Any, client: str) -> Any:
    """The same record with the name of the client that it is for; tensors are shared."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({**record, "to": ConfigRecord({"client": client})})


def addressee(record: Any) -> str:
    """Inverse of `addressed`; "" where a record is for nobody."""
    to = record.config_records.get("to")
    return "" if to is None else str(to.get("client", ""))


def from_record(record: Any) -> Packed:
    """Inverse of `to_record`. Raises WireError for a record that it would not have made."""
    try:
        header = record.config_records["header"]["json"]
        arrays = record.array_records["tensors"]
        held = {name: tensor(a.dtype, tuple(a.shape), a.data) for name, a in arrays.items() if a.stype == _STYPE}
    except WireError:
        raise
    except UNREADABLE as problem:
        raise WireError(f"a Flower message holds no message of ours: {type(problem).__name__}: {problem}") from problem
    if not isinstance(header, str) or len(held) < len(arrays):
        raise WireError("a Flower message holds no message of ours: its header is no text, or its arrays are others.")
    return Packed(header, held)


def misnamed(known: str, called: str) -> str:
    """A sentence where a client calls itself by another name than that of its key; empty where it does not."""
    if known == called:
        return ""
    return (
        f"the server knows this client's key as that of {known!r}, and it calls itself {called!r}; use the name, or "
        "the key, of the other."
    )


def ended(record: Any) -> str | None:
    """Why the run has ended for this client ("" where it simply has), or None where it goes on."""
    said = record.config_records.get("end")
    return None if said is None else str(said.get("reason", ""))


def answered(client: Client, wire: Wire, record: Any, memory: Memory | None = None) -> Any:
    """The record of a client's answer to the record of a task; what goes wrong is told in a sentence."""
    from flwr.app import ConfigRecord, RecordDict

    to = addressee(record)
    if text := misnamed(to, client.name):
        return RecordDict({"error": ConfigRecord({"text": text})})
    try:
        whole = memory.completed(record) if memory else record
        if whole is None:
            return RecordDict({"lacks": ConfigRecord({"some": True})})
        return to_record(wire.pack(client.answer(wire.unpack(from_record(whole)))))
    except NetweightError as problem:
        text = str(problem)
    except Exception as problem:  # its text might hold rows, but not where the system refused something
        text = f"{type(problem).__name__} on the client; its own log says more."
        said = f": {problem}" if isinstance(problem, OSError) else ""
        at = "".join(format_tb(problem.__traceback__))
        log.error("a task ended with %s%s, at\n%s", type(problem).__name__, said, at)
    return RecordDict({"error": ConfigRecord({"text": text})})
