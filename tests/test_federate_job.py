"""The main job of a server whose training rows are with its clients."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import Killed, journal, many_rows, quick_measuring, tiny_base, tiny_model, tiny_rows, write_table
from netweight import artifact
from netweight.cli import app
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.engine import load
from netweight.errors import ClientError, OptionError, StoreError
from netweight.federate.job import optimize
from netweight.federate.keys import make_keys
from netweight.federate.options import Terms, terms_of, tuned
from netweight.federate.start import REPORTS, Deployment, Place, kept_apart, serve
from netweight.job import Budget, Job, Options, Tables, prepare
from netweight.loss import Supervised
from netweight.model import Model
from netweight.reporter import Silent
from netweight.run import Local, Run
from netweight.run.federated import Automatic, Client, InProcess, Rounds
from netweight.run.federated.messages import Answer, FitTask, Lost, ReduceTask, Task
from netweight.run.federated.report import in_words, read_reports
from netweight.store import store_of
from netweight.summary import verify
from netweight.task import Classify, Score
from netweight.techniques import Distill, Finetune, Quantize, Static
from netweight.techniques.finetune import Moments
from netweight.train import Plan
from test_federate import Federation, Joining, ended, free_port, waited
from test_private_federated import shops

PLAN = Plan(epochs=2, batch_size=16, learning_rate=1e-2, precision="fp32")
PRIVATE = Automatic()
CHOSEN = ("fedavg", "mean", "full")


class Connected(InProcess):
    """Clients of this process as if they were connected; who is told the end is noted, and so is what they were asked."""

    def __init__(self, clients: Sequence[Client]) -> None:
        super().__init__(clients)
        self.told: list[Mapping[str, str]] = []
        self.asked: list[type] = []

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        self.asked += {type(task) for task in tasks.values()}
        return super().exchange(tasks, seconds)

    def dismiss(self, reasons: Mapping[str, str], others: str | None = "") -> None:
        self.told.append(reasons)


def deployment(channel: Connected, folder: Path, privacy: Automatic | None = PRIVATE, **rounds: Any) -> Deployment:
    terms = terms_of(Rounds(2, **rounds), CHOSEN, privacy=privacy)
    return Deployment(channel, None, folder / "work", terms, print)  # type: ignore[arg-type]


def head() -> Model:
    model = tiny_model()
    model.network.backbone.requires_grad_(False)  # type: ignore[union-attr]
    return model


def test_what_cost_rows_something_is_not_asked_for_twice(tmp_path: Path) -> None:
    """The server dies when the fit is over and before the model is kept: nobody trains again, nobody need be there."""
    over = Connected(shops(2))
    with deployment(over, tmp_path) as run:
        made = run.fit(head(), Supervised(head().task), PLAN)
    assert over.told == [{}]
    (report,) = run.reports
    assert report.in_all == pytest.approx(report.epsilon)
    nobody = Connected([])
    with deployment(nobody, tmp_path, minimum=1) as again:
        assert again.reports == [report]
        assert again.fit(head(), Supervised(head().task), PLAN).digest == made.digest
    assert nobody.asked == []
    assert again.reports == [report]
    again.forget()
    assert list((tmp_path / "work").glob("rounds-*"))
    # Without privacy it may be repeated, and its state goes when the model is saved.
    with deployment(Connected(shops(2)), tmp_path / "open", privacy=None) as run:
        run.fit(head(), Supervised(head().task), PLAN)
        run.fit(head(), Supervised(head().task), PLAN)
    assert len(run.reports) == 1
    run.forget()
    assert not list((tmp_path / "open" / "work").glob("rounds-*"))


def test_statistics_are_asked_for_once(tmp_path: Path) -> None:
    """With those of other clients a fit that begins with a probe would be another one, and its rounds be lost."""

    class Dying(Connected):
        def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
            if any(isinstance(task, FitTask) and task.round == 1 for task in tasks.values()):
                raise Killed
            return super().exchange(tasks, seconds)

    clients, work = shops(3), tmp_path / "work"
    technique = Finetune(epochs=2, train="head", class_weights=True)
    with pytest.raises(Killed), deployment(Dying(clients), tmp_path, privacy=None) as run:
        technique(tiny_model(), run, PLAN)
    two = Connected(clients[:2])
    with deployment(two, tmp_path, privacy=None) as run:
        technique(tiny_model(), run, PLAN)
        assert [len(done.took_part) for done in run.report.rounds] == [3, 2]
        assert ReduceTask not in two.asked
        for kept in work.glob("statistic-*"):
            kept.write_bytes(b"half")
        with pytest.raises(StoreError, match="statistic .*safetensors is damaged .*; delete it to ask for it again"):
            technique(tiny_model(), run, PLAN)
        run.forget()
    assert not list(work.glob("*.safetensors"))


def test_a_model_that_was_changed_is_asked_about_anew(tmp_path: Path) -> None:
    """Fine-tuning sets the head of the very model that statistics were asked of."""
    model = tiny_model()
    with deployment(Connected(shops(2)), tmp_path, privacy=None) as run:
        before = run.reduce(model, Moments(model.task))["xx"]
        for parameter in model.network.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        assert not torch.equal(run.reduce(model, Moments(model.task))["xx"], before)
    assert "digest" not in vars(model), "it would name what the model was"


def test_rounds_stay_until_the_model_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the last round is over: nobody trains again, and nobody need be there."""
    over, nobody = Connected(shops(2)), Connected([])
    channels = iter((over, nobody))
    monkeypatch.setattr("netweight.federate.start.opened", lambda *_: nullcontext(next(channels)))
    place, terms = Place("127.0.0.1:1", tmp_path, tmp_path / "out"), terms_of(Rounds(2), CHOSEN)

    def technique(model: Model, run: Run, plan: Plan) -> Model:
        return run.fit(model, Supervised(model.task), plan)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Model, "save", full)
        with pytest.raises(OSError, match="No space left"):
            serve(place, head(), technique, None, terms, PLAN, print)
    assert list((place.out / "work").glob("rounds-*"))
    made = serve(place, head(), technique, None, terms, PLAN, print)
    assert nobody.asked == []
    assert Model.load(place.out / "model").digest == made.digest
    assert not list((place.out / "work").glob("rounds-*"))


def test_what_a_job_cost_in_words(tmp_path: Path) -> None:
    run = deployment(Connected(shops(2, tmp_path / "shops")), tmp_path)
    assert (in_words([]), run.remarks()) == ("", ())
    run.fit(head(), Supervised(head().task), PLAN)
    (said,) = run.remarks()
    spent = run.report.epsilon
    assert said == f"privacy of the whole job: 1 fit on clients' rows cost a client's rows epsilon {spent:.2f} at most."
    numbers = run.account()["fits"][0]
    assert (numbers["clients"], numbers["rows"], numbers["epsilon"]) == (2, 96, spent)
    assert "shop0" not in json.dumps(run.account())
    # Another job on the same rows.
    other = deployment(Connected(shops(2, tmp_path / "shops")), tmp_path / "other")
    other.fit(head(), Supervised(head().task), replace(PLAN, seed=1))
    whole = max(r.in_all for r in other.report.rounds)
    assert whole > 8
    assert f"and {whole:.2f} with what was made of these rows before" in in_words(other.reports)
    assert f"2 fits on clients' rows cost a client's rows epsilon {whole:.2f}" in in_words([run.report, other.report])
    plain = replace(run.report, epsilon=None)
    assert "OFF in 2 fits on clients' rows; nothing bounds" in in_words([run.report, plain])


def test_reports_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / REPORTS).write_text('[{"label": 1}]')
    with pytest.raises(StoreError, match="the reports of fits in .* are damaged .*; delete them to go on"):
        read_reports(tmp_path / REPORTS)


def test_clients_that_do_not_come_are_named_and_those_that_came_are_told(tmp_path: Path) -> None:
    over = Connected(shops(1))
    with pytest.raises(ClientError, match="shop0 and no other client appeared within 0 s, and 2 must; start them"):
        deployment(over, tmp_path, minimum=2).__enter__()
    assert over.told == [{}]


def test_the_epsilon_that_a_client_allows_holds_over_jobs(tmp_path: Path) -> None:
    task = FitTask("f" * 64, 0, head(), Supervised(head().task), PLAN, privacy=PRIVATE.among(2).task(2, 2))
    (mine,) = shops(1)
    client = Client("shop0", mine.data, tmp_path, limit=8.0)
    for number in (0, 1):
        client.answer(replace(task, round=number))
    client = Client("shop0", mine.data, tmp_path, limit=8.0)
    with pytest.raises(
        OptionError, match="with this fit the rows of shop0 would have cost epsilon .* it allows 8; ask"
    ):
        client.answer(replace(task, fit="e" * 64))
    assert Client("shop0", mine.data, tmp_path, limit=20.0).answer(replace(task, fit="e" * 64)).in_all > 8  # type: ignore[union-attr]
    with pytest.raises(
        OptionError, match="shop0 allows .* epsilon 8 in all, and was asked for an update without noise"
    ):
        client.answer(replace(task, privacy=None))
    with pytest.raises(OptionError, match="was asked for an exact sum over rows, which has no bound"):
        client.answer(ReduceTask(head(), None))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="the epsilon that shop0 allows is 0; use a number above 0, or no limit"):
        Client("shop0", mine.data, limit=0)


def test_tables_without_training_rows(tmp_path: Path) -> None:
    rows = many_rows(300)
    dev, certify = rows.take(range(100)), rows.take(range(100, 300))
    with pytest.raises(OptionError, match="dev and certify cannot be cut from them; give both"):
        Tables(None, dev=dev)
    with pytest.raises(OptionError, match="and train is here; leave them out"):
        Tables(dev, labels=("bad", "good"))
    tables = Tables(None, dev=dev, certify=certify, labels=("good", "bad", "odd"))
    with pytest.raises(OptionError, match="labels are for classification; scores have none"):
        Job(tables, options=Options("score"))
    with pytest.raises(OptionError, match="from scratch learns the words of train, which is not here"):
        Job(tables, options=Options(model="scratch"))
    data, task, notes, _ = prepare(Job(tables), tmp_path)
    assert task.labels == ("good", "bad", "odd")  # type: ignore[union-attr]
    assert (len(data.train), len(data.dev), len(data.certify)) == (0, 100, 200)
    assert any("share a text with dev or certify was not checked" in note for note in notes)
    scores = [replace(part, label=tuple(str(i) for i in range(len(part)))) for part in (dev, certify)]
    _, task, *_ = prepare(Job(Tables(None, dev=scores[0], certify=scores[1]), options=Options("score")), tmp_path)
    assert task.kind == "score"
    assert task.mean == pytest.approx(49.5)


def test_terms_and_teacher_are_part_of_what_a_job_is() -> None:
    rows = many_rows(60)
    data, task, *_ = prepare(Job(Tables(None, dev=rows.take(range(30)), certify=rows.take(range(30, 60)))), Path())
    usual, private = (terms_of(Rounds(3, wait=5.0), CHOSEN, privacy=p) for p in (None, PRIVATE))
    jobs = [
        Job(Tables(None, dev=rows, certify=rows), options=Options(finetune=tuned(t, 5.0, None, None)), run=str(t))
        for t in (usual, private)
    ]
    named = [job.identity(data, task) for job in jobs]
    assert "teacher" not in named[0]
    assert named[1]["teacher"][0]["train"] == "head"
    assert named[0]["run"] != named[1]["run"]
    assert str(replace(usual, rounds=replace(usual.rounds, wait=9.0))) == str(usual)
    assert tuned(private, 1.0, 1e-3, "lora") == Finetune(1.0, 1e-3, train="lora", probe=False)
    assert tuned(private, 1.0, None, None).learning_rate > tuned(usual, 1.0, None, "head").learning_rate
    assert isinstance(usual, Terms)


def test_privacy_needs_a_pool(tmp_path: Path) -> None:
    job = Job(Tables(None, dev=tiny_rows(), certify=tiny_rows()), Budget(), Options())
    with pytest.raises(OptionError, match=r"under privacy clients train the teacher alone: .*Give --pool, texts"):
        optimize(
            Place("127.0.0.1:1", tmp_path, tmp_path / "a.nw"),
            job,
            terms_of(Rounds(), CHOSEN, privacy=PRIVATE),
            Silent(),
        )


@pytest.mark.parametrize("task", [Score(1.0, 2.0), Classify(("bad", "good"))])
def test_students_learn_from_texts_alone(task: Classify | Score, tmp_path: Path) -> None:
    texts, none = tiny_rows(40).unlabelled(), tiny_rows(40).take([])
    run = Local(Dataset(texts, none, none, Sealed(none)), tmp_path)
    teacher = tiny_model(task)
    made = Distill(layers=1, epochs=1)(teacher, run, replace(PLAN, seed=1))
    assert made.digest != teacher.digest
    assert Static(width=8, buckets=64, epochs=1)(teacher, run, PLAN).digest != teacher.digest
    assert Quantize(rows=10)(teacher, run, PLAN).ranges


def test_a_private_federation_becomes_a_certified_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS: two clients train the head with noise; the server makes students of its own texts, and certifies."""
    quick_measuring(monkeypatch)
    names, address, out = ("north", "south"), f"127.0.0.1:{free_port()}", tmp_path / "made.nw"
    make_keys(tmp_path / "keys", names)
    rows = many_rows(900, noise=0.02)
    for name, part in {"dev": range(200, 400), "certify": range(400, 700), "pool": range(700, 900)}.items():
        write_table(tmp_path / f"{name}.tsv", rows.take(part))
    clients = [
        Joining(address, tmp_path / "keys" / name, Client(name, kept_apart(mine), tmp_path / name, limit=8.0), 60.0)
        for name, mine in zip(names, (rows.take(range(100)), rows.take(range(100, 200))), strict=True)
    ]
    given: dict[str, object] = {
        "out": out,
        "keys": tmp_path / "keys/server",
        "address": address,
        "model": tiny_base(tmp_path / "base"),
        "labels": "bad,good",
        "rounds": 2,
        "epochs": 4,
        "train": "head",
        "learning-rate": 0.01,
        "wait": 60,
        "max-drop": 5,
        "threads": 1,
        **{name: tmp_path / f"{name}.tsv" for name in ("dev", "certify", "pool")},
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["federate", "optimize", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for client in clients:
        client.join(10)
        assert client.problem is None
        assert client.said[-1] == "the server has ended the run"
    (report,) = json.loads((store_of(out) / REPORTS).read_text())
    assert report["label"] == "fine-tune"
    assert 0 < report["epsilon"] <= 8
    assert "the head's probe is left out: it is an exact sum over rows" in done.output
    assert "linear is not made: it needs labelled rows in one place" in done.output
    assert "privacy of the whole job: 1 fit on clients' rows cost a client's rows epsilon" in done.output
    assert {"point full-int8", "point static"} <= set(journal(out))
    provenance = artifact.read_manifest(out).provenance
    (fit,) = provenance["federation"]["fits"]
    assert (fit["clients"], fit["epsilon"]) == (2, report["epsilon"])
    assert fit["bytes up"] > 0
    assert provenance["data"]["rows"] == {"train": 0, "select": 100, "calibrate": 100, "certify": 300, "pool": 200}
    assert any(note.startswith("privacy of the whole job: 1 fit") for note in provenance["notes"])
    assert "north" not in json.dumps(dict(provenance))
    assert verify(out, None)
    assert len(load(out, threads=1).predict(["the zip was late"])) == 1


@pytest.mark.slow
def test_a_job_whose_server_is_killed_goes_on_and_clients_make_students(tmp_path: Path) -> None:
    """Processes, without privacy and without a pool."""
    federation = Federation(tmp_path)
    rows = many_rows(900, noise=0.02)
    for name, part in {"north": range(150), "south": range(150, 300), "dev": range(300, 600)}.items():
        write_table(tmp_path / f"{name}.tsv", rows.take(part))
    write_table(tmp_path / "certify.tsv", rows.take(range(600, 900)))
    out = tmp_path / "made.nw"
    words = ("--out", out, "--keys", tmp_path / "keys/server", "--address", federation.address, "--threads", 1)
    words += ("--model", tmp_path / "base", "--rounds", 2, "--wait", 90, "--max-drop", 5, "--privacy", "off")
    words += ("--dev", tmp_path / "dev.tsv", "--certify", tmp_path / "certify.tsv")
    try:
        server = federation.start("optimize", *words)
        clients = [federation.client(name) for name in federation.names]
        waited((store_of(out) / REPORTS).exists)
        server.send_signal(signal.SIGKILL)
        server.wait()
        before = json.loads((store_of(out) / REPORTS).read_text())
        status, said = ended(federation.start("optimize", *words))
        assert status == 0, said
        for client in clients:
            status, told = ended(client)
            assert status == 0, told
    finally:
        federation.stop()
    reports = json.loads((store_of(out) / REPORTS).read_text())
    assert len(reports) > len(before) >= 1
    assert {"fine-tune", "static student"} <= {report["label"] for report in reports}
    assert len({report["fit"] for report in reports}) == len(reports)
    assert "privacy of the whole job: OFF" in said
    assert artifact.read_manifest(out).provenance["federation"]["fits"]
