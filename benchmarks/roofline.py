"""How much of the machine's int8 peak an encoder tier reaches:

    .venv/bin/python benchmarks/roofline.py runs/banking77-seed0.nw [--tier half-int8] [--threads 2]

Reads the run store beside the artifact. Operations of a row are 2 x multiply-adds of the int8 matrices of the exported
file, from their shapes and the row's tokens (padding and attention's own products do not count). The peak is the best
that ONNX Runtime reaches on large int8 matrices with the same threads. Peak and tier are measured in turns. Writes
benchmarks/results/roofline.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from netweight import artifact
from netweight.artifact import Tier
from netweight.data import Columns, read
from netweight.encode import TextEncoder, Tokens
from netweight.engine.cascade import tier_engine
from netweight.measure import BATCHES, cores, machine
from netweight.packing import unpacked_file
from netweight.pipeline import store_of
from netweight.store import DEV, Store

SHAPES = ((256, 1024, 1024), (512, 1024, 4096), (1024, 2048, 2048), (2048, 1024, 1024), (4096, 512, 2048))
ROUNDS, ROWS = 7, 512
# Nodes between an int8 weight and the product that takes it.
_PASS = ("DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast")


@dataclass(frozen=True)
class Work:
    """int8 multiply-adds: `token` for each token, `row` for each row; and how many products are not of int8 weights."""

    token: int
    row: int
    others: int

    def of(self, lengths: np.ndarray) -> float:
        """int8 operations of rows of these lengths."""
        return 2.0 * float(self.token * lengths.sum() + self.row * len(lengths))


def work_of(data: bytes) -> Work:
    """From the shapes in an ONNX file."""
    graph = onnx.load_from_string(data).graph
    held = {t.name: t for t in graph.initializer}
    made = {out: node for node in graph.node for out in node.output}

    def weight(name: str) -> onnx.TensorProto | None:
        while name not in held and name in made and made[name].op_type in _PASS:
            name = made[name].input[0]
        found = held.get(name)
        return found if found is not None and len(found.dims) == 2 else None

    # The last product is the head, which takes one vector a row.
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul")]
    token = row = others = 0
    for node in products:
        place = 3 if node.op_type == "QLinearMatMul" else 1
        found = weight(node.input[place])
        if found is None:
            others += 1
        elif found.data_type in (TensorProto.INT8, TensorProto.UINT8):
            macs = int(np.prod(found.dims))
            if node is products[-1]:
                row += macs
            else:
                token += macs
        else:
            others += 1
    return Work(token, row, others)


def peaks(threads: int) -> dict[str, tuple[float, Callable[[], object]]]:
    """Operations and a call, for each shape and operator."""
    found: dict[str, tuple[float, Callable[[], object]]] = {}
    rng = np.random.default_rng(0)
    for m, k, n in SHAPES:
        a = rng.integers(0, 255, (m, k), np.uint8)
        b = numpy_helper.from_array(rng.integers(-127, 127, (k, n), np.int8), "b")
        for kind in ("MatMulInteger", "QLinearMatMul"):
            session = _session(kind, a.shape, b, threads)
            found[f"{kind} {m} x {k} x {n}"] = (2.0 * m * k * n, lambda s=session, x=a: s.run(None, {"a": x}))
    return found


def _session(kind: str, shape: tuple[int, ...], b: onnx.TensorProto, threads: int) -> ort.InferenceSession:
    scalars = {"as": np.float32(0.1), "az": np.uint8(3), "bs": np.float32(0.1), "bz": np.int8(0)}
    scalars |= {"ys": np.float32(50.0), "yz": np.uint8(128)}
    takes = ["a", "as", "az", "b", "bs", "bz", "ys", "yz"] if kind == "QLinearMatMul" else ["a", "b", "az", "bz"]
    kept = [b, *(numpy_helper.from_array(np.asarray(v), n) for n, v in scalars.items() if n in takes)]
    type_ = TensorProto.UINT8 if kind == "QLinearMatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(kind, takes, ["y"])],
        kind,
        [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", type_, (shape[0], b.dims[1]))],
        kept,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds_of(call: Callable[[], object], least: float = 0.2) -> float:
    """Of one call, from as many as take `least` seconds."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < least:
        call()
        count += 1
    return (time.perf_counter() - began) / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tier", action="append", help="default: every encoder of the run store")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    manifest = artifact.read_manifest(given.artifact)
    definition = artifact.read_file(given.artifact, manifest, artifact.TOKENIZER).decode()
    encoder = TextEncoder(definition, manifest.max_length, manifest.pad)
    tokens = encoder.encode(read(store_of(given.artifact) / DEV, Columns("text", "label")).rows.text[:ROWS])
    best = peaks(given.threads)
    tiers: dict[str, tuple[Work, Callable[[int], object], int]] = {}
    with Store(store_of(given.artifact), None) as store:
        encoders = [f"{kind}-int8" for kind in ("full", "slim", "thin", "half", "third")]
        for name in given.tier or [name for name in encoders if store.get(f"point {name}")]:
            known = store.get(f"point {name}")
            data = store.read(f"points/{name}.bin")
            engine = tier_engine(Tier(name, known["engine"], "", known["options"]), data, manifest.pad, given.threads)
            work = work_of(unpacked_file(data) if known["options"].get("packed") else data)
            call = lambda batch, e=engine: e.logits(tokens, batch)  # noqa: E731
            tiers[name] = (work, call, min(BATCHES, key=lambda b, c=call: seconds_of(lambda: c(b))))
    rates: dict[str, list[float]] = {name: [] for name in (*best, *tiers)}
    for _ in range(ROUNDS):
        for name, (count, call) in best.items():
            rates[name].append(count / seconds_of(call))
        for name, (work, call, batch) in tiers.items():
            rates[name].append(work.of(tokens.lengths) / seconds_of(lambda c=call, b=batch: c(b)))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    top = max(best, key=lambda name: middle[name])
    found = {
        "machine": asdict(machine(given.threads)),
        "artifact": given.artifact.name,
        "rows": len(tokens),
        "tokens": float(tokens.lengths.mean()),
        "peak": {"name": top, "operations": middle[top]},
        "peaks": {name: middle[name] for name in best},
        "tiers": {
            name: {
                "batch": batch,
                "operations_per_row": work.of(tokens.lengths) / len(tokens),
                "other_products": work.others,
                "padding": _padding(tokens, batch),
                "rows_per_second": middle[name] * len(tokens) / work.of(tokens.lengths),
                "operations": middle[name],
                "share": middle[name] / middle[top],
            }
            for name, (work, _, batch) in tiers.items()
        },
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "roofline.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"peak: {middle[top] / 1e9:,.0f} billion int8 operations a second ({top})")
    for name in tiers:
        print(f"{name}: {middle[name] / 1e9:,.0f} billion, {100 * middle[name] / middle[top]:.0f} % of it")


def _padding(tokens: Tokens, batch: int) -> float:
    """Share of padding among the tokens that are computed."""
    computed = sum(len(rows) * int(tokens.lengths[rows].max()) for rows in tokens.buckets(batch))
    return 1 - float(tokens.lengths.sum()) / computed


if __name__ == "__main__":
    main()
