"""Arrays in as few bytes as their values need, without loss: zeros as a bitmask, small integers in 1 to 7 bits, and
in two bytes floats that fp16 holds.

Nothing computes on packed arrays. They make files small; an engine unpacks them once, when it loads. So a pruned or
4-bit model is smaller on disk and exactly as fast as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from netweight.errors import CorruptArtifact

_BITMASK = "/present"
_GAPS = "/"  # of a packed file: the bytes between its arrays
_HEADER = "netweight"


@dataclass(frozen=True)
class Form:
    """How one array is stored. `bits` of each value above `low` (0: as it is); `sparse`: of the values that are not
    zero, beside a bitmask that says where they stand; `half`: in fp16."""

    dtype: str
    shape: tuple[int, ...]
    bits: int = 0
    low: int = 0
    sparse: bool = False
    half: bool = False


def packed(arrays: Mapping[str, NDArray[Any]], **more: Any) -> bytes:
    """A safetensors file that holds the arrays, each in its smallest form; `more` is kept as JSON beside them."""
    held: dict[str, NDArray[Any]] = {}
    forms = {}
    for name, array in arrays.items():
        forms[name] = form_of(array)
        held |= _stored(name, np.ascontiguousarray(array), forms[name])
    header = {"forms": {name: _described(form) for name, form in forms.items()}, "more": more}
    return save(held, {_HEADER: json.dumps(header)})


def _described(form: Form) -> dict[str, Any]:
    """What a header says of a form; `half` where it holds, so that files without are those of older versions."""
    return {name: value for name, value in asdict(form).items() if name != "half" or value}


def unpacked(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Inverse of `packed`: the arrays, bit for bit, and what was kept beside them. Raises CorruptArtifact."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
        held = {name: _array(given) for name, given in deserialize(data)}  # type: ignore[no-untyped-call]
        forms = {name: Form(**given) for name, given in header["forms"].items()}
        return {name: _restored(name, held, form) for name, form in forms.items()}, header["more"]
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as problem:
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


def form_of(array: NDArray[Any]) -> Form:
    """The smallest form: of all values or of those that are not zero, in as few bits as their spread needs."""
    dtype, shape = array.dtype.str, array.shape
    half = _fits_half(array)
    present = array[array != 0] if _without_minus_zero(array) else array.reshape(-1)
    best, least = Form(dtype, shape), array.nbytes
    for sparse, values in ((False, array.reshape(-1)), (True, present)):
        bits, low = _bits(values)
        each = bits or (16 if half else 8 * array.itemsize)
        size = (len(values) * each + 7) // 8 + sparse * ((array.size + 7) // 8)
        if size < least and (not sparse or present.size < array.size):
            best, least = Form(dtype, shape, bits, low, sparse, half), size
    return best


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


def _stored(name: str, array: NDArray[Any], form: Form) -> dict[str, NDArray[Any]]:
    values, held = array.reshape(-1), {}
    if form.sparse:
        held[name + _BITMASK] = np.packbits(values != 0)
        values = values[values != 0]
    if form.bits:
        small = (values.astype(np.int16) - form.low).astype(np.uint8)
        values = np.packbits(np.unpackbits(small[:, None], axis=1, bitorder="little", count=form.bits))
    if form.half:
        values = values.astype(np.float16)
    held[name] = values if form.bits or form.sparse or form.half else array
    return held


def _restored(name: str, held: Mapping[str, NDArray[Any]], form: Form) -> NDArray[Any]:
    dtype, size = np.dtype(form.dtype), int(np.prod(form.shape, dtype=np.int64))
    values, there = held[name], None
    if form.sparse:
        there = np.unpackbits(held[name + _BITMASK], count=size).astype(bool)
    if form.bits:
        count = size if there is None else int(there.sum())
        bits = np.unpackbits(values, count=count * form.bits).reshape(count, form.bits)
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
