"""Past one machine: parts and their store without Ray; then a real cluster of two nodes, one of which is killed."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import netweight
from conftest import Say, Shop, many_rows
from netweight import artifact
from netweight.client import Client
from netweight.cluster import batch, online, predict_parts
from netweight.cluster.batch import Work, answer
from netweight.cluster.online import Scale, deployed
from netweight.cluster.parts import STORE, Done, opened, parts_of
from netweight.connect import _loopback, connected
from netweight.errors import DataError, EndpointError, MissingExtra, OptionError, StoreError
from netweight.predict import predict
from netweight.serve.keys import add_key
from netweight.serve.schema import MOST_BYTES
from netweight.serve.server import Options, built, checked
from test_serve import TEXTS, changed
from test_server import free_port, until

ROWS = list(many_rows(400).text)


def table(path: Path, texts: list[str]) -> Path:
    """One part, in the format of its name; with a row that cannot be used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [*texts, ""]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "n": pa.array(range(len(texts)), pa.int16())}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    else:
        lines = ("text,n\n" + "".join(f"{text},{i}\n" for i, text in enumerate(texts))).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """A folder of parts of every format, with what other tools leave beside them."""
    folder = tmp_path / "in"
    names = ("a.csv", "b.csv.gz", "day=1/part-0.parquet", "day=1/part-1.parquet", "day=2/part-0.jsonl")
    for i, name in enumerate(names):
        table(folder / name, ROWS[i * 50 : (i + 1) * 50])
    (folder / "_SUCCESS").touch()
    (folder / ".a.csv.crc").write_bytes(b"x")
    (folder / "_delta" / "x.txt").parent.mkdir()
    (folder / "_delta" / "x.txt").touch()
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks run in this process, one after the other; the names of their parts."""
    ran: list[str] = []

    def answers(parts: Any, work: Work) -> Iterator[Done]:
        for part in parts:
            ran.append(part.name)
            yield Done(**answer(asdict(part), work))

    monkeypatch.setattr(batch, "_answers", answers)
    monkeypatch.setattr(batch, "connected", lambda address: nullcontext())
    return ran


def files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(STORE))


def same_as_alone(made: Path, source: Path, out: Path, alone: Path) -> None:
    """Every part is what `netweight predict` writes for it, byte for byte."""
    names = [part.name for part in parts_of(source, out)]
    assert files(out) == sorted(names)
    for name in names:
        (alone / name).parent.mkdir(parents=True, exist_ok=True)
        predict(made, source / name, out=alone / name, threads=1)
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name


# --- parts ---


def test_parts_are_the_tables_of_a_folder(parted: Path, tmp_path: Path) -> None:
    parts = parts_of(parted, tmp_path / "out")
    names = ["a.csv", "b.csv.gz", "day=1/part-0.parquet", "day=1/part-1.parquet", "day=2/part-0.jsonl"]
    assert [part.name for part in parts] == names
    assert parts[2].source == str(parted / "day=1/part-0.parquet")
    assert parts[2].target == str(tmp_path / "out/day=1/part-0.parquet")
    assert parts[0].size == (parted / "a.csv").stat().st_size
    (one,) = parts_of(parted / "a.csv", tmp_path / "out")
    assert (one.name, one.target) == ("a.csv", str(tmp_path / "out/a.csv"))


def test_what_is_no_table_is_refused(parted: Path, tmp_path: Path) -> None:
    (parted / "README.md").touch()
    with pytest.raises(DataError, match="README.md has none of the suffixes"):
        parts_of(parted, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tables"):
        parts_of(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="there is no file"):
        parts_of(tmp_path / "absent", tmp_path / "out")
    for out in (parted, parted / "out", tmp_path):
        with pytest.raises(OptionError, match="lie in one another"):
            parts_of(parted, out)
    with pytest.raises(OptionError, match="lies in"):
        parts_of(parted / "a.csv", parted)


def test_links_to_files_are_parts_and_other_links_are_refused(parted: Path, tmp_path: Path) -> None:
    """They were left out without a word."""
    aside, link = table(tmp_path / "aside" / "part-2.parquet", ROWS[:9]), parted / "day=1" / "part-2.parquet"
    link.symlink_to(aside)
    (parted / "_old").symlink_to(aside.parent)  # hidden
    parts = {part.name: part.size for part in parts_of(parted, tmp_path / "out")}
    assert parts["day=1/part-2.parquet"] == aside.stat().st_size
    aside.unlink()
    with pytest.raises(DataError, match=r"day=1/part-2.parquet is a link to nothing, and only links to files are"):
        parts_of(parted, tmp_path / "out")
    link.unlink()
    (parted / "day=3").symlink_to(aside.parent)
    with pytest.raises(DataError, match=r"day=3 is a link to a folder, and only links to files are followed"):
        parts_of(parted, tmp_path / "out")


def test_a_part_is_answered_as_a_table_alone(made: Path, parted: Path, tmp_path: Path, here: list[str]) -> None:
    out, seen = tmp_path / "out", list[tuple[int, int]]()
    done = predict_parts(made, parted, out=out, progress=lambda *numbers: seen.append(numbers))
    assert (done.parts, done.before, done.again, done.rows, done.bad) == (5, 0, 0, 255, 5)
    assert done.sentence.startswith("5 parts; 255 rows in ")
    assert done.sentence.endswith(" 5 rows could not be used and have no prediction.")
    assert seen == [(i, 5) for i in range(6)]
    same_as_alone(made, parted, out, tmp_path / "alone")
    assert pq.read_schema(out / "day=1/part-0.parquet").field("n").type == pa.int16()


def test_a_second_run_goes_on_where_the_first_was(made: Path, parted: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "out"

    class Gone(Exception):
        pass

    def dies(done: int, parts: int) -> None:
        if done == 2:
            raise Gone

    with pytest.raises(Gone):
        predict_parts(made, parted, out=out, progress=dies)
    assert files(out) == ["a.csv", "b.csv.gz"]
    (out / ".b.csv.gz.77-0123abcd.part").write_bytes(b"half")
    (out / "a.csv").write_bytes((out / "a.csv").read_bytes()[:-1])  # not as it was written
    here.clear()
    done = predict_parts(made, parted, out=out)
    assert here == ["a.csv", "day=1/part-0.parquet", "day=1/part-1.parquet", "day=2/part-0.jsonl"]
    assert (done.before, done.again) == (1, 1)
    same_as_alone(made, parted, out, tmp_path / "alone")
    here.clear()
    assert predict_parts(made, parted, out=out).sentence.startswith("5 parts, 5 of them from before; 0 rows")
    assert not here


def test_what_has_changed_is_done_again(made: Path, parted: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "out"
    predict_parts(made, parted, out=out)
    here.clear()
    table(parted / "a.csv", ROWS[:7])
    table(parted / "c.csv", ROWS[:3])
    done = predict_parts(made, parted, out=out)
    assert here == ["a.csv", "c.csv"]
    assert "6 parts, 4 of them from before; 12 rows" in done.sentence
    assert "1 were done again, since they had changed." in done.sentence
    same_as_alone(made, parted, out, tmp_path / "alone")


def test_another_artifact_and_other_files_are_refused(
    made: Path, parted: Path, tmp_path: Path, here: list[str]
) -> None:
    out = tmp_path / "out"
    predict_parts(made, parted, out=out)
    other = changed(made, tmp_path / "other.nw")
    with pytest.raises(StoreError, match="belongs to another job .artifact: .* there, .* now"):
        predict_parts(other, parted, out=out)
    with pytest.raises(StoreError, match="pair: None there, 'n' now"):
        predict_parts(made, parted, out=out, pair="n")
    (parted / "a.csv").unlink()
    with pytest.raises(OptionError, match="also holds a.csv, which the input does not have"):
        predict_parts(made, parted, out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "b.csv.gz").touch()
    with pytest.raises(OptionError, match="holds b.csv.gz, which no earlier run wrote"):
        predict_parts(made, parted, out=tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="is a file"):
        predict_parts(made, parted, out=tmp_path / "file")
    busy = tmp_path / "busy"
    with opened(busy, (), "v", "text", None), pytest.raises(StoreError, match="another process works in"):
        opened(busy, (), "v", "text", None)


def test_a_part_that_fails_ends_no_other(made: Path, parted: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "out"
    predict_parts(made, parted, out=out)
    (parted / "a.csv").write_text("wrong\n1\n")
    table(parted / "c.csv", ROWS[:3])
    with pytest.raises(DataError, match="1 of 6 parts failed, the others are done. a.csv: a.csv has no column 'text'"):
        predict_parts(made, parted, out=out)
    assert "a.csv" not in files(out), "what was said of other rows"
    assert "c.csv" in files(out)
    late = pa.array([253402300799], pa.timestamp("s", tz="Asia/Shanghai"))
    pq.write_table(pa.table({"text": ["a"], "when": late}), parted / "day=1" / "part-2.parquet")
    table(parted / "d.csv", ROWS[:3])
    with pytest.raises(DataError, match="2 of 8 parts failed, .*day=1/part-2.parquet: the column 'when' of part-2"):
        predict_parts(made, parted, out=out)
    assert "d.csv" in files(out)
    (parted / "day=1" / "part-2.parquet").unlink()
    table(parted / "a.csv", ROWS[:3])
    predict_parts(made, parted, out=out)
    same_as_alone(made, parted, out, tmp_path / "alone")


def test_a_worker_refuses_another_version_and_a_table_that_changes(
    made: Path, parted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part, *_) = parts_of(parted, tmp_path / "out")
    said = Done(**answer(asdict(part), Work(str(made), "another", "text", None, 1)))
    assert "no longer another; run again" in said.error
    work = Work(str(made), artifact.read_manifest(made).digest[:12], "text", None, 1)
    sizes = iter([(1, 1), (2, 2)])
    monkeypatch.setattr(batch, "mark", lambda path: next(sizes))
    assert "changed while it was read" in Done(**answer(asdict(part), work)).error


def test_files_that_are_not_seen_from_here_are_an_error(
    made: Path, parted: Path, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_answers", lambda parts, work: [Done(parts[0].name, 1, 1, 10, 1)])
    with pytest.raises(DataError, match="every machine must see the same folders"):
        predict_parts(made, parted, out=tmp_path / "out")


# --- options ---


def test_options_of_the_command_line(made: Path, parted: Path, tmp_path: Path, say: Say) -> None:
    assert "name it with --out" in say("predict", made, parted, "--ray", "local").err
    wrong = say("predict", made, parted, "--ray", "everywhere", "--out", tmp_path / "out")
    assert "a Ray cluster is local, auto, HOST:PORT or ray://HOST:PORT; given was 'everywhere'" in wrong.err
    far = say("predict", made, parted, "--ray", "ray://127.0.0.1:10001", "--out", tmp_path / "out")
    assert "Ray Data does not work through ray://; run this on a machine of the cluster, with auto." in far.err
    assert "go with --ray" in say("serve", made, "--max-replicas", 3).err
    assert (
        "at least 1, and at most as many"
        in say("serve", made, "--ray", "local", "--max-replicas", 1, "--min-replicas", 2).err
    )
    with pytest.raises(OptionError, match="above 0"):
        Scale(target=0)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    for work in (connected("local"), deployed(Options((str(made),)), Scale())):
        with pytest.raises(MissingExtra, match=r"pip install '\.\[ray\]'"), work:
            pass


@pytest.mark.parametrize(("others", "ended"), [((), "everything"), (("theirs",), "netweight")])
def test_the_end_of_a_server_is_not_the_end_of_what_others_serve(
    made: Path, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...], ended: str
) -> None:
    """They came while it ran: a cluster that serves something already is refused."""
    there, ends = dict[str, None](), list[str]()
    fake = SimpleNamespace(
        status=lambda: SimpleNamespace(applications=there),
        run=lambda application, name, route_prefix: there.update({name: None}),
        delete=ends.append,
        shutdown=lambda: ends.append("everything"),
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=fake))
    monkeypatch.setattr(online, "cores", lambda: (1, 1))
    monkeypatch.setattr(online, "_start", lambda options: None)
    monkeypatch.setattr(online, "_application", lambda options, scale: None)
    with deployed(Options((str(made),)), Scale()):
        there.update(dict.fromkeys(others))
        assert not ends
    assert ends == [ended]


def test_files_are_named_for_every_node(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    add_key(Path("keys.jsonl"), "shop")
    for name in ("certificate.pem", "key.pem"):
        Path(name).touch()
    found = checked(Options((made.name,), keys="keys.jsonl", tls=("certificate.pem", "key.pem")))
    assert (found.folders, found.keys) == ((str(made),), str(tmp_path / "keys.jsonl"))
    assert found.tls == (str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem"))


# --- two nodes ---


class Nodes:
    """A cluster of this machine, on loopback: a head that this process is connected to, and other nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 2000}
        self._given = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
        head = self._given | {
            "include_dashboard": False,
            "_system_config": quick | {"health_check_failure_threshold": 3},
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address

    def add(self) -> None:
        self.node = self.cluster.add_node(**self._given)

    def kill(self) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)

    def processes(self) -> list[Any]:
        import psutil

        started = {
            p.process.pid for node in self.cluster.list_all_nodes() for ps in node.all_processes.values() for p in ps
        }
        roots = [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]
        return [*roots, *(child for root in roots for child in root.children(recursive=True))]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed: pip install '.[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for who in ("REPLICA", "HANDLE"):  # so that a second replica is not waited for
            patch.setenv(f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        patch.setenv(
            "PYTHONPATH", f"{Path(netweight.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
        made = Nodes()
        try:
            made.add()
            with _loopback():
                ray.init(made.address, log_to_driver=False)
            yield made
        finally:
            left = made.processes()
            ray.shutdown()
            made.cluster.shutdown()
            for process in left:
                if process.is_running():
                    process.kill()


def test_a_node_dies_and_every_part_is_there_once(shop: Shop, nodes: Nodes, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for i in range(10):
        table(source / f"part-{i}.{('parquet', 'csv', 'jsonl')[i % 3]}", ROWS * 20)
    killed = threading.Event()

    def progress(done: int, parts: int) -> None:
        if done == 3 and not killed.is_set():
            killed.set()
            nodes.kill()

    try:
        done = predict_parts(shop.folder, source, out=out, address=nodes.address, progress=progress)
    finally:
        if killed.is_set():
            nodes.add()
    assert killed.is_set()
    assert (done.parts, done.before, done.rows, done.bad) == (10, 0, 80_010, 10)
    same_as_alone(shop.folder, source, out, tmp_path / "alone")
    again = predict_parts(shop.folder, source, out=out, address=nodes.address)
    assert again.before == 10


def test_more_threads_than_a_node_has_are_refused(shop: Shop, nodes: Nodes, tmp_path: Path) -> None:
    table(tmp_path / "in" / "a.csv", ROWS[:3])
    with pytest.raises(OptionError, match="no node of this cluster has 3 CPUs for --threads; the largest has 1"):
        predict_parts(shop.folder, tmp_path / "in", out=tmp_path / "out", address=nodes.address, threads=3)
    with (
        pytest.raises(OptionError, match="no node of this cluster has 3 CPUs"),
        deployed(Options((str(shop.folder),), threads=3), Scale()),
    ):
        pass
    with (
        pytest.raises(OptionError, match="--workers does not apply"),
        deployed(Options((str(shop.folder),), workers=2), Scale()),
    ):
        pass
    for more in ({"log": "rows.log"}, {"candidates": (("made", str(shop.folder)),)}):
        with (
            pytest.raises(OptionError, match="--log and --candidate count on one machine"),
            deployed(Options((str(shop.folder),), **more), Scale()),  # type: ignore[arg-type]
        ):
            pass


# Method, path, body; what differs by nature (ids, times) is taken out of the answers.
ASKED: list[tuple[str, str, Any]] = [
    ("POST", "/v1/models/made/predict", {"texts": TEXTS}),
    ("POST", "/v1/models/made/predict", {"texts": TEXTS[:3], "scores": True}),
    ("POST", "/v1/models/made/predict", {"texts": []}),
    ("POST", "/v1/models/made/predict", {"texts": ["a"], "pairs": [["a", "b"]]}),
    ("POST", "/v1/models/made/predict", b"{"),
    ("POST", "/v1/models/made/predict", b'{"texts": ["' + b"a" * MOST_BYTES + b'"]}'),
    ("POST", "/v1/models/other/predict", {"texts": ["a"]}),
    ("GET", "/v1/models/made/predict", None),
    ("GET", "/v1/models", None),
    ("GET", "/healthz", None),
    ("GET", "/readyz", None),
    ("GET", "/openapi.json", None),
    ("GET", "/nothing", None),
]


def said(response: httpx.Response) -> Any:
    headers = {
        name: value for name, value in response.headers.items() if name not in ("date", "server", "x-request-id")
    }
    assert len(response.headers.get_list("x-request-id")) == 1
    body = response.json()
    if "request_id" in body:
        assert body.pop("request_id") == response.headers["x-request-id"]
    headers.pop("content-length", None)
    return response.status_code, headers, body


def running() -> int:
    """Replicas that answer."""
    from ray import serve

    (deployment,) = serve.status().applications["netweight"].deployments.values()
    return dict(deployment.replica_states).get("RUNNING", 0)


@pytest.mark.slow
def test_ray_serves_what_the_plain_server_does_and_outlives_a_node(shop: Shop, nodes: Nodes, tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    key = add_key(keys, "shop")
    options = Options((str(shop.folder),), port=free_port(), patience=10.0, threads=1, keys=str(keys))
    scale = Scale(most=2, target=1.0, up=1.0)
    try:
        with deployed(options, scale) as url:
            _contract(url, built(options), key)
            with pytest.raises(OptionError, match="this cluster serves already: netweight"), deployed(options, scale):
                pass
            _outlives(url, key, nodes)
    except EndpointError as problem:
        if "protobuf<7" in str(problem):
            pytest.skip(str(problem))
        raise


def _contract(url: str, plain: Any, key: str) -> None:
    async def alone(method: str, path: str, given: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(plain), base_url="http://test") as client:
            return await client.request(method, path, **given)

    with httpx.Client(base_url=url, timeout=60) as client:
        for method, path, body in ASKED:
            for headers in ({"Authorization": f"Bearer {key}", "X-Request-Id": "order-7"}, {}):
                given = {"headers": headers, ("content" if isinstance(body, bytes) else "json"): body}
                there, here = client.request(method, path, **given), asyncio.run(alone(method, path, given))
                assert said(there) == said(here), (method, path)
                assert there.headers["x-request-id"] == "order-7" or not headers
        numbers = client.get("/metrics", headers={"Authorization": f"Bearer {key}"})
        assert 'netweight_requests_total{model="made",status="200"} 2.0' in numbers.text
    plain.state.models.close()


def _outlives(url: str, key: str, nodes: Nodes) -> None:
    """Under load a second replica starts; its node dies, every request is answered; on a new node it comes back."""
    wanted, end = None, threading.Event()
    answers: list[int] = []
    problems: list[Exception] = []

    def load() -> None:
        nonlocal wanted
        try:
            with Client(url, key, retries=8) as client:
                while not end.is_set():
                    found = [one.label for one in client.predict("made", TEXTS)]
                    wanted = wanted or found
                    assert found == wanted
                    answers.append(1)
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: running() == 2)
        nodes.kill()
        before = len(answers)
        until(lambda: running() == 1)
        until(lambda: len(answers) > before + 50)
        nodes.add()
        until(lambda: running() == 2)
    finally:
        end.set()
        for thread in threads:
            thread.join(60)
    assert not problems, problems


def test_nothing_leaves_this_machine(nodes: Nodes) -> None:
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()
    looked = 0
    for process in nodes.processes():
        # Processes that give themselves a title write over their environment.
        assert process.environ().get("RAY_USAGE_STATS_ENABLED", "0") == "0"
        for one in process.net_connections("inet"):
            looked += 1
            if one.raddr:
                assert one.raddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process.cmdline(), one)
    assert looked > 10


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed: pip install '.[ray]'")
    assert ray is not None
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def nobody(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    said = "no Ray cluster answers at auto .Could not find any running Ray instance..;"
    with pytest.raises(EndpointError, match=said), connected("auto"):
        pass
