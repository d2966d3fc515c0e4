"""What a run does to rows before a fit: features, spliced rows; and that sparse tables resume exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Killed, Killer, full_disk, tiny_model
from netweight.data import Dataset, Rows
from netweight.encode import Tokens
from netweight.errors import OptionError
from netweight.features import BIGRAM_A, BIGRAM_B, features
from netweight.loss import Batch, SoftTargets, Supervised
from netweight.model import Model
from netweight.network import Network
from netweight.run import Local, local
from netweight.run.local import logits_of, spliced
from netweight.task import Classify, Score
from netweight.techniques import Distill, Finetune, LinearFloor, Static
from netweight.techniques.finetune import Moments, set_probe
from netweight.train import Plan

RAGGED = st.lists(st.lists(st.integers(0, 30_000), max_size=7), max_size=8)


def tokens_of(rows: list[list[int]], types: int = 0) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    flat = np.array([i for row in rows for i in row], np.int32)
    return Tokens(flat, np.full(len(flat), types, np.uint8), offsets)


@given(RAGGED, st.sampled_from([0, 1, 64, 4096]))
def test_features_equal_a_plain_loop(rows: list[list[int]], buckets: int) -> None:
    index, starts = features(tokens_of(rows), 40_000, buckets)
    wanted: list[int] = []
    begins = []
    for row in rows:
        begins.append(len(wanted))
        for i, token in enumerate(row):
            wanted.append(token)
            if buckets and i + 1 < len(row):
                wanted.append(40_000 + (token * BIGRAM_A + row[i + 1] * BIGRAM_B) % buckets)
    assert index.tolist() == wanted
    assert starts.tolist() == begins


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(4, 90), min_size=1, max_size=9), min_size=1, max_size=6),
    st.integers(4, 12),
    st.integers(0, 9),
)
def test_spliced_rows_begin_like_one_stretch_and_end_like_another(
    rows: list[list[int]], longest: int, seed: int
) -> None:
    given_rows = [[2, *row, 3] for row in rows]
    stretches = [
        [2, *row[at : at + longest - 2], 3] for row in rows for at in range(max(1, len(row) - (longest - 2) + 1))
    ]
    made = spliced(tokens_of(given_rows), 20, longest, seed)
    assert len(made) == 20
    assert made.ids.tolist() == spliced(tokens_of(given_rows), 20, longest, seed).ids.tolist(), "not deterministic"
    assert spliced(tokens_of(given_rows), 7, longest, seed).ids.tolist() == made.ids[: made.offsets[7]].tolist()
    for i in range(20):
        new = made.ids[made.offsets[i] : made.offsets[i + 1]].tolist()
        assert 2 <= len(new) <= min(longest, max(map(len, given_rows)))
        cuts = range(1, len(new))
        assert any(
            any(row[:cut] == new[:cut] for row in stretches)
            and any(row[cut - len(new) :] == new[cut:] for row in stretches)
            for cut in cuts
        )


def test_stretches_come_from_anywhere_in_a_text() -> None:
    made = spliced(tokens_of([[2, *range(10, 110), 3]]), 2000, 12, 0)
    assert set(made.ids.tolist()) == {2, 3, *range(10, 110)}
    last = made.ids[made.offsets[1:] - 2]
    assert (last == 109).mean() < 0.1, "what stands before the last token is not always the text's end"
    assert len(spliced(tokens_of([]), 0, 12, 0)) == 0


def test_spliced_rows_are_as_many_as_their_tokens_allow(
    model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stretches of the whole text, where a model reads a part of it; none of pairs."""
    asked, fits = [], []

    def seen(texts: Tokens, count: int, longest: int, seed: int) -> Tokens:
        asked.append((int(texts.lengths.max()), count, longest))
        return spliced(texts, count, longest, seed)

    monkeypatch.setattr(local, "spliced", seen)
    monkeypatch.setattr(local, "fit", lambda network, source, loss, plan, **_: fits.append((source.tokens, plan)))
    long = replace(dataset, train=replace(dataset.train, text=tuple(t + " long" * 98 for t in dataset.train.text)))
    rows, loss = len(dataset.train), SoftTargets(model.task, (model,))
    run = Local(long)
    whole = int(run._encoded(model.encoder.reading(512), run.data, False).lengths.max())
    assert whole > 98 > model.encoder.max_length
    few = Plan(precision="fp32", splice=2.0, spliced_tokens=10 * model.encoder.max_length)
    run.fit(model, loss, few)
    run.fit(model, loss, replace(few, spliced_tokens=10**6))
    Local(replace(long, train=replace(long.train, pair=long.train.text))).fit(model, loss, few)
    read = model.encoder.max_length
    assert asked == [(whole, 10, read), (whole, 2 * rows, read), (read, 0, read)]
    assert [len(tokens) for tokens, _ in fits] == [rows + 10, 3 * rows, rows]
    for tokens, plan in fits:
        assert plan.epochs * len(tokens.ids) == pytest.approx(few.epochs * rows * read), "as many tokens as without"


def test_spliced_rows_need_a_teacher_and_do_not_lengthen_a_fit(model: Model, dataset: Dataset) -> None:
    class Counting:
        steps = 0

        def start(self, label: str, steps: int, done: int) -> None:
            self.steps = steps

        def step(self, step: int, loss: float, rate: float) -> None:
            pass

        def note(self, message: str) -> None:
            pass

    plan = Plan(batch_size=16, epochs=2, precision="fp32", splice=3.0)
    with pytest.raises(OptionError, match="spliced rows have no labels; only a loss with teachers"):
        Local(dataset).fit(model, Supervised(model.task), plan)
    counted = []
    for splice in (0.0, 3.0):
        reporter = Counting()
        Local(dataset).fit(model, SoftTargets(model.task, (model,)), replace(plan, splice=splice, reporter=reporter))
        counted.append(reporter.steps)
    assert counted == [10, pytest.approx(10, abs=1)], "as many tokens; spliced rows are a little shorter or longer"


@dataclass(frozen=True)
class Counted:
    """Rows."""

    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(len(batch))}


def test_of_a_large_pool_teachers_label_a_sample(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of millions of rows the first student would have to wait for hours; pretraining sees all."""
    monkeypatch.setattr("netweight.data.rows.MOST_TAUGHT", 7)
    pool, rows = Rows(tuple(f"zip {'my ' * i}coat" for i in range(20))), len(dataset.train)
    run, shown = Local(replace(dataset, pool=pool), tmp_path), []
    monkeypatch.setattr(local, "fit", lambda network, source, *_, **__: shown.append(len(source)))
    assert len(run.outputs(model, unlabelled=True)) == rows + 7
    loss = SoftTargets(model.task, (model,))
    run.fit(model, loss, Plan(precision="fp32"))
    run.fit(model, replace(loss, teachers=()), Plan(precision="fp32"))
    assert shown == [rows + 7, rows + 20]
    assert int(run.reduce(model, Counted(), unlabelled=True)["rows"]) == rows + 20
    assert int(run.reduce(model, Counted())["rows"]) == rows


def test_of_many_labels_teachers_label_fewer_rows(
    model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte holds what is said of 89,000 rows, where labels are 3,000: spliced rows go first, then real ones."""
    rows, outputs = len(dataset.train), model.task.outputs
    counted = replace(dataset, counts=dict.fromkeys(map(str, range(outputs)), 1))
    loss, plan, sources = SoftTargets(model.task, (model,)), Plan(precision="fp32", splice=1.0), list[local._Source]()
    monkeypatch.setattr(local, "fit", lambda network, source, *_, **__: sources.append(source))
    for room in (rows + 9, 30):
        for module in ("netweight.run.local", "netweight.data.rows"):
            monkeypatch.setattr(f"{module}.MOST_SAID", outputs * room)
        run = Local(counted)
        run.fit(model, loss, plan)
        assert [len(sources[-1]), len(sources[-1].teachers[0])] == [room, room]
    known = model.task.targets(run.taught.train.label or ())
    assert sources[-1].targets.tolist() == known.tolist(), "those of the rows that were taken"
    run.fit(model, replace(loss, teachers=()), replace(plan, splice=0.0))
    assert len(sources[-1]) == rows, "who learns from labels alone has all of them"


def test_students_of_every_kind_share_what_the_teacher_says(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    """One file for the rows and one for those that were spliced: labelling them takes longer than a small student."""
    kinds = (
        Static(width=8, buckets=16, epochs=1, splice=2.0, reads=64),
        Static(width=8, buckets=16, filters=4, epochs=1, splice=2.0),
        Distill(layers=1, epochs=1, splice=1.0),
    )
    for technique in kinds:
        technique(model, Local(dataset, tmp_path), Plan(batch_size=16))
        assert len(list(tmp_path.glob("outputs-*"))) == 2, technique
    replace(kinds[0], reads=8)(model, Local(dataset, tmp_path), Plan(batch_size=16))
    assert len(list(tmp_path.glob("outputs-*"))) == 3, "shorter spliced rows are others"


def test_students_may_read_farther_than_their_teachers(
    model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = replace(model, encoder=model.encoder.reading(6))
    rows = Local(dataset)._encoded(model.encoder, dataset, False)
    assert int(rows.lengths.max()) > 6
    labelled, usual = [], local.logits_of

    def seen(model: Model, tokens: Tokens, half: bool = False) -> torch.Tensor:
        labelled.append(tokens)
        return usual(model, tokens, half)

    monkeypatch.setattr(local, "logits_of", seen)
    made = Static(width=8, buckets=16, epochs=1, splice=2.0, reads=24)(teacher, Local(dataset), Plan(precision="fp32"))
    assert made.encoder.max_length == 24
    assert made.encoder.definition == teacher.encoder.definition
    assert [int(tokens.lengths.max()) for tokens in labelled] == [6, 6], "rows, and what was spliced of them"
    assert teacher.encoder.max_length == 6
    floor = LinearFloor(reads=24)(teacher, Local(dataset), Plan())
    same = LinearFloor()(model.with_network(teacher.network), Local(dataset), Plan())
    assert int(rows.lengths.max()) <= 24
    for name, value in floor.network.state_dict().items():
        assert torch.equal(value, same.network.state_dict()[name]), name


def test_what_teachers_take_counts_in_the_time_box(
    model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, boxes = [0.0], []
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(local, "fit", lambda *_, **__: boxes.append(_[3].seconds))
    usual = local.logits_of

    def slow(*given: object, **more: object) -> torch.Tensor:
        now[0] += 40
        return usual(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "logits_of", slow)
    # Besides the rows and the spliced ones, the student and the teacher are asked twice to see how long a few rows take.
    for seconds, splice in ((100.0, 0.0), (1300.0, 1.0), (300.0, 1.0), (60.0, 1.0), (None, 1.0)):
        Local(dataset).fit(model, SoftTargets(model.task, (model,)), Plan(seconds=seconds, splice=splice))
    assert boxes == [60, 1300 - 240, 300 - 120, 1, None], "in 300 seconds there is no time for spliced rows"


def test_labels_of_spliced_rows_take_a_part_of_the_time_box(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, labelled = [0.0], []
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(local, "fit", lambda *_, **__: None)
    monkeypatch.setattr(local, "half_pays", lambda device: True)
    usual, each = local.logits_of, [0.001]

    def slow(of: Model, tokens: Tokens, half: bool = False) -> torch.Tensor:
        now[0] += each[0] * len(tokens.ids)
        if half:
            labelled.append(len(tokens.ids))
        return usual(of, tokens, half=half)

    monkeypatch.setattr(local, "logits_of", slow)
    loss = SoftTargets(model.task, (model,))
    plan = Plan(seconds=40.0, limit=40.0, splice=100.0)
    Local(dataset, tmp_path).fit(model, loss, plan)
    *_, spliced_tokens = labelled
    assert 7000 < spliced_tokens < 10500, "about a quarter of forty seconds, at a millisecond a token"
    each[0] = 0.0001
    for kept in tmp_path.glob("outputs-*"):
        kept.unlink()
    Local(dataset, tmp_path).fit(model, loss, replace(plan, seconds=10.0))
    assert labelled[-1] == spliced_tokens, "one that goes on draws the same rows"


def test_short_time_boxes_have_small_batches_and_no_spliced_rows(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few that the ones that are timed are all of them.
    dataset = replace(dataset, train=dataset.train.take(range(60)))
    now, fits, n = [0.0], [], len(dataset.train)
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(local, "fit", lambda _, source, __, plan, **___: fits.append((len(source), plan)))
    usual = local.logits_of

    def slow(of: Model, tokens: Tokens, half: bool = False) -> torch.Tensor:
        now[0] += len(tokens) * int(tokens.lengths.max(initial=0))  # a second for each token, padding too
        return usual(of, tokens, half=half)

    monkeypatch.setattr(local, "logits_of", slow)
    tokens = model.encoder.encode(dataset.train.text)
    longest, mean, all_ = int(tokens.lengths.max()), float(tokens.lengths.mean()), len(tokens.ids)
    loss = SoftTargets(model.task, (model,))
    plan = Plan(batch_size=128, learning_rate=4e-4, splice=1.0, precision="fp32", limit=1.0)

    def fitted(affordable: float | None, folder: Path | None = None) -> tuple[int, int, float]:
        # A token costs several times as much in training. Besides, rows are labelled, and the student runs on them twice.
        seconds = None if affordable is None else local._TRAINED * affordable + 3 * n * longest
        Local(dataset, folder).fit(model, loss, replace(plan, seconds=seconds))
        rows, made = fits[-1]
        return rows, made.batch_size, made.learning_rate

    assert fitted(None) == (2 * n, 128, 4e-4)
    assert fitted(500 * 128 * mean) == (2 * n, 128, 4e-4)
    assert fitted(500 * 127 * mean) == (2 * n, 64, pytest.approx(4e-4 / math.sqrt(2)))
    monkeypatch.setattr(local, "_TOKENS", 50 * mean)
    assert fitted(4 * all_)[:2] == (2 * n, 64)
    monkeypatch.setattr(local, "_TOKENS", mean)
    assert fitted(4 * all_)[:2] == (2 * n, 16)
    assert fitted(4 * all_ - 1) == (n, 16, pytest.approx(4e-4 / math.sqrt(8)))
    assert fitted(4 * all_ - 1, tmp_path)[:2] == (n, 16)
    assert fitted(500 * 128 * mean, tmp_path)[:2] == (n, 16), "one that goes on is the same fit"
    plan = replace(plan, limit=9.0)
    assert fitted(500 * 128 * mean, tmp_path)[:2] == (2 * n, 128), "but under another time limit"
    part = replace(plan, seconds=1.0, part=(0.0, 0.5))
    Local(dataset).fit(model, loss, part)
    assert fits[-1][1].batch_size == 128, "a round of a federated fit is as the others"


def test_labels_of_spliced_rows_are_shared_by_fits(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that draws more rows than another labels the others only, and gets what it would get alone."""
    asked = []
    usual = local.logits_of

    def counted(of: Model, tokens: Tokens, half: bool = False) -> torch.Tensor:
        asked.append(len(tokens))
        return usual(of, tokens, half)

    monkeypatch.setattr(local, "logits_of", counted)
    loss, rows = SoftTargets(model.task, (tiny_model(seed=3),)), len(dataset.train)
    made = {}
    for splice, folder in ((1.0, tmp_path / "a"), (3.0, tmp_path / "a"), (2.0, tmp_path / "a"), (3.0, tmp_path / "b")):
        asked.clear()
        made[splice, folder] = Local(dataset, folder).fit(model, loss, Plan(epochs=1, precision="fp32", splice=splice))
        assert (
            asked
            == {
                (1.0, "a"): [rows, rows],
                (3.0, "a"): [2 * rows],
                (2.0, "a"): [],
                (3.0, "b"): [rows, 3 * rows],
            }[splice, folder.name]
        )
    pairs = replace(dataset, train=replace(dataset.train, pair=dataset.train.text))
    for _ in range(2):  # pairs are not spliced: no rows are no file to read from
        Local(pairs, tmp_path / "c").fit(model, loss, Plan(epochs=1, splice=1.0))
    one, other = (made[3.0, tmp_path / name].network.state_dict() for name in "ab")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def test_what_a_teacher_said_before_a_kill_is_not_asked_for_again(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept after a minute or more, and equal to what it says without a kill, bit for bit."""
    now, asked = [0.0], list[tuple[int, int]]()
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(local, "_ASKED", 30)
    whole, usual = Local(dataset).outputs(model), local.logits_of

    def slow(of: Model, tokens: Tokens, half: bool = False) -> torch.Tensor:
        asked.append((len(tokens), sum(map(local._rows_of, tmp_path.glob("outputs-*")))))
        now[0] += 40
        if len(asked) == 3:
            raise Killed
        return usual(of, tokens, half)

    monkeypatch.setattr(local, "logits_of", slow)
    with pytest.raises(Killed):
        Local(dataset, tmp_path).outputs(model)
    assert torch.equal(Local(dataset, tmp_path).outputs(model), whole)
    assert asked == [(30, 0), (30, 0), (20, 60), (20, 60)]
    assert torch.equal(Local(dataset, tmp_path).outputs(model), whole)
    assert len(asked) == 4


def test_what_a_teacher_says_is_held_once(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thousands of labels it is gigabytes, which are not copied whenever a few rows are added."""
    held, usual = list[tuple[int, int]](), local.save_file

    def seen(tensors: dict[str, torch.Tensor], file: Path) -> None:
        held.append((len(tensors["logits"]), tensors["logits"].data_ptr()))
        usual(tensors, file)

    monkeypatch.setattr(local, "save_file", seen)
    monkeypatch.setattr(local, "_ASKED", 30)
    monkeypatch.setattr(local, "_OFTEN", 0.0)
    said = Local(dataset, tmp_path).outputs(model)
    assert held == [(n, said.data_ptr()) for n in (30, 60, 80)]
    assert torch.equal(Local(dataset, tmp_path).outputs(model), said), "what was kept is the same"


def test_outputs_that_are_damaged_are_asked_for_again(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    said = Local(dataset, str(tmp_path)).outputs(model)
    (kept,) = tmp_path.glob("outputs-*")
    whole = kept.read_bytes()
    for left in (b"", whole[:40]):
        kept.write_bytes(left)
        assert torch.equal(Local(dataset, tmp_path).outputs(model), said)
        assert kept.read_bytes() == whole


def test_outputs_for_which_a_disk_has_no_room_leave_nothing_there(
    model: Model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "save_file", full_disk)
    with pytest.raises(OSError, match=r"outputs-.*\.safetensors cannot be written: .*No space left on device"):
        Local(dataset, tmp_path).outputs(model)
    assert not list(tmp_path.iterdir())


def test_a_killed_static_fit_resumes_to_the_same_weights(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    technique = Static(width=8, buckets=64, epochs=3, batch_size=16, splice=1.0)
    whole = technique(model, Local(dataset), Plan())
    killer = Killer(at=5)
    plan = Plan(checkpoint_every=0, reporter=killer)
    with pytest.raises(Killed):
        technique(model, Local(dataset, tmp_path), plan)
    killer.at = -1
    assert technique(model, Local(dataset, tmp_path), plan).digest == whole.digest
    assert killer.resumed_at == 4


def test_a_table_refuses_optimizers_that_know_no_rows(model: Model, dataset: Dataset) -> None:
    with pytest.raises(OptionError, match="table needs optimizer adamw or adam, not 'sgd'"):
        Static(width=4, buckets=8, epochs=1)(model, Local(dataset), Plan(optimizer="sgd"))


def test_probes_are_scikit_learns(dataset: Dataset) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import Ridge

    for model, rows in (
        (tiny_model(), dataset.train),
        (
            tiny_model(Score(mean=2.0, scale=1.5)),
            replace(dataset.train, label=tuple(str(5 + i % 5) for i in range(len(dataset.train)))),
        ),
    ):
        run = Local(replace(dataset, train=rows))
        set_probe(model.network, run.reduce(model, Moments(model.task)), model.task)  # type: ignore[arg-type]
        ids, mask, types = map(torch.from_numpy, model.encoder.encode(rows.text).padded(np.arange(len(rows)), 0))
        with torch.no_grad():
            x = model.network.features(ids, mask, types).double().numpy()  # type: ignore[operator]
            said = model.network(ids, mask, types).double().numpy()
        targets = model.task.targets(rows.label or ())
        if isinstance(model.task, Score):
            known = Ridge(alpha=0.1 * float((x**2).sum(axis=0).mean())).fit(x, (targets - 2.0) / 1.5).predict(x)
            np.testing.assert_allclose(said[:, 0], known, atol=1e-3)
        else:
            lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(x, targets)
            assert (said.argmax(axis=1) == lda.predict(x)).mean() > 0.97


def test_labels_that_no_row_has_change_no_probe(dataset: Dataset) -> None:
    model = tiny_model(Classify(("bad", "good", "never")))
    known = tiny_model()
    run = Local(dataset)
    for one in (model, known):
        set_probe(one.network, run.reduce(one, Moments(one.task)), one.task)  # type: ignore[arg-type]
    heads = [one.network.head for one in (model, known)]  # type: ignore[attr-defined]
    torch.testing.assert_close(heads[0].weight[:2], heads[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads[0].bias[:2], heads[1].bias, rtol=1e-4, atol=1e-5)
    assert Local(dataset).quality(known) == Local(dataset).quality(model)


def test_a_row_for_each_label_is_enough_for_a_probe(dataset: Dataset) -> None:
    for rows in (dataset.train.take([0, 1]), dataset.train.take([0])):
        model = tiny_model()
        sums = Local(replace(dataset, train=rows)).reduce(model, Moments(model.task))
        set_probe(model.network, sums, model.task)  # type: ignore[arg-type]
        assert torch.isfinite(model.network.head.weight).all()  # type: ignore[union-attr]


def test_a_probe_is_scaled_without_changing_a_label(dataset: Dataset) -> None:
    model = tiny_model()
    sums = Local(dataset).reduce(model, Moments(model.task))
    set_probe(model.network, sums, model.task, shrinkage=1e-6)  # type: ignore[arg-type]
    head = model.network.head  # type: ignore[attr-defined]
    gap = (head.weight[1] - head.weight[0]).detach().double()
    means = sums["xy"][:-1] / sums["xy"][-1]
    assert float(((means[:, 1] - means[:, 0]) * gap).sum() / 2) <= 5.0 + 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("netweight.techniques.finetune._GAP", 1e9)
        free = tiny_model()
        set_probe(free.network, sums, free.task, shrinkage=1e-6)  # type: ignore[arg-type]
    loose = free.network.head.weight.detach().double()  # type: ignore[attr-defined]
    assert float(((means[:, 1] - means[:, 0]) * (loose[1] - loose[0])).sum() / 2) > 5.0, "else nothing was scaled"
    tokens = model.encoder.encode(dataset.train.text)
    said = [logits_of(one, tokens) for one in (model, free)]
    assert torch.equal(said[0].argmax(1), said[1].argmax(1))
    torch.testing.assert_close(said[0] / said[0].norm(), said[1] / said[1].norm(), atol=1e-4, rtol=1e-3)
    assert torch.isfinite(head.weight).all()
    assert Local(dataset).quality(Finetune(epochs=1)(model, Local(dataset), Plan(precision="fp32"))) >= 0.9


def test_hidden_tokens_are_a_share_and_never_the_first(model: Model, dataset: Dataset) -> None:
    source = local._Source(model.encoder.encode(dataset.train.text), dataset.train, model, ())
    rows = np.arange(80)
    whole, some = (source.batch(rows, np.random.default_rng(0), hide).mask for hide in (0.0, 0.25))
    assert (some <= whole).all()
    assert (some[:, 0] == 1).all()
    assert 0.15 < 1 - float(some[:, 1:].sum() / whole[:, 1:].sum()) < 0.35


def test_a_probe_knows_how_common_labels_are(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netweight.techniques.finetune._GAP", 1e9)
    means = torch.cat([torch.randn(32, 2, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2)]).double()

    def leaning(*counts: float) -> float:
        n = torch.tensor(counts).double()
        xx = (means * n) @ means.T
        xx[:-1, :-1] += n.sum() * torch.eye(32)
        made = model.copy()
        set_probe(made.network, {"xx": xx, "xy": means * n}, made.task)
        return float(made.network.head.bias.detach().diff())  # type: ignore[union-attr,operator]

    assert leaning(20, 60) - leaning(40, 40) == pytest.approx(math.log(3), abs=1e-3)


def test_a_time_box_is_the_limit_of_who_names_none(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    technique, plans = Finetune(epochs=2, probe=False), list[Plan]()
    usual = local.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "fit", lambda *given, **more: (plans.append(given[3]), usual(*given, **more)))
        for seconds, limit in ((50.0, None), (500.0, None), (50.0, 4000.0), (None, None)):
            technique(model, Local(dataset, tmp_path), Plan(seconds=seconds, limit=limit))
    assert [plan.limit for plan in plans] == [50.0, 500.0, 4000.0, None]
    assert plans[0].seconds is not None
    assert plans[0].seconds < 50.0, "its own are what is left"
