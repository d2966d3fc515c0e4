"""A federated run over Flower: its grids, real processes on loopback, and what can go wrong between them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_base, tiny_rows, write_table
from netweight.errors import OptionError, WireError
from netweight.federate.keys import ClientKeys, ServerKeys, make_keys
from netweight.federate.kinds import WIRE
from netweight.federate.options import run_of, task_of
from netweight.federate.simulate import simulated
from netweight.federate.start import Place, kept_apart, serve
from netweight.model import Model
from netweight.quiet import flower
from netweight.run.federated import Client, Federated, Int8, Rounds, Travel
from netweight.run.federated.flower import FlowerChannel, Node, addressed, addressee, answered, from_record, to_record
from netweight.run.federated.messages import Lost, Reduced, Scored, ScoreTask
from netweight.task import Classify
from netweight.techniques import Finetune
from netweight.train import Plan
from test_federated import fitted, shops

flower()
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

    def nodes(self) -> dict[str, Node]:
        return {c.name: Node(i, self.sessions[i]) for i, c in self.clients.items() if c.name not in self.away}

    def push_messages(self, messages: Sequence[Any]) -> list[str]:
        ids = []
        for message in messages:
            client = self.clients[message.metadata.dst_node_id]
            name = f"m{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed.append(client.name)
            ids.append(name)
            if client.name not in self.silent:
                odd = client.name in self.said
                content = self.said[client.name] if odd else answered(client, WIRE, message.content)
                self.replies[name] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, ids: Sequence[str]) -> list[Any]:
        return [self.replies.pop(name) for name in ids if name in self.replies]


def channel(grid: FakeGrid, patience: float = 0.3) -> FlowerChannel:
    return FlowerChannel(grid, grid.nodes, WIRE, patience)


def test_a_run_over_a_grid_equals_one_in_this_process(model: Model) -> None:
    runs = [
        Federated(where, rounds=Rounds(2), travel=Travel(Int8())) for where in (channel(FakeGrid(shops())), shops())
    ]
    made = [fitted(run, model) for run in runs]
    assert made[0].digest == made[1].digest
    assert [s.quality for s in runs[0].report.standings] == [s.quality for s in runs[1].report.standings]
    assert runs[0].report.up == runs[1].report.up


def test_a_record_holds_a_message_and_nothing_else() -> None:
    message = Reduced({"a": torch.randn(3, 2), "b": torch.tensor(4), "c": torch.zeros(0)}, 3)
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
    grid.away = {"shop2"}
    assert over.clients() == ("shop0", "shop1")
    found = over.exchange({"shop2": task})
    assert found["shop2"] == Lost("shop2", "it left, and was away for 0.3 s.")


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


def test_what_goes_wrong_on_a_client_is_told_in_a_sentence(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    client = shops()[0]

    def said(record: Any) -> str:
        return str(answered(client, WIRE, record).config_records["error"]["text"])

    task = to_record(WIRE.pack(ScoreTask(model)))
    assert (
        said(addressed(task, "mart"))
        == "the server knows this client's key as that of 'mart', and it calls itself 'shop0'."
    )
    assert "a Flower message holds no message of ours" in said(addressed(RecordDict({}), "shop0"))

    def fails(_: object) -> Any:
        raise ValueError("the row 'I hate it' is odd")

    monkeypatch.setattr(Client, "answer", lambda self, task: fails(task))
    assert said(addressed(task, "shop0")) == "ValueError on the client; its own log says more."
    found = channel(FakeGrid([client])).exchange({"shop0": ScoreTask(model)})
    assert found["shop0"] == Lost("shop0", "ValueError on the client; its own log says more.")


def test_flower_errors_are_told(model: Model) -> None:
    from flwr.app import Error

    grid = FakeGrid(shops())
    grid.push_messages = lambda messages: ["m"]  # type: ignore[method-assign]
    sent = Message(RecordDict({}), 10, "query")
    sent.metadata.__dict__["_message_id"] = "m"
    grid.replies["m"] = Message(Error(code=1, reason="out of memory"), reply_to=sent)
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
    with pytest.raises(OptionError, match="holds keys already"):
        make_keys(tmp_path / "k", ("a",))


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


# --- options, rows ---


def test_labels_come_from_names_or_rows() -> None:
    rows = tiny_rows(20)
    assert task_of(("x", "y"), None) == Classify(("x", "y"))
    assert set(task_of(None, rows).labels) == set(rows.label or ())  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="give --labels A,B,C or --dev TABLE"):
        task_of(None, None)
    with pytest.raises(OptionError, match="labels that --labels does not name"):
        task_of(("x", "y"), rows)


def test_a_share_of_a_clients_rows_measures_quality() -> None:
    rows = tiny_rows(400)
    data = kept_apart(rows)
    assert len(data.train) + len(data.select) == 400
    assert not set(data.train.text) & set(data.select.text)
    assert kept_apart(rows.take(list(reversed(range(400))))).select.text[::-1] == data.select.text


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


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


ROUNDS = ("--rounds", 2, "--epochs", 2, "--minimum", 2, "--wait", 60)


def test_a_finished_model_is_not_overwritten(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    with pytest.raises(OptionError, match="holds a finished model; use another folder"):
        serve(
            Place("127.0.0.1:1", tmp_path, tmp_path),
            model,
            Finetune(),
            run_of(Rounds(), CHOSEN, False, None),
            Plan(),
            print,
        )


def test_a_server_and_two_clients_train_a_model_over_tls(federation: Federation) -> None:
    server = federation.server(*ROUNDS, "--travel", "int8")
    clients = [federation.client(name) for name in federation.names]
    status, said = ended(server)
    assert status == 0, said
    for client in clients:
        status, told = ended(client)
        assert status == 0, told
        assert "the server has ended the run" in told
    out = federation.folder / "out"
    made = Model.load(out / "model")
    (report,) = json.loads((out / "federation.json").read_text())
    assert [s["client"] for s in report["standings"]] == ["north", "south"]
    assert [r["took_part"] for r in report["rounds"]] == [["north", "south"]] * 2
    assert isinstance(made.task, Classify)
    assert "privacy:" in said


@pytest.mark.slow
def test_a_simulation_on_ray_equals_a_run_in_this_process(model: Model, tmp_path: Path) -> None:
    with simulated(shops(), tmp_path) as over:
        assert over.clients() == ("shop0", "shop1", "shop2")
        run = Federated(over, rounds=Rounds(2), travel=Travel(Int8()))
        made = fitted(run, model)
    assert made.digest == fitted(Federated(shops(), rounds=Rounds(2), travel=Travel(Int8())), model).digest
    assert not (tmp_path / "shop0" / "work").exists() or not list((tmp_path / "shop0" / "work").glob("fit-*"))


def test_names_of_simulated_clients_are_their_own() -> None:
    twice = [*shops(2), *shops(2)]
    with pytest.raises(OptionError, match="4 clients bear 2 names"), simulated(twice):
        pass
