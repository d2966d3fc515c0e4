"""What travels: nothing is lost for good, sizes are what is claimed, and every byte is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netweight.errors import OptionError
from netweight.run.aggregate import Mean
from netweight.run.federated import Full, Int8, RandomK, TopK
from netweight.run.federated.checks import Round
from netweight.run.federated.codecs import Codec, Decoded, encoded, parts_of, size

CODECS: list[Codec] = [
    Int8(),
    Int8("tensor"),
    Int8("row", "stochastic"),
    Int8("tensor", "stochastic"),
    RandomK(0.2),
    RandomK(1.0),
    TopK(0.2),
    TopK(0.01),
]
BOTH = frozenset({"w", "b"})


def tensors(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    found = {"w": torch.randn(6, 7, generator=drawn), "b": torch.randn(5, generator=drawn)}
    return {**found, "count": torch.tensor(seed), "mean": torch.randn(2, generator=drawn)}


def sent_and_left(codec: Codec, old: Any, new: Any, seed: int, left: Any) -> tuple[Decoded, dict[str, Tensor], Any]:
    sent, left = encoded(codec, old, new, BOTH, (seed, seed + 1), left)
    return Decoded(codec, sent, old, BOTH, seed), left, sent


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@settings(max_examples=15)
@given(seed=st.integers(0, 999))
def test_what_was_sent_and_what_is_left_add_up_to_what_was_learned(codec: Codec, seed: int) -> None:
    left: dict[str, Tensor] = {}
    true = {name: torch.zeros_like(tensors(0)[name]) for name in BOTH}
    sent = {name: torch.zeros_like(tensors(0)[name]) for name in BOTH}
    for round_ in range(4):
        old, new = tensors(seed + round_), tensors(seed + 50 + round_)
        update, left, _ = sent_and_left(codec, old, new, seed + round_, left)
        assert update["count"] == new["count"], "buffers travel as they are"
        assert torch.equal(update["mean"], new["mean"])
        for name in BOTH:
            true[name] += new[name] - old[name]
            sent[name] += update[name] - old[name]
    for name in BOTH:
        torch.testing.assert_close(sent[name] + left[name], true[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_sizes_are_those_of_the_parts(codec: Codec) -> None:
    old, new = tensors(0), tensors(1)
    _, _, sent = sent_and_left(codec, old, new, 3, {})
    wanted = {name: part for n in BOTH for name, part in parts_of(codec, n, old[n]).items()}
    assert {n: (tuple(t.shape), t.dtype) for n, t in sent.items() if n in wanted} == wanted
    per = {"Int8": 1, "RandomK": 4, "TopK": 8}[type(codec).__name__]
    share = 1.0 if isinstance(codec, Int8) else codec.share  # type: ignore[union-attr]
    scales = 4 * (7 if codec in (Int8(), Int8("row", "stochastic")) else 2) if isinstance(codec, Int8) else 0
    values = sum(-(-round(share * n * 1000) // 1000) if share < 1 else n for n in (42, 5))
    assert size(sent) == per * values + scales + size({n: new[n] for n in ("count", "mean")})


def test_the_full_codec_is_exact() -> None:
    old, new = tensors(0), tensors(1)
    update, left, _ = sent_and_left(Full(), old, new, 0, {})
    assert left == {}
    assert all(torch.equal(update[name], new[name]) for name in new)


def test_int8_is_off_by_half_a_step_and_stochastic_rounding_is_unbiased() -> None:
    old, new = tensors(0), tensors(1)
    step = (new["w"] - old["w"]).abs().amax(dim=1, keepdim=True) / 127
    update, _, _ = sent_and_left(Int8(), old, new, 0, {})
    assert bool(((update["w"] - new["w"]).abs() <= step * 0.51).all())
    many = [sent_and_left(Int8("row", "stochastic"), old, new, s, {})[0]["w"] for s in range(0, 800, 2)]
    assert bool(((torch.stack(many).mean(0) - new["w"]).abs() <= step * 0.1).all())
    assert len({float(m.sum()) for m in many}) > 300, "each draws its own"


def test_a_random_mask_is_shared_and_differs_by_round() -> None:
    """The mean of masked updates is the masked mean: what secure sums rest on."""
    old = tensors(0)
    sent = {f"c{i}": encoded(RandomK(0.3), old, tensors(10 + i), BOTH, (7, i), {})[0] for i in range(3)}
    weights = {"c0": 1.0, "c1": 2.0, "c2": 3.0}
    summed = {n: v for n, v in Mean()(sent, weights).items() if n in BOTH}
    mean = Mean()({c: tensors(10 + i) for i, c in enumerate(sent)}, weights)
    at_once = encoded(RandomK(0.3), old, mean, BOTH, (7, 99), {})[0]
    for name in BOTH:
        torch.testing.assert_close(summed[name], at_once[name], rtol=1e-5, atol=1e-6)
    other = encoded(RandomK(0.3), old, mean, BOTH, (8, 99), {})[0]
    assert not torch.equal(other["w"], at_once["w"])


def test_top_k_takes_the_largest() -> None:
    old = {"w": torch.zeros(10), "b": torch.zeros(2)}
    new = {"w": torch.tensor([0.0, 5, 0, -9, 1, 2, 0, 0, 3, 0]), "b": torch.tensor([1.0, -2])}
    update, left, sent = sent_and_left(TopK(0.3), old, new, 0, {})
    assert sent["w/places"].tolist() == [1, 3, 8]
    assert update["w"].tolist() == [0, 5, 0, -9, 0, 0, 0, 0, 3, 0]
    assert left["w"].tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0]


CASES: list[tuple[str, Codec, Any, str]] = [
    ("a lacking tensor", Full(), {"w": None}, "no tensor w"),
    ("one too many", Full(), {"x": torch.zeros(1)}, "a tensor x that nobody asked for"),
    ("another shape", Full(), {"w": torch.zeros(7, 6)}, r"w as torch.float32 \(7, 6\), which should be torch.float32"),
    ("another dtype", Full(), {"w": torch.zeros(6, 7).double()}, "w as torch.float64"),
    ("NaN", Full(), {"w": torch.full((6, 7), float("nan"))}, "values that are not finite"),
    ("NaN in a buffer", Full(), {"mean": torch.tensor([1, float("nan")])}, "another mean than it was given"),
    ("another buffer", Int8(), {"mean": torch.zeros(2)}, "another mean than it was given, which training does not"),
    ("a buffer of whole numbers", Full(), {"count": torch.tensor(255)}, "another count than it was given"),
    ("infinite", Full(), {"b": torch.full((5,), float("inf"))}, "values that are not finite"),
    ("huge", Full(), {"w": torch.full((6, 7), 1e6)}, "a norm of .* more than 10 times .*, what is usual in the round"),
    ("NaN scale", Int8(), {"w/scale": torch.full((6,), float("nan"))}, "values that are not finite"),
    ("no scale", Int8(), {"w/scale": None}, "no tensor w/scale"),
    (
        "places outside",
        TopK(0.1),
        {"w/places": torch.tensor([1, 2, 3, 4, 42], dtype=torch.int32)},
        "places outside of w",
    ),
    (
        "negative places",
        TopK(0.1),
        {"w/places": torch.tensor([-1, 2, 3, 4, 5], dtype=torch.int32)},
        "places outside of w",
    ),
]


@pytest.mark.parametrize(("codec", "changed", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_poisoned_update_is_refused_and_named(codec: Codec, changed: Any, said: str) -> None:
    old = tensors(0)
    new = [{**old, **{name: tensors(10 + i)[name] for name in BOTH}} for i in range(4)]
    sent = {f"c{i}": dict(encoded(codec, old, new[i], BOTH, (7, i), {})[0]) for i in range(4)}
    check = Round(codec, old, BOTH, 7, 10.0)
    assert sorted(check.accepted(sent)[0]) == ["c0", "c1", "c2", "c3"]
    sent["c2"] = {n: v for n, v in {**sent["c2"], **changed}.items() if v is not None}
    sound, refused = check.accepted(sent)
    assert sorted(sound) == ["c0", "c1", "c3"]
    assert [lost.client for lost in refused] == ["c2"]
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refused[0].reason)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="share of RandomK is 0; use a number above 0, at most 1"):
        RandomK(0)
    with pytest.raises(OptionError, match="share of TopK is 1.1"):
        TopK(1.1)
    with pytest.raises(OptionError, match="Int8 has scale 'column', rounding|Int8 has scale 'column' and rounding"):
        Int8("column")  # type: ignore[arg-type]
