"""What serving costs, and how it holds: `make bench-serve ARTIFACT=reviews.nw`.

    .venv/bin/python benchmarks/serve.py ARTIFACT INPUT [--text text] [--seconds 10]

The server has the first core and one engine thread, the generator (`load.py`) the second. Latency is counted from when
a request was due. "static" is the artifact's first tier alone. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from load import Seen, beside, closed_loop, open_loop, request
from process import HOST, Running, server

from netweight import artifact
from netweight.data import Columns, read
from netweight.measure import machine

RESULTS = Path(__file__).resolve().parent / "results" / "serve.json"
PORT = 8765
PLACE = (HOST, PORT)
# What `predict` makes of the same texts in batches of 64, in a process of its own on the server's core.
IN_PROCESS = """
import json, os, sys, time
os.sched_setaffinity(0, {0})
from pathlib import Path
from netweight.engine import load
texts = json.loads(Path(sys.argv[2]).read_text())
engine = load(sys.argv[1], 1); engine.warm()
began, done = time.perf_counter(), 0
while time.perf_counter() < began + float(sys.argv[3]):
    at = done % (len(texts) - 64)
    engine.predict(texts[at:at + 64]); done += 64
print(done / (time.perf_counter() - began))
"""


@contextmanager
def served(folder: Path) -> Iterator[Running]:
    """A server of one artifact as "model"; gives the seconds from its start until it is ready."""
    with server(folder, PORT, cores="0") as running:
        yield running


def first_tier(folder: Path, to: Path) -> Path:
    """The artifact's first tier as an artifact."""
    manifest = artifact.read_manifest(folder)
    tier = replace(manifest.tiers[0], threshold=0.0)
    names = (artifact.TOKENIZER, tier.file)
    contents = {name: artifact.read_file(folder, manifest, name) for name in names}
    artifact.save(to, replace(manifest, tiers=(tier,)), contents)
    return to


def batches(folder: Path, texts: list[str], kept: Path, seconds: float, rounds: int = 5) -> dict[str, Any]:
    """Rows a second over HTTP in batches of 64, and of the engine in process, in turns."""
    bodies = [request("/v1/models/model/predict", {"texts": texts[i : i + 64]}) for i in range(0, len(texts) - 64, 64)]
    http, inside = [], []
    for _ in range(rounds):
        with served(folder):
            asyncio.run(closed_loop(PLACE, bodies, 2, 0.5))
            seen = asyncio.run(closed_loop(PLACE, bodies, 2, seconds / rounds))
        http.append(64 * len(seen.seconds) / (seconds / rounds))
        words = [sys.executable, "-c", IN_PROCESS, str(folder), str(kept), str(seconds / rounds)]
        inside.append(float(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    ratios = [a / b for a, b in zip(http, inside, strict=True)]
    return {"http": statistics.median(http), "inside": statistics.median(inside), "ratio": statistics.median(ratios)}


def singles(running: Running, bodies: list[bytes], rate: float | None, seconds: float) -> dict[str, Any]:
    """Single texts at a rate; without one, at that at which the server's core is busy for 60 % of the time, as a few
    seconds at 200 a second tell."""
    before = running.busy()
    calm = asyncio.run(open_loop(PLACE, bodies, 200.0, 5.0))
    each = (running.busy() - before) / len(calm.seconds)
    rate = rate or 0.6 / each
    before = running.busy()
    seen = asyncio.run(open_loop(PLACE, bodies, rate, seconds))
    return {"rate": rate, "busy": (running.busy() - before) / seconds, **told(seen)}


def told(seen: Seen) -> dict[str, Any]:
    """What is kept of a load."""
    found: dict[str, Any] = {f"p{p}": round(seen.percentile(p), 2) for p in (50, 95, 99)}
    return found | {"late_p99": round(seen.percentile(99, seen.late), 2), "statuses": dict(seen.statuses)}


def capacity(bodies: list[bytes]) -> float:
    """Single requests a second that 32 clients get answered."""
    return len(asyncio.run(closed_loop(PLACE, bodies, 32, 3.0)).seconds) / 3.0


def overload(bodies: list[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Twice what it can do, then a quarter: who is let in, how long they take, how soon all is well again."""
    hot = asyncio.run(open_loop(PLACE, bodies, 2 * rate, seconds, most=2000))
    cool = asyncio.run(open_loop(PLACE, bodies, rate / 4, 4.0))
    refused = [due for due, status, _ in cool.log if status != 200]
    return {"rate": 2 * rate, **told(hot), "recovered_after": max(refused, default=0.0), "then": told(cool)}


def exchanges(folder: Path, bodies: list[bytes], rate: float, count: int) -> dict[str, Any]:
    """The folder is replaced `count` times under load."""
    manifest = artifact.read_manifest(folder)
    contents = {name: artifact.read_file(folder, manifest, name) for name in manifest.files}

    async def replaced() -> None:
        for i in range(count):
            tiers = tuple(replace(t, temperature=t.temperature * (1.0 + 1e-6 * (i + 1))) for t in manifest.tiers)
            await asyncio.to_thread(artifact.save, folder, replace(manifest, tiers=tiers), contents)
            await asyncio.sleep(1.0)

    seen = asyncio.run(beside(open_loop(PLACE, bodies, rate, 1.0 * count + 2), replaced))
    return {"count": count, "rate": rate, **told(seen)}


def main() -> None:
    """Print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("input")
    parser.add_argument("--text", default="text")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--exchanges", type=int, default=20)
    parser.add_argument("--overload", type=float, default=60.0, help="seconds of twice what it can do")
    given = parser.parse_args()
    os.sched_setaffinity(0, {1})
    texts = list(read(given.input, Columns(given.text), label_required=False).rows.text)
    bodies = [request("/v1/models/model/predict", {"texts": [text]}) for text in texts]
    found: dict[str, Any] = {"machine": asdict(machine(1)), "seconds": given.seconds}
    with tempfile.TemporaryDirectory() as place:
        kept = Path(place) / "texts.json"
        kept.write_text(json.dumps(texts), encoding="utf-8")
        manifest = artifact.read_manifest(given.artifact)
        contents = {name: artifact.read_file(given.artifact, manifest, name) for name in manifest.files}
        whole = Path(place) / "whole" / "model.nw"
        artifact.save(whole, manifest, contents)
        for name, folder in (("static", first_tier(whole, Path(place) / "static" / "model.nw")), ("cascade", whole)):
            one: dict[str, Any] = {"batches": batches(folder, texts, kept, given.seconds)}
            with served(folder) as running:
                one["ready"] = running.ready
                most = capacity(bodies)
                one["capacity"] = most
                one["singles"] = singles(running, bodies, 1000.0 if name == "static" else None, given.seconds)
                one["overload"] = overload(bodies, most, given.overload)
                one["exchanges"] = exchanges(folder, bodies, 0.3 * most, given.exchanges)
            found[name] = one
            print(name, json.dumps(one, indent=1), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
