"""Registering, certifying, verifying, matching: the values, the ledger, and every error text."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.certify import (
    Answers,
    Candidate,
    Certificate,
    Estimate,
    Outcomes,
    Registration,
    certify,
    matches,
    register,
    verify,
)
from netweight.certify.compare import too_late
from netweight.data.rows import Rows, Sealed
from netweight.errors import CertificateError, LabelError, OptionError, StoreError
from netweight.task import Classify, Score, Task

LABELS = ("a", "b", "c")
ACCURACY = Classify(LABELS)
REFERENCE, SAFE, CHEAP, BAD = (Candidate(name, name * 4) for name in ("reference", "safe", "cheap", "bad"))


def labelled(n: int = 900, group: bool = False) -> Rows:
    texts = tuple(f"{'好用的' if i % 3 == 0 else 'text'} {i} {'77 ' * (i % 5)}" for i in range(n))
    groups = tuple(f"buyer {i // 3}" if i % 9 else "" for i in range(n)) if group else None
    return Rows(texts, tuple(LABELS[i % 3] for i in range(n)), group=groups, slices={"shop": ("x", "y") * (n // 2)})


def answers(rows: Rows, wrong: range | list[int], confidence: float = 0.9) -> Answers:
    """Right but for the rows `wrong`."""
    logits = np.eye(3)[[LABELS.index(label) for label in rows.label or ()]].astype(np.float32)
    logits[list(wrong)] = logits[list(wrong)][:, [1, 2, 0]]
    return Answers(logits, np.full(len(rows), confidence + 1e-9))


def plan(rows: Rows, *candidates: Candidate, task: Task = ACCURACY, ledger: Path | None = None) -> Registration:
    return register(
        REFERENCE, candidates or (SAFE, CHEAP, BAD), task, Sealed(rows), max_drop=1.0, confidence=0.95, ledger=ledger
    )


def certified(rows: Rows | None = None, task: Task = ACCURACY) -> tuple[Certificate, Outcomes]:
    rows = rows or labelled()
    given = {"safe": answers(rows, range(20)), "cheap": answers(rows, range(21)), "bad": answers(rows, range(300))}
    return certify(plan(rows, task=task), Sealed(rows), answers(rows, range(20)), given)


def test_the_cheapest_that_passed_ships() -> None:
    certificate, outcomes = certified()
    assert certificate.verdict == "certified"
    assert certificate.shipped == CHEAP
    assert [t.passed for t in certificate.tested] == [True, True, False]
    assert (certificate.final.lost, certificate.final.gained) == (1, 0)
    assert certificate.final.drop.value == pytest.approx(1 / 900)
    assert certificate.final.drop.high <= certificate.final.margin == 0.01
    assert certificate.reference.value == pytest.approx(880 / 900)
    assert 0.9 < certificate.power <= 1
    assert certificate.rows_needed[0] is not None
    assert set(outcomes.candidates) == {"safe", "cheap", "bad"}
    assert certificate.calibration is not None
    assert certificate.calibration.rows == (90,) * 10


def test_testing_stops_at_the_first_failure() -> None:
    rows = labelled()
    given = {"safe": answers(rows, range(300)), "cheap": answers(rows, []), "bad": answers(rows, [])}
    certificate, outcomes = certify(plan(rows), Sealed(rows), answers(rows, []), given)
    assert [t.candidate for t in certificate.tested] == [SAFE]
    assert certificate.verdict == "worse"
    assert certificate.shipped == SAFE
    assert set(outcomes.candidates) == {"safe"}
    assert certificate.rows_needed[1] is None


def test_too_few_rows_are_neither_certified_nor_worse() -> None:
    rows = labelled(90)
    certificate, _ = certify(plan(rows, SAFE), Sealed(rows), answers(rows, []), {"safe": answers(rows, [])})
    assert certificate.verdict == "not certified"
    assert certificate.rows_needed == (369, 369)


def test_slices_are_named_bounded_and_silent_where_rows_are_few() -> None:
    certificate, _ = certified()
    found = {(s.column, s.value): s for s in certificate.slices}
    assert found["script", "Han"].rows == found["label", "a"].rows == 300
    assert found["shop", "x"].rows == 450
    assert sum(s.rows for s in certificate.slices if s.column == "length") == 900
    assert found["label", "a"].quality <= found["label", "a"].reference
    rows = replace(labelled(), slices={"one each": tuple(str(i) for i in range(900))})
    given = {"safe": answers(rows, [])}
    certificate, _ = certify(plan(rows, SAFE), Sealed(rows), answers(rows, []), given)
    single = [s for s in certificate.slices if s.column == "one each"]
    assert len(single) == 30
    assert all(s.drop is None for s in single)


@pytest.mark.parametrize("task", [Classify(LABELS), Classify(LABELS, "macro-f1")], ids=["accuracy", "macro-f1"])
@pytest.mark.parametrize("group", [False, True])
def test_everything_is_recomputed_from_the_files(task: Task, group: bool) -> None:
    certificate, outcomes = certified(labelled(group=group), task)
    again, rows = Certificate.from_json(certificate.to_json()), Outcomes.from_json(outcomes.to_json())
    assert again == certificate
    assert rows.to_json() == outcomes.to_json()
    verify(again, rows)
    assert (outcomes.groups is not None) == group
    assert any("groups" in note for note in certificate.notes) == group


def test_scores_are_certified_and_recomputed() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=400)
    rows = Rows(tuple(f"text {i}" for i in range(400)), tuple(repr(float(t)) for t in true))
    reference = (true + 0.3 * rng.normal(size=400))[:, None]
    safe = Answers(reference + 0.01 * rng.normal(size=(400, 1)), np.ones(400))
    for metric in ("spearman", "mae"):
        registration = plan(rows, SAFE, task=Score(metric=metric))  # type: ignore[arg-type]
        registration = replace(registration, max_drop=10.0)
        certificate, outcomes = certify(registration, Sealed(rows), Answers(reference, np.ones(400)), {"safe": safe})
        assert certificate.verdict == "certified"
        assert certificate.calibration is None
        verify(Certificate.from_json(certificate.to_json()), Outcomes.from_json(outcomes.to_json()))
        assert "all 400" in matches(certificate, outcomes, rows, safe)
        for nothing in (np.nan, np.inf):
            said = safe.logits.copy()
            said[:3] = nothing
            with pytest.raises(CertificateError, match="on 3 of 400 certify rows safe predicts otherwise"):
                matches(certificate, outcomes, rows, Answers(said, np.ones(400)))
    # The margin of a mean absolute error is percent of the reference's.
    assert certificate.final.margin == pytest.approx(0.1 * float(np.abs(reference[:, 0] - true).mean()))


def test_a_changed_number_is_found_whatever_the_unit_of_labels() -> None:
    """With labels of a few thousandths a margin is a few millionths."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=400)
    rows = Rows(tuple(f"text {i}" for i in range(400)), tuple(repr(float(t) / 1000) for t in true))
    said = Answers((true + 0.3 * rng.normal(size=400))[:, None], np.ones(400))
    registration = plan(rows, SAFE, task=Score(scale=1e-3, metric="mae"))
    certificate, outcomes = certify(registration, Sealed(rows), said, {"safe": said})
    again = Certificate.from_json(certificate.to_json())
    verify(again, Outcomes.from_json(outcomes.to_json()))
    (tested,) = again.tested
    assert tested.margin < 3e-6
    lower = replace(tested, drop=replace(tested.drop, high=tested.drop.high - 9e-7))
    with pytest.raises(CertificateError, match=r"tested\[0\].drop.high is .* in the certificate, and .* recomputed"):
        verify(replace(again, tested=(lower,)), outcomes)
    shifted = replace(said, logits=said.logits + 0.05)
    with pytest.raises(CertificateError, match="on 400 of 400 certify rows safe predicts otherwise"):
        matches(certificate, outcomes, rows, shifted)


def test_a_changed_number_is_found_and_named() -> None:
    certificate, outcomes = certified()
    first = certificate.tested[0]
    changed = replace(certificate, tested=(replace(first, p_value=first.p_value / 2), *certificate.tested[1:]))
    with pytest.raises(CertificateError, match=r"tested\[0\].p_value is .* in the certificate, and .* recomputed"):
        verify(changed, outcomes)
    with pytest.raises(CertificateError, match=r"verdict is 'worse' in the certificate, and 'certified'"):
        verify(replace(certificate, verdict="worse"), outcomes)
    for bound in (-math.inf, math.inf, math.nan):
        forged = replace(certificate.reference, low=bound)
        with pytest.raises(CertificateError, match=r"reference.low is -?(inf|nan) in the certificate, and 0\.9"):
            verify(Certificate.from_json(replace(certificate, reference=forged).to_json()), outcomes)
    better = outcomes.candidates["bad"].copy()
    better[20:, 0] = better[20:, 1]
    with pytest.raises(CertificateError, match="recomputed"):
        verify(certificate, replace(outcomes, candidates={**outcomes.candidates, "bad": better}))


def test_slices_in_which_nothing_differs_have_no_interval() -> None:
    rows = Rows(tuple(f"text {i}" for i in range(400)), tuple(str(i % 7) for i in range(400)))
    said = Answers(np.arange(400.0)[:, None] % 5, np.ones(400))
    certificate, outcomes = certify(plan(rows, SAFE, task=Score()), Sealed(rows), said, {"safe": said})
    assert certificate.slices
    assert all(s.drop is None for s in certificate.slices)
    flat = tuple(replace(s, drop=Estimate(0.0, 0.0, 0.0)) for s in certificate.slices)
    with pytest.raises(CertificateError, match=r"slices\[0\].drop is .* and None recomputed"):
        verify(replace(certificate, slices=flat), outcomes)


@pytest.mark.parametrize("metric", ["spearman", "mae"])
def test_scores_that_are_all_equal_certify_nothing(metric: str) -> None:
    rows = Rows(tuple(f"text {i}" for i in range(400)), ("3",) * 400)
    reference, noise = (Answers(np.random.default_rng(i).normal(size=(400, 1)), np.ones(400)) for i in range(2))
    registration = plan(rows, SAFE, task=Score(metric=metric))  # type: ignore[arg-type]
    with pytest.raises(CertificateError, match="all 400 rows of certify have the score 3"):
        certify(registration, Sealed(rows), reference, {"safe": noise})


def test_outcomes_of_other_rows_or_candidates_are_refused() -> None:
    certificate, outcomes = certified()
    short = replace(outcomes, keys=outcomes.keys[:5])
    with pytest.raises(CertificateError, match="is of 900 rows, its outcomes of 5"):
        verify(certificate, short)
    fewer = replace(outcomes, candidates={"safe": outcomes.candidates["safe"]})
    with pytest.raises(CertificateError, match="tested bad, cheap, safe; its outcomes are of safe"):
        verify(certificate, fewer)
    hidden = replace(certificate, tested=certificate.tested[:2])
    fewer = replace(outcomes, candidates={name: outcomes.candidates[name] for name in ("safe", "cheap")})
    with pytest.raises(CertificateError, match="bad was to be tested next; the outcomes hold no rows of it"):
        verify(hidden, fewer)


def test_damaged_files_are_named() -> None:
    _, outcomes = certified()
    for text in ("{", "[]", '{"verdict": 1}'):
        with pytest.raises(CertificateError, match="the certificate cannot be read"):
            Certificate.from_json(text)
        with pytest.raises(CertificateError, match="the outcomes cannot be read"):
            Outcomes.from_json(text)
    stored = json.loads(outcomes.to_json())
    stored["confidence"] = stored["confidence"][:-1]
    with pytest.raises(CertificateError, match="hold 900 keys and columns of 899 rows"):
        Outcomes.from_json(json.dumps(stored))


@given(st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_outcomes_round_trip(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 2)) if seed % 2 else rng.integers(0, 5, (n, 2)).astype(float)
    other = np.stack([rng.normal(size=n), values[:, 1]], axis=1)
    groups = tuple(rng.integers(0, 3, n).tolist()) if seed % 3 else None
    slices = {"shop": tuple(rng.choice(["x", "é", ""], n).tolist())}
    stored = Outcomes(tuple(map(str, range(n))), values, {"one": other}, rng.random(n).round(6), groups, slices)
    again = Outcomes.from_json(stored.to_json())
    assert (again.keys, again.groups, again.slices) == (stored.keys, groups, slices)
    np.testing.assert_array_equal(again.reference, values)
    np.testing.assert_array_equal(again.candidates["one"], other)
    np.testing.assert_array_equal(again.confidence, stored.confidence)


class Cell(str):
    """A cell that counts what it is compared with."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Cell.compared += 1
        return str.__eq__(self, other)


def test_outcomes_of_many_slices_are_written_in_one_walk() -> None:
    cells = tuple(Cell(f"user {i}") for i in range(2000))
    rows = np.zeros((2000, 2))
    stored = Outcomes(tuple(map(str, range(2000))), rows, {"one": rows}, np.ones(2000), None, {"user": cells})
    Cell.compared = 0
    text = stored.to_json()
    assert Cell.compared < 20_000
    assert Outcomes.from_json(text).slices == {"user": tuple(f"user {i}" for i in range(2000))}


def test_options_that_cannot_be_are_refused() -> None:
    sealed, task = Sealed(labelled()), Classify(LABELS)
    for drop in (0.0, -1.0, 50.1, float("nan")):
        with pytest.raises(OptionError, match="max_drop is .* more than 0 and at most 50"):
            register(REFERENCE, [SAFE], task, sealed, max_drop=drop, confidence=0.95)
    for confidence in (0.4, 1.0, float("nan")):
        with pytest.raises(OptionError, match="confidence is .* use at least 0.5 and less than 1"):
            register(REFERENCE, [SAFE], task, sealed, max_drop=1.0, confidence=confidence)
    with pytest.raises(CertificateError, match="there is no candidate to certify"):
        register(REFERENCE, [], task, sealed, max_drop=1.0, confidence=0.95)
    with pytest.raises(CertificateError, match="2 candidates are named 'safe'; give them different names"):
        register(REFERENCE, [SAFE, CHEAP, SAFE], task, sealed, max_drop=1.0, confidence=0.95)


def test_looks_are_counted_for_each_certify_split(tmp_path: Path) -> None:
    ledger = tmp_path / "looks.jsonl"
    rows = labelled()
    first = plan(rows, SAFE, ledger=ledger)
    assert (first.look, first.level) == (1, pytest.approx(0.025))
    second = plan(rows, SAFE, CHEAP, ledger=ledger)
    assert (second.look, second.level) == (2, pytest.approx(0.0125))
    assert plan(rows, SAFE, ledger=ledger) == first
    assert plan(rows, SAFE, CHEAP, ledger=ledger) == second
    assert plan(labelled(300), SAFE, ledger=ledger).look == 1
    assert plan(rows, CHEAP, ledger=ledger).look == 3
    assert len(ledger.read_text().splitlines()) == 4
    certificate, _ = certify(
        second, Sealed(rows), answers(rows, []), {"safe": answers(rows, []), "cheap": answers(rows, [])}
    )
    assert any("look 2" in note for note in certificate.notes)


def test_a_number_that_is_written_otherwise_is_the_same_look(tmp_path: Path) -> None:
    """Python may say 1 where the command line says 1.0; ledgers of before hold either."""
    for first, second in ((1, 1.0), (1.0, 1)):
        for drop in (first, second):
            ledger = tmp_path / f"looks-{first}.jsonl"
            assert register(REFERENCE, [SAFE], ACCURACY, Sealed(labelled()), max_drop=drop, ledger=ledger).look == 1
        assert json.loads(ledger.read_text())["max_drop"] == first, "one line"


def test_a_ledger_of_before_may_hold_one_question_as_two_looks(tmp_path: Path) -> None:
    rows, ledger = labelled(), tmp_path / "looks.jsonl"
    first = plan(rows, SAFE)
    held = [first, replace(first, max_drop=1, look=2)]
    ledger.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in held))
    assert plan(rows, SAFE, ledger=ledger).look == 1
    looks = [plan(rows, *candidates, ledger=ledger).look for candidates in ((CHEAP,), (SAFE, CHEAP), (CHEAP,))]
    assert looks == [3, 4, 3], "none is given to two questions"


def test_the_levels_of_all_looks_sum_to_what_was_promised() -> None:
    one = plan(labelled(), SAFE)
    assert sum(replace(one, look=k).level for k in range(1, 60)) == pytest.approx(0.05)


def test_looks_at_which_nothing_could_pass_are_told_of() -> None:
    """Of 20,000 resamples none is rarer than half of one."""
    task = Classify(LABELS, "macro-f1")
    assert not too_late(task, False, 0.05 / 2**10)
    assert not too_late(ACCURACY, False, 0.05 / 2**11), "the exact test has no such end"
    for grouped, of in ((False, task), (True, ACCURACY), (False, Score())):
        said = too_late(of, grouped, 0.05 / 2**11)
        assert "below 2.5e-05, and the level here was 2.44e-05: no candidate could pass. Give a fresh certify" in said


def test_a_torn_last_line_is_not_a_look(tmp_path: Path) -> None:
    ledger = tmp_path / "looks.jsonl"
    rows = labelled()
    first = plan(rows, SAFE, ledger=ledger)
    whole = ledger.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        ledger.write_bytes(whole + whole[:length])
        assert plan(rows, CHEAP, ledger=ledger).look == 2
        assert plan(rows, SAFE, ledger=ledger) == first


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    ledger = tmp_path / "looks.jsonl"
    plan(labelled(), SAFE, ledger=ledger)
    ledger.write_text("{}\n" + ledger.read_text())
    with pytest.raises(StoreError, match=r"line 1 of .*looks.jsonl cannot be read .* restore the file from a copy"):
        plan(labelled(), CHEAP, ledger=ledger)


def test_answers_must_be_those_of_the_registered_rows() -> None:
    rows = labelled()
    registration, reference = plan(rows, SAFE), answers(rows, [])
    with pytest.raises(CertificateError, match="register the rows that are to be tested"):
        certify(registration, Sealed(labelled(90)), reference, {"safe": reference})
    with pytest.raises(CertificateError, match="there are no answers of safe; run every registered candidate"):
        certify(registration, Sealed(rows), reference, {})
    short = Answers(reference.logits[:7], reference.confidence[:7])
    with pytest.raises(CertificateError, match="safe answered 7 rows, the certify split has 900"):
        certify(registration, Sealed(rows), reference, {"safe": short})


def test_macro_f1_is_refused_where_a_class_has_few_rows() -> None:
    rows = labelled(72).take([*range(0, 72, 3), *range(1, 72, 3), 2])
    task = Classify(LABELS, "macro-f1")
    with pytest.raises(
        CertificateError, match=r"25 certify rows in each class; 'a' has 24, 'b' has 24, 'c' has 1\. Merge"
    ):
        certify(plan(rows, SAFE, task=task), Sealed(rows), answers(rows, []), {"safe": answers(rows, [])})


def test_few_groups_are_refused() -> None:
    rows = replace(labelled(90), group=tuple(str(i // 10) for i in range(90)))
    with pytest.raises(CertificateError, match="the certify rows form 9 groups; at least 30 are needed"):
        certify(plan(rows, SAFE), Sealed(rows), answers(rows, []), {"safe": answers(rows, [])})


def test_given_rows_match_in_any_order_and_with_others_among_them() -> None:
    rows = labelled()
    certificate, outcomes = certified(rows)
    order = np.random.default_rng(0).permutation(900)
    now = answers(rows, range(21))
    assert matches(certificate, outcomes, rows, now) == "all 900 certify rows match in label and prediction."
    more = Rows(("unrelated", *rows.text), ("no label of the task", *(rows.label or ())))
    said = matches(certificate, outcomes, more, Answers(np.vstack([[[0, 0, 1]], now.logits]), np.ones(901)))
    assert said == "all 900 certify rows match in label and prediction; 1 further rows were ignored."
    shuffled = rows.take(order)
    assert "all 900" in matches(certificate, outcomes, shuffled, Answers(now.logits[order], now.confidence[order]))


def test_what_does_not_match_is_counted() -> None:
    rows = labelled()
    certificate, outcomes = certified(rows)
    now = answers(rows, range(21))
    with pytest.raises(CertificateError, match="10 of 900 certify rows are not among the 890 given rows"):
        matches(certificate, outcomes, rows.take(range(890)), Answers(now.logits[:890], now.confidence[:890]))
    with pytest.raises(CertificateError, match="the given rows have no labels"):
        matches(certificate, outcomes, rows.unlabelled(), now)
    other = replace(rows, label=("b", "c", *(rows.label or ())[2:]))
    with pytest.raises(CertificateError, match="the labels of 2 of 900 certify rows differ"):
        matches(certificate, outcomes, other, now)
    with pytest.raises(CertificateError, match="on 4 of 900 certify rows cheap predicts otherwise"):
        matches(certificate, outcomes, rows, answers(rows, range(25)))
    with pytest.raises(LabelError):
        matches(certificate, outcomes, replace(rows, label=("?", *(rows.label or ())[1:])), now)


def test_equal_texts_with_different_labels_match() -> None:
    rows = labelled(300)
    rows = replace(rows, text=(rows.text[1], *rows.text[1:]))
    given = answers(rows, [])
    given.logits[0] = given.logits[1]
    certificate, outcomes = certify(plan(rows, SAFE), Sealed(rows), given, {"safe": given})
    assert "all 300" in matches(certificate, outcomes, rows, given)
    # Equal but for capitals, they may be read differently.
    apart = answers(rows, [])
    assert apart.logits[0].argmax() != apart.logits[1].argmax()
    certificate, outcomes = certify(plan(rows, SAFE), Sealed(rows), apart, {"safe": apart})
    assert "all 300" in matches(certificate, outcomes, rows, apart)


@pytest.mark.parametrize("fails", [False, True])
def test_a_full_disk_hides_no_look(tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a part of a line, and says nothing; or says so the next time."""
    rows, ledger, write, calls = labelled(), tmp_path / "looks.jsonl", os.write, []

    def full(file: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 2 and fails:
            raise OSError(28, "No space left on device")
        return write(file, data[: len(data) // 2] if len(calls) == 1 else data)

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        if fails:
            with pytest.raises(OSError, match="No space left"):
                plan(rows, SAFE, ledger=ledger)
        else:
            assert plan(rows, SAFE, ledger=ledger).look == 1
    assert len(calls) == 2
    assert ledger.read_bytes().count(b"\n") == (0 if fails else 1)
    assert plan(rows, CHEAP, ledger=ledger).look == (1 if fails else 2), "labels opened after the line was whole"


@pytest.mark.parametrize(
    ("look", "group", "said"),
    [(1, False, []), (2, False, ["This is look 2"]), (1, True, ["Rows come in"])],
)
def test_looks_and_groups_are_told_of(look: int, group: bool, said: list[str]) -> None:
    rows = labelled(group=group)
    right = answers(rows, [])
    found, _ = certify(replace(plan(rows, SAFE), look=look), Sealed(rows), right, {"safe": right})
    starts = ("This is look", "Rows come in")
    assert [note[: len(said[0])] for note in found.notes if note.startswith(starts)] == said
