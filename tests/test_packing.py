"""Packing loses nothing, for any values; and takes as few bytes as it says."""

from __future__ import annotations

import json
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load, save

from netweight.errors import CorruptArtifact
from netweight.packing import Form, packed, packed_file, unpacked, unpacked_file


def peaked(seed: int, size: int, spread: float = 3.0) -> np.ndarray:
    """Integers as weights have them: normal."""
    return np.rint(np.random.default_rng(seed).normal(0, spread, size)).clip(-31, 31).astype(np.int8)


def header(data: bytes) -> dict[str, str]:
    said: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return said


def form_of(values: np.ndarray) -> Form:
    """The form in which an array is stored."""
    return Form(**json.loads(header(packed({"w": values}))["netweight"])["forms"]["w"])


NUMBERS = st.one_of(
    arrays(np.int8, array_shapes(min_side=0)),
    arrays(np.uint8, array_shapes(min_side=0)),
    arrays(np.int8, array_shapes(), elements=st.integers(-8, 7)),
    arrays(np.int8, array_shapes(min_side=5), elements=st.sampled_from([0, 0, 0, 0, -3, 3])),
    arrays(np.float32, array_shapes(), elements=st.sampled_from([0.0, 0.0, -0.0, 1.5, np.nan, np.inf])),
    arrays(np.int64, array_shapes()),
    # These are deflated.
    st.builds(peaked, st.integers(0, 99), st.integers(0, 3000)),
    st.builds(lambda seed, n: peaked(seed, n).astype(np.float32), st.integers(0, 99), st.integers(0, 3000)),
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


def test_normal_weights_take_their_entropy() -> None:
    values = peaked(0, 100_000, 8.0)
    share = np.unique(values, return_counts=True)[1] / len(values)
    entropy = float(-(share * np.log2(share)).sum())
    found = form_of(values)
    assert found.coded
    # A Huffman code takes a few hundredths of a bit more than Shannon's bound; six bits are what they would take.
    assert entropy < 8 * (len(packed({"w": values})) - 300) / len(values) < entropy + 0.1 < 6
    masked = np.where(np.random.default_rng(1).random(len(values)) < 0.7, 0, values).astype(np.int8)
    assert form_of(masked).coded
    assert len(packed({"w": masked})) < len(packed({"w": values})) / 2


def test_what_does_not_shrink_is_not_deflated() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(-128, 128, 100_000).astype(np.int8), rng.normal(size=50_000).astype(np.float32)):
        assert not form_of(values).coded
        assert "coded" not in packed({"w": values})[:300].decode("latin-1")


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
    with pytest.raises(CorruptArtifact, match="cannot be unpacked"):
        unpacked(data.replace(b'\\"more\\": {}', b'\\"more\\": 37'))


@pytest.mark.parametrize("sparse", [False, True])
def test_bits_are_exactly_as_many_as_a_form_says(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, 9000).astype(np.int8)
    if sparse:
        values = np.where(rng.random(9000) < 0.9, 0, rng.normal(size=9000)).astype(np.float32)
    data = packed({"w": values})
    assert (form_of(values).bits, form_of(values).sparse) == ((0, True) if sparse else (4, False))
    said = header(data)
    for count in (8000, 9001, 10**13):
        forged = {name: value.replace("[9000]", f"[{count}]") for name, value in said.items()}
        with pytest.raises(CorruptArtifact, match=f"bytes do not hold {count * (1 if sparse else 4)} bits"):
            unpacked(save(load(data), forged))


def deflated(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


def test_a_deflated_stream_is_exactly_what_its_form_says() -> None:
    values = peaked(0, 9000)
    data = packed({"w": values})
    said = header(data)

    def forged(stream: bytes) -> bytes:
        return save({"w": np.frombuffer(stream, np.uint8)}, said)

    held = load(data)["w"].tobytes()
    assert (unpacked(forged(held))[0]["w"] == values).all()
    whole = deflated(values.tobytes())
    assert (unpacked(forged(whole))[0]["w"] == values).all()
    for stream in (whole[:-20], whole + b"x", b"", b"no stream", deflated(values[:-1].tobytes())):
        with pytest.raises(CorruptArtifact, match="cannot be unpacked"):
            unpacked(forged(stream))
    bomb = forged(deflated(bytes(100_000_000)))
    tracemalloc.start()
    with pytest.raises(CorruptArtifact, match="deflated bytes are not the 9000 that they should be"):
        unpacked(bomb)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"dtype": "<U1000"}, "'w' is said to be of dtype '<U1000' and shape"),
        ({"dtype": "|V1000"}, "'w' is said to be of dtype"),
        ({"dtype": "(,)f4"}, "'w' is said to be of dtype"),
        ({"dtype": "<f3"}, "data type '<f3' not understood"),
        ({"dtype": None}, "TypeError"),
        ({"shape": [-1]}, r"'w' is said to be of dtype '\|i1' and shape \[-1\]"),
        ({"shape": [3, (2**64 - 1) // 3]}, "OverflowError"),  # of int64, the product is -1
        ({"shape": [10**30]}, "OverflowError"),
        ({"shape": ["x", 10**9]}, "TypeError"),
        ({"shape": 9000}, "TypeError"),
    ],
)
def test_forms_are_of_numbers_and_of_a_size(said: dict[str, object], why: str) -> None:
    values = peaked(0, 9000)
    stored = header(packed({"w": values}))
    forms = json.loads(stored["netweight"])
    forms["forms"]["w"] |= {"coded": True} | said
    stored["netweight"] = json.dumps(forms)
    data = save({"w": np.frombuffer(deflated(bytes(30_000_000)), np.uint8)}, stored)
    tracemalloc.start()
    with pytest.raises(CorruptArtifact, match=f"cannot be unpacked: .*{why}"):
        unpacked(data)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_masks_of_models_stay_what_they_are() -> None:
    mask = np.tril(np.ones((64, 64), bool))
    assert form_of(mask).dtype == "|b1"
    assert unpacked(packed({"w": mask}))[0]["w"].tobytes() == mask.tobytes()
