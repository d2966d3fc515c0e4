"""The same artifact behind Netweight, LitServe and plain Ray Serve, in turns:

    .venv/bin/python benchmarks/servers.py ARTIFACT INPUT [--text text] [--rounds 5] [--work runs] [--kind K] [--peer P]

Each server has the first core, all of its processes together, and one engine thread; the generator (`load.py`) the
second. Every server answers lists of texts with label, confidence and tier. Throughput: 32 clients with one text each,
each sending the next when the last was answered. p99: open loop at 60 % of the peer's throughput, the same rate for
both; latency is counted from when a request was due. The peers may batch, and do so where that is faster for them (the
better of two settings). "static" is the artifact's first tier alone. Writes benchmarks/results/servers.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load import closed_loop, open_loop, request
from serve import HOST, first_tier

from netweight import artifact
from netweight.data import Columns, read
from netweight.measure import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "servers.json"
PORT, PLACE = 8766, (HOST, 8766)
PEERS = ("litserve", "ray_serve")
KINDS = ("static", "cascade")
BATCHES = ((1, 0.0), (32, 2.0))  # requests together, milliseconds of waiting for them
SECONDS, CLIENTS = 5.0, 32


def python_of(peer: str, work: Path) -> Path:
    """The interpreter of its environment, which is made on first use."""
    folder, wanted = work / "env" / peer, HERE / "servers" / peer / "requirements.txt"
    done = folder / "installed.txt"
    if not done.exists() or done.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", str(wanted)], check=True)
        done.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return folder / "bin" / "python"


@contextmanager
def served(words: list[str], path: str, text: str) -> Iterator[float]:
    """A server on the first core; gives the seconds until it answers."""
    source = str(HERE.parent / "src")
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    body = request(path, {"texts": [text]})
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["taskset", "-c", "0", *words], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            while 200 not in asyncio.run(closed_loop(PLACE, [body], 1, 0.01)).statuses:
                if process.poll() is not None or time.perf_counter() > began + 120:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace")[-2000:])
                time.sleep(0.05)
            yield time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # processes of its own that it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            while answers():  # the socket may outlive the processes for a moment
                time.sleep(0.1)


def answers() -> bool:
    """Whether anybody listens."""
    with socket.socket() as one:
        return one.connect_ex(PLACE) == 0


def throughput(bodies: list[bytes], seconds: float) -> float:
    """Requests a second."""
    asyncio.run(closed_loop(PLACE, bodies, CLIENTS, 1.0))
    seen = asyncio.run(closed_loop(PLACE, bodies, CLIENTS, seconds))
    return len(seen.seconds) / seconds


def compare(peer: str, folder: Path, texts: list[str], rounds: int, work: Path) -> dict[str, Any]:
    """Netweight and a peer in turns."""
    ours = [sys.executable, "-c", "from netweight.cli import main; main()", "serve", str(folder)]
    ours += ["--port", str(PORT), "--threads", "1", "--queue-ms", "1000"]
    script = [str(python_of(peer, work)), str(HERE / "servers" / peer / "run.py"), str(folder), str(PORT)]
    paths = {"netweight": "/v1/models/model/predict", peer: "/predict"}
    bodies = {name: [request(path, {"texts": [text]}) for text in texts] for name, path in paths.items()}
    tried = {}
    for size, wait in BATCHES:
        with served([*script, str(size), str(wait)], paths[peer], texts[0]):
            tried[size, wait] = throughput(bodies[peer], SECONDS)
    best = max(tried, key=lambda key: tried[key])
    words = {"netweight": ours, peer: [*script, *map(str, best)]}
    rate = 0.6 * tried[best]
    found: dict[str, dict[str, list[float]]] = {name: {"throughput": [], "p50": [], "p99": []} for name in words}
    for _ in range(rounds):
        for name, command in words.items():
            with served(command, paths[name], texts[0]):
                found[name]["throughput"].append(throughput(bodies[name], SECONDS))
                seen = asyncio.run(open_loop(PLACE, bodies[name], rate, SECONDS))
                assert set(seen.statuses) == {200}, seen.statuses
                for p in (50, 99):
                    found[name][f"p{p}"].append(seen.percentile(p))
    middle = {n: {k: statistics.median(v) for k, v in kinds.items()} for n, kinds in found.items()}
    ratios = {
        key: statistics.median(a / b for a, b in zip(found["netweight"][key], found[peer][key], strict=True))
        for key in ("throughput", "p50", "p99")
    }
    return {"batch": best, "rate": rate, "rounds": rounds, "measured": middle, "ratios": ratios}


def main() -> None:
    """Print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("input")
    parser.add_argument("--text", default="text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: both")
    parser.add_argument("--peer", action="append", choices=PEERS, help="default: both")
    given = parser.parse_args()
    os.sched_setaffinity(0, {1})
    texts = list(read(given.input, Columns(given.text), label_required=False).rows.text)
    found: dict[str, Any] = {"machine": asdict(machine(1)), "artifact": {}}
    if RESULTS.exists():  # what is not asked for again stays
        found["artifact"] = json.loads(RESULTS.read_text(encoding="utf-8"))["artifact"]
    with tempfile.TemporaryDirectory() as place:
        manifest = artifact.read_manifest(given.artifact)
        whole = Path(place) / "whole" / "model.nw"
        artifact.save(whole, manifest, {n: artifact.read_file(given.artifact, manifest, n) for n in manifest.files})
        for name, folder in (("static", first_tier(whole, Path(place) / "static" / "model.nw")), ("cascade", whole)):
            for peer in (given.peer or PEERS) if name in (given.kind or KINDS) else ():
                one = compare(peer, folder, texts, given.rounds, given.work.absolute())
                found["artifact"].setdefault(name, {})[peer] = one
                print(name, peer, json.dumps(one, indent=1), flush=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
