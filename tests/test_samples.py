"""The built-in sample data: deterministic, distinct, balanced, noisy as stated, and honest in its forms."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from itertools import islice
from random import Random

import pytest

from netweight.data import normalise, split
from netweight.errors import OptionError
from netweight.samples import Sample, sample
from netweight.samples.compose import INTENTS, NOISE, messages
from netweight.samples.frames import CLOSINGS, DETAILS, FORMS, GREETINGS, OPENINGS
from netweight.samples.grammar import expand


@pytest.fixture(scope="module")
def whole() -> Sample:
    return sample()


def labels(given: Sample) -> tuple[str, ...]:
    assert given.labelled.label is not None
    return given.labelled.label


def test_a_seed_fixes_every_row() -> None:
    one, again, other = sample(0, 500, 200), sample(0, 500, 200), sample(1, 500, 200)
    assert one.labelled.fingerprint == again.labelled.fingerprint
    assert one.pool.fingerprint == again.pool.fingerprint
    assert one.labelled.fingerprint != other.labelled.fingerprint
    assert one.pool.fingerprint != other.pool.fingerprint


def test_more_rows_of_a_seed_begin_with_the_fewer() -> None:
    assert sample(3, 300, 0).labelled.text[:100] == sample(3, 100, 0).labelled.text


def test_texts_are_distinct_and_the_pool_shares_none(whole: Sample) -> None:
    assert len(whole.labelled) == 24_000
    assert len(whole.pool) == 12_000
    assert whole.pool.label is None
    labelled, pool = set(map(normalise, whole.labelled.text)), set(map(normalise, whole.pool.text))
    assert len(labelled) == 24_000
    assert len(pool) == 12_000
    assert not labelled & pool


def test_every_label_has_its_share(whole: Sample) -> None:
    counts = Counter(labels(whole))
    assert set(counts) == set(INTENTS)
    assert min(counts.values()) >= 0.03 * len(whole.labelled)
    assert max(counts.values()) <= 0.15 * len(whole.labelled)


def test_the_stated_share_of_labels_is_wrong() -> None:
    drawn = list(islice(messages(Random(5)), 8_000))
    wrong = sum(m.label != m.intent for m in drawn) / len(drawn)
    assert 0.02 <= NOISE <= 0.03
    assert abs(wrong - NOISE) < 0.007  # four standard deviations


def test_texts_are_single_lines_of_sane_length_without_template_marks(whole: Sample) -> None:
    for text in (*whole.labelled.text, *whole.pool.text):
        assert text.splitlines() == [text]
        assert 5 <= len(text) <= 400
        assert text == " ".join(text.split())
        assert not re.search(r"[\[\]{}|]| [,.?]|[?.,]\.|\ba [aeio]", text), text


def test_slices_say_what_each_text_is(whole: Sample) -> None:
    forms, channels = Counter(whole.labelled.slices["form"]), Counter(whole.labelled.slices["channel"])
    assert set(forms) == set(FORMS) == {"plain", "aside", "contrast", "negation", "history", "correction"}
    assert set(channels) == {"chat", "mail", "app"}
    assert min(*forms.values(), *channels.values()) >= 0.02 * len(whole.labelled)
    rows = zip(whole.labelled.text, whole.labelled.slices["form"])
    negated = [text.casefold() for text, form in rows if form == "negation"]
    said = sum(bool(re.search(r"not|n'?t\b|nobody|never", text)) for text in negated)
    assert said > 0.9 * len(negated)  # the rest has a typo there
    assert any("even though" in text for text in whole.labelled.text)


def test_both_intents_occur_in_one_sentence_in_either_order() -> None:
    slots = {"topic": ("A",), "topic2": ("B",), "want": ("A",), "want2": ("B",), "say": ("A",), "say2": ("B",)}
    slots |= {"fine2": ("B",), "who": ("sister",), "ago": ("yesterday",), "ask": ("A?",)}
    for form in ("contrast", "negation", "history", "correction"):
        filled = [expand(frame, slots, Random(0)) for frame in FORMS[form]]
        first = sum(text.index("A") < text.index("B") for text in filled)
        assert 0.3 * len(filled) < first < 0.7 * len(filled), form


def test_every_template_can_be_filled() -> None:
    frames = [frame for form in FORMS.values() for frame in form] + [*OPENINGS, *DETAILS]
    frames += [part for table in (GREETINGS, CLOSINGS) for parts in table.values() for part in parts]
    phrases = [phrase for intent in INTENTS.values() for f in fields(intent) for phrase in getattr(intent, f.name)]
    for template in frames + phrases:
        assert template.count("[") == template.count("]"), template
        assert template == " ".join(template.split()), template
    for name, intent in INTENTS.items():
        assert name not in intent.near
        assert set(intent.near) <= set(INTENTS)


@pytest.mark.parametrize("template", ["a [b|c", "a b] c", "a | b"])
def test_a_template_whose_brackets_do_not_match_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        expand(template, {}, Random(0))


def test_it_splits_without_loss() -> None:
    given = sample(2, 2_000, 500)
    data = split(given.labelled, pool=given.pool)
    assert len(data.train) + len(data.dev) + len(data.certify) == 2_000
    assert data.pool is not None
    assert len(data.pool) == 500


@pytest.mark.parametrize(("rows", "pool"), [(0, 10), (10, -1), (900_000, 200_000)])
def test_sizes_that_cannot_be_made_are_refused(rows: int, pool: int) -> None:
    with pytest.raises(OptionError, match="cannot be made"):
        sample(0, rows, pool)
