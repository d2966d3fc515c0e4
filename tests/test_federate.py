"""A federated run over Flower: its grids, real processes on loopback, and what can go wrong between them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from conftest import Say, tiny_base, tiny_model, tiny_rows, write_table
from netweight.errors import ClientError, EndpointError, LabelError, OptionError, WireError
from netweight.federate.keys import ClientKeys, ServerKeys, make_keys
from netweight.federate.kinds import WIRE
from netweight.federate.link import listening
from netweight.federate.node import Connection, reachable
from netweight.federate.options import task_of, terms_of
from netweight.federate.simulate import simulated
from netweight.federate.start import Deployment, Place, kept_apart, owned, serve
from netweight.loss import SoftTargets, Supervised
from netweight.model import Model
from netweight.quiet import flower
from netweight.run.federated import Client, Federated, Int8, Rounds, RowLevel, Travel
from netweight.run.federated.accountant import Steps, epsilon
from netweight.run.federated.flower import (
    FlowerChannel,
    Memory,
    Node,
    addressed,
    addressee,
    answered,
    from_record,
    hashes_of,
    to_record,
)
from netweight.run.federated.messages import FitTask, Fitted, Lost, Reduced, Scored, ScoreTask
from netweight.task import Classify, Score
from netweight.techniques import Finetune
from netweight.train import Plan
from test_federated import PLAN, fitted, shops
from test_federated_clients import Unheard
from test_habits import _CONNECTIONS, python

flower()
import grpc  # noqa: E402
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

SECONDS = 120
CHOSEN = ("fedavg", "mean", "full")


class FakeGrid:
    """Flower's Grid with clients that answer at once, never, or with what a test says."""

    def __init__(self, clients: Sequence[Client]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.clients = {i + 10: client for i, client in enumerate(clients)}
        self.sessions = dict.fromkeys(self.clients, 0)
        self.silent: set[str] = set()
        self.away: set[str] = set()
        self.said: dict[str, Any] = {}
        self.replies: dict[str, Any] = {}
        self.pushed: list[str] = []
        self.bytes: list[int] = []
        self.memory: dict[str, Memory] = {}

    def nodes(self) -> dict[str, Node]:
        return {c.name: Node(i, self.sessions[i]) for i, c in self.clients.items() if c.name not in self.away}

    def push_messages(self, messages: Sequence[Any]) -> list[str]:
        ids = []
        for message in messages:
            client = self.clients[message.metadata.dst_node_id]
            name = f"m{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed.append(client.name)
            self.bytes.append(sum(len(a.data) for a in message.content.array_records.get("tensors", {}).values()))
            ids.append(name)
            if client.name not in self.silent:
                odd = client.name in self.said
                content = (
                    self.said[client.name]
                    if odd
                    else answered(client, WIRE, message.content, self.memory.get(client.name))
                )
                self.replies[name] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, ids: Sequence[str]) -> list[Any]:
        return [self.replies.pop(name) for name in ids if name in self.replies]


def channel(grid: FakeGrid, patience: float = 0.3) -> FlowerChannel:
    return FlowerChannel(grid, grid.nodes, WIRE, patience)


def test_a_run_over_a_grid_equals_one_in_this_process(model: Model) -> None:
    runs = [
        Federated(where, rounds=Rounds(2), travel=Travel(Int8()), privacy=None)
        for where in (channel(FakeGrid(shops())), shops())
    ]
    made = [fitted(run, model) for run in runs]
    assert made[0].digest == made[1].digest
    assert [s.quality for s in runs[0].report.standings] == [s.quality for s in runs[1].report.standings]
    assert runs[0].report.up == runs[1].report.up


def test_a_client_hears_over_a_grid_which_of_its_answers_counted(model: Model) -> None:
    made = []
    for how in ("away", "late"):
        lossy = Unheard([], how)
        lossy.inner = channel(FakeGrid(shops()))  # type: ignore[assignment]
        made.append(fitted(Federated(lossy, rounds=Rounds(3), travel=Travel(Int8()), privacy=None), model).digest)
    assert made[0] == made[1]


def test_what_a_client_holds_is_not_sent_again(model: Model) -> None:
    grid = FakeGrid(shops(1))
    grid.memory = {"shop0": Memory()}
    over = FlowerChannel(grid, grid.nodes, WIRE, remembers=True)

    def asked(task: Any) -> int:
        answer = over.exchange({"shop0": task})["shop0"]
        assert isinstance(answer, Scored | Fitted), answer
        return grid.bytes[-1]

    teacher, student = tiny_model(seed=1), model.copy()
    loss = SoftTargets(model.task, (teacher,))  # type: ignore[arg-type]
    fit = FitTask("f", 0, student, loss, replace(PLAN, epochs=0.1))
    whole = asked(fit)
    assert whole > 2 * 0.9 * model.bytes
    with torch.no_grad():
        student.network.head.weight += 1  # type: ignore[union-attr]
    assert asked(ScoreTask(student)) < 0.2 * model.bytes
    assert asked(fit) < 0.4 * model.bytes  # the teacher was not in the message before, and is remembered
    # What a client lost it is sent again, once; who claims it forever is lost.
    grid.memory = {"shop0": Memory()}
    before = len(grid.pushed)
    assert asked(fit) > 2 * 0.9 * model.bytes
    assert len(grid.pushed) == before + 2
    grid.said = {"shop0": RecordDict({"lacks": ConfigRecord({"some": True})})}
    assert over.exchange({"shop0": fit})["shop0"] == Lost("shop0", "it keeps asking for tensors that it was sent.")


def test_messages_with_a_part_of_their_own_share_the_model(model: Model) -> None:
    made: Any = {}
    tasks = [FitTask("f", i, model, Supervised(model.task), PLAN) for i in range(3)]
    packed = [WIRE.pack(task) for task in tasks]
    records = [to_record(p, made) for p in packed]
    arrays = [list(r.array_records["tensors"].values()) for r in records]
    assert all(a.data is b.data for one in arrays[1:] for a, b in zip(one, arrays[0]))
    assert [hashes_of(r, made) for r in records] == [hashes_of(to_record(p)) for p in packed]
    assert WIRE.unpack(from_record(records[2])).round == 2


def test_a_record_holds_a_message_and_nothing_else() -> None:
    message = Reduced({"a": torch.randn(3, 2), "b": torch.tensor(4), "c": torch.zeros(0)})
    came = WIRE.unpack(from_record(addressed(to_record(WIRE.pack(message)), "shop")))
    assert all(torch.equal(came.tensors[n], t) for n, t in message.tensors.items())
    assert addressee(addressed(to_record(WIRE.pack(message)), "shop")) == "shop"
    assert addressee(to_record(WIRE.pack(message))) == ""
    pickled = Array("float32", (1,), "numpy.ndarray", b"\x80\x04")
    for record, said in (
        (RecordDict({}), "KeyError"),
        (RecordDict({"header": ConfigRecord({"json": 3}), "tensors": ArrayRecord({})}), "its header is no text"),
        (RecordDict({"header": ConfigRecord({"json": "{}"}), "tensors": ArrayRecord({"a": pickled})}), "are others"),
    ):
        with pytest.raises(WireError, match=said):
            from_record(record)


def test_who_is_silent_away_or_odd_is_lost_with_the_reason(model: Model) -> None:
    grid = FakeGrid(shops())
    over = channel(grid)
    task = ScoreTask(model)
    grid.silent = {"shop0"}
    grid.said["shop1"] = RecordDict({})
    found = over.exchange(dict.fromkeys(("shop0", "shop1", "shop2"), task), 0.2)
    assert isinstance(found["shop2"], Scored)
    assert found["shop0"] == Lost("shop0", "no answer within 0.2 s.")
    assert isinstance(found["shop1"], Lost)
    assert "its answer cannot be read: a Flower message holds no message of ours" in found["shop1"].reason
    grid.said["shop1"] = to_record(WIRE.pack(task))
    assert over.exchange({"shop1": task})["shop1"] == Lost(
        "shop1", "its answer cannot be read: an answer came with a model; clients send tensors only."
    )
    grid.away = {"shop2"}
    assert over.clients() == ("shop0", "shop1")
    found = over.exchange({"shop2": task})
    assert found["shop2"] == Lost("shop2", "it left, and was away for 0.3 s.")


def test_what_flower_cannot_read_costs_its_sender_alone(model: Model) -> None:
    grid = FakeGrid(shops())
    pull = grid.pull_messages

    def odd(ids: Sequence[str]) -> list[Any]:
        if "m1" in ids:
            raise ValueError("Unexpected format for object head. " * 100)
        return pull(ids)

    grid.pull_messages = odd  # type: ignore[method-assign]
    found = channel(grid).exchange(dict.fromkeys(("shop0", "shop1", "shop2"), ScoreTask(model)), 5)
    assert isinstance(found["shop0"], Scored)
    assert isinstance(found["shop2"], Scored)
    assert isinstance(found["shop1"], Lost)
    assert found["shop1"].reason.startswith("its answer cannot be read: ValueError: Unexpected format for object head.")
    assert len(found["shop1"].reason) == 2000


def test_an_answer_is_that_of_whom_it_was_asked_of(model: Model) -> None:
    """Flower checks of whom a message is in its head only, not in what it then builds of it."""
    grid = FakeGrid(shops())
    grid.silent = {"shop0"}
    pull = grid.pull_messages

    def of_another(ids: Sequence[str]) -> list[Any]:
        replies = pull(ids)
        for reply in replies:
            reply.metadata.__dict__["_reply_to_message_id"] = "m0"
        return replies

    grid.pull_messages = of_another  # type: ignore[method-assign]
    found = channel(grid).exchange(dict.fromkeys(("shop0", "shop1"), ScoreTask(model)), 0.3)
    assert isinstance(found["shop1"], Scored)
    assert found["shop0"] == Lost("shop0", "no answer within 0.3 s.")


def test_who_connects_anew_is_asked_again(model: Model) -> None:
    grid = FakeGrid(shops())
    grid.silent = {"shop0"}
    pull = grid.pull_messages

    def pulled(ids: Sequence[str]) -> list[Any]:
        if grid.silent:
            grid.silent = set()
            grid.sessions[10] += 1
        return pull(ids)

    grid.pull_messages = pulled  # type: ignore[method-assign]
    assert isinstance(channel(grid).exchange({"shop0": ScoreTask(model)})["shop0"], Scored)
    assert grid.pushed == ["shop0", "shop0"]


def test_what_goes_wrong_on_a_client_is_told_in_a_sentence(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = shops()[0]

    def said(record: Any) -> str:
        return str(answered(client, WIRE, record).config_records["error"]["text"])

    task = to_record(WIRE.pack(ScoreTask(model)))
    assert (
        said(addressed(task, "mart"))
        == "the server knows this client's key as that of 'mart', and it calls itself 'shop0'; use the name, or the key, "
        "of the other."
    )
    assert "a Flower message holds no message of ours" in said(addressed(RecordDict({}), "shop0"))

    row = client.data.train.text[0]

    def fails(_: object) -> Any:
        raise ValueError(f"the row {row!r} is odd")

    monkeypatch.setattr(Client, "answer", lambda self, task: fails(task))
    assert said(addressed(task, "shop0")) == "ValueError on the client; its own log says more."
    found = channel(FakeGrid([client])).exchange({"shop0": ScoreTask(model)})
    assert found["shop0"] == Lost("shop0", "ValueError on the client; its own log says more.")
    assert "a task ended with ValueError, at" in caplog.text
    assert "in fails" in caplog.text
    assert row not in caplog.text

    def full(self: Client, task: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Client, "answer", full)
    assert said(addressed(task, "shop0")) == "OSError on the client; its own log says more."
    assert "a task ended with OSError: [Errno 28] No space left on device, at" in caplog.text


def test_flower_errors_are_told(model: Model) -> None:
    from flwr.app import Error
    from flwr.common.constant import ErrorCode

    grid = FakeGrid(shops())
    grid.push_messages = lambda messages: ["m"]  # type: ignore[method-assign]
    sent = Message(RecordDict({}), 10, "query")
    sent.metadata.__dict__["_message_id"] = "m"
    grid.replies["m"] = Message(
        Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="out of memory"), reply_to=sent
    )
    assert channel(grid).exchange({"shop0": ScoreTask(model)})["shop0"] == Lost("shop0", "Flower says: out of memory")


# --- keys ---


def test_keys_are_made_once_and_secrets_are_for_the_owner(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "k", ("a", "b"))
    assert {str(p.relative_to(tmp_path / "k")) for p in made} == {
        *("ca.key", "server/ca.crt", "server/server.crt", "server/server.key"),
        *("server/clients/a.pub", "server/clients/b.pub", "a/ca.crt", "a/client.key", "b/ca.crt", "b/client.key"),
    }
    assert {oct(p.stat().st_mode & 0o777) for p in made if p.suffix == ".key"} == {"0o600"}
    assert set(ServerKeys.load(tmp_path / "k" / "server").clients) == {"a", "b"}
    ClientKeys.load(tmp_path / "k/a/ca.crt", tmp_path / "k/a/client.key")
    before = {path: path.read_bytes() for path in made}
    with pytest.raises(OptionError, match=r"k has keys of a already; name other clients, or delete theirs \(NAME/ and"):
        make_keys(tmp_path / "k", ("a", "c"))
    make_keys(tmp_path / "k", ("c",))
    assert {path: path.read_bytes() for path in made} == before
    assert set(ServerKeys.load(tmp_path / "k" / "server").clients) == {"a", "b", "c"}
    ClientKeys.load(tmp_path / "k/c/ca.crt", tmp_path / "k/c/client.key")


@pytest.mark.parametrize(
    ("clients", "said"),
    [(("../a",), "is no name of a client"), ((), "name at least one"), (("a", "a"), "each once")],
)
def test_names_of_clients(clients: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        make_keys(tmp_path, clients)


def test_missing_and_odd_keys(tmp_path: Path) -> None:
    make_keys(tmp_path / "k", ("a",))
    with pytest.raises(OptionError, match=r"clients has no public key \(NAME.pub\)"):
        ServerKeys.load(tmp_path)
    (tmp_path / "k/server/server.key").unlink()
    with pytest.raises(OptionError, match=r"server.key cannot be read \(No such file or directory\)"):
        ServerKeys.load(tmp_path / "k/server")
    with pytest.raises(OptionError, match="holds no private key on an elliptic curve"):
        ClientKeys.load(tmp_path / "k/a/ca.crt", tmp_path / "k/a/ca.crt")
    (tmp_path / "k/server/clients/b.pub").write_bytes((tmp_path / "k/server/clients/a.pub").read_bytes())
    with pytest.raises(OptionError, match="a.pub and b.pub in .*clients hold one key, and a key stands for one client"):
        ServerKeys.load(tmp_path / "k/server")
    pem = (tmp_path / "k/a/ca.crt").read_bytes()
    for odd in (ssl.PEM_cert_to_DER_cert(pem.decode()), "# für uns\n".encode() + pem, b""):
        (tmp_path / "k/a/ca.crt").write_bytes(odd)
        with pytest.raises(OptionError, match=r"ca.crt holds no certificate in PEM \(ASCII\); use the ca.crt of the"):
            ClientKeys.load(tmp_path / "k/a/ca.crt", tmp_path / "k/a/client.key")


# --- options, rows ---


def test_labels_of_the_command_line_may_stand_between_full_width_commas(say: Say, tmp_path: Path) -> None:
    table = write_table(tmp_path / "dev.tsv", tiny_rows())
    command = ("federate", "server", "--out", tmp_path / "run", "--keys", tmp_path / "keys", "--dev", table)
    assert "dev has labels that --labels does not name: 'bad'." in say(*command, "--labels", "good，other").err
    assert "needs at least 2 labels; given were ['good']." in say(*command, "--labels", "good，").err


def test_delta_of_the_command_line(say: Say, tmp_path: Path) -> None:
    tables = ("--dev", tmp_path / "dev.tsv", "--certify", tmp_path / "certify.tsv")
    command = ("federate", "optimize", "--out", tmp_path / "run", "--keys", tmp_path / "keys", *tables)
    assert "delta of RowLevel is 0.5: the chance that the promise fails." in say(*command, "--delta", "0.5").err


def test_labels_come_from_names_or_rows() -> None:
    rows = tiny_rows(20)
    assert task_of(("x", "y"), None) == Classify(("x", "y"))
    assert set(task_of(None, rows).labels) == set(rows.label or ())  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="give --labels A,B,C or --dev TABLE"):
        task_of(None, None)
    with pytest.raises(OptionError, match="labels that --labels does not name"):
        task_of(("x", "y"), rows)
    ids = replace(rows, label=tuple(map(str, range(len(rows)))))
    with pytest.raises(LabelError, match="each label needs at least 2 rows in dev; only 1 has '0', '1', .* more"):
        task_of(None, ids)


def test_scores_are_standardised_by_the_rows_of_the_server() -> None:
    rows = replace(tiny_rows(5), label=tuple("12345"))
    assert task_of(None, rows, "score") == Score(3.0, 2**0.5)
    for labels, given in ((None, None), (("1", "2"), rows)):
        with pytest.raises(OptionError, match="scores are standardised .*: give --dev TABLE, and leave --labels out"):
            task_of(labels, given, "score")


def test_a_folder_is_used_by_one_client(tmp_path: Path) -> None:
    taken = pytest.raises(OptionError, match="shop is used by a client that runs; give each client a folder")
    with owned(tmp_path / "shop"), taken, owned(tmp_path / "shop"):
        pass
    with owned(tmp_path / "shop"):
        pass


def test_a_share_of_a_clients_rows_measures_quality() -> None:
    rows = tiny_rows(400)
    data = kept_apart(rows)
    assert len(data.train) + len(data.select) == 400
    assert not set(data.train.text) & set(data.select.text)
    assert kept_apart(rows.take(list(reversed(range(400))))).select.text[::-1] == data.select.text


# --- over TLS, in this process ---


class Joining(threading.Thread):
    """A client in a thread; `said` is what it told, `problem` how it ended."""

    def __init__(self, address: str, keys: Path, client: Client, patience: float = 20.0) -> None:
        super().__init__(daemon=True)
        self.said: list[str] = []
        self.problem: BaseException | None = None
        found = ClientKeys.load(keys / "ca.crt", keys / "client.key")
        self.connection = Connection(address, found, patience, self.said.append)
        self.client = client
        self.start()

    def run(self) -> None:
        try:
            self.connection.serve(self.client)
        except BaseException as problem:
            self.problem = problem


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "keys"
    make_keys(folder, ("shop0", "shop1", "shop2"))
    return folder


def test_clients_come_leave_and_are_told_the_end(keys: Path, model: Model) -> None:
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server"), patience=0.3) as over:
        assert over.clients() == ()
        first, second = (Joining(address, keys / c.name, c) for c in shops()[:2])
        soon(lambda: over.clients() == ("shop0", "shop1"))
        task = ScoreTask(model)
        answers = over.exchange(dict.fromkeys(("shop0", "shop1", "shop2"), task))
        assert isinstance(answers["shop0"], Scored)
        assert isinstance(answers["shop1"], Scored)
        assert answers["shop2"] == Lost("shop2", "it left, and was away for 0.3 s.")
        over.dismiss({"shop1": "labels differ."}, "")
        first.join(10)
        second.join(10)
        assert over.clients() == ()
    assert first.problem is None
    assert first.said[-1] == "the server has ended the run"
    assert isinstance(second.problem, ClientError)
    assert str(second.problem) == "labels differ."


@pytest.mark.parametrize("refused", [False, True])
def test_clients_are_told_that_a_run_has_failed(keys: Path, refused: bool, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"

    def fails(over: FlowerChannel) -> None:
        terms = terms_of(Rounds(1, minimum=1, wait=30.0), CHOSEN)
        with Deployment(over, None, tmp_path / "work", terms, print) as run:
            if refused:
                run.members.refused["shop0"] = "labels differ."
            raise ZeroDivisionError

    with listening(address, ServerKeys.load(keys / "server")) as over:
        client = Joining(address, keys / "shop0", shops()[0])
        soon(lambda: over.clients() == ("shop0",))
        with pytest.raises(ZeroDivisionError):
            fails(over)
        client.join(10)
    assert isinstance(client.problem, ClientError)
    wanted = "the server refused this client: labels differ." if refused else "the server has ended the run without a"
    assert str(client.problem).startswith(wanted)


def test_no_client_appears(keys: Path, model: Model) -> None:
    with listening(f"127.0.0.1:{free_port()}", ServerKeys.load(keys / "server")) as over:
        run = Federated(over, rounds=Rounds(1, wait=0.3), privacy=None)
        with pytest.raises(
            ClientError, match=r"no client appeared within 0.3 s, and 1 must; start them, or wait longer"
        ):
            fitted(run, model)


def test_all_clients_leave(keys: Path, model: Model) -> None:
    address = f"127.0.0.1:{free_port()}"

    class Leaves(Client):
        def answer(self, task: Any) -> Any:
            if isinstance(task, FitTask):
                raise SystemExit  # as a process that ends: the connection is left
            return super().answer(task)

    client = Leaves("shop0", shops()[0].data)
    with listening(address, ServerKeys.load(keys / "server"), patience=0.5) as over:
        joined = Joining(address, keys / "shop0", client)
        run = Federated(over, rounds=Rounds(2, wait=10), privacy=None)
        with pytest.raises(
            ClientError, match=r"0 clients answered, and 1 must. shop0: it left, and was away for 0.5 s"
        ):
            fitted(run, model)
        joined.join(10)
    assert isinstance(joined.problem, SystemExit)


def test_a_client_that_differs_ends_with_the_field_and_the_server_says_so_once(
    keys: Path, model: Model, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    odd = shops()[1].data
    odd = replace(odd, train=replace(odd.train, label=tuple("other" for _ in odd.train.label or ())))
    terms, said = terms_of(Rounds(1, wait=20.0), CHOSEN), list[str]()
    with listening(address, ServerKeys.load(keys / "server")) as over:
        one = Joining(address, keys / "shop1", Client("shop1", odd))
        with Deployment(over, None, tmp_path / "work", terms, said.append) as run:
            asking = threading.Thread(target=lambda: fitted(run, model))
            asking.start()
            for again in (False, True):  # it comes again, as under a service manager
                if again:
                    one = Joining(address, keys / "shop1", Client("shop1", odd))
                one.join(10)
                assert isinstance(one.problem, ClientError)
                assert str(one.problem).startswith("the server refused this client: labels differs: the server has")
            other = Joining(address, keys / "shop0", shops()[0])
            asking.join(20)
        other.join(10)
    assert other.problem is None
    assert [line[: len("shop1 was refused: labels differs")] for line in said] == ["shop1 was refused: labels differs"]
    assert run.report.notes == (said[0],)


def test_a_client_whose_name_is_not_that_of_its_key_ends_at_once(keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other", ("shop0",))
    address, said = f"127.0.0.1:{free_port()}", list[str]()
    client = shops()[0]
    with listening(address, ServerKeys.load(keys / "server"), said=said.append) as over:
        first = Joining(address, keys / "shop0", client)
        soon(lambda: over.clients() == ("shop0",))
        there = over.nodes()
        for _ in range(2):
            one = Joining(address, keys / "shop0", Client("shop9", client.data))
            one.join(10)
            assert isinstance(one.problem, ClientError)
            assert str(one.problem).startswith("the server knows this client's key as that of 'shop0', and it calls")
        assert over.nodes() == there, "who is there with that key stays"
        authority = (keys / "server/ca.crt").read_bytes()
        unknown = ClientKeys(authority, (tmp_path / "other/shop0/client.key").read_bytes())
        with pytest.raises(ClientError, match="does not let this client in"):
            Connection(address, unknown).serve(client)
        over.dismiss({})
        first.join(10)
    assert said == [
        f"'shop9' was not let in: {one.problem}",
        "'shop0' was not let in: its public key is not among those of the server's clients.",
    ]


def test_a_server_that_is_away_or_is_another(keys: Path, tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    authority = (keys / "server/ca.crt").read_bytes()
    with pytest.raises(EndpointError, match=r"no server answers at .*Connection refused.*has been started"):
        reachable(nobody, authority, 0.1)
    with pytest.raises(OptionError, match="the server is 'example.com'; use HOST:PORT"):
        reachable("example.com", authority, 0.1)
    make_keys(tmp_path / "other", ("shop0",))
    make_keys(tmp_path / "name", ("shop0",), ("federation.example.com",))
    for folder, wanted in ((tmp_path / "other", authority), (tmp_path / "name", None)):
        address = f"127.0.0.1:{free_port()}"
        other = pytest.raises(EndpointError, match=r"certificate of the server at .* does not match: .*Use the ca.crt")
        with listening(address, ServerKeys.load(folder / "server")), other:
            reachable(address, wanted or (folder / "server/ca.crt").read_bytes(), 5)


def strict(authority: Path) -> ssl.SSLContext:
    """What ssl's defaults are from Python 3.13 on."""
    context = ssl.create_default_context(cadata=authority.read_text(encoding="ascii"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def shaken(client: ssl.SSLContext, keys: Path) -> None:
    """Hands, between a client and a server with these keys, in memory."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys / "server.crt", keys / "server.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(3):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert all(end.version() for end in ends), "both are through"


def test_certificates_are_taken_by_strict_clients(keys: Path) -> None:
    shaken(strict(keys / "server/ca.crt"), keys / "server")


def test_certificates_that_were_made_before_are_taken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography import x509

    add, folder = x509.CertificateBuilder.add_extension, tmp_path / "keys" / "server"
    with monkeypatch.context() as before:
        without = lambda self, what, critical: self if isinstance(what, x509.KeyUsage) else add(self, what, critical)  # noqa: E731
        before.setattr(x509.CertificateBuilder, "add_extension", without)
        make_keys(tmp_path / "keys", ("shop0",))
    context = strict(folder / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="key usage"):
        shaken(context, folder)
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(folder)):
        reachable(address, (folder / "ca.crt").read_bytes(), 5)


def test_a_port_that_is_taken_and_certificates_that_do_not_fit(keys: Path, tmp_path: Path) -> None:
    server = ServerKeys.load(keys / "server")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        taken_by = pytest.raises(OptionError, match=r"is taken by another program, or is no address of this machine")
        with taken_by, listening(address, server):
            pass
    with pytest.raises(OptionError, match="address is 'here'; use HOST:PORT"), listening("here", server):
        pass
    make_keys(tmp_path / "other", ("shop0",))
    mixed = replace(server, key=(tmp_path / "other/server/server.key").read_bytes())
    with pytest.raises(OptionError, match="with these certificates"), listening(f"127.0.0.1:{free_port()}", mixed):
        pass


def test_who_has_no_key_of_a_client_is_not_let_in(keys: Path, tmp_path: Path) -> None:
    from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.proto.node_pb2 import Node as Place_

    make_keys(tmp_path / "other", ("shop0",))
    address = f"127.0.0.1:{free_port()}"
    authority = (keys / "server/ca.crt").read_bytes()
    with listening(address, ServerKeys.load(keys / "server")) as over:
        stranger = Connection(address, ClientKeys(authority, (tmp_path / "other/shop0/client.key").read_bytes()))
        with pytest.raises(ClientError, match=r"does not let this client in .*its public key must lie among"):
            stranger.activate()
        with pytest.raises(grpc.RpcError) as refused:  # nor may it register itself
            stranger.stub.RegisterNode(RegisterNodeFleetRequest(public_key=stranger._public()))
        assert over.clients() == ()
        # Without a signature, or in the name of another, nothing is answered.
        plain = FleetStub(grpc.secure_channel(address, grpc.ssl_channel_credentials(authority)))
        with pytest.raises(grpc.RpcError) as refused:
            plain.PullMessages(PullMessagesRequest(node=Place_(node_id=1)))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        one, two = (
            Connection(address, ClientKeys(authority, (keys / name / "client.key").read_bytes()))
            for name in ("shop0", "shop1")
        )
        one.activate()
        two.activate()
        one.node = two.node
        with pytest.raises(grpc.RpcError) as refused:
            one.stub.PullMessages(PullMessagesRequest(node=one.node))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError):  # TLS alone is spoken
            FleetStub(grpc.insecure_channel(address)).PullMessages(PullMessagesRequest(), timeout=5)


def test_a_client_speaks_for_itself_only(keys: Path, tmp_path: Path, model: Model) -> None:
    """With the public key of another, which is no secret, nobody ends its session; nor answers what it was asked."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest

    make_keys(tmp_path / "other", ("stranger",))
    address = f"127.0.0.1:{free_port()}"
    authority = (keys / "server/ca.crt").read_bytes()
    with listening(address, ServerKeys.load(keys / "server"), patience=0.3) as over:
        shop, other, stranger = (
            Connection(address, ClientKeys(authority, (folder / "client.key").read_bytes()))
            for folder in (keys / "shop0", keys / "shop1", tmp_path / "other/stranger")
        )
        shop.activate()
        other.activate()
        sessions = over.nodes()
        with pytest.raises(grpc.RpcError, match="the key to let in is not the key that signed"):
            stranger.stub.ActivateNode(ActivateNodeRequest(public_key=shop._public(), heartbeat_interval=20))
        assert over.nodes() == sessions
        answers: dict[str, Any] = {}
        asking = threading.Thread(target=lambda: answers.update(over.exchange({"shop0": ScoreTask(model)}, 60)))
        asking.start()
        came: list[Any] = []
        soon(lambda: came.append(shop._pull()) or came[-1] is not None)  # type: ignore[func-returns-value]
        with pytest.raises(grpc.RpcError, match="a client answers for itself only"):
            other._push(Message(to_record(WIRE.pack(Scored(0.1, 7))), reply_to=came[-1]))
        shop._push(Message(to_record(WIRE.pack(Scored(0.9, 7))), reply_to=came[-1]))
        asking.join(20)
    assert answers == {"shop0": Scored(0.9, 7)}


def by_hand(address: str, keys: Path) -> Connection:
    """A client of which a test makes each call."""
    return Connection(address, ClientKeys.load(keys / "ca.crt", keys / "client.key"))


def handed(shop: Connection) -> Any:
    """The next task of a client by hand."""
    end = time.monotonic() + 20
    while (task := shop._pull()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return task


def pushed(shop: Connection, task: Any, answer: Any) -> None:
    shop._push(Message(to_record(WIRE.pack(answer)), reply_to=task))


class Asking(threading.Thread):
    """A server that asks shop0 something; `found` is what came."""

    def __init__(self, over: FlowerChannel, model: Model, seconds: float | None = None) -> None:
        super().__init__(daemon=True)
        self.over, self.task, self.seconds = over, ScoreTask(model), seconds
        self.found: Any = None
        self.start()

    def run(self) -> None:
        self.found = self.over.exchange({"shop0": self.task}, self.seconds)["shop0"]


def test_an_upload_that_stalls_keeps_nobody_waiting(keys: Path, model: Model) -> None:
    address = f"127.0.0.1:{free_port()}"
    go_on, stalled = threading.Event(), threading.Event()
    with listening(address, ServerKeys.load(keys / "server")) as over:
        slow, joined = by_hand(address, keys / "shop0"), Joining(address, keys / "shop1", shops()[1])
        slow.activate()
        soon(lambda: over.clients() == ("shop0", "shop1"))
        push = slow.stub.PushObject

        def stalls(request: Any) -> Any:
            stalled.set()
            go_on.wait(8)
            return push(request)

        slow.stub.PushObject = stalls
        uploading = threading.Thread(target=lambda: pushed(slow, handed(slow), Scored(0.1, 7)))
        uploading.start()
        found = over.exchange(dict.fromkeys(("shop0", "shop1"), ScoreTask(model)), 3)
        assert not go_on.is_set()
        assert stalled.is_set()
        assert isinstance(found["shop1"], Scored)
        assert found["shop0"] == Lost("shop0", "no answer within 3 s.")
        go_on.set()
        uploading.join(10)
        slow._leave()
        over.dismiss({})
        joined.join(10)
    assert joined.problem is None


def test_an_upload_that_breaks_off_is_asked_for_again(
    keys: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr.supercore.corestate.in_memory_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS", 1)
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server")) as over:
        shop = by_hand(address, keys / "shop0")
        shop.activate()
        soon(lambda: over.clients() == ("shop0",))
        asking = Asking(over, model)

        def breaks(request: Any) -> Any:
            raise ConnectionError

        push, shop.stub.PushObject = shop.stub.PushObject, breaks
        first = handed(shop)
        with pytest.raises(ConnectionError):
            pushed(shop, first, Scored(0.1, 7))
        shop.stub.PushObject = push
        again = handed(shop)
        assert again.metadata.message_id != first.metadata.message_id
        pushed(shop, again, Scored(0.9, 7))
        asking.join(20)
    assert asking.found == Scored(0.9, 7)


def test_no_more_of_an_answer_is_kept_than_a_message_may_have(keys: Path, model: Model) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server"), replace(WIRE, most=2000)) as over:
        shop = by_hand(address, keys / "shop0")
        shop.activate()
        soon(lambda: over.clients() == ("shop0",))
        asking = Asking(over, model, 1)
        with pytest.raises(ObjectPushError):
            pushed(shop, handed(shop), Reduced({"a": torch.zeros(10_000)}))
        asking.join(20)
        assert asking.found == Lost("shop0", "no answer within 1 s.")
        asking = Asking(over, model)
        pushed(shop, handed(shop), Scored(0.9, 7))
        asking.join(20)
    assert asking.found == Scored(0.9, 7)


class Busy(grpc.RpcError):  # type: ignore[misc]
    def code(self) -> Any:
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self) -> str:
        return "too many calls"


def busy(call: Callable[..., Any], *times: int) -> Callable[..., Any]:
    """The call of a stub, which is turned down at these times."""
    count = itertools.count()

    def made(*given: Any, **options: Any) -> Any:
        if next(count) in times:
            raise Busy
        return call(*given, **options)

    return made


def test_a_call_that_is_turned_down_loses_no_task(keys: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy server turns down a client that begins, then one that was just handed a task, then one that is back."""
    stub = Connection._stub

    def turned_down(self: Connection) -> Any:
        made = stub(self)
        made.ActivateNode, made.PullObject = busy(made.ActivateNode, 0, 2), busy(made.PullObject, 0)
        return made

    monkeypatch.setattr(Connection, "_stub", turned_down)
    monkeypatch.setattr("netweight.federate.node._RETRY", (0.05, 0.1))
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server")) as over:
        joined = Joining(address, keys / "shop0", shops()[0])
        soon(lambda: over.clients() == ("shop0",))
        assert isinstance(over.exchange({"shop0": ScoreTask(model)}, 20)["shop0"], Scored)
        over.dismiss({})
        joined.join(10)
    assert joined.problem is None
    assert joined.said.count("the server turned a call down (too many calls)") == 2
    assert joined.said.count(f"connected to {address} again") == 2


def test_a_client_that_hears_the_end_waits_for_no_server(keys: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server")) as over:
        joined = Joining(address, keys / "shop0", shops()[0])
        soon(lambda: over.clients() == ("shop0",))
        stub = joined.connection.stub
        stub.PushMessages, stub.ActivateNode = (busy(c, *range(999)) for c in (stub.PushMessages, stub.ActivateNode))
        over.dismiss({})
        joined.join(10)
    assert not joined.is_alive()
    assert joined.problem is None
    assert joined.said[-1] == "the server has ended the run"


def test_a_server_takes_the_calls_of_all_its_clients_at_once(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = []

    def made(*_: Any, **options: Any) -> Any:
        workers.append(options["max_concurrent_workers"])
        raise RuntimeError("counted")

    monkeypatch.setattr("flwr.supercore.grpc.generic_create_grpc_server", made)
    many = replace(ServerKeys.load(keys / "server"), clients={f"shop{i}": b"%d" % i for i in range(500)})
    with pytest.raises(OptionError, match="counted"), listening(f"127.0.0.1:{free_port()}", many):
        pass
    assert workers[0] > 3 * 500  # two parts of a message and a sign of life of each


def test_clocks_may_differ_as_flower_allows_and_as_is_said(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
    from flwr.supercore.date import now

    ahead, behind = SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE
    said = f"clock must be less than {ahead} seconds ahead of the server's and less than {behind} behind it"
    assert said in (Path(__file__).parent.parent / "docs" / "federated-deployment.md").read_text(encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server")):
        for seconds in (ahead + 30, -behind - 1, 30 - behind):  # the call itself may take a while

            def differing(seconds: float = seconds) -> datetime:
                return now() + timedelta(seconds=seconds)

            monkeypatch.setattr("flwr.supercore.date.now", differing)
            shop = by_hand(address, keys / "shop0")
            if -behind < seconds < ahead:
                shop.activate()
                continue
            with pytest.raises(ClientError, match=f"Invalid timestamp.*its {said}"):
                shop.activate()


def test_a_client_that_was_killed_is_let_in_at_once_and_asked_again(keys: Path, model: Model) -> None:
    address = f"127.0.0.1:{free_port()}"
    client = shops()[0]
    found = ClientKeys.load(keys / "shop0/ca.crt", keys / "shop0/client.key")
    with listening(address, ServerKeys.load(keys / "server")) as over:
        first = Connection(address, found)
        first.activate()
        answers: dict[str, Any] = {}
        asking = threading.Thread(target=lambda: answers.update(over.exchange({"shop0": ScoreTask(model)})))
        asking.start()
        soon(lambda: first._pull() is not None)  # it took the task, and dies
        Joining(address, keys / "shop0", client)
        asking.join(20)
        assert isinstance(answers["shop0"], Scored)


def test_a_server_that_comes_back_without_memory_finds_its_clients(keys: Path, model: Model) -> None:
    address = f"127.0.0.1:{free_port()}"
    server = ServerKeys.load(keys / "server")
    with listening(address, server) as over:
        joined = Joining(address, keys / "shop0", shops()[0])
        soon(lambda: over.clients() == ("shop0",))
        assert isinstance(over.exchange({"shop0": ScoreTask(model)})["shop0"], Scored)
    with listening(address, server) as over:
        soon(lambda: over.clients() == ("shop0",))
        assert isinstance(over.exchange({"shop0": ScoreTask(model)})["shop0"], Scored)
        over.dismiss({})
        joined.join(10)
    assert f"connected to {address} again" in joined.said


def test_a_client_gives_up_on_a_server_that_stays_away(keys: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with listening(address, ServerKeys.load(keys / "server")) as over:
        joined = Joining(address, keys / "shop0", shops()[0], patience=1.0)
        soon(lambda: over.clients() == ("shop0",))
    joined.join(30)
    assert isinstance(joined.problem, EndpointError)
    assert "is away for 1 s" in str(joined.problem)


@pytest.mark.slow
def test_a_client_that_trains_for_long_is_not_taken_for_gone(
    keys: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netweight.federate.node._INTERVAL", 10)  # the least: after 20 s of silence it is gone
    address = f"127.0.0.1:{free_port()}"

    class Slow(Client):
        asked = 0

        def answer(self, task: Any) -> Any:
            Slow.asked += 1
            time.sleep(25)
            return super().answer(task)

    with listening(address, ServerKeys.load(keys / "server"), patience=0.1) as over:
        Joining(address, keys / "shop0", Slow("shop0", shops()[0].data))
        soon(lambda: over.clients() == ("shop0",))
        assert isinstance(over.exchange({"shop0": ScoreTask(model)})["shop0"], Scored)
        over.dismiss({})
    assert Slow.asked == 1


def soon(true: Any) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- processes ---


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return int(found.getsockname()[1])


class Federation:
    """Keys, tables and processes of a small federation."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("north", "south")) -> None:
        self.folder, self.names = folder, names
        self.address = f"127.0.0.1:{free_port()}"
        self.running: list[subprocess.Popen[str]] = []
        make_keys(folder / "keys", names)
        tiny_base(folder / "base")
        rows = tiny_rows(120)
        for i, name in enumerate(names):
            write_table(folder / f"{name}.tsv", rows.take(range(i * 40, i * 40 + 40)))
        write_table(folder / "dev.tsv", rows.take(range(100, 120)))

    def start(self, *words: object) -> subprocess.Popen[str]:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        code = "from netweight.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "federate", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        self.running.append(process)
        return process

    def server(self, *more: object, out: str = "out") -> subprocess.Popen[str]:
        f = self.folder
        options = ("--address", self.address, "--model", f / "base", "--dev", f / "dev.tsv", "--threads", 1)
        return self.start("server", "--out", f / out, "--keys", f / "keys/server", *options, *more)

    def client(self, name: str, *more: object, table: Path | None = None) -> subprocess.Popen[str]:
        f = self.folder
        options = (
            "--server",
            self.address,
            "--name",
            name,
            "--keys",
            f / "keys" / name,
            "--folder",
            f / "state" / name,
        )
        return self.start("client", table or f / f"{name}.tsv", *options, "--threads", 1, *more)

    def stop(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    try:
        yield made
    finally:
        made.stop()


OPEN = ("--privacy", "off")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


def test_a_finished_model_is_not_overwritten(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    with pytest.raises(OptionError, match="holds a finished model; use another folder"):
        serve(
            Place("127.0.0.1:1", tmp_path, tmp_path),
            model,
            Finetune(),
            None,
            terms_of(Rounds(), CHOSEN),
            Plan(),
            print,
        )


def test_a_server_and_a_client_train_a_model_over_tls(federation: Federation) -> None:
    """Two processes; more of them are in the slow test below."""
    server = federation.server("--rounds", 2, "--epochs", 2, "--minimum", 1, "--wait", 60, "--travel", "int8", *OPEN)
    client = federation.client("north")
    status, said = ended(server)
    assert status == 0, said
    status, told = ended(client)
    assert status == 0, told
    assert "the server has ended the run" in told
    out = federation.folder / "out"
    made = Model.load(out / "model")
    (report,) = json.loads((out / "federation.json").read_text())
    assert [s["client"] for s in report["standings"]] == ["north"]
    assert [r["took_part"] for r in report["rounds"]] == [["north"]] * 2
    assert isinstance(made.task, Classify)
    assert "privacy: OFF, as was asked for" in said


@pytest.mark.slow
def test_over_tls_it_is_private_unless_told_otherwise(federation: Federation) -> None:
    server = federation.server(
        "--rounds", 2, "--epochs", 2, "--minimum", 2, "--wait", 60, "--train", "head", "--learning-rate", 0.01
    )
    clients = [federation.client(name) for name in federation.names]
    status, said = ended(server)
    assert status == 0, said
    assert all(ended(client)[0] == 0 for client in clients)
    (report,) = json.loads((federation.folder / "out" / "federation.json").read_text())
    assert 0 < report["epsilon"] <= 8
    assert [r["took_part"] for r in report["rounds"]] == [["north", "south"]] * 2
    assert "privacy: row-level" in said
    assert (federation.folder / "state" / "north" / "privacy.json").exists()


@pytest.mark.slow
def test_a_simulation_on_ray_equals_a_run_in_this_process(model: Model, tmp_path: Path) -> None:
    with simulated(shops(), tmp_path) as over:
        assert over.clients() == ("shop0", "shop1", "shop2")
        run = Federated(over, rounds=Rounds(2), travel=Travel(Int8()), privacy=None)
        made = fitted(run, model)
    assert (
        made.digest == fitted(Federated(shops(), rounds=Rounds(2), travel=Travel(Int8()), privacy=None), model).digest
    )
    assert not (tmp_path / "shop0" / "work").exists() or not list((tmp_path / "shop0" / "work").glob("fit-*"))


@pytest.mark.slow
def test_simulated_clients_remember_what_they_were_asked(tmp_path: Path) -> None:
    """Under privacy a client's answers in a round hang together, whichever of Flower's actors takes which task."""
    model = tiny_model()
    model.network.backbone.requires_grad_(False)  # type: ignore[union-attr]
    with simulated(shops(9, rows=540), tmp_path, cpus=(os.cpu_count() or 2) / 2) as over:
        run = Federated(over, rounds=Rounds(2), privacy=RowLevel(epsilon=30.0))
        fitted(run, model)
    assert [(len(r.took_part), r.lost) for r in run.report.rounds] == [(9, ())] * 2
    assert 0 < (run.report.epsilon or 0) <= 30
    assert all((tmp_path / name / "privacy.json").exists() for name in run.report.rounds[0].took_part)


def test_actors_that_only_pass_tasks_on_import_no_torch() -> None:
    assert python("import netweight.federate.home, sys; print('torch' in sys.modules)").strip() == "False"


def test_names_of_simulated_clients_are_their_own() -> None:
    twice = [*shops(2), *shops(2)]
    with pytest.raises(OptionError, match="4 clients bear 2 names"), simulated(twice):
        pass


@pytest.mark.slow
def test_a_killed_server_goes_on_from_its_last_round_and_a_killed_client_comes_back(federation: Federation) -> None:
    many = ("--rounds", 6, "--epochs", 6, "--minimum", 2, "--wait", 90, "--privacy", "off")
    server = federation.server(*many)
    north, south = (federation.client(name) for name in federation.names)
    work = federation.folder / "out" / "work"
    waited(lambda: list(work.glob("rounds-*.safetensors")))
    server.send_signal(signal.SIGKILL)
    server.wait()
    north.kill()
    north.wait()
    with safe_open(next(iter(work.glob("rounds-*.safetensors"))), "pt") as file:
        before = json.loads(file.metadata()["about"])["rounds"]
    server = federation.server(*many)
    north = federation.client("north")
    status, said = ended(server)
    assert status == 0, said
    (report,) = json.loads((federation.folder / "out" / "federation.json").read_text())
    assert [r["round"] for r in report["rounds"]] == [0, 1, 2, 3, 4, 5]
    assert all(r["took_part"] == ["north", "south"] for r in report["rounds"])
    assert report["rounds"][: len(before)] == before  # to the second: they were not made again
    assert before
    for client in (north, south):
        status, told = ended(client)
        assert status == 0, told
    assert "again" in told


@pytest.mark.slow
def test_a_round_of_secure_sums_in_which_the_server_is_killed_costs_rows_once(federation: Federation) -> None:
    many = ("--rounds", 4, "--epochs", 4, "--minimum", 2, "--wait", 90, "--train", "head", "--learning-rate", 0.01)
    server = federation.server(*many)
    clients = [federation.client(name) for name in federation.names]
    out, state = federation.folder / "out", federation.folder / "state"

    def entered(name: str) -> list[Any]:
        ledger = state / name / "privacy.json"
        return [step for fit in json.loads(ledger.read_text()).values() for step in fit] if ledger.exists() else []

    def done() -> list[Any]:
        for path in (out / "work").glob("rounds-*.safetensors"):
            with safe_open(path, "pt") as file:
                return list(json.loads(file.metadata()["about"])["rounds"])
        return []

    # A client has trained in a round that the server has not finished: it will be asked for it again.
    waited(lambda: len(entered("north")) > len(done()) > 0)
    server.send_signal(signal.SIGKILL)
    server.wait()
    before = done()
    assert 0 < len(before) < 4
    status, said = ended(federation.server(*many))
    assert status == 0, said
    assert "the server saw sums of updates only" in said
    assert [ended(client)[0] for client in clients] == [0, 0]
    (report,) = json.loads((out / "federation.json").read_text())
    assert report["rounds"][: len(before)] == before
    assert [(r["round"], r["took_part"]) for r in report["rounds"]] == [(i, ["north", "south"]) for i in range(4)]
    assert report["moved"] > 0
    assert float(Model.load(out / "model").network.head.weight.detach().abs().max()) > 0, "it begins with zeros"  # type: ignore[union-attr]
    costs = []
    for name in federation.names:
        steps = entered(name)
        assert len(steps) == 4
        costs.append(epsilon([Steps(**step) for step in steps], 1e-5))
    assert report["epsilon"] == pytest.approx(max(costs))


def waited(true: Any) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_over_flower_reaches_nobody_but_loopback(keys: Path) -> None:
    code = """
import sys, threading
from pathlib import Path
sys.path.append(sys.argv[2])
from netweight.federate.keys import ClientKeys, ServerKeys
from netweight.federate.link import listening
from netweight.federate.node import Connection
from netweight.run.federated.messages import Scored, ScoreTask
from conftest import tiny_model
from test_federated import shops
keys, address = Path(sys.argv[1]), sys.argv[3]
with listening(address, ServerKeys.load(keys / "server")) as over:
    found = ClientKeys.load(keys / "shop0/ca.crt", keys / "shop0/client.key")
    client = threading.Thread(target=lambda: Connection(address, found).serve(shops()[0]))
    client.start()
    while not over.clients():
        pass
    assert isinstance(over.exchange({"shop0": ScoreTask(tiny_model())})["shop0"], Scored)
    over.dismiss({})
    client.join()
from flwr.supercore import telemetry
assert telemetry.create_event(telemetry.EventType.PING, None) == "disabled"
print("done")
"""
    home = keys.parent / "home"
    where = f"127.0.0.1:{free_port()}"
    told = python(_CONNECTIONS + code, keys, Path(__file__).parent, where, HOME=str(home), HF_HUB_OFFLINE="1")
    assert told.endswith("done\n")
    assert not list(home.rglob(".flwr/*"))


def test_importing_flower_leaves_the_environment_alone() -> None:
    code = """
import os
before = dict(os.environ)
from netweight.quiet import flower
flower()
assert dict(os.environ) == before
"""
    python(code)
