"""Arrays in as few bytes as their values need, without loss: zeros as a bitmask, small integers in 1 to 7 bits, in two
bytes floats that fp16 holds, and where some values are more common than others, deflated (RFC 1951).

Nothing computes on packed arrays. They make files small; an engine unpacks them once, when it loads. So a pruned or
4-bit model is smaller on disk and exactly as fast as before.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from netweight.errors import CorruptArtifact

_BITMASK = "/present"
_GAPS = "/"  # of a packed file: the bytes between its arrays
_HEADER = "netweight"
# Deflating is tried in full where a stretch of so many bytes from the middle shrinks to this share.
_SAMPLE = 1 << 16
_WORTH_CODING = 0.9


@dataclass(frozen=True)
class Form:
    """How one array is stored. `bits` of each value above `low` (0: as it is); `sparse`: of the values that are not
    zero, beside a bitmask that says where they stand; `half`: in fp16; `coded`: deflated."""

    dtype: str
    shape: tuple[int, ...]
    bits: int = 0
    low: int = 0
    sparse: bool = False
    half: bool = False
    coded: bool = False


def packed(arrays: Mapping[str, NDArray[Any]], **more: Any) -> bytes:
    """A safetensors file that holds the arrays, each in its smallest form; `more` is kept as JSON beside them."""
    held: dict[str, NDArray[Any]] = {}
    forms = {}
    for name, array in arrays.items():
        forms[name], stored = _smallest(np.ascontiguousarray(array))
        held |= {name + part: values for part, values in stored.items()}
    header = {"forms": {name: _described(form) for name, form in forms.items()}, "more": more}
    return save(held, {_HEADER: json.dumps(header)})


def _described(form: Form) -> dict[str, Any]:
    """What a header says of a form; `half` and `coded` where they hold, so that files without are those of older
    versions."""
    return {name: value for name, value in asdict(form).items() if name not in ("half", "coded") or value}


def unpacked(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Inverse of `packed`: the arrays, bit for bit, and what was kept beside them. Raises CorruptArtifact."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
        held = {name: _array(given) for name, given in deserialize(data)}  # type: ignore[no-untyped-call]
        forms = {name: Form(**given) for name, given in header["forms"].items()}
        return {name: _restored(name, held, form) for name, form in forms.items()}, dict(header["more"])
    except (SafetensorError, zlib.error, ValueError, LookupError, TypeError, OverflowError, RecursionError) as problem:
        raise CorruptArtifact(f"a packed file cannot be unpacked: {problem!r}") from problem


def packed_file(data: bytes, arrays: Sequence[tuple[int, NDArray[Any]]]) -> bytes:
    """A file with some arrays inside, packed. Each is given with the place at which its bytes stand in `data`."""
    gaps, at = [], 0
    for start, array in arrays:
        if data[start : start + array.nbytes] != array.tobytes():
            raise ValueError(f"the array said to stand at byte {start} does not.")
        gaps.append(data[at:start])
        at = start + array.nbytes
    gaps.append(data[at:])
    named = {f"{i:05}": array for i, (_, array) in enumerate(arrays)}
    between = np.frombuffer(b"".join(gaps), np.uint8)
    return packed(named | {_GAPS: between}, gaps=[len(gap) for gap in gaps])


def unpacked_file(data: bytes) -> bytes:
    """Inverse of `packed_file`, byte for byte."""
    arrays, more = unpacked(data)
    between, at, parts = arrays.pop(_GAPS, np.zeros(0, np.uint8)).tobytes(), 0, []
    gaps = more.get("gaps", [])
    if len(gaps) != len(arrays) + 1 or sum(gaps) != len(between):
        raise CorruptArtifact("a packed file does not say how its parts belong together.")
    for length, array in zip(gaps, [*(arrays[name] for name in sorted(arrays)), None], strict=True):
        parts.append(between[at : at + length])
        at += length
        if array is not None:
            parts.append(array.tobytes())
    return b"".join(parts)


def _smallest(array: NDArray[Any]) -> tuple[Form, dict[str, NDArray[Any]]]:
    """The form in which an array takes the fewest bytes, and what is stored of it by the end of its name."""
    whole = Form(array.dtype.str, array.shape, half=_fits_half(array))
    forms = [whole, _in_bits(whole, array.reshape(-1))]
    if _without_minus_zero(array) and not array.all():
        forms.append(_in_bits(replace(whole, sparse=True), array[array != 0]))
    best, least = min(((form, _stored(array, form)) for form in forms), key=_size)
    for form in dict.fromkeys((whole, replace(best, bits=0, low=0))):
        values = _stored(array, form)[""]
        middle = max(0, values.nbytes - _SAMPLE) // 2
        sample = values.tobytes()[middle : middle + _SAMPLE]
        if len(_deflated(sample)) < _WORTH_CODING * len(sample):
            coded = replace(form, coded=True)
            best, least = min((best, least), (coded, _stored(array, coded)), key=_size)
    return best, least


def _size(given: tuple[Form, dict[str, NDArray[Any]]]) -> int:
    return sum(values.nbytes for values in given[1].values())


def _in_bits(form: Form, values: NDArray[Any]) -> Form:
    bits, low = _bits(values)
    return replace(form, bits=bits, low=low)


def _fits_half(array: NDArray[Any]) -> bool:
    """Whether fp16 holds every value, bit for bit."""
    if array.dtype != np.float32:
        return False
    with np.errstate(over="ignore"):
        again = array.astype(np.float16).astype(np.float32)
    return again.tobytes() == array.tobytes()


def _without_minus_zero(array: NDArray[Any]) -> bool:
    return not (array.dtype.kind == "f" and bool(np.any(np.signbit(array) & (array == 0))))


def _bits(values: NDArray[Any]) -> tuple[int, int]:
    if values.dtype not in (np.int8, np.uint8) or not values.size:
        return 0, 0
    low, high = int(values.min()), int(values.max())
    bits = max(1, (high - low).bit_length())
    return (bits, low) if bits < 8 else (0, 0)


def _stored(array: NDArray[Any], form: Form) -> dict[str, NDArray[Any]]:
    values, held = array.reshape(-1), {}
    if form.sparse:
        held[_BITMASK] = np.packbits(values != 0)
        values = values[values != 0]
    if form.half:
        values = values.astype(np.float16)
    if form.bits:
        small = (values.astype(np.int16) - form.low).astype(np.uint8)
        values = np.packbits(np.unpackbits(small[:, None], axis=1, bitorder="little", count=form.bits))
    if form.coded:
        values = np.frombuffer(_deflated(values.tobytes()), np.uint8)
    return held | {"": values if form.bits or form.sparse or form.half or form.coded else array}


def _deflated(data: bytes) -> bytes:
    """Weights have no repetitions worth looking for, tables and graphs have: the shorter of both."""
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        found.append(coder.compress(data) + coder.flush())
    return min(found, key=len)


def _inflated(data: bytes, size: int) -> bytes:
    """Inverse of `_deflated`. Raises ValueError where it is not `size` bytes; never makes many more."""
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    whole = coder.decompress(data, size + 1)
    if len(whole) != size or not coder.eof or coder.unused_data:
        raise ValueError(f"{len(data)} deflated bytes are not the {size} that they should be")
    return whole


def _unpackbits(held: NDArray[Any], count: int) -> NDArray[np.uint8]:
    """The first `count` bits. Raises ValueError where there are others, or too few, which numpy would fill up."""
    if held.nbytes != (count + 7) // 8:
        raise ValueError(f"{held.nbytes} bytes do not hold {count} bits")
    return np.unpackbits(held, count=count)


def _restored(name: str, held: Mapping[str, NDArray[Any]], form: Form) -> NDArray[Any]:
    # As long as what is written says: a text of 100,000 characters is a dtype too, and nothing bounds -1 bytes.
    if not re.fullmatch(r"[<>|][biuf]\d+", form.dtype) or min(form.shape, default=0) < 0:
        raise ValueError(f"{name!r} is said to be of dtype {form.dtype!r} and shape {form.shape!r}")
    dtype, size = np.dtype(form.dtype), math.prod(form.shape)
    values, there = held[name], None
    if form.sparse:
        there = _unpackbits(held[name + _BITMASK], size).astype(bool)
    count = size if there is None else int(there.sum())
    if form.coded:
        as_held = np.dtype(np.float16) if form.half else dtype
        values = np.frombuffer(_inflated(values.tobytes(), count * as_held.itemsize), as_held)
    if form.bits:
        bits = _unpackbits(values, count * form.bits).reshape(count, form.bits)
        small = np.packbits(bits, axis=1, bitorder="little")[:, 0]
        values = (small.astype(np.int16) + form.low).astype(dtype)
    if there is not None:
        whole = np.zeros(size, dtype)
        whole[there] = values
        values = whole
    return values.astype(dtype, copy=False).reshape(form.shape)


_NAMED = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}


def _array(given: Mapping[str, Any]) -> NDArray[Any]:
    return np.frombuffer(given["data"], _NAMED[given["dtype"]]).reshape(given["shape"])
