"""The report: well-formed, self-contained, escaped, the same bytes for the same values, and right in its words."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from netweight.artifact import Manifest, Tier
from netweight.certify.certificate import (
    Calibration,
    Candidate,
    Certificate,
    Estimate,
    Outcomes,
    Registration,
    Slice,
)
from netweight.certify.certificate import Tested as Step  # pytest collects what is named Test...
from netweight.measure import Machine, Measurement, Measurements, Timing
from netweight.report import Example, render
from netweight.report.format import Scale, percent, significant, size, times
from netweight.report.pareto import Point, front
from netweight.report.style import DARK, LIGHT
from netweight.report.svg import Axis
from netweight.task import Classify, Score, Task

MACHINE = Machine(
    "Example CPU 9000 with avx512_vnni", 2, 2, "Linux x86_64", "3.11.9", {"numpy": "2.3.1"}, "1a2b3c4", "2026-01-31"
)
EVIL = "<script>alert(1)</script>\"'&\x00\ud800"
Job = tuple[Manifest, Certificate, Measurements, Outcomes]


def measurement(name: str, quality: float, speed: float | None, mb: float, tiers: tuple[str, ...] = ()) -> Measurement:
    timing = (
        None
        if speed is None
        else Timing(speed, 0.93 * speed, 1.04 * speed, 32, 900 / speed, 1400 / speed, 2100 / speed)
    )
    answered = (1.0,) if len(tiers) < 2 else (0.81, *(0.19 / (len(tiers) - 1) for _ in tiers[1:]))
    memory, start = (None, None) if speed is None else (int(mb * 1e6) + 60_000_000, 0.2 + mb / 100)
    return Measurement(
        name, tiers or (name,), 1500, quality, 0.965, 0.41, answered, int(mb * 1e6), timing, memory, start
    )


def measurements(base: float, unit: float) -> Measurements:
    """`base` is the reference's quality, `unit` a point of it."""
    reference = measurement("MiniLM-L6 fine-tuned", base, 346, 91)
    shipped = measurement("static-256 → L3 int8 h19", base - 0.2 * unit, 9100, 21, ("static-256", "L3 int8"))
    others = (
        measurement("linear", base - 4 * unit, 72000, 1.9),
        measurement("static-256", base - 1.8 * unit, 33000, 7.7),
        measurement("static-128", base - 2.3 * unit, 41000, 4.1),
        measurement("L1 int8", base - 2.4 * unit, 5100, 13.2),
        measurement("L2 int8", base - 1.0 * unit, 2900, 14.9),
        measurement("L3 int8", base + 0.05 * unit, 2050, 16.7),
        measurement("L3 pruned int8", base - 0.1 * unit, 2300, 15.1),
        measurement("L6 int8 (NNCF)", base - 0.15 * unit, 1150, 23.5),
        measurement("L6 dynamic int8", base - 0.2 * unit, 710, 23.5),
        measurement("static-256 → L2 int8 h30", base - 0.4 * unit, 8100, 19, ("static-256", "L2 int8")),
        measurement("static-128 → L3 int8 h35", base - 0.1 * unit, 5400, 19, ("static-128", "L3 int8")),
        measurement("untimed", base - 0.6 * unit, None, 30),
        shipped,
    )
    return Measurements(MACHINE, reference, shipped, others, 0.04)


def rows_of(task: Task, n: int, seed: int, wrong: float) -> np.ndarray[Any, Any]:
    rng, truth = np.random.default_rng(seed), np.random.default_rng(0)
    if isinstance(task, Score):
        true = np.round(truth.uniform(0, 5, n), 1)
        return np.stack([np.clip(true + rng.normal(0, 0.4, n), 0, 5), true], axis=1)
    true = truth.integers(0, task.outputs, n)
    other = np.where(rng.random(n) < 0.5, (true + 1) % task.outputs, rng.integers(0, task.outputs, n))
    return np.stack([np.where(rng.random(n) < wrong, other, true), true], axis=1).astype(float)


def job(task: Task | None = None, verdict: str = "certified", tiers: int = 2, full: bool = True, n: int = 3075) -> Job:
    """A job of any kind; without `full` everything that may be missing is."""
    task = task or Classify(("delivery", "refund", "size", "other"))
    base = {"accuracy": 0.932, "macro-f1": 0.671, "spearman": 0.842, "mae": -0.431}[task.metric]
    point = task.margin(1.0, base)
    shipped, reference = Candidate("static-256 → L3 int8 h19", "ab" * 32), Candidate("MiniLM-L6 fine-tuned", "cd" * 32)
    safest = Candidate("L6 int8 (NNCF)", "ef" * 32)
    cheaper, never = Candidate("static-256 → L2 int8 h30", "12" * 32), Candidate("static-256", "34" * 32)
    value, low, high = {"certified": (0.2, -0.3, 0.71), "not certified": (0.6, -0.2, 1.4), "worse": (2.4, 1.5, 3.3)}[
        verdict
    ]

    def tested(candidate: Candidate, value: float, low: float, high: float) -> Step:
        drop = Estimate(value * point, low * point, high * point)
        score = base - drop.value
        return Step(
            candidate, Estimate(score, score - 1.1 * point, score + point), drop, point,
            0.00004 if high < 0.5 else 0.0123 if high < 1 else 0.31, high < 1, 41, 35,
        )  # fmt: skip

    final = tested(shipped, value, low, high)
    order = (safest, shipped, cheaper, never) if verdict == "certified" else (shipped, cheaper)
    steps = (
        (tested(safest, -0.1, -0.5, 0.3), final, tested(cheaper, 0.7, 0.1, 1.3)) if verdict == "certified" else (final,)
    )
    registration = Registration(reference, order, task, 1.0, 0.975, "9f" * 32, n)
    bins = np.linspace(0.42, 0.995, 10)
    calibration = Calibration(
        tuple(bins.tolist()),
        tuple((bins - 0.03 * np.cos(8 * bins)).clip(0, 1).tolist()),
        (n // 10,) * 10,
        0.0213,
        0.0871,
    )
    slices = (
        Slice("channel", "app", 1600, base, base - 0.1 * point, Estimate(0.1 * point, -0.4 * point, 0.6 * point)),
        Slice("channel", "e-mail", 700, base, base - 1.6 * point, Estimate(1.6 * point, 0.2 * point, 3.1 * point)),
        Slice("channel", "telephone", 300, base, base - 3 * point, Estimate(3 * point, 1.2 * point, 5.1 * point)),
        Slice("length", "long", 21, base, base, None),
    )
    certificate = Certificate(
        registration, verdict, shipped, Estimate(base, base - 1.1 * point, base + point), steps,  # type: ignore[arg-type]
        0.93, (2210, 3480 if verdict == "certified" else None),
        slices if full else (), calibration if full and task.kind == "classify" else None,
        ("12 rows of the pool that also stand in certify were left out.",) if full else (),
    )  # fmt: skip
    candidates = {shipped.name: rows_of(task, n, 2, 0.07)} if full else {}
    outcomes = Outcomes(("k",) * n, rows_of(task, n, 1, 0.068), candidates, np.full(n, 0.9))
    measured = measurements(base, point)
    if not full:
        bare = replace(measured.reference, timing=None, memory=None, cold_start=None)
        measured = Measurements(MACHINE, bare, replace(bare, name=shipped.name, answered=()), (), 0.04)
    stages = (
        Tier("static-256", "static", "tiers/0-static-256.safetensors", {}, 1.31, 0.83),
        Tier("L3 int8", "onnx", "tiers/1-L3.onnx", {}, 1.12, before=0.43),
    )
    provenance = {
        "data": "7c" * 32,
        "seed": 0,
        "licence": "Apache-2.0",
        "recipe": [{"kind": "Distill", "layers": 3}, {"kind": "Quantize"}],
    }
    return Manifest(task, 64, 0, stages[:tiers], provenance if full else {}), certificate, measured, outcomes


LABELS_77 = tuple(f"label number {i} with words" for i in range(77))
CASES: dict[str, Job] = {
    "certified": job(),
    "not certified": job(verdict="not certified"),
    "worse": job(verdict="worse"),
    "two labels": job(Classify(("no", "yes"))),
    "77 labels": job(Classify(LABELS_77)),
    "macro-f1": job(Classify(("bad", "good", "so-so"), "macro-f1")),
    "spearman": job(Score(2.5, 1.4), "not certified"),
    "mae": job(Score(2.5, 1.4, "mae")),
    "one tier": job(tiers=1),
    "nothing measured": job(full=False),
    "score, nothing measured": job(Score(), "worse", full=False),
}
PAGES = {name: render(*case) for name, case in CASES.items()}
VOID = {"meta", "br", "hr", "img", "link"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; collects headings, ids, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        assert len(found) == len(attrs), f"<{tag}> has an attribute twice"
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "srcset", "action", "xlink:href")]
        assert not [k for k in found if k.startswith("on")]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "desc"):
            self.words.append(data)


def read(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def text(page: str) -> str:
    return " ".join(" ".join(read(page).words).split())


@pytest.mark.parametrize("name", CASES)
def test_pages_are_well_formed_and_accessible(name: str) -> None:
    page = PAGES[name]
    found = read(page)
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(found.headings, found.headings[1:]))
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links} <= set(found.ids)
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        root = ElementTree.fromstring(svg)
        named = {e.get("id") for e in root if e.tag in ("title", "desc") and e.text}
        assert set(root.get("aria-labelledby", "").split()) == named
        numbers = re.findall(r'\s(?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', svg)
        assert all(abs(float(v)) < 2000 for v in numbers)
    assert page.count("<table") == page.count("<caption>") == page.count("</caption>")
    assert '<html lang="en">' in page


@pytest.mark.parametrize("name", CASES)
def test_pages_stand_alone(name: str) -> None:
    page = PAGES[name]
    found = read(page)
    assert all(link.startswith("#") for link in found.links)
    assert not found.tags & {"script", "link", "iframe", "img", "object", "form", "base"}
    assert not re.search(r"https?:|//\w|url\(|@import", page)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert len(page.encode()) < 400_000
    assert render(*CASES[name]) == page
    assert not re.search("&(amp;)?lt;/?[a-z]+", page)
    for broken in ("None", "nan", "inf", "Estimate(", "float64", "undefined"):
        assert broken not in re.sub(r"<style>.*?</style>", "", page, flags=re.S), broken


def test_degenerate_values_still_make_a_page() -> None:
    manifest, certificate, measured, outcomes = job(Classify(("a", "b")), tiers=1, n=1)
    zero = Estimate(1.0, 1.0, 1.0)
    step = replace(certificate.final, quality=zero, drop=Estimate(0.0, 0.0, 0.0), p_value=0.0, lost=0, gained=0)
    certificate = replace(
        certificate,
        tested=(step,),
        reference=zero,
        power=1.0,
        calibration=Calibration((1.0,), (1.0,), (1,), 0.0, 0.0),
        slices=(),
        notes=(),
    )
    same = replace(measured.reference, quality=1.0, bytes=0)
    measured = Measurements(MACHINE, same, replace(same, name="x" * 300), (), 0.0)
    page = render(manifest, certificate, measured, outcomes)
    read(page)
    assert "nan" not in page.split("</style>")[1]
    no_rows = replace(outcomes, reference=np.zeros((0, 2)), candidates={"static-256 → L3 int8 h19": np.zeros((0, 2))})
    read(render(manifest, certificate, measured, no_rows))
    constant = np.full((9, 2), 3.0)
    manifest, certificate, measured, outcomes = CASES["spearman"]
    read(render(manifest, certificate, measured, replace(outcomes, candidates={certificate.shipped.name: constant})))


def test_many_candidates_and_slices_stay_small() -> None:
    manifest, certificate, measured, outcomes = CASES["77 labels"]
    rng = np.random.default_rng(0)
    many = tuple(
        measurement(
            f"candidate {i} of a long search, wide name", 0.8 + 0.1 * rng.random(), float(rng.lognormal(7, 1)), 20
        )
        for i in range(2000)
    )
    slices = tuple(replace(certificate.slices[0], value=f"value {i} " + "x" * 500) for i in range(5000))
    page = render(manifest, replace(certificate, slices=slices), replace(measured, candidates=many), outcomes)
    assert len(page.encode()) < 400_000
    assert "The first 200 of 5,000." in page
    assert "30 of 2,002 candidates" in page


def test_each_verdict_says_what_was_shown() -> None:
    certified, uncertified, worse = (text(PAGES[name]) for name in ("certified", "not certified", "worse"))
    assert "Certified: static-256 → L3 int8 h19 may replace MiniLM-L6 fine-tuned" in certified
    assert "Accuracy drops by less than 1.0 point with 97.5 % confidence on 3,075 rows that no search saw." in certified
    assert "93.00 % (91.90 % to 94.00 %)" in certified
    assert "0.20 points (−0.30 to 0.71)" in certified
    assert "93.0 %: the chance to pass" in certified
    assert "not reached" in certified
    assert "Not certified" in uncertified
    assert "It is not shown with 97.5 % confidence that accuracy drops by less than 1.0 point" in uncertified
    assert (
        "2,210 if the true drop were 0; no number of rows up to ten million if it were the observed 0.60 points"
        in uncertified
    )
    assert "Worse" in worse
    assert (
        "Accuracy drops by more than the allowed 1.0 point: 3,075 rows that no search saw show it with 97.5 %" in worse
    )
    assert "certified:" not in worse.lower()
    assert "each bound is missed with a chance of at most 1.25 %" in certified
    assert "so that 97.5 % holds over all looks" in certified


def test_what_a_bootstrap_shows_is_about_what_it_says() -> None:
    manifest, certificate, measured, outcomes = CASES["certified"]
    grouped = replace(outcomes, groups=tuple(i // 2 for i in range(len(outcomes))))
    for page in (PAGES["macro-f1"], render(manifest, certificate, measured, grouped)):
        said = text(page)
        assert "with about 97.5 % confidence on 3,075 rows" in said
        assert "each bound is missed with a chance of about 1.25 %: it is a bootstrap's" in said
        assert "so that about 97.5 % holds over all looks" in said
        assert "at most 1.25 %" not in said


def test_a_slice_without_an_interval_tells_nothing() -> None:
    manifest, certificate, measured, outcomes = CASES["spearman"]
    flat = tuple(replace(s, drop=None) for s in certificate.slices)
    said = text(render(manifest, replace(certificate, slices=flat), measured, outcomes))
    assert said.count("too little to say –") == len(flat)


def test_a_slice_of_equal_scores_has_no_correlation() -> None:
    manifest, certificate, measured, outcomes = CASES["spearman"]
    equal = (Slice("shop", "one", 40, 0.0, 0.0, None), Slice("shop", "two", 40, 0.0, -0.25, None))
    said = text(render(manifest, replace(certificate, slices=equal), measured, outcomes))
    assert "shop = one 40 – – too little to say –" in said
    assert "shop = two 40 0.0000 −0.2500 too little to say –" in said


def test_a_slice_is_held_to_its_own_error() -> None:
    """One percent of 0.431 is more than all of the error where that is 0.004."""
    manifest, certificate, measured, outcomes = CASES["mae"]
    cheap = (
        Slice("shop", "one", 40, -0.004, -0.008, Estimate(0.004, 0.002, 0.0042)),
        Slice("shop", "two", 40, -0.004, -0.005, Estimate(0.001, -0.001, 0.003)),
        Slice("shop", "three", 40, -4.0, -4.01, Estimate(0.01, -0.01, 0.03)),
    )
    said = text(render(manifest, replace(certificate, slices=cheap), measured, outcomes))
    assert "A point is 1 % of the reference's error on the slice." in said
    assert "shop = one 40 0.004000 0.008000 100.00 points (50.00 to 105.00) ✗ worse, beyond the margin" in said
    assert "shop = two 40 0.004000 0.005000 25.00 points (−25.00 to 75.00) no clear change" in said
    assert "shop = three 40 4.000 4.010 0.25 points (−0.25 to 0.75) ✓ within the margin" in said


def test_tiers_show_their_numbers() -> None:
    said = text(PAGES["certified"])
    assert re.search(r"1: static-256 static \S+ % below 0\.83 1\.31 0 ", said)
    assert re.search(r"2: L3 int8 onnx \S+ % answers the rest 1\.12 0\.43 ", said)


def test_metrics_speak_their_own_units() -> None:
    assert "67.10 of 100" in text(PAGES["macro-f1"])
    assert "0.8420" in text(PAGES["spearman"])
    mae = text(PAGES["mae"])
    assert "Mean absolute error rises by less than 1.0 point" in mae
    assert "1 point is 1 % of the reference's error, 0.00431" in mae
    # Lower errors are better: the interval is turned so that its small end stands first.
    assert "0.4310 (0.4267 to 0.4357)" in mae


def test_what_is_missing_is_named() -> None:
    bare = text(PAGES["nothing measured"])
    assert "not measured" in bare
    assert "No speeds were measured" in bare
    assert "No column to slice by was given" in bare
    assert "scores carry no confidence" in text(PAGES["score, nothing measured"])
    assert "One model, static-256, answers every row" in text(PAGES["one tier"])
    assert "too little to say" in text(PAGES["certified"])


def test_what_a_page_leaves_out_is_said_and_a_threshold_near_1_is_not_1() -> None:
    manifest, certificate, measured, outcomes = CASES["certified"]
    slices = tuple(Slice("label", f"l{i}", 9, 0.5, 0.5, None) for i in range(30))
    page = text(render(manifest, replace(certificate, slices=slices), measured, outcomes))
    assert "Of a column, the 30 values with most rows." in page
    assert "values with most rows" not in text(PAGES["certified"])
    for threshold, shown in (
        (0.9996, "below 0.9996"),
        (0.9, "below 0.9 "),
        (1.0, "below 1 "),
        (0.99999, "below 0.99999"),
    ):
        tiers = tuple(replace(tier, threshold=threshold) for tier in manifest.tiers)
        assert shown in text(render(replace(manifest, tiers=tiers), certificate, measured, outcomes)) + " "


def test_matrix_is_readable_or_a_heat_map() -> None:
    assert 'class="matrix"' in PAGES["two labels"]
    assert "most confused pairs" not in PAGES["two labels"]
    assert 'class="matrix"' not in PAGES["77 labels"]
    assert "The 15 most confused pairs" in PAGES["77 labels"]
    assert 'id="hexbin-t"' in PAGES["spearman"]


def test_what_the_job_said_stands_among_the_notes() -> None:
    manifest, certificate, measured, outcomes = CASES["certified"]
    foreign = "The base does not know 41 % of the words."
    told = replace(manifest, provenance={**manifest.provenance, "notes": [foreign, EVIL]})
    page = render(told, replace(certificate, notes=("a note of the certificate",)), measured, outcomes)
    found = page[page.index("<h3>Notes</h3>") :]
    assert found.index(f"<li>{foreign}</li>") < found.index("<li>a note of the certificate</li>")
    assert '"notes"' not in page
    assert "script" not in read(page).tags
    for other in (None, 3, {"a": 1}, []):
        odd = replace(manifest, provenance={**manifest.provenance, "notes": other})
        assert render(odd, certificate, measured, outcomes) == PAGES["certified"]


def test_nothing_from_outside_becomes_markup() -> None:
    manifest, certificate, measured, outcomes = job(Classify((EVIL, "good", "so-so")))
    bad = Candidate(EVIL, "00" * 32)
    step = replace(certificate.final, candidate=bad)
    certificate = replace(
        certificate,
        registration=replace(certificate.registration, reference=bad, candidates=(bad,), fingerprint=EVIL),
        shipped=bad,
        tested=(step,),
        slices=(Slice(EVIL, EVIL, 9, 0.5, 0.5, None),),
        notes=(EVIL,),
    )
    machine = replace(MACHINE, cpu=EVIL, system=EVIL, python=EVIL, versions={EVIL: EVIL}, commit=EVIL, date=EVIL)
    shipped = replace(measured.shipped, name=EVIL, tiers=(EVIL, EVIL))
    measured = Measurements(machine, replace(measured.reference, name=EVIL), shipped, (shipped,), 0.04)
    tiers = tuple(Tier(EVIL, EVIL, "f") for _ in range(2))
    manifest = replace(manifest, tiers=tiers, provenance={EVIL: {EVIL: [EVIL]}, "licence": EVIL})
    outcomes = replace(outcomes, candidates={EVIL: outcomes.candidates["static-256 → L3 int8 h19"]})
    examples = [Example(EVIL, "good", "good", EVIL), Example(EVIL, EVIL, "good", EVIL)]
    manifest = replace(manifest, provenance={**manifest.provenance, "command": EVIL})
    page = render(manifest, certificate, measured, outcomes, examples=examples)
    assert "script" not in read(page).tags
    assert "<script" not in page
    assert "\x00" not in page
    page.encode()
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_examples_show_only_rows_that_changed() -> None:
    shown = [
        Example("was lost", "a", "a", "b"),
        Example("was won", "a", "b", "a"),
        Example("both wrong", "a", "b", "b"),
    ]
    page = text(render(*CASES["certified"], examples=shown))
    assert page.index("The reference is better") < page.index("was lost") < page.index("was won")
    assert "both wrong" not in page
    scores = text(render(*CASES["mae"], examples=[Example("nearer now", "3", "1", "2.5")]))
    assert scores.index("The shipped model is better") < scores.index("nearer now")
    assert "Rows that changed" not in PAGES["certified"]


def test_numbers_are_written_for_people() -> None:
    assert [significant(v) for v in (0.012345, 9.996, 1234.5, 72000.4, -3.14159, 0)] == [
        "0.0123", "10.0", "1,230", "72,000", "−3.14", "0",
    ]  # fmt: skip
    assert [percent(v) for v in (0.5, 0.9999, 1.0, 0.0001, 0.0)] == [
        "50.0 %",
        "> 99.9 %",
        "100.0 %",
        "< 0.1 %",
        "0.0 %",
    ]
    assert [size(v) for v in (12, 23_512_345, None)] == ["12 bytes", "23.5 MB", "not measured"]
    assert times(346, 9100, "faster", "slower") == "26.3 × faster"
    assert times(91, 21, "larger", "smaller") == "4.33 × smaller"
    assert times(None, 1, "a", "b") == "–"
    scale = Scale(Classify(("a", "b")), 0.9)
    assert [scale.points(v) for v in (0.01, 0.0031, -0.00001)] == ["1.00 point", "0.31 points", "0.00 points"]
    assert [scale.allowed(v) for v in (0.01, 0.0025)] == ["1.0 point", "0.25 points"]


def test_front_keeps_what_nothing_equals_in_both() -> None:
    shown = [
        Point(n, c, q, 1) for n, c, q in (("a", 1, 0.8), ("b", 2, 0.9), ("c", 3, 0.9), ("d", 1, 0.7), ("e", 4, 0.95))
    ]
    assert [p.name for p in front(shown)] == ["a", "b", "e"]


@pytest.mark.parametrize(
    "axis", [Axis(0.9, 1.1, 0, 1), Axis(3, 47000, 0, 1, log=True), Axis(1.2, 1.8, 0, 1, log=True), Axis(-0.3, 0, 0, 1)]
)
def test_axes_have_round_ticks_inside(axis: Axis) -> None:
    found = axis.ticks()
    assert 2 <= len(found) <= 8
    assert all(-1e-9 <= axis(v) <= 1 + 1e-9 for v in found)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_contrast(colours: dict[str, str]) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for shapes that carry meaning."""
    for ink in ("text", "muted", "accent", "good", "bad", "warn"):
        assert contrast(colours[ink], colours["page"]) >= 4.5, ink
    assert contrast(colours["text"], colours["panel"]) >= 4.5
    assert contrast(colours["muted"], colours["panel"]) >= 4.5
    for tier in ("t0", "t1", "t2", "t3"):
        assert contrast(colours["tint"], colours[tier]) >= 4.5, tier
    assert contrast(colours["edge"], colours["page"]) >= 3
    for shade in ("good", "bad"):
        mixed = "#" + "".join(
            f"{round(0.35 * int(colours[shade][i : i + 2], 16) + 0.65 * int(colours['page'][i : i + 2], 16)):02x}"
            for i in (1, 3, 5)
        )
        assert contrast(colours["text"], mixed) >= 4.5, shade
