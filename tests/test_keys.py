"""API keys: only hashes are kept, limits hold, and the file may change under a running server."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from conftest import Say
from netweight.errors import OptionError
from netweight.serve import keys
from netweight.serve.app import application
from netweight.serve.keys import Bucket, Gate, Key, add_key, read_keys, remove_key
from netweight.serve.problems import full
from test_serve import Server


class Door:
    """A gate before an application that says yes, and a clock that stands still."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.gate = Gate(PlainTextResponse("yes"), path, lambda: self.now)

    def ask(self, key: str | None = None, path: str = "/v1/models", scheme: str = "Bearer") -> httpx.Response:
        async def inside() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.gate), base_url="http://test") as client:
                return await client.get(path, headers={"Authorization": f"{scheme} {key}"} if key else {})

        return asyncio.run(inside())


def test_only_who_has_a_key_gets_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    key = add_key(path, "shop")
    door = Door(path)
    assert door.ask(key).text == "yes"
    assert door.ask(key, scheme="bearer").text == "yes"
    for wrong in (door.ask(), door.ask(key + "x"), door.ask(key, scheme="Basic"), door.ask("ключ".encode().hex())):
        assert wrong.status_code == 401
        assert wrong.headers["WWW-Authenticate"] == "Bearer"
        assert wrong.json()["code"] == "no-key"
    assert door.ask(path="/healthz").text == "yes"
    assert door.ask(path="/metrics").status_code == 401


def test_a_key_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    keys = {add_key(path, "shop") for _ in range(3)}
    assert len(keys) == 3
    text = path.read_text()
    assert not any(key in text or key.removeprefix("nw_") in text for key in keys)
    assert path.stat().st_mode & 0o077 == 0
    assert [key.name for key in read_keys(path)] == ["shop"] * 3
    assert os.listdir(tmp_path) == ["keys.jsonl"]


def test_a_file_in_the_place_of_another_stays_readable_by_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sudo netweight keys` made it root's alone: the server went on with the keys that it had read."""
    path, given = tmp_path / "keys.jsonl", list[tuple[int, int]]()
    monkeypatch.setattr(os, "fchown", lambda handle, user, group: given.append((user, group)))
    add_key(path, "shop")
    assert not given
    path.chmod(0o640)
    add_key(path, "other")
    remove_key(path, "shop")
    held = path.stat()
    assert stat.S_IMODE(held.st_mode) == 0o640
    assert given == [(held.st_uid, held.st_gid)] * 2


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, user: int, group: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "keys.jsonl"
    add_key(path, "shop")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(OptionError, match=r"cannot be given \(Operation not permitted\), so nothing was changed; run"):
        remove_key(path, "shop")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["keys.jsonl"]


def test_a_change_right_after_the_first_reading_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "keys.jsonl", read_keys
    key = add_key(path, "shop")

    def meanwhile(which: Path) -> tuple[Key, ...]:
        found = read(which)
        monkeypatch.setattr(keys, "read_keys", read)
        remove_key(which, "shop")
        return found

    monkeypatch.setattr(keys, "read_keys", meanwhile)
    door = Door(path)
    door.now = 2.0
    assert door.ask(key).status_code == 401


def test_a_key_that_is_removed_while_another_is_added_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "keys.jsonl", read_keys
    add_key(path, "shop")
    with ThreadPoolExecutor(1) as pool:
        removals = list[Future[None]]()

        def meanwhile(which: Path) -> tuple[Key, ...]:
            found = read(which)
            monkeypatch.setattr(keys, "read_keys", read)
            removals.append(pool.submit(remove_key, path, "shop"))
            wait(removals, 0.2)
            return found

        monkeypatch.setattr(keys, "read_keys", meanwhile)
        add_key(path, "other")
        removals[0].result(10)
    assert [key.name for key in read_keys(path)] == ["other"]


def test_keys_change_under_a_running_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.jsonl"
    old = add_key(path, "shop")
    door = Door(path)
    new = add_key(path, "shop")
    door.now = 2.0
    assert (door.ask(old).status_code, door.ask(new).status_code) == (200, 200), "both, while clients move over"
    with pytest.raises(OptionError, match="has 2 keys of 'shop'; say which one: shop:"):
        remove_key(path, "shop")
    remove_key(path, "shop", read_keys(path)[0].sha256[:12])
    os.utime(path, ns=(1, 1))
    door.now = 4.0
    assert (door.ask(old).status_code, door.ask(new).status_code) == (401, 200)
    path.write_text("{")
    for now in (6.0, 8.0):
        door.now = now
        assert door.ask(new).status_code == 200, "a file that cannot be read changes nothing"
        assert caplog.text.count("removed since are still let in: ") == 1
    path.unlink()
    door.now = 10.0
    assert door.ask(new).status_code == 200
    assert caplog.text.count("removed since are still let in: ") == 2, "another reason is told of as well"
    path.write_text("")
    door.now = 12.0
    assert door.ask(new).status_code == 401


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    slow, free = add_key(path, "slow", 3), add_key(path, "free")
    door = Door(path)
    assert [door.ask(slow).status_code for _ in range(4)] == [200, 200, 200, 429]
    assert door.ask(free).status_code == 200
    refused = door.ask(slow)
    assert refused.json()["code"] == "rate-limited"
    assert refused.headers["Retry-After"] == "20"
    door.now = 20.0
    assert [door.ask(slow).status_code for _ in range(2)] == [200, 429]


def test_who_comes_back_when_told_is_let_in(tmp_path: Path) -> None:
    """A token comes every 5.45 seconds: 5 are not enough."""
    path = tmp_path / "keys.jsonl"
    key, door = add_key(path, "shop", 11), Door(path)
    assert [door.ask(key).status_code for _ in range(11)] == [200] * 11
    door.now = float(door.ask(key).headers["Retry-After"])
    assert door.now == 6.0
    assert door.ask(key).status_code == 200
    assert full(1.2).headers["Retry-After"] == "2"


def test_who_is_turned_away_is_counted(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    headers = {"Authorization": f"Bearer {add_key(path, 'shop', 2)}"}
    server = Server(made)
    server.app = application(server.models, server.metrics, path)
    assert server.post({"texts": ["a"]}).status_code == 401
    assert [server.post({"texts": ["a"]}, headers=headers).status_code for _ in range(4)] == [200, 200, 429, 429]
    text = server.metrics.text().decode()
    for model, status, count in (("", 401, 1), ("", 429, 2), ("shop", 200, 2)):
        assert f'netweight_requests_total{{model="{model}",status="{status}"}} {count}.0' in text


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 20))
def test_no_more_than_the_limit_and_one_minute_beyond(pauses: list[float], limit: int) -> None:
    bucket, now, let_in = Bucket(limit, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        taken = bucket.taken(now, limit)
        if taken.left >= 0:
            bucket, let_in = taken, let_in + 1
    assert let_in <= limit + now * limit / 60 + 1e-6


def test_files_and_names_that_are_refused(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "keys.jsonl"
    with pytest.raises(
        OptionError, match=rf"is no file of keys .*; make one with `netweight keys {path} --add NAME`\.$"
    ):
        read_keys(path)
    path.write_text(json.dumps({"nam": "a"}))
    with pytest.raises(OptionError, match=r"is no file of keys .*; make one with `netweight keys FILE --add NAME`\.$"):
        read_keys(path)
    path.unlink()
    with pytest.raises(OptionError, match="cannot be called 'a b'"):
        add_key(path, "a b")
    made = say("keys", path, "--add", "shop", "--per-minute", 60)
    assert made.out.startswith("nw_")
    assert "shop" in say("keys", path).out
    assert say("keys", path).out.endswith("  60\n")
    wrong = say("keys", path, "--remove", "other")
    assert wrong.status == 1
    assert "has no such key of 'other'; its names are: shop." in wrong.err
    # Two keys of one name: a client moves, and the first goes by what the list shows of it.
    old = say("keys", path).out.split()[1]
    say("keys", path, "--add", "shop")
    assert "say which one" in say("keys", path, "--remove", "shop").err
    assert "two steps" in say("keys", path, "--add", "shop", "--remove", f"shop:{old}").err
    assert "goes with --add" in say("keys", path, "--per-minute", 5).err
    assert say("keys", path, "--remove", f"shop:{old}").out == f"removed shop:{old}\n"
    (left,) = say("keys", path).out.splitlines()
    assert old not in left
    assert say("keys", path, "--remove", "shop").out == "removed shop\n"
    assert say("keys", path).out == ""
