"""An LLM as a teacher, against a real server on loopback: limits, retries, a kill, and a key that nobody ever sees."""

from __future__ import annotations

import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Say
from netweight import llm
from netweight.data import Columns, Rows, read
from netweight.errors import EndpointError, OptionError, StoreError
from netweight.llm import LLMTeacher, _retry_after, label_pool, parse
from netweight.task import Classify, Score

TASK = Classify(("bad", "good"))
KEY = "sk-very/secret+key"
NAME = "NETWEIGHT_TEST_KEY"

# The model's name says how the server behaves. It writes down each request before it answers.
_SERVER = r"""
import email.utils, json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

log, seen = open(sys.argv[1], "a", buffering=1), {}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say(200, {"got": "GET"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key, text = self.headers.get("Authorization"), json.loads(body["messages"][1]["content"])["text"]
        log.write(json.dumps({"path": self.path, "text": text, "key": key, "body": body}) + "\n")
        mode, times = body["model"], seen.setdefault((body["model"], text), 0)
        seen[body["model"], text] += 1
        if mode == "flaky" and times < 2:
            return self.say([429, 503][times], {}, {"Retry-After": ["0", email.utils.formatdate(usegmt=True)][times]})
        if mode == "gone" or (mode == "dropped" and times < 1):
            return self.connection.close()
        if mode == "poison" and "great" in text:
            return self.say(413, {"error": "too long"})
        if mode == "torn" and times < 1:
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return self.connection.close()
        if mode == "patient" and times < 1:
            return self.say(408, {})
        if mode == "stuck" and times < 1:
            time.sleep(1.0)
        if mode in ("down", "401", "404", "400"):
            return self.say(500 if mode == "down" else int(mode), {"error": f"no {mode} for {key}"})
        if mode == "busy":
            return self.say(429, {}, {"Retry-After": "9999"})
        if mode == "moved":
            return self.say(302, {}, {"Location": "/elsewhere"})
        if mode == "html":
            return self.say(200, None)
        if mode == "strange":
            return self.say(200, {"choices": []})
        if mode == "slow":
            time.sleep(0.03)
        if mode == "thinking" or (mode == "partly" and "great" in text):
            cut = {"message": {"content": "Let me think."}, "finish_reason": "length"}
            return self.say(200, {"choices": [cut], "usage": {"total_tokens": 100}})
        label = "good" if "great" in text else "bad"
        content = {"words": f" {label}\n", "chatty": f"I think it is {label}.", "silent": None}.get(mode)
        if content is None and mode != "silent":
            content = json.dumps({"label": label})
        usage = {} if mode == "uncounted" else {"usage": {"total_tokens": 100}}
        self.say(200, {"choices": [{"message": {"content": content}}], **usage})

    def say(self, status, given, headers={}):
        data = b"<html>hello" if given is None else json.dumps(given).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *given):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class Served:
    url: str
    log: Path

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def texts(self) -> Counter[str]:
        return Counter(request["text"] for request in self.requests())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    log.touch()
    process = subprocess.Popen([sys.executable, "-c", _SERVER, log], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Served(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log)
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def served(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(NAME, KEY)
    server.log.write_text("")
    return server


def teacher(served: Served, model: str, **options: Any) -> LLMTeacher:
    return replace(LLMTeacher(served.url, model, NAME, backoff=0.001, timeout=5.0), **options)


def pool(n: int = 6) -> Rows:
    return Rows(tuple(f"{'great' if i % 3 == 0 else 'torn'} zip {i}" for i in range(n)))


WANTED = tuple("good" if i % 3 == 0 else "bad" for i in range(6))


@pytest.mark.parametrize("model", ["plain", "words", "flaky", "dropped", "torn", "patient", "uncounted"])
def test_rows_are_labelled(served: Served, model: str, tmp_path: Path) -> None:
    done = label_pool(pool(), TASK, teacher(served, model), str(tmp_path / "new" / "cache.jsonl"), limit=10)
    assert done.labels == done.rows.label == WANTED
    assert (done.asked, done.known, done.abstained, done.left) == (6, 0, 0, 0)
    assert served.texts().total() == 6 * {"flaky": 3, "dropped": 2, "torn": 2, "patient": 2}.get(model, 1)
    assert done.tokens == 600 or (model == "uncounted" and done.tokens > 6 * 32)
    first = served.requests()[0]
    assert first["path"] == "/v1/chat/completions"
    assert first["key"] == f"Bearer {KEY}"
    assert first["body"]["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"] == ["bad", "good"]
    assert '["bad", "good"]' in first["body"]["messages"][0]["content"]
    assert first["body"]["messages"][0]["content"].startswith("Classify the text.")
    assert "6 of 6 rows have a label: 6 texts were asked now and 0 before" in done.sentence


@pytest.mark.parametrize("model", ["chatty", "silent"])
def test_what_is_no_label_is_an_abstention_and_not_asked_again(served: Served, model: str, tmp_path: Path) -> None:
    for known in (0, 6):
        done = label_pool(pool(), TASK, teacher(served, model, constrain=False), tmp_path / "cache", limit=10)
        assert (done.known, done.abstained, len(done.rows)) == (known, 6, 0)
        assert done.labels == (None,) * 6
    assert served.texts().total() == 6
    assert "response_format" not in served.requests()[0]["body"]


def test_a_text_that_is_refused_ends_nothing(served: Served, tmp_path: Path) -> None:
    asked = teacher(served, "poison", concurrency=1)
    for known in (0, 6):
        done = label_pool(pool(), TASK, asked, tmp_path / "cache", limit=10)
        assert done.labels == (None, "bad", "bad", None, "bad", "bad")
        assert (done.known, done.abstained, done.left) == (known, 2, 0)
    assert served.texts().total() == 6
    # What is refused in a run without an answer may be the endpoint's fault: it is said, and asked again.
    for _ in range(2):
        done = label_pool(Rows((*pool().text, "great zip 9")), TASK, asked, tmp_path / "cache", limit=10)
        assert (done.abstained, done.left) == (2, 1)
        assert re.search(r"1 texts were refused: .* answered 413", done.sentence)
    assert served.texts()["great zip 9"] == 2
    # Texts that are all refused say nothing about texts: the request is wrong.
    great = Rows(tuple(f"great zip {i}" for i in range(30)))
    for cache, requests in (("fresh", 3), ("cache", 20)):
        served.log.write_text("")
        with pytest.raises(EndpointError, match="answered 413.*too long"):
            label_pool(
                great if cache == "fresh" else Rows((*pool().text, *great.text)),
                TASK,
                asked,
                tmp_path / cache,
                limit=99,
            )
        assert served.texts().total() == requests
        assert len((tmp_path / cache).read_text().splitlines()) == (0 if cache == "fresh" else 6)


def test_who_waits_is_told_how_many_texts_are_answered(served: Served, tmp_path: Path) -> None:
    seen = list[tuple[int, int]]()
    for model, first in (("poison", 0), ("poison", 6), ("plain", 0)):
        asked = teacher(served, model, concurrency=1 if model == "poison" else 4)
        label_pool(pool(), TASK, asked, tmp_path / "cache", limit=10, progress=lambda *numbers: seen.append(numbers))
        assert seen == [(done, 6) for done in range(first, 7)]
        seen.clear()


def test_answers_that_end_before_a_label(served: Served, tmp_path: Path) -> None:
    asked = teacher(served, "thinking", concurrency=1)
    with pytest.raises(EndpointError, match=r"did not come to a label in 38 tokens.*\(--answer-tokens\)"):
        label_pool(pool(), TASK, asked, tmp_path / "cache", limit=10)
    assert served.texts().total() == 3
    assert len((tmp_path / "cache").read_text().splitlines()) == 3, "they were paid for"
    with pytest.raises(EndpointError, match="in 500 tokens"):
        label_pool(pool(), TASK, replace(asked, answer_tokens=500), tmp_path / "cache", limit=10)
    assert served.requests()[-1]["body"]["max_tokens"] == 500
    done = label_pool(pool(), TASK, teacher(served, "partly", concurrency=1), tmp_path / "cache", limit=10)
    assert done.labels == (None, "bad", "bad", None, "bad", "bad")
    assert (done.abstained, done.tokens) == (2, 600), "what was cut off was paid for"
    for room, again in ((None, 0), (500, 2)):
        more = teacher(served, "partly", concurrency=1, answer_tokens=room)
        assert label_pool(pool(), TASK, more, tmp_path / "cache", limit=10).asked == again
    with pytest.raises(OptionError, match="answer_tokens of an LLM teacher is 0; use 1 or more"):
        teacher(served, "plain", answer_tokens=0)


def test_one_endpoint_in_two_spellings_and_a_label_without_a_name(served: Served, tmp_path: Path) -> None:
    asked = teacher(served, "plain")
    label_pool(pool(), TASK, asked, tmp_path / "cache", limit=10)
    assert label_pool(pool(), TASK, replace(asked, url=f"{asked.url}/"), tmp_path / "cache", limit=10).asked == 0
    for label in (" ", "null", " good"):
        with pytest.raises(OptionError, match=f"{label!r} is no label that a table can hold: it is empty, nan or null"):
            label_pool(pool(), Classify(("bad", label)), asked, tmp_path / "cache", limit=10)


def test_limits_count_what_is_known(served: Served, tmp_path: Path) -> None:
    asked, cache = teacher(served, "plain"), tmp_path / "cache"
    assert label_pool(pool(), TASK, asked, cache, limit=2).labels == (*WANTED[:2], *(None,) * 4)
    done = label_pool(pool(), TASK, asked, cache, limit=4)
    assert (done.asked, done.known, done.left, done.labels[:4]) == (2, 2, 2, WANTED[:4])
    # 400 tokens are spent and a request is guessed to cost about as much as it does: one more fits into 560.
    done = label_pool(pool(), TASK, replace(asked, concurrency=1), cache, limit=10, token_limit=560)
    assert (done.asked, done.known, done.left, done.tokens) == (1, 4, 1, 500)
    assert served.texts().total() == 5


def test_each_text_is_asked_once(served: Served, tmp_path: Path) -> None:
    rows = Rows(("great zip", "torn zip", "great zip", "x" * 100), number=(5, 6, 7, 8))
    done = label_pool(rows, TASK, teacher(served, "plain", characters=20), tmp_path / "cache", limit=10)
    assert done.labels == ("good", "bad", "good", "bad")
    assert done.rows.number == (5, 6, 7, 8)
    assert served.texts() == Counter(["great zip", "torn zip", "x" * 20])
    pairs = Rows(("great zip",) * 2, pair=("a", "b"))
    assert label_pool(pairs, TASK, teacher(served, "plain"), tmp_path / "cache", limit=10).asked == 2


def test_a_killed_labelling_goes_on(served: Served, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from netweight.data import Rows
from netweight.llm import LLMTeacher, label_pool
from netweight.task import Classify
rows = Rows(tuple(f"torn zip {i}" for i in range(60)))
teacher = LLMTeacher(sys.argv[1], "slow", sys.argv[3], concurrency=3)
label_pool(rows, Classify(("bad", "good")), teacher, Path(sys.argv[2]), limit=60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, served.url, str(tmp_path / "cache"), NAME])
    try:
        deadline = time.monotonic() + 60
        while served.texts().total() < 12 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    before = served.texts().total()
    assert 12 <= before < 60
    with (tmp_path / "cache").open("ab") as torn:
        torn.write(b'{"key": "abc')
    rows = Rows(tuple(f"torn zip {i}" for i in range(60)))
    done = label_pool(rows, TASK, teacher(served, "slow", concurrency=3), tmp_path / "cache", limit=60)
    assert done.labels == ("bad",) * 60
    assert done.known >= before - 3
    assert done.asked + done.known == 60
    twice = [text for text, times in served.texts().items() if times > 1]
    assert len(twice) <= 3, "only what was in flight may be asked again"
    assert len((tmp_path / "cache").read_text().splitlines()) == 60


def test_a_timeout_is_tried_again(served: Served, tmp_path: Path) -> None:
    done = label_pool(pool(1), TASK, teacher(served, "stuck", timeout=0.3), tmp_path / "cache", limit=1)
    assert done.labels == ("good",)
    assert served.texts().total() == 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("401", f"answered 401: it does not accept the key in {NAME}"),
        ("gone", r"was lost \(RemoteDisconnected\), 2 times in a row; run again later"),
        ("404", r"answered 404: there is no model '404'.*usually ends in /v1.*no 404 for Bearer \[key\]"),
        ("400", r"answered 400.*no 400 for Bearer \[key\].*constrain=False"),
        ("down", "answered 500, 2 times in a row; run again later"),
        ("busy", "answered 429 and asks to wait 9999 s, more than the patience of 120 s"),
        ("moved", "answered 302, a redirect; give the url"),
        ("html", "answers, but not as chat completions do"),
        ("strange", "answers, but not as chat completions do"),
    ],
)
def test_refusals_of_the_endpoint(served: Served, model: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=said) as caught:
        label_pool(pool(), TASK, teacher(served, model, retries=1, concurrency=1), tmp_path / "cache", limit=10)
    assert served.texts().total() == {"down": 2, "gone": 2, "400": 3}.get(model, 1)
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert KEY not in (tmp_path / "cache").read_text()


def test_a_key_that_is_missing_is_asked_for(served: Served, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="answered 401: it does not accept a request without a key; set key_env"):
        label_pool(pool(1), TASK, teacher(served, "401", key_env=None), tmp_path / "cache", limit=1)


def test_other_instructions_are_another_question(served: Served, tmp_path: Path) -> None:
    for words in ("Is it kind?", "Is it cheap?"):
        asked = teacher(served, "plain", instructions=words)
        assert label_pool(pool(), TASK, asked, tmp_path / "cache", limit=10).asked == 6
        assert served.requests()[-1]["body"]["messages"][0]["content"].startswith(f"{words}\n")


def test_waits_are_those_that_were_asked_for(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _retry_after("7") == 7
    ahead = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < _retry_after(ahead) <= 60
    assert [_retry_after(odd) for odd in (None, "", "soon", "-3")] == [0, 0, 0, 0]
    waited: list[float] = []
    monkeypatch.setattr(llm, "_retry_after", lambda given: 7.0 if given else 0.0)
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waited.append(seconds) or False)
    rows = Rows(("great wait",))  # which no other test has asked this server for
    done = label_pool(rows, TASK, teacher(served, "flaky", concurrency=1), tmp_path / "cache", limit=1)
    assert done.labels == ("good",)
    assert [round(seconds, 1) for seconds in waited if seconds is not None] == [7.0, 7.0]


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,nowhere.invalid")
    with pytest.raises(EndpointError, match=r"nothing listens at http://127\.0\.0\.1:9/v1; start the server"):
        label_pool(pool(), TASK, LLMTeacher("http://127.0.0.1:9/v1?secret=1", "m"), tmp_path / "cache", limit=10)
    import socket

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(EndpointError, match=r"the host of http://nowhere\.invalid/v1 cannot be found"):
        label_pool(pool(), TASK, LLMTeacher("http://nowhere.invalid/v1", "m"), tmp_path / "cache", limit=10)


def test_the_key_stays_where_it_is(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, said in [("", "holds no key"), ("sk\nvery secret", "can be no key"), ("ключ", "can be no key")]:
        monkeypatch.setenv(NAME, wrong)
        with pytest.raises(OptionError, match=f"{NAME} {said}|what {NAME} holds {said}") as caught:
            label_pool(pool(), TASK, teacher(served, "plain"), tmp_path / "cache", limit=1)
        assert not wrong or wrong not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(OptionError, match="never a key") as caught:
        LLMTeacher(served.url, "plain", KEY)
    assert KEY not in str(caught.value)
    with pytest.raises(OptionError, match="holds a user or password") as caught:
        LLMTeacher("https://me:hunter2@host/v1", "plain")
    assert "hunter2" not in str(caught.value)
    assert served.texts().total() == 0
    monkeypatch.setenv(NAME, KEY)
    assert KEY not in repr(teacher(served, "plain"))
    label_pool(pool(), TASK, teacher(served, "plain"), tmp_path / "cache", limit=9)
    held = (tmp_path / "cache").read_text()
    assert KEY not in held
    assert "zip" not in held
    assert re.fullmatch(r'({"key": "[0-9a-f]{64}", "label": "(good|bad)", "tokens": 100}\n){6}', held)


def test_caches_of_others(served: Served, tmp_path: Path) -> None:
    import fcntl

    cache = tmp_path / "cache"
    cache.write_text('{"key": "a", "label": 3, "tokens": 1}\n')
    # A table that was named by mistake stays as it is, also where its last line has no end.
    for text in ("text,label\ngreat,good", "text\ngreat", '{"text": "great"}'):
        (tmp_path / "mine.csv").write_text(text)
        with pytest.raises(StoreError, match="damaged|no cache of answers; name another file"):
            label_pool(pool(1), TASK, teacher(served, "plain"), tmp_path / "mine.csv", limit=1)
        assert (tmp_path / "mine.csv").read_text() == text
    with pytest.raises(StoreError, match="line 1 of .*cache is damaged"):
        label_pool(pool(), TASK, teacher(served, "plain"), cache, limit=1)
    cache.write_text("")
    with cache.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process labels with the cache"):
            label_pool(pool(), TASK, teacher(served, "plain"), cache, limit=1)
    # Another model is another question.
    label_pool(pool(1), TASK, teacher(served, "plain"), cache, limit=1)
    assert label_pool(pool(1), TASK, teacher(served, "words"), cache, limit=1).asked == 1


def test_refused_options(served: Served, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="an LLM teacher gives labels; a task of kind score"):
        label_pool(pool(), Score(), teacher(served, "plain"), tmp_path / "c", limit=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="limit is 0 and token_limit None"):
        label_pool(pool(), TASK, teacher(served, "plain"), tmp_path / "c", limit=0)
    with pytest.raises(OptionError, match="limit is 1 and token_limit 0"):
        label_pool(pool(), TASK, teacher(served, "plain"), tmp_path / "c", limit=1, token_limit=0)
    with pytest.raises(OptionError, match="the url of an endpoint is 'file:///etc/passwd'"):
        LLMTeacher("file:///etc/passwd", "m")
    with pytest.raises(OptionError, match="concurrency of an LLM teacher is 0"):
        teacher(served, "plain", concurrency=0)
    with pytest.raises(OptionError, match="timeout of an LLM teacher is 0"):
        teacher(served, "plain", timeout=0)


@settings(max_examples=50)
@given(st.text(max_size=20), st.sampled_from(TASK.labels))
def test_parsing_guesses_nothing(around: str, label: str) -> None:
    labels = TASK.labels
    assert parse(json.dumps({"label": label}), labels) == label
    assert parse(f" {label}\n", labels) == label
    wrong = [around + label + around, json.dumps({"label": around}), json.dumps({"label": label, "why": around})]
    wrong += [json.dumps([label]), json.dumps({"Label": label}), json.dumps({"label": [label]}), f"{label}, {label}"]
    for content in wrong:
        said = parse(content, labels)
        assert said is None or content.strip() == said or around == said


def test_parsing_what_is_no_text() -> None:
    assert parse(None, TASK.labels) is None
    assert parse("[" * 100_000, TASK.labels) is None


def test_the_command(served: Served, say: Say, tmp_path: Path) -> None:
    table, out = tmp_path / "pool.csv", tmp_path / "labelled.csv"
    table.write_text("words\n" + "\n".join(pool().text) + "\n", encoding="utf-8")
    words = ["label", table, "--text", "words", "--labels", "bad, good", "--url", served.url, "--model", "plain"]
    words += ["--key-env", NAME, "--limit", 4, "--out", out]
    said = say(*words)
    assert said.status == 0, said.err
    assert "4 of 6 rows have a label" in said.err
    rows = read(out, Columns("text", "label")).rows
    assert (rows.text, rows.label) == (pool().text[:4], WANTED[:4])
    assert out.read_text(encoding="utf-8").startswith("row,text,label\n1,great zip 0,good\n")
    assert (tmp_path / "labelled.csv.cache.jsonl").exists()
    assert "0 texts were asked now and 4 before" in say(*words).err
    refused = say(*[w if w != NAME else "sk-secret" for w in words])
    assert (refused.status, "never a key" in refused.err, "sk-secret" in refused.err) == (1, True, False)
    refused = say(*words[:-1], tmp_path / "x.parquet")
    assert (refused.status, "rows are written as .csv" in refused.err) == (1, True)
    refused = say(*words[:-1], tmp_path / "gone" / "x.csv")
    assert (refused.status, "of the output does not exist" in refused.err) == (1, True)
    assert served.texts().total() == 4


def test_the_code_of_the_page_runs(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_API_KEY", KEY)
    text = (Path(__file__).parents[1] / "docs" / "techniques" / "llm-teacher.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)).replace("https://llm.example/v1", served.url)
    code = code.replace("some-model", "plain")
    labelled = replace(pool(4), label=WANTED[:4])
    names: dict[str, Any] = {"select": labelled, "pool": pool(6), "train": labelled}
    exec(code, names)
    assert names["right"] == 1.0
    assert names["more"].label == WANTED[:4] + WANTED
    assert names["said"].known == 4
    exec(code.replace("limit=300", "limit=2"), names)
    assert (names["check"].left, names["right"]) == (2, 1.0)
