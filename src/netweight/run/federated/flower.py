"""Messages over Flower: how they look in its records, and a channel over its Grid.

Simulation and deployment of Flower have different grids behind the same two calls, push and pull. flwr is imported
where it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from netweight.errors import NetweightError, WireError
from netweight.quiet import flower
from netweight.run.federated.client import Client
from netweight.run.federated.messages import Answer, Lost, Task
from netweight.run.federated.wire import Packed, Wire, raw, tensor

QUERY = "query"  # the one type of message: what is asked stands inside
_LOOK = 0.05  # seconds between two looks for answers
_STYPE = "netweight"  # a tensor's bytes, without the header that Flower's own type of array has


@dataclass(frozen=True)
class Node:
    """A client as Flower knows it. `session` grows whenever it connects anew: it has forgotten what it was asked."""

    id: int
    session: int = 0


Nodes = Callable[[], Mapping[str, Node]]


class FlowerChannel:
    """Tasks to clients over a Flower Grid.

    Args:
        grid: of a running simulation or deployment, with its run set.
        nodes: the clients that are there now, by name.
        wire: what may travel.
        patience: seconds that a client may be away while it is asked; then it is `Lost`.
    """

    def __init__(self, grid: Any, nodes: Nodes, wire: Wire, patience: float = 60.0) -> None:
        self.grid, self.nodes, self.wire, self.patience = grid, nodes, wire, patience

    def clients(self) -> tuple[str, ...]:
        return tuple(sorted(self.nodes()))

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        records = {key: to_record(self.wire.pack(task)) for key, task in {id(t): t for t in tasks.values()}.items()}
        asked = {name: _Asked(addressed(records[id(task)], name)) for name, task in sorted(tasks.items())}
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

    def dismiss(self, reasons: Mapping[str, str], seconds: float = 5.0) -> None:
        """Tell all clients that are there that the run has ended, and those that were refused why."""
        from flwr.app import ConfigRecord, RecordDict

        asked = {
            name: _Asked(RecordDict({"end": ConfigRecord({"reason": reasons.get(name, "")})})) for name in self.nodes()
        }
        self._ask_again(asked, seconds, {})
        end = time.monotonic() + seconds
        waiting = {one.message for one in asked.values() if one.message}
        while waiting and time.monotonic() < end:
            waiting -= {m.metadata.reply_to_message_id for m in self.grid.pull_messages(sorted(waiting))}
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
                    one.node, one.message = node, self._push(one.record, node, seconds)

    def _push(self, record: Any, node: Node, seconds: float | None) -> str | None:
        from flwr.app import Message

        message = Message(record, node.id, QUERY, ttl=None if seconds is None else seconds + self.patience)
        return next(iter(self.grid.push_messages([message])), None)

    def _pulled(self, waiting: Mapping[str, _Asked]) -> dict[str, Answer | Lost]:
        names = {one.message: name for name, one in waiting.items() if one.message}
        found: dict[str, Answer | Lost] = {}
        for reply in self.grid.pull_messages(sorted(names)) if names else ():
            name = names.get(reply.metadata.reply_to_message_id)
            if name is not None:
                found[name] = self._read(name, reply)
        return found

    def _read(self, name: str, reply: Any) -> Answer | Lost:
        if reply.has_error():
            return Lost(name, f"Flower says: {reply.error.reason}")
        said = reply.content.config_records.get("error")
        if said is not None:
            return Lost(name, str(said.get("text", ""))[:2000])
        try:
            answer: Answer = self.wire.unpack(from_record(reply.content))
            return answer
        except WireError as problem:
            return Lost(name, f"its answer cannot be read: {problem}")


@dataclass
class _Asked:
    """A task on its way to a client: to which session it was sent, as which message, and since when that is away."""

    record: Any
    node: Node | None = None
    message: str | None = None
    away: float | None = None


def to_record(packed: Packed) -> Any:
    """A Flower RecordDict that holds a message."""
    flower()
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = {
        name: Array(str(t.dtype).removeprefix("torch."), tuple(t.shape), _STYPE, bytes(raw(t)))
        for name, t in packed.tensors.items()
    }
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
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise WireError(f"a Flower message holds no message of ours: {type(problem).__name__}: {problem}") from problem
    if not isinstance(header, str) or len(held) < len(arrays):
        raise WireError("a Flower message holds no message of ours: its header is no text, or its arrays are others.")
    return Packed(header, held)


def ended(record: Any) -> str | None:
    """Why the run has ended for this client ("" where it simply has), or None where it goes on."""
    said = record.config_records.get("end")
    return None if said is None else str(said.get("reason", ""))


def answered(client: Client, wire: Wire, record: Any) -> Any:
    """The record of a client's answer to the record of a task; what goes wrong is told in a sentence."""
    from flwr.app import ConfigRecord, RecordDict

    if ended(record) is not None:
        return RecordDict({"end": ConfigRecord({"reason": ""})})
    to = addressee(record)
    if to != client.name:
        text = f"the server knows this client's key as that of {to!r}, and it calls itself {client.name!r}."
        return RecordDict({"error": ConfigRecord({"text": text})})
    try:
        return to_record(wire.pack(client.answer(wire.unpack(from_record(record)))))
    except NetweightError as problem:
        text = str(problem)
    except Exception as problem:  # its text might hold rows
        text = f"{type(problem).__name__} on the client; its own log says more."
    return RecordDict({"error": ConfigRecord({"text": text})})
