"""Packing loses nothing, for any values; and takes as few bytes as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from netweight.errors import CorruptArtifact
from netweight.packing import form_of, packed, packed_file, unpacked, unpacked_file

NUMBERS = st.one_of(
    arrays(np.int8, array_shapes(min_side=0)),
    arrays(np.uint8, array_shapes(min_side=0)),
    arrays(np.int8, array_shapes(), elements=st.integers(-8, 7)),
    arrays(np.int8, array_shapes(min_side=5), elements=st.sampled_from([0, 0, 0, 0, -3, 3])),
    arrays(np.float32, array_shapes(), elements=st.sampled_from([0.0, 0.0, -0.0, 1.5, np.nan, np.inf])),
    arrays(np.int64, array_shapes()),
)


@given(st.lists(NUMBERS, max_size=4))
def test_what_is_unpacked_is_what_was_packed(values: list[np.ndarray]) -> None:
    named = {f"a/{i}": v for i, v in enumerate(values)}
    again, more = unpacked(packed(named, said="x"))
    assert more == {"said": "x"}
    assert list(again) == list(named)
    for name, value in named.items():
        assert again[name].dtype == value.dtype
        assert again[name].shape == value.shape
        assert again[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("bits", range(1, 8))
def test_small_integers_take_their_bits(bits: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 8000).astype(np.int8)
    values[:2] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert form_of(values).bits == bits
    assert len(packed({"w": values})) < 1000 * bits + 300


def test_zeros_take_a_bit() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=8000).astype(np.float32)
    values[rng.random(8000) < 0.9] = 0
    kept = int((values != 0).sum())
    assert form_of(values).sparse
    assert len(packed({"w": values})) < 1000 + 4 * kept + 300
    # Half of the values of 4 bits: a mask would cost a bit each and save two.
    assert form_of(np.where(rng.random(8000) < 0.6, 0, rng.integers(-8, 8, 8000)).astype(np.int8)).sparse


@given(st.binary(max_size=50), st.binary(max_size=50), NUMBERS, NUMBERS)
def test_a_file_comes_back_byte_for_byte(before: bytes, between: bytes, one: np.ndarray, two: np.ndarray) -> None:
    data = before + one.tobytes() + between + two.tobytes() + b"end"
    places = [(len(before), one), (len(before) + one.nbytes + len(between), two)]
    assert unpacked_file(packed_file(data, places)) == data


def test_refusals() -> None:
    with pytest.raises(ValueError, match="said to stand at byte 1"):
        packed_file(b"abc", [(1, np.frombuffer(b"xy", np.uint8))])
    data = packed({"w": np.arange(5, dtype=np.int8)})
    for broken in (data[:20], b"", data.replace(b"forms", b"farms")):
        with pytest.raises(CorruptArtifact, match="cannot be unpacked"):
            unpacked(broken)
    with pytest.raises(CorruptArtifact, match="does not say how its parts belong together"):
        unpacked_file(data)
