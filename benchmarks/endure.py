"""Whether a server lasts: `make bench-endure ARTIFACT=reviews.nw INPUT=reviews.csv`.

    .venv/bin/python benchmarks/endure.py ARTIFACT INPUT [--requests 1000000] [--exchanges 100] [--kills 5]

A soak of batches and single texts, in turns, from clients that wait for their answers; `kill -9` of one worker of two
under load, again and again; a folder that is replaced under load. Nothing here measures speed: the server may use all
cores. Writes benchmarks/results/endure.json; ends with 1 where a request failed that should not have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load import Connection, beside, open_loop, request
from process import Running, server
from serve import PORT, exchanges

from netweight import artifact
from netweight.client import AsyncClient
from netweight.data import Columns, read
from netweight.errors import EndpointError
from netweight.measure import machine

RESULTS = Path(__file__).resolve().parent / "results" / "endure.json"
ASK = "/v1/models/model/predict"
BATCH = 64
CLIENTS = 4  # fewer than a server ever refuses
# What a client may send again without a thought, as `netweight.client` does; 0 is a connection that broke.
AGAIN = {0, 429, 502, 503}


async def soak(running: Running, texts: list[str], count: int) -> dict[str, Any]:
    """`count` requests, every tenth one a batch; memory is looked at ten times, first when a tenth is done."""
    statuses: Counter[int] = Counter()
    memory, files = list[float](), list[int]()
    singles = [request(ASK, {"texts": [text]}) for text in texts]
    batches = [request(ASK, {"texts": texts[i : i + BATCH]}) for i in range(0, len(texts) - BATCH, BATCH)]
    work = iter(range(count))

    async def client() -> None:
        connection = Connection(*running.place)
        for i in work:
            many, few = batches[i // 10 % len(batches)], singles[i % len(singles)]
            status, _ = await connection.send(few if i % 10 else many)
            statuses[status] += 1
            if statuses.total() % max(1, count // 10) == 0:
                memory.append(running.resident())
                files.append(running.files())
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return {
        "requests": count,
        "statuses": dict(statuses),
        "seconds": round(time.perf_counter() - began, 1),
        "megabytes": memory,
        "grown_after_warm_up": round(memory[-1] - memory[0], 1),
        "files_kept": files[-1] - files[0],
    }


def started(running: Running) -> int:
    """Workers that began to answer so far, those that are gone included."""
    return running.log.read_text(encoding="utf-8", errors="replace").count("Application startup complete.")


async def killed(running: Running) -> tuple[float, float]:
    """Seconds after kill -9 of a worker until another process is in its place, and until that one answers."""
    before, ready = running.workers(), started(running)
    os.kill(before[0], signal.SIGKILL)
    began = time.perf_counter()
    while not (len(running.workers()) == len(before) and before[0] not in running.workers()):
        await asyncio.sleep(0.01)
    replaced = time.perf_counter() - began
    while started(running) == ready:
        await asyncio.sleep(0.01)
    return round(replaced, 2), round(time.perf_counter() - began, 2)


async def kills(running: Running, texts: list[str], count: int, rate: float) -> dict[str, Any]:
    """One worker of two is killed `count` times. Statuses are those of clients that never ask twice; beside them, the
    client that we ship does, and counts what it had to give up."""
    bodies = [request(ASK, {"texts": [text]}) for text in texts]
    took, given_up, done, over = list[tuple[float, float]](), list[str](), 0, False
    seconds = 12.0 * count

    async def ours() -> None:
        nonlocal done
        async with AsyncClient("http://{}:{}".format(*running.place)) as client:
            while not over:
                try:
                    await client.predict("model", texts[done % len(texts) :][:2])
                except EndpointError as problem:
                    given_up.append(str(problem))
                done += 1
                await asyncio.sleep(0.005)

    async def work() -> None:
        nonlocal over
        asking = asyncio.ensure_future(ours())
        for _ in range(count):
            await asyncio.sleep(2.0)
            took.append(await killed(running))
        over = True
        await asking

    seen = await beside(open_loop(running.place, bodies, rate, seconds), work)
    return {
        "kills": count,
        "rate": rate,
        "replaced_after": [first for first, _ in took],
        "answers_after": [second for _, second in took],
        "statuses": dict(seen.statuses),
        "client": {"requests": done, "given_up": given_up},
    }


def main() -> None:
    """Print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("input")
    parser.add_argument("--text", default="text")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--exchanges", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100.0)
    given = parser.parse_args()
    texts = list(read(given.input, Columns(given.text), label_required=False).rows.text)
    found: dict[str, Any] = {"machine": asdict(machine(1))}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model.nw"
        manifest = artifact.read_manifest(given.artifact)
        contents = {name: artifact.read_file(given.artifact, manifest, name) for name in manifest.files}
        artifact.save(folder, manifest, contents)
        # Patience enough: a soak looks for errors, and a stall of the machine is none.
        with server(folder, PORT, "--queue-ms", "10000") as running:
            found["soak"] = asyncio.run(soak(running, texts, given.requests))
            print(json.dumps(found["soak"]), flush=True)
            before = running.resident()
            bodies = [request(ASK, {"texts": [text]}) for text in texts]
            found["exchanges"] = exchanges(folder, bodies, given.rate, given.exchanges)
            found["exchanges"]["megabytes"] = [before, running.resident()]
            print(json.dumps(found["exchanges"]), flush=True)
        # Patience for the time in which one worker stands for two.
        with server(folder, PORT, "--workers", "2", "--queue-ms", "2000") as running:
            while started(running) < 2:
                time.sleep(0.1)
            found["kills"] = asyncio.run(kills(running, texts, given.kills, given.rate))
            print(json.dumps(found["kills"]), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    fine = all(set(found[part]["statuses"]) == {200} for part in ("soak", "exchanges"))
    fine &= set(found["kills"]["statuses"]) <= {200, *AGAIN} and not found["kills"]["client"]["given_up"]
    sys.exit(not fine)


if __name__ == "__main__":
    main()
