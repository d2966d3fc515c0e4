"""The playground: the page's files and headers, explanations over HTTP, and the page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import netweight
from conftest import GOOD, KIND, MEAN, Shop, tiny_encoder
from netweight import artifact
from netweight.artifact import Tier
from netweight.client import AsyncClient
from netweight.engine import Engine, load
from netweight.serve.explain import explained
from netweight.serve.hosted import Hosted
from netweight.serve.keys import add_key
from netweight.serve.occlusion import MOST_PIECES, pieces, without, words
from netweight.serve.pages import PATHS
from netweight.serve.queue import Queue
from netweight.serve.schema import MOST_BYTES, MOST_CHARACTERS
from netweight.serve.steady import begin, step
from netweight.task import Score
from test_keys import Door
from test_serve import Server, answer, cascade_of_two
from test_server import Process, until

FILES = Path(netweight.__file__).parent / "serve" / "playground"
TEXT = f"my {KIND[3]} coat was {MEAN[5]}, {KIND[7]}!"


@pytest.fixture
def server(made: Path) -> Server:
    return Server(made)


def explain(server: Server, body: Any, model: str = "shop") -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.run(lambda client: client.post(f"/v1/models/{model}/explain", content=content))


# --- explanations ---


def test_weights_are_those_of_asking_the_engine_word_by_word(server: Server, made: Path) -> None:
    engine = load(made, 1)
    said = explain(server, {"text": TEXT}).json()
    (whole,) = engine.predict([TEXT])
    assert (said["model"], said["version"], said["degraded"]) == ("shop", engine.version, [])
    assert (said["prediction"]["label"], said["prediction"]["tier"]) == (whole.label, whole.tier)  # type: ignore[union-attr]
    assert said["prediction"]["confidence"] == pytest.approx(whole.confidence, abs=1e-5)  # type: ignore[union-attr]
    spans = words(TEXT)
    assert [(word["start"], word["end"]) for word in said["words"]] == spans
    for word, (start, end) in zip(said["words"], spans):
        assert word["text"] == TEXT[start:end]
        (without_it,) = engine.predict([without(TEXT, start, end)])
        same = without_it.label == whole.label  # type: ignore[union-attr]
        left = without_it.confidence if same else 1 - without_it.confidence  # type: ignore[union-attr]
        assert word["weight"] == pytest.approx(whole.confidence - left, abs=1e-5)  # type: ignore[union-attr]
        assert word["label"] == without_it.label  # type: ignore[union-attr]
    assert max(abs(word["weight"]) for word in said["words"]) > 1e-4


def test_both_texts_of_a_pair_are_looked_at(made: Path) -> None:
    manifest = artifact.read_manifest(made)
    contents = {name: artifact.read_file(made, manifest, name) for name in manifest.files}
    artifact.save(made, replace(manifest, provenance={}), contents)  # one that does not say what it is for
    said = explain(Server(made), {"pair": [f"my {KIND[0]}", f"{MEAN[0]} zip"]}).json()
    assert [(word["side"], word["text"]) for word in said["words"]] == [
        (0, "my"), (0, KIND[0]), (1, MEAN[0]), (1, "zip"),
    ]  # fmt: skip


def test_long_texts_cost_a_bounded_number_of_rows_and_empty_ones_none(server: Server) -> None:
    said = explain(server, {"text": "zip " * 1000}).json()
    assert 1 < len(said["words"]) <= MOST_PIECES
    assert sum(word["count"] for word in said["words"]) == 1000
    assert explain(server, {"text": " "}).json()["words"] == []
    text = server.get("/metrics").text
    assert "netweight_rows_total" not in re.sub("#.*", "", text), "rows without a word are nobody's texts"
    assert "netweight_engine_seconds_total" in text


def test_scores_tell_how_far_the_value_falls() -> None:
    class Lengths:
        def logits(self, tokens: Any, batch: int) -> Any:
            return tokens.lengths[:, None].astype(np.float32)

    engine = Engine(Score(mean=1.0, scale=0.5), tiny_encoder(), [(Tier("one", "static", "", {}), Lengths())], "score")
    hosted = Hosted("score", Path(), engine, Queue(partial(begin, engine), partial(step, engine)), {})
    texts = [f"my {GOOD[0]} zip"]
    left_out = pieces(texts)
    rows = [texts[0], *(without(texts[0], piece.start, piece.end) for piece in left_out)]
    said = json.loads(explained(hosted, answer(engine, rows), texts, left_out))
    assert said["prediction"] == {"tier": "one", "value": 3.5}
    assert [word["weight"] for word in said["words"]] == [0.5, 0.5, 0.5]
    assert "label" not in said["words"][0]
    hosted.queue.close()


def test_a_tier_that_fails_is_named(made: Path) -> None:
    engine = cascade_of_two(made)
    usual = engine.logits
    engine.logits = lambda tier, *given: 1 / 0 if tier else usual(tier, *given)  # type: ignore[method-assign,assignment,return-value]
    hosted = Hosted("two", made, engine, Queue(partial(begin, engine), partial(step, engine)), {})
    said = json.loads(explained(hosted, answer(engine, ["zip", ""]), ["zip"], pieces(["zip"])))
    assert (said["degraded"], said["prediction"]["tier"]) == (["two"], "one")
    hosted.queue.close()


@pytest.mark.parametrize(
    ("body", "status", "code", "text"),
    [
        (b"{", 400, "bad-json", "the body is not JSON"),
        ({}, 422, "invalid-request", "give text or pair, and not both"),
        ({"text": "a", "pair": ["a", "b"]}, 422, "invalid-request", "give text or pair, and not both"),
        ({"texts": ["a"]}, 422, "invalid-request", "texts"),
        ({"pair": ["a"]}, 422, "invalid-request", "pair"),
        ({"text": "a" * (MOST_CHARACTERS + 1)}, 422, "invalid-request", "at most 10000 characters"),
        ({"text": "a", "deadline_ms": 0}, 422, "invalid-request", "deadline_ms"),
        (b'{"text": "' + b"a" * MOST_BYTES + b'"}', 413, "too-large", "4,194,304 bytes"),
    ],
)
def test_bad_bodies(server: Server, body: Any, status: int, code: str, text: str) -> None:
    response = explain(server, body)
    said = response.json()
    assert (response.status_code, said["code"]) == (status, code)
    assert text in said["detail"]


def test_the_client_reads_an_explanation(server: Server) -> None:
    async def work(http: Any) -> tuple[Any, Any]:
        client = AsyncClient("http://test")
        client._http = http
        return await client.explain("shop", "great zip"), await client.predict("shop", ["great zip"])

    said, (prediction,) = server.run(work)
    assert said.prediction == prediction
    assert [word.text for word in said.words] == ["great", "zip"]
    raw = explain(server, {"text": "great zip"}).json()["words"]
    assert [(w.weight, w.label) for w in said.words] == [(w["weight"], w["label"]) for w in raw]


def test_other_refusals(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(server, {"text": "a"}, "other").json()["code"] == "unknown-model"
    assert server.get("/v1/models/shop/explain").json()["code"] == "method-not-allowed"
    monkeypatch.setattr(Engine, "logits", lambda *_: 1 / 0)
    assert explain(server, {"text": "a"}).json()["code"] == "engine-failed"


def test_the_interface_is_described(server: Server) -> None:
    operation = server.get("/openapi.json").json()["paths"]["/v1/models/{name}/explain"]["post"]
    assert {"200", "400", "404", "413", "422", "429", "500", "503", "504"} <= set(operation["responses"])
    assert {"text", "pair"} <= set(operation["requestBody"]["content"]["application/json"]["schema"]["properties"])


# --- files ---


def test_files_and_headers(server: Server) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert set(PATHS.values()) == {file.name for file in FILES.iterdir()}
    for path, name in PATHS.items():
        response = server.get(path)
        assert response.content == (FILES / name).read_bytes()
        assert response.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        (policy,) = response.headers.get_list("content-security-policy")
        assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
    assert server.get("/playground/nothing.js").json()["code"] == "not-found"
    assert server.get("/playground/../app.py").status_code == 404
    assert server.run(lambda client: client.post("/")).json()["code"] == "method-not-allowed"
    (policy,) = server.get("/healthz").headers.get_list("content-security-policy")
    assert policy.startswith("default-src 'none'")


def test_nothing_from_elsewhere_and_no_markup_from_strings() -> None:
    for file in FILES.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:https?:)?//\w[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}, file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    page = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?! type=\"module\" src)", page)


def test_every_string_is_there_in_both_languages() -> None:
    source = (FILES / "strings.js").read_text(encoding="utf-8")
    table = re.findall(r'^  "?([^"\n]+?)"?: \[\s*"((?:[^"\\]|\\.)*)",\s*"((?:[^"\\]|\\.)*)",?\s*\]', source, re.M)
    strings = {key: (english, chinese) for key, english, chinese in table}
    assert len(strings) == len(table) == source.count("],\n") > 80
    for key, (english, chinese) in strings.items():
        assert set(re.findall(r"{\w+}", english)) <= set(re.findall(r"{\w+}", chinese)), key
        assert re.search(r"[\u3000-\u9fff]|^\W*p\d\d|^\{", chinese), f"{key} is not Chinese: {chinese}"
    used = set[str]()
    for file in FILES.glob("*.js"):
        text = file.read_text(encoding="utf-8")
        used |= set(re.findall(r"""\bt\("([^"]+)\"""", text)) | set(re.findall(r'fail\("([^"]+)"', text))
    used |= set(re.findall(r'data-(?:t|label)="([^"]+)"', (FILES / "index.html").read_text(encoding="utf-8")))
    assert used <= set(strings)


def test_the_page_needs_no_key_but_answers_do(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.jsonl", "shop")
    door = Door(tmp_path / "keys.jsonl")
    assert [door.ask(path=path).status_code for path in PATHS] == [200] * len(PATHS)
    for path in ("/v1/models", "/v1/models/a/explain", "/metrics", "/playground/nothing", "/playground/../metrics"):
        assert door.ask(path=path).status_code == 401


# --- in a browser ---

HOSTILE = '<img src="x" onerror="window.hacked = 1">'


class Browser:
    """Headless Chromium, with what it asked for and complained about so far."""

    def __init__(self, url: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "lang=en-US"):
            options.add_argument(f"--{word}")
        for word in ("disable-background-networking", "disable-component-update", "no-first-run"):
            options.add_argument(f"--{word}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver: Any = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.url = url
        self.size(1280)

    def open(self, url: str = "") -> None:
        self.driver.get(url or self.url)
        ready = "return document.getElementById('model').value !== '' || !document.getElementById('door').hidden"
        until(lambda: bool(self.js(ready)), 30)

    def js(self, code: str, *given: Any) -> Any:
        return self.driver.execute_script(code, *given)

    def text(self, ident: str) -> str:
        """What is seen of an element."""
        return (
            str(self.js("return document.getElementById(arguments[0]).innerText", ident)).replace("\xa0", " ").strip()
        )

    def press(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def focus(self, ident: str) -> None:
        self.js("document.getElementById(arguments[0]).focus()", ident)

    def ask(self, texts: str) -> None:
        """Type texts and wait for the answers and the words of the first."""
        self.js("document.getElementById('texts').value = arguments[0]", texts)
        self.focus("texts")
        self.press(keys().CONTROL, keys().ENTER)
        until(lambda: self.js("return document.getElementById('results').ariaBusy") == "false", 30)

    def size(self, width: int) -> None:
        given = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", given)


def keys() -> Any:
    from selenium.webdriver.common.keys import Keys

    return Keys


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def running(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Servers of the shop's model, and of one whose label is markup."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install '.[dev]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium here to show the page: apt-get install chromium chromium-driver")
    folder = tmp_path_factory.mktemp("playground")
    manifest = artifact.read_manifest(shop.folder)
    labels = (HOSTILE, "good")
    contents = {name: artifact.read_file(shop.folder, manifest, name) for name in manifest.files}
    artifact.save(
        folder / "odd.nw", replace(manifest, task=replace(manifest.task, labels=labels), provenance={}), contents
    )
    started: list[Process] = []

    def start(*more: str) -> Process:
        place = folder / f"made{len(started)}" / "made.nw"
        shutil.copytree(shop.folder, place)
        started.append(Process(place, folder / f"{len(started)}.log", str(folder / "odd.nw"), *more))
        return started[-1]

    yield start
    for one in started:
        os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


@pytest.fixture(scope="module")
def loaded(running: Callable[..., Process]) -> Iterator[Browser]:
    browser = Browser(running().url)
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(loaded: Browser) -> Browser:
    """The page, as it opens."""
    loaded.size(1280)
    loaded.open(loaded.url)
    return loaded


def test_asking_with_the_keyboard_alone(browser: Browser, shop: Shop) -> None:
    def until_at(true: str) -> None:
        for _ in range(20):
            browser.press(keys().TAB)
            if browser.js(f"return document.activeElement.{true}"):
                assert browser.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        raise AssertionError(f"no Tab leads to {true}")

    texts = [TEXT, f"the {MEAN[9]} lamp"]
    wanted = load(shop.folder, 1).predict(texts)
    until_at("matches('#texts')")
    browser.press(texts[0], keys().ENTER, texts[1], keys().CONTROL, keys().ENTER)
    until(lambda: "Strongest words" in browser.text("words"), 30)
    assert re.match(r"2 texts in [\d.]+ ms", browser.text("said"))
    table = browser.text("answers")
    for one in wanted:
        assert one.label in table  # type: ignore[union-attr]
        assert one.tier in table
        assert f"{100 * one.confidence:.1f} %" in table  # type: ignore[union-attr]
    marked = browser.js(
        "return [...document.querySelectorAll('p.words')].map(p => [p.innerText, p.querySelectorAll('mark small').length])"
    )
    ((shown, numbers),) = marked
    assert re.sub(r"[+−][\d.]+", "", shown) == texts[0], "the text as it was, but for the numbers"
    assert numbers >= 1
    assert re.search(r"[+−]\d", browser.text("words")), "signs stand in letters, not in colour alone"
    until_at("matches('#answers button')")
    browser.press(keys().ARROW_DOWN)
    browser.press(keys().ENTER)
    until(lambda: MEAN[9] in browser.text("words"), 30)
    assert browser.js("return document.activeElement.getAttribute('aria-pressed')") == "true", "the focus stays"


def test_the_model_in_words(browser: Browser, shop: Shop) -> None:
    said = browser.text("certificate")
    certificate = shop.result.certificate
    assert f"✓ {certificate.verdict}" in said
    assert f"{certificate.registration.rows} rows that no search saw" in said
    assert "less than 5.0 points" in said
    for name in ("Rows a second", "p50", "p99", "Size", "reference", "Measured on"):
        assert name in said
    assert "[object" not in browser.js("return document.body.innerText")
    assert "undefined" not in browser.js("return document.body.innerText")


def test_both_languages(browser: Browser) -> None:
    browser.ask(TEXT)
    browser.js("document.querySelector('[data-language=zh]').click()")
    assert browser.js("return document.documentElement.lang") == "zh-CN"
    assert browser.text("answers-title") == "回答"
    assert "已认证" in browser.text("certificate")
    assert "作用最大的词" in browser.text("words")
    browser.ask("")
    assert browser.text("ask-problem") == "请至少输入一条文本。"
    browser.js("document.querySelector('[data-language=en]').click()")
    assert browser.text("ask-problem") == "Type at least one text.", "what is shown follows"
    assert browser.js("return document.documentElement.lang") == "en"


def test_a_phone(browser: Browser) -> None:
    browser.size(360)
    browser.ask(f"{TEXT}\n{'unbreakable' * 20}")
    for language in ("zh", "en"):
        browser.js(f"document.querySelector('[data-language={language}]').click()")
        assert browser.js("return document.documentElement.scrollWidth") == 360
    small = browser.js(
        "return [...document.querySelectorAll('button, select, textarea')].filter(e => e.offsetParent && e.offsetHeight < 32).length"
    )
    assert small == 0, "fingers need room"


def test_live_charts(browser: Browser) -> None:
    def drawn() -> Any:
        browser.ask(TEXT)
        return browser.js(
            "return [...document.querySelectorAll('.chart .first:not(.now)')].map(e => e.getAttribute('d'))"
        )

    until(lambda: all("M" in one for one in drawn()), 40)
    until(lambda: "L" in drawn()[0], 40)
    assert re.search(r"Requests a second\s+[\d.]+", browser.text("live"))
    browser.focus("pause")
    browser.press(keys().ENTER)
    assert browser.text("pause") == "Go on"
    asked = "return performance.getEntriesByType('resource').filter(e => e.name.endsWith('/metrics')).length"
    before = browser.js(asked)
    time.sleep(2.5)
    assert browser.js(asked) == before
    browser.press(keys().ENTER)
    until(lambda: browser.js(asked) == before + 1)
    browser.js("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    browser.js("document.dispatchEvent(new Event('visibilitychange'))")
    time.sleep(2.5)
    assert browser.js(asked) == before + 1, "nobody looks"


def test_rates_between_two_readings(browser: Browser) -> None:
    def metrics(requests: int, fast: int, first: int, second: int, born: float = 1.7e9) -> str:
        return f"""# HELP netweight_requests_total of all
netweight_requests_total{{model="a \\"b\\"",status="200"}} {requests}.0
netweight_requests_total{{model="other",status="200"}} 1e+06
netweight_request_seconds_bucket{{le="0.01",model="a \\"b\\""}} {fast}
netweight_request_seconds_bucket{{le="0.02",model="a \\"b\\""}} {requests}
netweight_request_seconds_bucket{{le="+Inf",model="a \\"b\\""}} {requests}
netweight_request_seconds_created{{model="a \\"b\\""}} {born}
netweight_rows_total{{model="a \\"b\\"",tier="one"}} {first}
netweight_rows_total{{model="a \\"b\\"",tier="two"}} {second}
"""

    found = browser.driver.execute_async_script(
        """const [before, after, elsewhere, done] = arguments;
        import('/playground/prometheus.js').then(({between, reading}) => {
          const [one, other, third] = [before, after, elsewhere].map((text) => reading(text, 'a "b"'));
          done([between(one, other, 2, 'one'), between(other, one, 2, 'one'), between(one, third, 2, 'one')]);
        });""",
        metrics(10, 10, 10, 0),
        metrics(30, 20, 40, 10),
        metrics(99, 50, 99, 10, 1.6e9),
    )
    # Twenty requests in two seconds, half of them under 10 ms; 40 rows, of which the second tier answered 10.
    assert found == [{"requests": 10, "rows": 20, "p50": 10, "p95": pytest.approx(19), "handed": 0.25}, None, None]


def test_problems_are_shown_in_words(browser: Browser) -> None:
    browser.ask("\n".join(["a"] * 1025))
    assert "at most 1024 items" in browser.text("ask-problem")
    browser.ask(TEXT)
    assert browser.text("ask-problem") == ""
    browser.js("document.querySelector('#model option').value = 'gone'")
    browser.ask(TEXT)
    until(lambda: "there is no model 'gone' here; there are: made, odd." in browser.text("ask-problem"))
    assert browser.js("return document.getElementById('ask-problem').getAttribute('role')") == "alert"
    browser.open()
    hidden = "return document.getElementById('pairs-line').hidden"
    assert browser.js(hidden) is True, "this model says that it answers single texts"
    browser.js("const m = document.getElementById('model'); m.value = 'odd'; m.dispatchEvent(new Event('change'))")
    assert browser.js(hidden) is False
    browser.js("document.getElementById('pairs').click()")
    browser.ask("one\ttwo\nthree")
    assert browser.text("ask-problem") == "Line 2 needs exactly one tab, between its two texts."
    browser.ask("one\ttwo")
    assert browser.js("return document.querySelectorAll('p.words').length") == 2
    browser.open()
    browser.ask("word " * 2500)
    until(lambda: "at most 10000 characters" in browser.text("words-problem"))


def test_scores_and_every_verdict_are_said_in_words(browser: Browser) -> None:
    """No server here predicts a number: the page is told answers of one that does."""
    word = {"text": "one", "side": 0, "start": 0, "end": 3, "count": 1, "weight": -0.25}
    answers = {
        "predict": {"predictions": [{"value": 3.5, "tier": "static"}], "degraded": ["full"]},
        "explain": {"prediction": {"value": 3.5, "tier": "static"}, "words": [word], "degraded": []},
    }
    browser.js(
        """const usual = window.fetch, [answers] = arguments;
        window.fetch = async (path, given) => {
          const said = answers[String(path).split('/').pop()];
          return said ? new Response(JSON.stringify(said)) : usual(path, given);
        };""",
        answers,
    )
    browser.ask("one")
    assert re.search(r"Text\s+Value\s+Tier\s+one\s+3.5\s+static", browser.text("answers"))
    assert "Without full, which failed." in browser.text("said")
    assert "The value is 3.5." in browser.text("words")
    assert "−0.25" in browser.text("words")
    said = browser.driver.execute_async_script(
        """const [done] = arguments, said = [];
        (async () => {
          const { showCertificate } = await import('/playground/certificate.js');
          const { speak } = await import('/playground/language.js');
          const [model] = (await (await fetch('/v1/models')).json()).models;
          for (const language of ['en', 'zh']) for (const metric of ['accuracy', 'macro-f1', 'spearman', 'mae'])
            for (const verdict of ['certified', 'not certified', 'worse']) {
              speak(language);
              const task = { ...model.certificate.registration.task, metric };
              const registration = { ...model.certificate.registration, task };
              showCertificate({ ...model, certificate: { ...model.certificate, verdict, registration } });
              said.push(document.getElementById('certificate').innerText);
            }
          showCertificate({ tiers: [] });
          done([...said, document.getElementById('certificate').innerText]);
        })();"""
    )
    assert len(set(said)) == 25
    for text in said:
        assert not re.search(r"undefined|NaN|null|[{}]|sentence:|metric:|point:", text), text
    assert "平均绝对误差上升" in said[21]
    assert "此模型产物没有证书。" in said[-1]


def test_markup_is_text(browser: Browser) -> None:
    browser.js("const m = document.getElementById('model'); m.value = 'odd'; m.dispatchEvent(new Event('change'))")
    browser.ask(f"{HOSTILE} {MEAN[0]}\n{HOSTILE}")
    assert browser.text("answers").count(HOSTILE) >= 3, "as texts and as a label"
    assert HOSTILE in re.sub(r"[+−][\d.]+", "", browser.text("words"))
    assert browser.js("return [window.hacked ?? null, document.querySelectorAll('main img').length]") == [None, 0]


def test_a_key_is_asked_for_and_kept_nowhere(running: Callable[..., Process], loaded: Browser, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.jsonl", "shop")
    loaded.open(running("--keys", str(tmp_path / "keys.jsonl")).url)
    assert loaded.text("door-problem") == ""
    for given, then in (("wrong", "The server does not know this key."), (key, "")):
        loaded.js("document.getElementById('key').value = ''")
        loaded.focus("key")
        loaded.press(given, keys().ENTER)
        until(lambda then=then: loaded.text("door-problem") == then)  # type: ignore[misc]
    until(lambda: bool(loaded.js("return document.getElementById('model').value")))
    loaded.ask(TEXT)
    assert "Strongest words" in loaded.text("words")
    kept = "return [localStorage.length, sessionStorage.length, document.cookie, location.href.includes(arguments[0])]"
    assert loaded.js(kept, key) == [0, 0, "", False]


def test_nothing_leaves_the_origin_and_nothing_complains(browser: Browser) -> None:
    browser.ask(TEXT)
    sent = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert any(url.endswith("/explain") for url in urls)
    assert {httpx.URL(url).host for url in urls if not url.startswith(("data:", "chrome"))} == {"127.0.0.1"}
    # A status that was provoked above is logged by the browser itself.
    said = [entry["message"] for entry in browser.driver.get_log("browser")]
    assert not [line for line in said if "the server responded with a status of 4" not in line]
