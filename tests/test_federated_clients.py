"""Clients of a federated run: what algorithms make them do, and what happens when they differ, fail, or lie."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model, tiny_rows
from netweight.data import Rows
from netweight.errors import ClientError, LabelError, ModelError, OptionError
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local
from netweight.run.federated import (
    Client,
    FedAvg,
    Federated,
    FedProx,
    Full,
    InProcess,
    Int8,
    RandomK,
    Rounds,
    Scaffold,
    TopK,
    Travel,
)
from netweight.run.federated.checks import Round
from netweight.run.federated.client import Correcting, manifest_of
from netweight.run.federated.messages import (
    Answer,
    FitTask,
    Fitted,
    Join,
    Joined,
    Lost,
    Reduced,
    Scored,
    ScoreTask,
    Task,
)
from netweight.run.federated.private import RowPrivate
from netweight.task import Score
from netweight.techniques.finetune import Moments
from netweight.train import Plan
from test_federated import PLAN, fitted, part, shops, values

# Full batches at a constant rate, and nothing but gradients: easy to repeat by hand.
PLAIN = Plan(
    batch_size=64,
    learning_rate=0.05,
    optimizer="sgd",
    schedule="constant",
    warmup=0.0,
    weight_decay=0.0,
    clip=0.0,
    precision="fp32",
)


def still(model: Model) -> Model:
    """Without dropout."""
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradient(network: nn.Module, model: Model, rows: Rows) -> dict[str, Tensor]:
    tokens = model.encoder.encode(rows.text)
    ids, mask, types = map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad))
    network.zero_grad()
    logits = network(ids, mask, types)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(model.task.targets(rows.label or ()))).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def test_scaffold_equals_a_plain_loop() -> None:
    """Two rounds of two steps for three clients, as Karimireddy et al. write them, with the loop's momentum."""
    model, clients = still(tiny_model()), shops(3, rows=60)
    run = Federated(clients, rounds=Rounds(2), algorithm=Scaffold(), privacy=None)
    made = values(fitted(run, model, replace(PLAIN, epochs=4)))

    x = {n: v.clone() for n, v in values(model).items()}
    zero = {n: torch.zeros_like(v) for n, v in x.items()}
    c, c_k = dict(zero), {client.name: dict(zero) for client in clients}
    for _ in range(2):
        ends, changes = [], []
        for client in clients:
            network, seen, v = model.copy().network.eval(), [], dict(zero)
            parameters = dict(network.named_parameters())
            with torch.no_grad():
                for n, p in parameters.items():
                    p.copy_(x[n])
            for _ in range(2):
                g = gradient(network, model, client.data.train)
                seen.append(g)
                with torch.no_grad():
                    for n in g:
                        v[n] = 0.9 * v[n] + g[n] + c[n] - c_k[client.name][n]
                        parameters[n] -= 0.05 * v[n]
            new = {n: sum(g[n] for g in seen) / 2 if n in seen[0] else zero[n] for n in x}
            changes.append({n: new[n] - c_k[client.name][n] for n in x})
            c_k[client.name] = new
            ends.append({n: p.detach().clone() for n, p in parameters.items()})
        x = {n: sum(end[n] for end in ends) / 3 for n in x}
        c = {n: c[n] + sum(change[n] for change in changes) / 3 for n in x}
    for name in x:
        torch.testing.assert_close(made[name], x[name], rtol=1e-4, atol=2e-6, msg=name)
    plain = values(fitted(Federated(clients, rounds=Rounds(2), privacy=None), model, replace(PLAIN, epochs=4)))
    assert max(float((plain[n] - made[n]).abs().max()) for n in x) > 1e-5, "the correction did something"


def test_the_variate_is_that_of_option_two() -> None:
    """c_k - c + (x - y) / (K * rate), of one step of SGD, in which momentum plays no part."""
    model, client = still(tiny_model()), shops(1, rows=60)[0]
    x = values(model)
    c = {n: 0.01 * torch.ones_like(v) for n, v in x.items()}
    task = FitTask("f" * 64, 0, model, Supervised(model.task), replace(PLAIN, epochs=1), variate=c)
    answer = client.answer(task)
    assert isinstance(answer, Fitted)
    assert answer.variate is not None
    for name in x:
        wanted = -c[name] + (x[name] - answer.tensors[name]) / 0.05
        if "pooler" not in name:  # nobody reads it, so no gradient reaches it
            torch.testing.assert_close(answer.variate[name], wanted, rtol=1e-3, atol=2e-5, msg=name)


def test_a_fit_under_other_corrections_is_another_one(model: Model) -> None:
    """A killed client does not go on from what it learned under those."""
    network, (c, other) = model.network, ({"head.bias": torch.full((2,), v)} for v in (0.0, 1.0))
    terms = [
        Correcting(network, mu, server, {}).terms for mu, server in ((0.1, None), (0.2, None), (0.1, c), (0.1, other))
    ]
    assert len(set(terms)) == 4
    assert Correcting(network, 0.0, None, {}).terms == ""
    assert Correcting(network, 0.1, other, {}).terms == terms[3]
    # With noise its own terms stand beside them.
    assert terms[3] in RowPrivate(1.0, 1.0, 8, Correcting(network, 0.1, other, {})).terms


def test_the_proximal_term_is_not_zero_after_the_first_batch(model: Model) -> None:
    """Zero where the fit begins, mu * (w - w_server) from then on, in every parameter that moves."""
    start = {n: v.clone() for n, v in values(model).items()}
    terms: list[float] = []

    class Spy(Correcting):
        def correct(self, network: nn.Module) -> None:
            held = {n: p for n, p in network.named_parameters() if p.grad is not None}
            before = {n: p.grad.clone() for n, p in held.items() if p.grad is not None}
            super().correct(network)
            terms.append(0.0)
            for n, p in held.items():
                assert p.grad is not None
                term = 0.3 * (p.detach() - start[n])
                torch.testing.assert_close(p.grad - before[n], term, rtol=1e-3, atol=1e-6)
                terms[-1] += float(term.norm())

    data = part(tiny_rows(80))
    Local(data, seams=Spy(model.network, 0.3, None, {})).fit(model, Supervised(model.task), PLAN)
    assert len(terms) == 10
    assert terms[0] == 0
    assert min(terms[1:]) > 1e-4
    near = values(fitted(Federated(shops(2), rounds=Rounds(1), algorithm=FedProx(mu=10.0), privacy=None), model))
    free = values(fitted(Federated(shops(2), rounds=Rounds(1), privacy=None), model))
    apart = [sum(float((v[n] - start[n]).norm()) for n in start) for v in (near, free)]
    assert apart[0] < 0.9 * apart[1], "the pull keeps clients near the server"


def test_a_personal_head_stays_at_home() -> None:
    """Two shops use the labels the other way round: with one head for both nobody is served, with two both are."""
    rows = tiny_rows(120)
    turned = replace(rows, label=tuple({"good": "bad", "bad": "good"}[v] for v in rows.label or ()))
    plan, model = replace(PLAN, epochs=9, learning_rate=3e-3), tiny_model()
    runs = {}
    for personal in (False, True):
        clients = [Client("one", part(rows)), Client("two", part(turned))]
        runs[personal] = Federated(clients, rounds=Rounds(3), travel=Travel(personal_head=personal), privacy=None)
        made = fitted(runs[personal], model, plan)
    standings = {personal: [s.quality or 0.0 for s in run.report.standings] for personal, run in runs.items()}
    assert min(standings[True]) >= 0.9
    assert sum(standings[False]) <= 1.4
    assert torch.equal(values(made)["head.weight"], values(model)["head.weight"])
    heads = [values(c.own(made, runs[True].report.fit))["head.weight"] for c in clients]
    assert not torch.equal(heads[0], heads[1])
    saved = 4 * (32 * 2 + 2) * 2
    assert runs[False].report.rounds[0].up - runs[True].report.rounds[0].up == saved


class Changed:
    """A channel whose answers a test may change."""

    def __init__(self, clients: list[Client], change: Callable[[str, Task, Answer | Lost], Answer | Lost]) -> None:
        self.inner, self.change, self.gone = InProcess(clients), change, set[str]()
        self.asked: list[tuple[str, ...]] = []

    def clients(self) -> tuple[str, ...]:
        return tuple(name for name in self.inner.clients() if name not in self.gone)

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        if isinstance(next(iter(tasks.values())), FitTask):
            self.asked.append(tuple(tasks))
        return {n: self.change(n, tasks[n], a) for n, a in self.inner.exchange(tasks, seconds).items()}


def same(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
    return answer


def test_a_client_that_differs_is_refused_with_the_field_and_both_values(model: Model) -> None:
    clients = shops(3)
    mine = manifest_of(model, ("text", "label"))
    others = {
        "task": "classify, macro-f1",
        "labels": ("bad", "fine", "good"),
        "tokenizer": "0" * 64,
        "max_length": 64,
        "base": "another",
    }
    for field, value in others.items():
        clients[1].expects = replace(mine, **{field: value})
        run = Federated(clients, rounds=Rounds(1), privacy=None)
        fitted(run, model)
        (note,) = run.report.notes
        assert note.startswith(f"shop1 was refused: {field} differs: the server has ")
        assert str(value)[2:20] in note
        assert [s.client for s in run.report.standings] == ["shop0", "shop2"]

    def old(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(answer, Joined) and name == "shop2":
            return replace(answer, manifest=replace(answer.manifest, version="0.1"))
        return answer

    run = Federated(Changed(shops(3), old), rounds=Rounds(1), privacy=None)
    fitted(run, model)
    assert "shop2 was refused: version differs: the server has" in run.report.notes[0]
    assert "the client '0.1'" in run.report.notes[0]


def test_another_label_set_and_other_columns_are_refused(model: Model) -> None:
    rows = tiny_rows(30)
    strange = replace(rows, label=("great", *(rows.label or ())[1:]))
    paired = replace(rows, pair=rows.text)
    said: list[str] = []
    clients = [*shops(2), Client("strange", part(strange), said=said.append), Client("twins", part(paired))]
    run = Federated(clients, rounds=Rounds(1), privacy=None)
    fitted(run, model)
    assert run.report.notes == (
        "strange was refused: labels differs: the server has ['bad', 'good'], the client 1 that are not among them; it "
        "names them where it runs.",
        "twins was refused: columns differs: the server has ['text', 'label'], the client ['text', 'pair', 'label'].",
    )
    assert said == ["strange: labels that the server does not know (1; it has 'bad', 'good'): 'great'."]
    with pytest.raises(
        ClientError, match="0 of 1 clients can take part, and 1 must. strange was refused: labels differs"
    ):
        fitted(Federated([Client("strange", part(strange))], privacy=None), model)
    leaving = Changed([Client("strange", part(strange))], same)
    run = Federated(leaving, rounds=Rounds(1, wait=0.3), privacy=None)
    run.members.refuses = lambda name, reason, final: leaving.gone.add(name)
    with pytest.raises(ClientError, match="0 of 0 clients can take part, and 1 must. strange was refused: labels"):
        fitted(run, model)


def test_labels_that_are_no_scores_are_refused(model: Model) -> None:
    model, said = replace(model, task=Score()), list[str]()
    numbers = part(replace(tiny_rows(30), label=tuple(str(i) for i in range(30))))
    clients = [Client("words", shops(1)[0].data, said=said.append), Client("numbers", numbers)]
    run = Federated(clients, privacy=None)
    assert list(run.usable(model)) == ["numbers"]
    assert run.members.refused["words"].startswith("labels differs: the server has numbers, the client 2 that are")
    assert said == ["words: labels that the server does not know (2; it has numbers): 'bad', 'good'."]


def test_labels_that_are_texts_stay_with_the_client(model: Model) -> None:
    """As where the column of labels is named by mistake, and a server asks without having let the client join."""
    rows, said = tiny_rows(30), list[str]()
    client = Client("mistaken", part(replace(rows, label=rows.text)), said=said.append)
    joined = client.answer(Join(manifest_of(model, ("text", "label"))))
    assert isinstance(joined, Joined)
    assert joined.unknown == len(set(client.data.train.label or ()))
    tasks: list[Task] = [FitTask("f", 0, model, Supervised(task), PLAN) for task in (model.task, Score())]
    tasks[1] = replace(tasks[1], model=replace(model, task=Score()))  # type: ignore[arg-type]
    for i, task in enumerate(tasks):
        with pytest.raises(LabelError, match="labels of this client do not fit the task; it says where it runs which"):
            client.answer(task)
        assert len(said) == i + 3
    assert any(text[:20] in said[-1] for text in rows.text)


def test_who_comes_back_with_other_rows_is_asked_anew(model: Model) -> None:
    clients = shops(3)

    def changing(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(task, FitTask) and task.round == 0:
            data = clients[1].data
            channel.inner._clients["shop1"] = Client("shop1", replace(data, train=data.train.take(range(13))))
        return answer

    channel = Changed(clients, changing)
    run = Federated(channel, rounds=Rounds(3), privacy=None)
    fitted(run, model)
    assert [r.took_part for r in run.report.rounds] == [
        ("shop0", "shop1", "shop2"),
        ("shop0", "shop2"),
        ("shop0", "shop1", "shop2"),
    ]
    (refused,) = run.report.rounds[1].refused
    assert refused == Lost("shop1", "it joined with 27 rows and now has 13; it is asked anew what it has.")
    assert [s.rows for s in run.report.standings] == [27, 13, 27]


def test_one_label_only_works_and_is_said_and_no_rows_take_no_part(model: Model) -> None:
    rows = tiny_rows(60)
    good = rows.take([i for i in range(60) if (rows.label or ())[i] == "good"])
    clients = [*shops(2), Client("sunny", part(good)), Client("empty", part(rows.take([])))]
    run = Federated(clients, rounds=Rounds(1), privacy=None)
    fitted(run, model)
    assert run.report.rounds[0].took_part == ("shop0", "shop1", "sunny")
    assert run.report.notes == (
        "empty has no training rows and takes no part.",
        "sunny has rows of one label only.",
    )
    assert (run.report.standings[0].client, run.report.standings[0].rows) == ("empty", 0)
    with pytest.raises(ClientError, match="empty has no training rows and takes no part"):
        fitted(Federated([clients[-1]], privacy=None), model)
    lost = InProcess([clients[-1]]).exchange({"empty": FitTask("f", 0, model, Supervised(model.task), PLAN)})
    assert lost["empty"] == Lost("empty", "this client has no training rows; it can take part once it has some.")


def test_nobody_appears_or_all_leave(model: Model) -> None:
    with pytest.raises(ClientError, match="no client appeared within 0.1 s, and 1 must; start them, or wait longer"):
        fitted(Federated([], rounds=Rounds(1, wait=0.1), privacy=None), model)
    channel = Changed(shops(3), same)

    def leaving(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(task, FitTask) and task.round == 1:
            channel.gone |= {"shop0", "shop1", "shop2"}
        return answer

    channel.change = leaving
    with pytest.raises(ClientError, match=r"all clients left \(shop0, shop1, shop2\); start them again"):
        fitted(Federated(channel, rounds=Rounds(3), privacy=None), model)

    def failing(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        return Lost(name, "it left.") if isinstance(task, FitTask) else answer

    with pytest.raises(ClientError, match="round 0: 0 clients answered, and 1 must. shop0: it left. shop1: it left."):
        fitted(Federated(Changed(shops(2), failing), privacy=None), model)
    with pytest.raises(ClientError, match="0 of 2 clients can take part.*shop0 was refused: no answer within 1e-09 s"):
        fitted(Federated(shops(2), rounds=Rounds(1, seconds=1e-9), privacy=None), model)


def test_slow_and_absent_clients_are_normal(model: Model) -> None:
    channel = Changed(shops(4), same)

    def slow(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(task, FitTask):
            if task.round == 0:
                channel.gone.add("shop3")
            if task.round == 2:
                channel.gone.clear()
            if name == "shop1" and task.round == 1:
                return Lost(name, "no answer within 5 s")
        return answer

    channel.change = slow
    run = Federated(channel, rounds=Rounds(4), privacy=None)
    fitted(run, model)
    took_part = [r.took_part for r in run.report.rounds]
    assert [len(t) for t in took_part] == [4, 2, 3, 4]
    assert took_part[3] == ("shop0", "shop1", "shop2", "shop3"), "one that comes back takes part again"
    assert run.report.rounds[1].lost == (Lost("shop1", "no answer within 5 s"),)
    assert any("round 1: shop1 lost: no answer within 5 s" in line for line in run.report.lines())


class Unheard(Changed):
    """shop1 answers in the middle of three rounds, and is late or sends NaN; or it is not asked."""

    def __init__(self, clients: list[Client], how: str) -> None:
        super().__init__(clients, same)
        self.how, self.scored = how, list[Task]()

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        self.scored += [task for task in tasks.values() if isinstance(task, ScoreTask)]
        middle = isinstance(task := next(iter(tasks.values())), FitTask) and task.round == 1
        if not middle:
            return super().exchange(tasks, seconds)
        found = super().exchange({n: t for n, t in tasks.items() if n != "shop1" or self.how != "away"}, seconds)
        answer = found.get("shop1")
        if isinstance(answer, Fitted) and self.how == "refused":
            return {**found, "shop1": replace(answer, loss=math.nan)}
        return {**found, "shop1": Lost("shop1", "no answer within 5 s")}


def test_a_head_whose_answer_did_not_count_is_not_scored(model: Model) -> None:
    """shop1's last answer is refused: its standing is that of the head that it had before."""
    clients = shops(3)
    channel, heard = Unheard(clients, "refused"), list[int | None]()

    def own(model: Model, fit: str, taken: int | None = None) -> Model:
        heard.append(taken)
        return Client.own(clients[1], model, fit, taken)

    clients[1].own = own  # type: ignore[method-assign]
    run = Federated(channel, rounds=Rounds(2), travel=Travel(personal_head=True), privacy=None)
    made, fit = fitted(run, model), run.report.fit
    assert run.report.rounds[1].refused[0].client == "shop1"
    assert heard == [0, 0, 0], "for its score, and for the membership check before and after"
    heads = [values(clients[1].own(made, fit, taken))["head.weight"] for taken in (0, 1, None)]
    assert torch.equal(heads[1], heads[2])
    assert not torch.equal(heads[0], heads[1])
    scored = {task.taken for task in channel.scored if isinstance(task, ScoreTask)}
    assert scored == {0, 1}
    standing = next(s for s in run.report.standings if s.client == "shop1")
    assert standing.quality == Local(clients[1].data).quality(clients[1].own(made, fit, 0))


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "travel"),
    [
        (Scaffold(), Travel()),
        *((FedAvg(), Travel(codec)) for codec in (Int8(), RandomK(0.2), TopK(0.1))),
        (FedAvg(), Travel(personal_head=True)),
    ],
    ids=repr,
)
def test_what_a_client_carries_is_of_the_last_answer_that_counted(
    algorithm: FedAvg, travel: Travel, folder: bool, model: Model, tmp_path: Path
) -> None:
    """An answer that the server did not take leaves no trace on the client, as if it had not been asked."""
    made = {}
    for how in ("away", "refused", "late"):
        channel = Unheard(shops(3, tmp_path / how if folder else None), how)
        run = Federated(channel, rounds=Rounds(3), algorithm=algorithm, travel=travel, privacy=None)
        made[how] = fitted(run, model).digest
        assert [len(r.took_part) for r in run.report.rounds] == [3, 2, 3]
    assert made["refused"] == made["late"] == made["away"]


@pytest.mark.parametrize("fit", ["/../../other", "f" * 63, "F" * 64, "f" * 64 + "\n"])
def test_a_fit_names_no_other_folder(fit: str, model: Model, tmp_path: Path) -> None:
    other = tmp_path / "clients" / "other"
    other.mkdir(parents=True)
    (other / "3.safetensors").write_bytes(b"mine")
    client = shops(1, tmp_path / "clients")[0]
    (tmp_path / "clients" / "shop0" / "rounds-").mkdir(parents=True)
    plan, codec = replace(PLAN, epochs=0.1), Int8()
    tasks = (FitTask(fit, 0, model, Supervised(model.task), plan, codec=codec), ScoreTask(model, fit, 3))
    for task in tasks:
        with pytest.raises(OptionError, match="a fit is named by its SHA-256 in hexadecimal text, and '.* came"):
            client.answer(task)
    assert [path.name for path in other.iterdir()] == ["3.safetensors"]
    assert isinstance(client.answer(ScoreTask(model)), Scored)


def test_a_share_of_the_clients_takes_part_in_each_round(model: Model) -> None:
    asked = []
    for seed in (0, 0, 1):
        channel = Changed(shops(5, rows=60), same)
        fitted(Federated(channel, rounds=Rounds(6, share=0.4), privacy=None), model, replace(PLAN, epochs=1, seed=seed))
        asked.append(channel.asked)
    assert all(len(names) == 2 for names in asked[0])
    assert len(set(asked[0])) > 2
    assert asked[0] == asked[1] != asked[2]


def test_a_poisoned_update_changes_nothing_and_is_named(model: Model) -> None:
    def lying(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(answer, Fitted) and name == "shop3":
            return replace(answer, tensors={n: v * float("nan") for n, v in answer.tensors.items()})
        return answer

    run = Federated(Changed(shops(4), lying), rounds=Rounds(1), privacy=None)
    made = fitted(run, model)
    assert [lost.client for lost in run.report.rounds[0].refused] == ["shop3"]
    honest = fitted(Federated(shops(4)[:3], rounds=Rounds(1), privacy=None), model)
    for name, value in values(honest).items():
        torch.testing.assert_close(values(made)[name], value)


@pytest.mark.parametrize(
    ("factor", "shape", "said"),
    [
        (float("nan"), None, "the variate has values that are not finite."),
        (1e6, None, "the variate has a norm of .*, more than 10 times .*, what is usual in the round."),
        (1.0, (7, 9), r"the variate has head.bias as torch.float32 \(7, 9\), which should be torch.float32 \(2,\)."),
    ],
)
def test_a_poisoned_variate_changes_nothing_and_is_named(
    factor: float, shape: tuple[int, ...] | None, said: str, model: Model
) -> None:
    def lying(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(answer, Fitted) and name == "shop3":
            odd = {n: torch.ones(shape) if shape else v * factor for n, v in (answer.variate or {}).items()}
            return replace(answer, variate=odd)
        return answer

    model.network.backbone.requires_grad_(False)  # type: ignore[union-attr]
    run = Federated(Changed(shops(4), lying), rounds=Rounds(2), algorithm=Scaffold(), privacy=None)
    made = fitted(run, model)
    for done in run.report.rounds:
        ((name, reason),) = [(lost.client, lost.reason) for lost in done.refused]
        assert name == "shop3"
        assert re.fullmatch(said, reason)
    assert all(bool(value.isfinite().all()) for value in values(made).values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v * float("nan"), "the statistic has values that are not finite."),
        (lambda v: v * 1e9, r"the statistic has a norm .* of .*, more than 100 times .*, what is usual in the round."),
        (
            lambda v: v[:1],
            r"the statistic has xx as torch.float64 \(1, 33\), which should be torch.float64 \(33, 33\).",
        ),
        (lambda v: v.float(), "the statistic has xx as torch.float32 .*, which should be torch.float64 .*"),
    ],
)
def test_a_poisoned_statistic_changes_nothing_and_is_named(
    change: Callable[[Tensor], Tensor], said: str, model: Model
) -> None:
    def lying(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        if isinstance(answer, Reduced) and name == "shop3":
            return replace(answer, tensors={n: change(v) for n, v in answer.tensors.items()})
        return answer

    told: list[tuple[str, str]] = []
    run, honest = Federated(Changed(shops(4), lying), privacy=None), Federated(shops(4)[:3], privacy=None)
    run.members.refuses = run.refuses = lambda client, reason, final: told.append((client, reason))  # type: ignore[method-assign]
    found = run.reduce(model, Moments(model.task))
    for name, value in honest.reduce(model, Moments(model.task)).items():
        torch.testing.assert_close(found[name], value)
    ((client, reason),) = told
    assert client == "shop3"
    assert re.fullmatch(said, reason)


def test_what_is_missing_from_a_statistic_is_named(model: Model) -> None:
    def lying(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        return replace(answer, tensors={}) if isinstance(answer, Reduced) else answer

    run = Federated(Changed(shops(2), lying), privacy=None)
    with pytest.raises(ClientError, match=r"a statistic: 0 clients answered, .* shop0: the statistic has no tensor xx"):
        run.reduce(model, Moments(model.task))


def test_who_takes_part_late_may_send_its_whole_variate() -> None:
    old = {"w": torch.zeros(2)}
    sent = {f"shop{i}": {"w": torch.tensor([size, 0.0])} for i, size in enumerate((0.01, 0.02, 0.03, 1.0))}
    accepted = [
        len(Round(Full(), old, frozenset(old), 0, 10.0, "variate", usual).accepted(sent)[0]) for usual in (0.0, 0.5)
    ]
    assert accepted == [3, 4]


def test_variates_and_personal_heads_go_together(model: Model) -> None:
    run = Federated(shops(3), rounds=Rounds(2), algorithm=Scaffold(), travel=Travel(personal_head=True), privacy=None)
    made = values(fitted(run, model))
    assert run.report.rounds[1].took_part == ("shop0", "shop1", "shop2")
    assert torch.equal(made["head.weight"], values(model)["head.weight"])


def claiming(**numbers: Any) -> Callable[[str, Task, Answer | Lost], Answer | Lost]:
    """shop1 reports other numbers where an answer has such."""

    def change(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        known = {f.name for f in fields(answer)} & set(numbers)
        return replace(answer, **{n: numbers[n] for n in known}) if name == "shop1" and known else answer

    return change


def test_numbers_that_cannot_be_are_refused_by_name(model: Model) -> None:
    for rows in (-60, 10**13):
        run = Federated(Changed(shops(4), claiming(rows=rows)), rounds=Rounds(1), privacy=None)
        fitted(run, model)
        assert run.report.notes == (f"shop1 was refused: it says that it has {rows} training rows.",)
    run = Federated(Changed(shops(4), claiming(loss=math.nan)), rounds=Rounds(1), privacy=None)
    fitted(run, model)
    assert run.report.rounds[0].refused == (Lost("shop1", "it reports a loss of nan."),)
    assert math.isfinite(run.report.rounds[0].loss or 0.0)
    run = Federated(Changed(shops(4), claiming(epsilon=math.inf)), rounds=Rounds(1), privacy=None)
    fitted(run, model)
    assert run.report.rounds[0].refused == (Lost("shop1", "it reports epsilon inf for this fit and 0 for all."),)
    run = Federated(Changed(shops(4), claiming(quality=math.nan)), rounds=Rounds(1), privacy=None)
    assert math.isfinite(run.quality(model))


def test_rows_that_are_claimed_make_nobody_the_model(model: Model) -> None:
    run = Federated(Changed(shops(4), claiming(rows=10**12)), rounds=Rounds(1), privacy=None)
    made = fitted(run, model)
    assert run.report.notes == (
        "shop1 says that it has 1,000,000,000,000 rows and counts as 205, 10 times the median.",
    )
    weights = {"shop0": 20.0, "shop1": 205.0, "shop2": 20.0, "shop3": 21.0}
    alone = {c.name: values(Local(c.data).fit(model, Supervised(model.task), PLAN)) for c in shops(4)}
    for name, value in values(made).items():
        wanted = sum(alone[c][name].double() * w for c, w in weights.items()) / sum(weights.values())
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_options_that_make_no_sense(model: Model) -> None:
    frozen = model.copy()
    frozen.network.requires_grad_(False)
    with pytest.raises(OptionError, match="every parameter is frozen"):
        fitted(Federated(shops(2), privacy=None), frozen)
    frozen.network.head.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="only the head is trained and each client keeps its own"):
        fitted(Federated(shops(2), travel=Travel(personal_head=True), privacy=None), frozen)
    with pytest.raises(OptionError, match="3 clients bear 2 names"):
        InProcess([*shops(2), shops(1)[0]])
    for wrong in ({"number": 0}, {"share": 0.0}, {"minimum": 0}, {"seconds": 0.0}, {"wait": -1.0}, {"outlier": 1.0}):
        with pytest.raises(OptionError, match=f"{next(iter(wrong))} of federated rounds is .*; use "):
            Rounds(**wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="mu of FedProx is 0"):
        FedProx(mu=0)
    with pytest.raises(OptionError, match="this run has not fitted anything yet"):
        _ = Federated(shops(2), privacy=None).report

    def idle(name: str, task: Task, answer: Answer | Lost) -> Answer | Lost:
        return replace(answer, tensors=values(model)) if isinstance(answer, Fitted) else answer

    with pytest.raises(ModelError, match="fit: no weight moved in 2 rounds"):
        fitted(Federated(Changed(shops(2), idle), rounds=Rounds(2), algorithm=FedAvg(), privacy=None), model)


def test_clients_that_train_in_turn_share_a_time_box(model: Model) -> None:
    boxes: list[float | None] = []

    class Timed(Client):
        def answer(self, task: Task) -> Answer:
            assert isinstance(task, FitTask)
            boxes.append(task.plan.seconds)
            return super().answer(replace(task, plan=replace(task.plan, seconds=None)))

    channel = InProcess([Timed(c.name, c.data) for c in shops(4, rows=80)])
    task = FitTask("f" * 64, 0, model, Supervised(model.task), replace(PLAN, epochs=0.2, seconds=8.0))
    channel.exchange({"shop1": task})
    channel.exchange(dict.fromkeys(channel.clients(), task))
    assert boxes == [8.0, 2.0, 2.0, 2.0, 2.0]


def test_a_client_answers_what_it_is_asked(model: Model) -> None:
    client = shops(1)[0]
    answer = client.answer(Join(manifest_of(model, ("text", "label"))))
    assert answer == Joined(manifest_of(model, ("text", "label")), 81, 2)
    rows = client.data.train
    many = replace(client.data, train=replace(rows, label=tuple(map(str, range(len(rows))))))
    joined = Client("shop", many, expects=manifest_of(model, ())).answer(Join(manifest_of(model, ())))
    assert isinstance(joined, Joined)
    assert joined.labels == 2, "whether they are more than one is all that a server needs"
