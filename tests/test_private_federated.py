"""Federated runs under privacy: on unless turned off, within the budget, and equal to plain ones where they must be."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

from conftest import Killed, tiny_model, tiny_rows
from netweight.cli import app
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import ClientError, OptionError, RunError, StoreError
from netweight.loss import Supervised
from netweight.objectives import Contrastive
from netweight.run.aggregate import Krum, Median, TrimmedMean
from netweight.run.federated import (
    Automatic,
    Client,
    ClientLevel,
    FedAdam,
    FedAvg,
    Federated,
    InProcess,
    Int8,
    RandomK,
    Rounds,
    RowLevel,
    Scaffold,
    TopK,
    Travel,
    guard,
    server,
    veiled,
)
from netweight.run.federated.accountant import Steps, epsilon
from netweight.run.federated.guard import Ledger, Opened, shortened
from netweight.run.federated.membership import Membership
from netweight.run.federated.messages import (
    Advertise,
    Advertised,
    FitTask,
    Fitted,
    Lost,
    Seat,
    Share,
    Shared,
    Told,
    Unmask,
)
from netweight.run.federated.privacy import Setting, client_noise, noise_to_signal, planned, refuse
from netweight.run.federated.wire import Wire
from netweight.techniques import Finetune
from netweight.techniques.finetune import freeze_embeddings
from netweight.train import Plan

PLAN = Plan(epochs=2, batch_size=16, learning_rate=1e-2, precision="fp32")


def part(rows):
    cut = len(rows) - max(12, len(rows) // 10)
    return Dataset(rows.take(range(cut)), rows.take(range(cut, len(rows))), rows.take([]), Sealed(rows.take([])))


def shops(n=3, folder=None, rows=60):
    every = tiny_rows(n * rows)
    return [
        Client(f"shop{i}", part(every.take(range(i * rows, (i + 1) * rows))), folder and folder / f"shop{i}")
        for i in range(n)
    ]


def head_only():
    model = tiny_model()
    for module in model.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.network.backbone.requires_grad_(False)
    return model


def fitted(run, model=None, plan=PLAN):
    model = model or head_only()
    return run.fit(model, Supervised(model.task), plan)


def change(made, start):
    was = dict(start.network.named_parameters())
    return torch.cat(
        [(p - was[n]).detach().flatten() for n, p in made.network.named_parameters() if was[n].requires_grad]
    )


def test_privacy_is_on_unless_turned_off():
    run = Federated(shops(), rounds=Rounds(2))
    made = fitted(run)
    report = run.report
    assert 0 < report.epsilon <= 8
    # Noise is the least that keeps the budget, so nearly all of it is used.
    assert report.epsilon > 7.9
    text = "\n".join(report.lines())
    assert "privacy: row-level: one row more or less" in text
    assert f"epsilon spent {report.epsilon:.2f} of 8 at delta 1e-05" in text
    assert "the server saw sums of updates only" in text
    assert "predicted noise to signal" in text
    assert report.moved > 0
    assert float(change(made, head_only()).abs().min()) > 0
    assert report.rounds[0].loss is None
    assert [a.client for a in report.attacks] == ["shop0", "shop1", "shop2"]
    assert "membership attack AUC" in text
    for attacked in report.attacks:
        assert attacked.after.low <= attacked.after.auc <= attacked.after.high


def test_turned_off_it_says_so():
    run = Federated(shops(), rounds=Rounds(1), privacy=None)
    fitted(run)
    assert run.report.epsilon is None
    assert "privacy: OFF, as was asked for: updates travel as they are" in "\n".join(run.report.lines())


class Plain:
    """Takes the noise out, so that sums can be compared."""

    def __init__(self, monkeypatch):
        from netweight.run.federated import guard, privacy

        monkeypatch.setattr(guard, "row_noise", lambda *_: 1e-9)
        monkeypatch.setattr(guard.secrets, "randbits", lambda _: 7)
        monkeypatch.setattr(privacy, "row_noise", lambda *_: 1e-9)
        monkeypatch.setattr(Ledger, "of", lambda *_: [])
        monkeypatch.setattr(guard, "epsilon", lambda *_: 0.0)
        from netweight.run.federated import private

        monkeypatch.setattr(private.secrets, "randbits", lambda _: 7)


@pytest.mark.parametrize("travel", [Travel(), Travel(RandomK(0.5))])
@pytest.mark.parametrize("algorithm", [FedAvg(), FedAdam()])
def test_a_secure_sum_gives_the_plain_mean_up_to_fixed_point(monkeypatch, travel, algorithm):
    Plain(monkeypatch)
    monkeypatch.setattr(server, "fit_digest", lambda _: "f" * 64)  # places of a random mask follow from it
    options = {"rounds": Rounds(2), "travel": travel, "algorithm": algorithm}
    start = head_only()
    made = {s: change(fitted(Federated(shops(), privacy=RowLevel(secure=s), **options)), start) for s in (True, False)}
    # FedAdam divides by the size of the change, which magnifies rounding.
    torch.testing.assert_close(made[True], made[False], atol=1e-6 if algorithm == FedAvg() else 1e-4, rtol=1e-4)
    assert float(made[True].norm()) > 1e-3


class Vanishing(InProcess):
    """Some clients leave a round at a stage; what the server saw is kept."""

    def __init__(self, clients, gone, stage):
        super().__init__(clients)
        self.gone, self.stage, self.seen = gone, stage, []

    def exchange(self, tasks, seconds=None):
        stage = type(next(iter(tasks.values())))
        there = {n: t for n, t in tasks.items() if not (stage is self.stage and n in self.gone)}
        answers = super().exchange(there, seconds)
        self.seen += [a for a in answers.values() if isinstance(a, Fitted)]
        return {**answers, **{n: Lost(n, "gone") for n in tasks if n not in there}}


@pytest.mark.parametrize("stage", [Advertise, Share, FitTask, Unmask])
def test_a_fifth_of_the_clients_vanish_in_a_round_and_the_sum_is_that_of_the_others(monkeypatch, stage):
    Plain(monkeypatch)
    clients = shops(5)
    run = Federated(Vanishing(clients, ("shop3",), stage), rounds=Rounds(1), privacy=RowLevel())
    made = change(fitted(run), head_only())
    left = [c for c in shops(5) if stage is Unmask or c.name != "shop3"]
    plain = change(fitted(Federated(left, rounds=Rounds(1), privacy=RowLevel(secure=False))), head_only())
    torch.testing.assert_close(made, plain, atol=1e-6, rtol=1e-4)
    (done,) = run.report.rounds
    assert ("shop3" in done.took_part) == (stage is Unmask)
    assert [lost.client for lost in done.lost] == ["shop3"]


def test_a_deadline_bounds_a_secure_round_as_a_whole(monkeypatch):
    """One more client is silent in each exchange, and the server waits for it as long as it may."""
    clock = [0.0]

    class Waiting(Vanishing):
        def exchange(self, tasks, seconds=None):
            self.stage = type(next(iter(tasks.values())))
            self.gone = (GONE.get(self.stage),)
            if self.gone[0] in tasks:
                given[self.stage] = seconds
                clock[0] += seconds
            return super().exchange(tasks, seconds)

    GONE = {Advertise: "shop01", Share: "shop02", FitTask: "shop03", Unmask: "shop04"}
    given = {}
    monkeypatch.setattr(veiled, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    every = shops(12, rows=40)
    clients = [Client(f"shop{i:02d}", c.data) for i, c in enumerate(every)]
    run = Federated(Waiting(clients, (), None), rounds=Rounds(1, seconds=100.0), privacy=RowLevel(epsilon=30.0))
    fitted(run)
    assert {stage: pytest.approx(seconds) for stage, seconds in given.items()} == {
        Advertise: 10,
        Share: 10,
        FitTask: 70,
        Unmask: 10,
    }
    assert clock == [pytest.approx(100)]
    assert len(run.report.rounds[0].took_part) == 9
    # What nobody waits for is left to those that train, and each exchange has some time however long others took.
    one = veiled.Veiled(None, {"a": None}, {}, {}, 2, 1.0, 60.0)
    assert one._left(Fitted) == pytest.approx(54)
    clock[0] += 1000
    assert one._left(Fitted) == pytest.approx(6)


def test_too_few_are_left():
    run = Federated(Vanishing(shops(5), ("shop1", "shop3"), FitTask), rounds=Rounds(1))
    with pytest.raises(ClientError, match="round 0, secure sum: 3 clients answered, and 4 must. shop1: gone"):
        fitted(run)


def test_the_server_sees_masked_words_only():
    channel = Vanishing(shops(3), (), None)
    fitted(Federated(channel, rounds=Rounds(1)))
    assert len(channel.seen) == 3
    for answer in channel.seen:
        assert list(answer.tensors) == ["masked"]
        assert np.isnan(answer.loss)


def test_a_sum_that_no_honest_clients_make_is_refused():
    class Lying(InProcess):
        def exchange(self, tasks, seconds=None):
            answers = super().exchange(tasks, seconds)
            for name, a in answers.items():
                if isinstance(a, Fitted) and name == "shop0":
                    answers[name] = replace(a, tensors={"masked": a.tensors["masked"] + 2**29})
            return answers

    with pytest.raises(RunError, match="the sum of updates has norm .* One did not, and a sum does not tell which"):
        fitted(Federated(Lying(shops()), rounds=Rounds(1), privacy=RowLevel(largest=1.0)))


def test_client_level_noise_adds_up_over_the_smallest_cohort():
    start = head_only()
    run = Federated(shops(6, rows=40), rounds=Rounds(1), privacy=ClientLevel(epsilon=20.0))
    made = fitted(run, start, replace(PLAN, learning_rate=1e-9))
    # The change is noise alone: of 6 clients, each with the share for 4.
    size = client_noise(20.0, 1e-5, 1) / 2 * 6**0.5 / 6
    found = change(made, start)
    assert 0.7 * size < float(found.std()) < 1.3 * size
    assert run.report.epsilon == pytest.approx(20.0, rel=1e-3)
    assert "client-level: one client more or less" in "\n".join(run.report.lines())


def test_many_clients_are_hidden_whole():
    assert isinstance(Automatic().among(99), RowLevel)
    assert isinstance(Automatic(4.0, 1e-6).among(100), ClientLevel)
    assert Automatic(4.0, 1e-6).among(100).epsilon == 4.0


def setting(rows=2000, clients=4, d=1000, rounds=10, **plan):
    held = {f"c{i}": rows for i in range(clients)}
    return Setting(Plan(**{"epochs": 5, "batch_size": 32, **plan}), Rounds(rounds), held, d)


def test_noise_to_signal_is_what_a_simulation_gives():
    """Noise of all steps and clients, added up, over the way of gradients that all agree."""
    here = setting(rows=200, clients=3, d=400, rounds=2)
    ratio, noise = noise_to_signal(RowLevel(), here)
    drawn = np.random.default_rng(0)
    steps = 2 * planned(200, 2.5, 32)
    lengths = []
    for _ in range(200):
        total = sum(drawn.normal(0, noise / 32, (steps, 400)).sum(axis=0) / 3 for _ in range(3))
        lengths.append(np.linalg.norm(total) / steps)
    assert ratio == pytest.approx(np.mean(lengths), rel=0.03)
    client, noise = noise_to_signal(ClientLevel(), here)
    total = [np.linalg.norm(drawn.normal(0, noise, (2, 400)).sum(axis=0)) / 2 / 2 for _ in range(200)]
    assert client == pytest.approx(np.mean(total), rel=0.03)


def test_what_is_said_to_help_helps():
    base = noise_to_signal(RowLevel(), setting())[0]
    assert noise_to_signal(RowLevel(), setting(rows=8000))[0] < base
    assert noise_to_signal(RowLevel(), setting(clients=16))[0] < base
    assert noise_to_signal(RowLevel(), setting(d=100))[0] < base
    assert noise_to_signal(RowLevel(), setting(batch_size=256))[0] < base
    assert noise_to_signal(RowLevel(epsilon=20), setting())[0] < base
    client = noise_to_signal(ClientLevel(), setting(clients=100))[0]
    assert noise_to_signal(ClientLevel(), setting(clients=400))[0] < client


def test_noise_that_drowns_the_signal_is_refused_with_its_numbers():
    model = tiny_model()
    freeze_embeddings(model.network, True)
    run = Federated(shops(2, rows=30), rounds=Rounds(2), privacy=Automatic(0.1))
    with pytest.raises(OptionError) as raised:
        fitted(run, model)
    text = str(raised.value)
    assert "the noise of epsilon 0.1 (delta 1e-05) would be" in text
    assert "from 36 rows of 2 clients in 2 rounds" in text
    assert (
        "What helps: fewer trained parameters (--train lora or head; Finetune(train=...)), more rows, a larger "
        "batch_size" in text
    )
    assert text.endswith("or a larger epsilon (--epsilon).")
    with pytest.raises(OptionError, match="more clients in a round"):
        refuse(ClientLevel(), setting(d=10**6), FedAvg(), Travel())


@pytest.mark.parametrize("aggregate", [Median(), TrimmedMean(), Krum()])
def test_secure_sums_cannot_be_ordered(aggregate):
    with pytest.raises(OptionError, match=f"{type(aggregate).__name__} orders or compares .*--aggregate mean"):
        fitted(Federated(shops(4), algorithm=FedAvg(aggregate)))


def test_what_does_not_add_up_is_refused():
    for codec in (TopK(), Int8()):
        with pytest.raises(
            OptionError, match=f"{type(codec).__name__} picks places or scales .*--travel random-k, full"
        ):
            fitted(Federated(shops(), travel=Travel(codec)))
    with pytest.raises(OptionError, match="SCAFFOLD sends a second set of tensors.*--algorithm"):
        fitted(Federated(shops(), algorithm=Scaffold()))
    one = Rounds(share=0.3)
    with pytest.raises(OptionError, match="secure aggregation hides a client among others, and 1 takes part"):
        fitted(Federated(shops(), rounds=one))
    with pytest.raises(OptionError, match="ClientLevel hides a client among others"):
        fitted(Federated(shops(), rounds=one, privacy=ClientLevel(secure=False)))
    with pytest.raises(
        ClientError,
        match=r"1 of 1 clients can take part, and 2 must.* Privacy hides .*--privacy off .*RowLevel\(secure=False\), too. needs no",
    ):
        fitted(Federated(shops(1)))


def test_errors_name_options_that_the_command_line_has():
    said = "".join(path.read_text(encoding="utf-8") for path in Path(server.__file__).parent.glob("*.py"))
    group = typer.main.get_command(app).commands["federate"]
    there = {word for p in group.commands["server"].params for word in (*p.opts, *p.secondary_opts)}
    named = set(re.findall(r"--[a-z][a-z-]*", said))
    assert {"--privacy", "--epsilon", "--train", "--aggregate"} <= named
    assert named <= there


def test_without_secure_sums_they_are_allowed():
    for options in ({"algorithm": FedAvg(Median())}, {"travel": Travel(Int8())}, {"algorithm": Scaffold()}):
        run = Federated(shops(3, rows=40), rounds=Rounds(2), privacy=RowLevel(secure=False), **options)
        fitted(run)
        assert run.report.epsilon <= 8
        assert "the server saw each client's update" in run.report.privacy


def test_statistics_are_refused_and_the_text_says_what_to_do():
    run = Federated(shops())
    with pytest.raises(OptionError, match="Moments is an exact sum over rows.* probe=False.*--privacy off"):
        Finetune(train="head")(tiny_model(), run, PLAN)
    made = Finetune(train="head", probe=False, epochs=1, learning_rate=1e-2)(tiny_model(), run, PLAN)
    assert made.digest != tiny_model().digest


def test_adapters_move_under_the_default_privacy():
    run = Federated(shops(3, rows=60), rounds=Rounds(1), privacy=RowLevel(epsilon=50.0))
    model = tiny_model()
    made = Finetune(train="lora", rank=1, probe=False, epochs=1, learning_rate=1e-2)(model, run, PLAN)
    was = dict(model.network.named_parameters())
    moved = {n for n, p in made.network.named_parameters() if not torch.equal(p, was[n])}
    assert any("attention" in n for n in moved)


def test_a_loss_that_is_no_sum_over_rows_is_refused_by_the_client():
    with pytest.raises(ClientError, match="Contrastive is no sum over rows"):
        Federated(shops(2), rounds=Rounds(1)).fit(head_only(), Contrastive(), PLAN)


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match="epsilon of RowLevel is 0; use a number above 0"):
        RowLevel(epsilon=0)
    with pytest.raises(OptionError, match="delta of ClientLevel is 0.5"):
        ClientLevel(delta=0.5)
    with pytest.raises(OptionError, match="delta of RowLevel is 0"):
        Automatic(delta=0)
    said = "delta is 0.001, and with 2,000 rows that .* one of them whole; use .* below 1 / 2,000, such as 5e-05"
    with pytest.raises(OptionError, match=said):
        refuse(RowLevel(delta=1e-3), setting(), FedAvg(), Travel())
    with pytest.raises(OptionError, match=r"delta is 0.01, and with 400 clients that .*\(--delta\)"):
        refuse(ClientLevel(delta=0.01), setting(clients=400), FedAvg(), Travel())
    refuse(RowLevel(delta=4e-4), setting(), FedAvg(), Travel())


def test_a_server_that_was_killed_gets_the_same_answer_and_it_costs_nothing(tmp_path):
    (client,) = shops(1, tmp_path)
    task = FitTask("f" * 64, 0, head_only(), Supervised(head_only().task), PLAN, privacy=RowLevel().task(1, 1))
    first = client.answer(task)
    (again,) = shops(1, tmp_path)
    second = again.answer(task)
    assert second.epsilon == first.epsilon <= 8
    for name, value in first.tensors.items():
        assert torch.equal(second.tensors[name], value)


def test_a_round_that_is_asked_for_again_is_opened_for_the_same_clients_only(tmp_path):
    """Vectors are those of the first time: two sums would differ by the update of who is in one of them."""

    class Dying(InProcess):
        def exchange(self, tasks, seconds=None):
            answers = super().exchange(tasks, seconds)
            if isinstance(next(iter(tasks.values())), Unmask):
                raise KeyboardInterrupt
            return answers

    def clients():
        return shops(4, tmp_path)

    with pytest.raises(KeyboardInterrupt):
        fitted(Federated(Dying(clients()), rounds=Rounds(1)))
    one_less = Federated(Vanishing(clients(), ("shop3",), FitTask), rounds=Rounds(1))
    with pytest.raises(ClientError, match="shop0 has told shares for the sum of shop0, shop1, shop2, shop3 in round 0"):
        fitted(one_less)
    run = Federated(clients(), rounds=Rounds(1))
    fitted(run)
    assert run.report.epsilon <= 8


class Twice(InProcess):
    """What secure aggregation asks is asked a second time, as where the answers were lost on their way."""

    def exchange(self, tasks, seconds=None):
        task = next(iter(tasks.values()))
        first = super().exchange(tasks, seconds)
        if not isinstance(task, Share | FitTask | Unmask):
            return first
        masked = {n: a.tensors["masked"] for n, a in first.items()} if isinstance(task, FitTask) else {}
        again = super().exchange(tasks, seconds)
        for name, answer in again.items():
            if isinstance(task, FitTask):
                assert torch.equal(answer.tensors["masked"], masked[name])
            else:
                assert answer == first[name]
                assert isinstance(answer, Shared | Told)
        if isinstance(task, Unmask):
            self.unmask = task
        return again


def test_steps_of_secure_aggregation_are_answered_again_and_alike(tmp_path):
    clients = shops(4, tmp_path)
    channel = Twice(clients)
    run = Federated(channel, rounds=Rounds(1))
    fitted(run)
    assert run.report.rounds[0].lost == ()
    assert [len(client._guard.ledger.of(None)) for client in clients] == [1] * 4
    with pytest.raises(OptionError, match="shop0 has told shares for the sum of shop0, shop1, shop2, shop3"):
        clients[0].answer(replace(channel.unmask, survivors=("shop0", "shop1", "shop2")))


class Weighing(InProcess):
    """Notes what clients weigh in secure sums, and dies when the first is opened, where it is told to."""

    def __init__(self, clients, dies=False):
        super().__init__(clients)
        self.dies, self.weights = dies, {}

    def exchange(self, tasks, seconds=None):
        self.weights |= {n: t.seat.weight for n, t in tasks.items() if isinstance(t, FitTask)}
        if self.dies and isinstance(next(iter(tasks.values())), Unmask):
            raise Killed
        return super().exchange(tasks, seconds)


def test_a_round_that_is_asked_for_again_weighs_clients_as_before(tmp_path):
    """Two sums of the same updates under other weights would tell updates apart."""
    counts = {"shop0": 80, "shop1": 40, "shop2": 40, "shop3": 120}
    every = [Client(n, part(tiny_rows(rows)), tmp_path / n) for n, rows in counts.items()]

    def run(channel):
        return Federated(channel, folder=tmp_path / "server", rounds=Rounds(1), privacy=Automatic(30.0))

    first, second = Weighing(every, dies=True), Weighing(every[:3])
    with pytest.raises(Killed):
        fitted(run(first))
    fitted(run(second))
    assert second.weights == {name: first.weights[name] for name in second.weights}
    assert len(set(first.weights.values())) == 3
    assert max(second.weights.values()) < max(first.weights.values()) == 1


def test_an_update_is_not_sent_a_second_time_at_another_weight(tmp_path):
    class Dying(Weighing):
        def exchange(self, tasks, seconds=None):
            if isinstance(next(iter(tasks.values())), FitTask):
                self.task = tasks["shop0"]
            return super().exchange(tasks, seconds)

    clients = shops(2, tmp_path)
    channel = Dying(clients, dies=True)
    with pytest.raises(Killed):
        fitted(Federated(channel, rounds=Rounds(1)))
    other = replace(channel.task, seat=replace(channel.task.seat, weight=0.5))
    with pytest.raises(
        OptionError, match="shop0 has answered round 0 weighing 1, and was asked .* weighing 0.5: two such"
    ):
        clients[0].answer(other)


class Coming(InProcess):
    """Clients of which `n` are there; `asked` are the tasks."""

    def __init__(self, clients, n):
        super().__init__(clients)
        self.n, self.asked, self.looks = n, [], 0

    def clients(self):
        self.looks += 1
        return super().clients()[: self.n if isinstance(self.n, int) else self.n(self.looks)]

    def exchange(self, tasks, seconds=None):
        self.asked += tasks.values()
        return super().exchange(tasks, seconds)


def test_who_comes_later_raises_how_many_must_be_left(monkeypatch):
    channel = Coming(shops(9, rows=40), 2)
    after = server._Fit.round

    def round_(self, state):
        try:
            return after(self, state)
        finally:
            channel.n = 9

    monkeypatch.setattr(server._Fit, "round", round_)
    run = Federated(channel, rounds=Rounds(2), privacy=RowLevel(epsilon=20.0))
    fitted(run)
    assert [len(r.took_part) for r in run.report.rounds] == [2, 9]
    assert {(t.round, t.threshold) for t in channel.asked if isinstance(t, Advertise)} == {(0, 2), (1, 6)}


def test_a_server_waits_for_those_that_privacy_needs():
    channel = Coming(shops(), lambda looks: 1 if looks < 3 else 3)
    run = Federated(channel, rounds=Rounds(1, wait=10))
    fitted(run)
    assert run.report.rounds[0].took_part == ("shop0", "shop1", "shop2")


def test_a_server_that_was_killed_promises_what_it_promised(tmp_path, monkeypatch):
    from netweight.run.federated import privacy

    def run(n):
        channel = Coming(shops(6, tmp_path / "shops", rows=40), n)
        return Federated(channel, folder=tmp_path / "server", rounds=Rounds(1), privacy=Automatic(30.0))

    def killed(*_):
        raise Killed

    monkeypatch.setattr(privacy, "CROSS_DEVICE", 5)
    with monkeypatch.context() as patch:
        patch.setattr(server._Fit, "_veiled", killed)
        with pytest.raises(Killed):
            fitted(run(6))
    monkeypatch.setattr(privacy, "CROSS_DEVICE", 100)
    with pytest.raises(ClientError, match="3 of 3 clients can take part, and 4 must"):
        fitted(run(3))
    last = run(6)
    fitted(last)
    assert last.report.privacy.startswith("client-level")


def test_secrets_are_shared_where_two_thirds_must_be_left():
    (client,) = shops(1)
    keys = client.answer(Advertise("f", 0, 2))
    with pytest.raises(OptionError, match="shop0 was told that 2 of 4 clients can open a sum; .* where 3 must"):
        client.answer(Share("f", 0, {f"shop{i}": keys for i in range(4)}))


def test_a_client_stops_when_its_budget_is_spent(tmp_path):
    (client,) = shops(1, tmp_path)
    task = FitTask("f" * 64, 0, head_only(), Supervised(head_only().task), PLAN, privacy=RowLevel().task(2, 1))
    costs = [client.answer(replace(task, round=r)).epsilon for r in (0, 1)]
    assert 0 < costs[0] < costs[1] <= 8
    (again,) = shops(1, tmp_path)
    with pytest.raises(OptionError, match="one more round would cost the rows of shop0 epsilon .* 8 was promised"):
        again.answer(replace(task, round=0))
    other = again.answer(replace(task, fit="e" * 64))
    assert other.epsilon == pytest.approx(costs[0])
    assert other.in_all > other.epsilon


@pytest.mark.parametrize("round_", [1, -1])
def test_a_round_that_no_noise_is_planned_for_is_refused(round_):
    """No rounds would be left to count, and a limit would count none."""
    client = Client("shop0", shops(1)[0].data, limit=8.0)
    privacy = RowLevel(epsilon=1e6).task(1, 1)
    task = FitTask("f" * 64, round_, head_only(), Supervised(head_only().task), PLAN, privacy=privacy)
    with pytest.raises(OptionError, match=f"shop0 was asked for round {round_} of a fit of 1, counted from 0; .*Begin"):
        client.answer(task)
    with pytest.raises(OptionError, match="the rows of shop0 would have cost epsilon .* and it allows 8"):
        client.answer(replace(task, round=0))


class Claiming(InProcess):
    """Tells clients that others add noise, who are not there."""

    def exchange(self, tasks, seconds=None):
        given = {n: t for n, t in tasks.items() if isinstance(t, FitTask)}
        claimed = {n: replace(t, privacy=replace(t.privacy, cohort=10**12)) for n, t in given.items()}
        return super().exchange({**tasks, **claimed}, seconds)


def test_a_limit_holds_for_a_share_of_noise_where_others_add_theirs():
    def run(channel, **options):
        clients = [Client(c.name, c.data, limit=41.0) for c in shops(3, rows=40)]
        one = Federated(channel(clients), rounds=Rounds(1), privacy=ClientLevel(epsilon=40.0, **options))
        fitted(one)
        return one.report.epsilon

    assert run(InProcess) == pytest.approx(40.0, rel=1e-3)
    with pytest.raises(
        ClientError, match="share of the noise of 1000000000000 clients, where the sum of 2 may be seen"
    ):
        run(Claiming)
    with pytest.raises(
        ClientError, match="share of the noise of 2 clients, where the sum of 1 may be seen; use row-level"
    ):
        run(InProcess, secure=False)
    client = Client("shop0", shops(1)[0].data, limit=21.0)
    client.answer(Advertise("f" * 64, 0, 10**12))
    task = FitTask("f" * 64, 0, head_only(), Supervised(head_only().task), PLAN, seat=Seat({}, {}, 2, 1.0, 100.0))
    with pytest.raises(OptionError, match="the sum of 0 may be seen"):
        client.answer(replace(task, privacy=ClientLevel().task(1, 10**12)))


def test_a_time_box_that_stops_early_costs_less(tmp_path):
    (client,) = shops(1, tmp_path)
    # So many steps take minutes, and a fit is given a second at least.
    plan = replace(PLAN, epochs=4000, seconds=0.05)
    task = FitTask("f" * 64, 0, head_only(), Supervised(head_only().task), plan, privacy=RowLevel().task(1, 1))
    found = client.answer(task)
    held = json.loads((tmp_path / "shop0" / "privacy.json").read_text())
    ((one,),) = held.values()
    assert 0 < one["count"] < planned(48, 4000, 16)
    assert found.epsilon == pytest.approx(epsilon([Steps(**one)], 1e-5))
    assert found.epsilon < 8


def test_a_damaged_ledger_is_no_empty_one(tmp_path):
    (tmp_path / "privacy.json").write_text("{")
    with pytest.raises(StoreError, match="the privacy ledger .* is damaged"):
        Ledger(tmp_path / "privacy.json")
    (tmp_path / "opened.json").write_text("[1]")
    with pytest.raises(StoreError, match="the record of opened sums .* is damaged"):
        Opened(tmp_path / "opened.json")


@pytest.mark.parametrize(
    ("more", "said"),
    [({"variate": {}}, "SCAFFOLD's variate"), ({"codec": Int8()}, "Int8 of its"), ({"codec": TopK()}, "TopK of its")],
)
def test_a_client_sends_nothing_beside_what_noise_for_clients_hides(more, said):
    (client,) = shops(1)
    task = FitTask("f" * 64, 0, head_only(), Supervised(head_only().task), PLAN, privacy=ClientLevel().task(1, 1))
    with pytest.raises(OptionError, match=f"shop0 was asked for {said}.*--travel"):
        client.answer(replace(task, **more))
    assert client._guard.ledger.of(None) == []


def test_noise_for_clients_hangs_on_all_bits_of_its_seed(monkeypatch):
    """torch's generator looks at the last 32 on a CPU: so many can be tried."""
    (client,) = shops(1)
    task = FitTask("f" * 64, 0, head_only(), Supervised(head_only().task), PLAN, privacy=ClientLevel().task(1, 1))
    old, found = {"w": torch.zeros(4)}, []
    for seed in (5, 5 + 2**40):
        monkeypatch.setattr(guard.secrets, "randbits", lambda _, seed=seed: seed)
        found.append(client._guard.noised(task, old, {"w": torch.zeros(4)}, frozenset({"w"}))["w"])
    assert not torch.equal(*found)


def test_copies_of_a_ledger_lose_nothing(tmp_path):
    one, two = Ledger(tmp_path / "privacy.json"), Ledger(tmp_path / "privacy.json")
    one.add("a", Steps(1.0, 0.1, 100))
    two.add("b", Steps(1.0, 0.1, 100))
    assert len(one.of(None)) == len(two.of(None)) == 2


def test_buffers_that_training_changes_are_refused():
    (client,) = shops(1)
    model = head_only()
    task = FitTask("f" * 64, 0, model, Supervised(model.task), PLAN, privacy=RowLevel().task(1, 1))
    old, sent = (
        {"head.bias": torch.zeros(2), "mean": torch.zeros(2)},
        {"head.bias": torch.ones(2), "mean": torch.ones(2)},
    )
    with pytest.raises(OptionError, match="training changed the buffer mean, which no noise hides"):
        client._guard.noised(task, old, sent, frozenset({"head.bias"}))


def test_updates_are_shortened_and_must_be_finite():
    values = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    shortened(values, 1.0)
    assert float(values["a"]) == pytest.approx(0.6)
    with pytest.raises(OptionError, match="values that are not finite"):
        shortened({"a": torch.tensor([torch.nan])}, 1.0)


def test_what_private_runs_say_travels():
    model = head_only()
    loss = Supervised(model.task)
    seat = Seat({"a": "00ff"}, {"a": "01"}, 3, 0.5, 100.0)
    keys = Advertised("aa", "bb")
    check = Membership(0.5, 0.4, 0.6, 0.0, 10, 10)
    for message in (
        *(
            Advertise("f", 0, 2),
            keys,
            Share("f", 0, {"a": keys}),
            Shared({"a": "00"}, {"a": "01"}, "02"),
            Unmask("f", 0, ("a", "b")),
        ),
        *(Told({"a": "00"}, {}), check),
    ):
        assert Wire().unpack(Wire().pack(message)) == message
    for privacy in (RowLevel().task(3, 2), ClientLevel().task(3, 2)):
        task = FitTask("f", 1, model, loss, PLAN, privacy=privacy, seat=seat)
        found = Wire().unpack(Wire().pack(task))
        assert (found.privacy, found.seat) == (privacy, seat)
    words = Fitted({"masked": torch.tensor([-1, 5], dtype=torch.int32)}, 9, float("nan"), epsilon=2.5)
    found = Wire().unpack(Wire().pack(words))
    assert torch.equal(found.tensors["masked"], words.tensors["masked"])
    assert (found.epsilon, np.isnan(found.loss)) == (2.5, True)


def test_keys_and_shares_are_hexadecimal():
    (client,) = shops(1)
    keys = client.answer(Advertise("f", 0, 2))
    with pytest.raises(OptionError, match="keys and shares travel as hexadecimal text"):
        client.answer(Share("f", 0, {"shop0": replace(keys, seal="no"), "shop1": keys}))


LIES = [
    (lambda a: replace(a, seal="00" * 32), Advertised, "its public keys are none."),
    (lambda a: replace(a, mask="no"), Advertised, "its public keys are none."),
    (
        lambda a: replace(a, sealed=dict.fromkeys(a.sealed, "no")),
        Shared,
        "it sent no sealed share to each other client.",
    ),
    (lambda a: replace(a, sealed={}), Shared, "it sent no sealed share to each other client."),
    (lambda a: replace(a, tensors={"masked": a.tensors["masked"][1:]}), Fitted, "no vector of 66 masked words."),
    (lambda a: replace(a, rows=7), Fitted, "it joined with 48 rows and now has 7; it is asked anew what it has."),
    (lambda a: replace(a, digests={}), Shared, "it vouches for no shares: digests are missing."),
    (lambda a: replace(a, seed="no"), Shared, "it vouches for no shares: digests are missing."),
    (lambda a: replace(a, seeds=dict.fromkeys(a.seeds, "01" * 66)), Told, "it told other shares than it was dealt."),
    (lambda a: replace(a, seeds={}), Told, "it told other shares than it was asked for."),
    (lambda a: a.seeds, Told, "no Told came."),
]


@pytest.mark.parametrize(("lie", "kind", "said"), LIES)
def test_one_client_that_lies_ends_no_secure_round(lie, kind, said):
    class Lying(InProcess):
        def exchange(self, tasks, seconds=None):
            answers = super().exchange(tasks, seconds)
            return {n: lie(a) if isinstance(a, kind) and n == "shop0" else a for n, a in answers.items()}

    run = Federated(Lying(shops(4)), rounds=Rounds(1))
    fitted(run)
    ((name, reason),) = [(lost.client, lost.reason) for lost in run.report.rounds[0].lost]
    assert name == "shop0"
    assert reason.endswith(said)
    assert ("shop0" in run.report.rounds[0].took_part) == (kind is Told)


def test_epsilon_that_cannot_be_is_no_answer():
    class Odd(InProcess):
        def exchange(self, tasks, seconds=None):
            answers = super().exchange(tasks, seconds)
            odd = {n: a for n, a in answers.items() if isinstance(a, Fitted) and n == "shop1"}
            return answers | {n: replace(a, epsilon=float("nan")) for n, a in odd.items()}

    for secure in (True, False):
        run = Federated(Odd(shops(4)), rounds=Rounds(1), privacy=RowLevel(secure=secure))
        fitted(run)
        assert 0 < run.report.epsilon <= 8
        assert "shop1" not in run.report.rounds[0].took_part


def test_a_client_says_what_is_promised_of_its_rows():
    said = []
    clients = shops(3)
    clients[0] = Client("shop0", clients[0].data, said=said.append)
    for options in ({}, {"privacy": RowLevel(secure=False)}, {"privacy": None}):
        fitted(Federated(clients, rounds=Rounds(2), **options))
    assert said == [
        "shop0: fit: row-level privacy, epsilon 8 at delta 1e-05; the server sees sums of updates only.",
        "shop0: fit: row-level privacy, epsilon 8 at delta 1e-05; the server sees this client's update.",
        "shop0: fit: privacy is OFF; nothing bounds what this client's updates tell of its rows.",
    ]


def test_a_client_that_came_back_in_the_middle_of_a_round_waits_for_the_next():
    (client,) = shops(1)
    with pytest.raises(OptionError, match="shop0 has advertised no keys for round 3"):
        client.answer(Unmask("f", 3, ("shop0",)))
