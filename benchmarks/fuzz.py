"""What a server makes of requests that are odd, broken or slow.

    .venv/bin/python benchmarks/fuzz.py ARTIFACT [--count 10000] [--examples 200]

A real server on loopback meets mutated requests (`mutate.py`), messages that are not HTTP, clients that stop half way,
and what schemathesis makes of its description. Writes benchmarks/results/fuzz.json; ends with 1 where anything was
answered with a 5xx or not as promised, where the server failed, or where it kept memory or files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from mutate import Mutant, broken, fault, mutants
from process import Running, server
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup

from netweight.measure import machine

RESULTS = Path(__file__).resolve().parent / "results" / "fuzz.json"
PORT, CLIENTS = 8766, 4
KEPT = 32.0  # megabytes that the server may have grown by: allocators keep some of what they were given


@dataclass
class Found:
    """Statuses by kind of request, and what was wrong."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, status: int, wrong: str, what: bytes) -> None:
        """One answer."""
        self.statuses[kind][status] += 1
        if wrong:
            self.faults.append(f"{kind}: {wrong}; asked {what[:200]!r}")


async def answer(reader: asyncio.StreamReader, method: str) -> tuple[int, str, bytes, bool]:
    """Status, media type, body, and whether the server closes."""
    head = b"HTTP/1.1 100"
    while head.startswith(b"HTTP/1.1 100"):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    lines = [line.partition(b": ") for line in head.lower().split(b"\r\n")]
    headers = {name: value.decode("latin-1") for name, _, value in lines}
    length = 0 if method == "HEAD" else int(headers[b"content-length"])
    body = await asyncio.wait_for(reader.readexactly(length), 30)
    return int(head[9:12]), headers.get(b"content-type", ""), body, headers.get(b"connection") == "close"


async def client(place: tuple[str, int], model: str, work: Iterator[Mutant], found: Found, look: Any) -> None:
    """Sends one after another over a kept connection."""
    streams = None
    for one in work:
        data = one.raw(model)
        reader, writer = streams or await asyncio.open_connection(*place)
        streams = (reader, writer)
        try:
            writer.write(data)
            status, media, body, closes = await answer(reader, one.method)
            found.add(one.kind, status, fault(status, media, body, one.method), data)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as problem:
            found.add(one.kind, 0, f"no answer ({problem!r})", data)
            closes = True
        if closes:
            writer.close()
            streams = None
        look(found)


async def mutated(running: Running, model: str, count: int, seed: int) -> tuple[Found, list[float], int]:
    """What came back, megabytes after each tenth of the requests, and files that were open after the first."""
    found, memory, files = Found(), list[float](), 0
    done = 0

    def look(_: Found) -> None:
        nonlocal done, files
        done += 1
        if done % max(1, count // 10) == 0:
            memory.append(running.resident())
            files = files or running.files()

    work = mutants(count, seed)
    await asyncio.gather(*(client(running.place, model, work, found, look) for _ in range(CLIENTS)))
    return found, memory, files


async def not_http(running: Running, model: str, found: Found) -> None:
    """Each message on a connection of its own; the server may answer or close, but not with a 5xx."""
    for kind, data in broken(model):
        reader, writer = await asyncio.open_connection(*running.place)
        writer.write(data)
        try:
            status, media, body, _ = await answer(reader, "POST")
            found.add(f"not HTTP: {kind}", status, fault(status, media, body), data)
        except (OSError, asyncio.IncompleteReadError):
            found.add(f"not HTTP: {kind}", 0, "", data)  # closed while it was still sending
        writer.close()


async def stopped(running: Running, model: str, count: int, found: Found) -> float:
    """Clients that send half a head or half a body and wait: seconds until the last is told so."""
    half = f"POST /v1/models/{model}/predict HTTP/1.1\r\nHost: fuzz\r\n".encode()

    async def one(i: int) -> float:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(*running.place)
        writer.write(half if i % 2 else half + b'Content-Length: 99\r\n\r\n{"te')
        said = await asyncio.wait_for(reader.read(), 90)
        found.add(
            "half head" if i % 2 else "half body", int(said[9:12] or 0), "" if b" 408 " in said[:16] else "kept", said
        )
        writer.close()
        return time.perf_counter() - began

    return max(await asyncio.gather(*(one(i) for i in range(count))))


def described(schema: schemathesis.BaseSchema, model: str, examples: int) -> list[str]:
    """What schemathesis finds between a description and its server."""
    checks = schema.config.checks
    # A body may be wrong and too large at once; then it is refused before anybody reads it.
    checks.negative_data_rejection.expected_statuses += ["413"]
    checks.not_a_server_error.expected_statuses += ["504"]  # who allows a millisecond may be late
    wrong: list[str] = []
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for one in schema.get_all_operations():
            operation = one.ok()
            if mode is GenerationMode.NEGATIVE and operation.method != "post":
                continue  # it takes nothing that could be wrong

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def holds(case: schemathesis.Case) -> None:
                if "name" in case.path_parameters:
                    case.path_parameters["name"] = model
                case.call_and_validate()

            try:
                holds()
            except FailureGroup as problem:
                wrong.append(f"{operation.method} {operation.path}, {mode.value}: {str(problem)[:1000]}")
    return wrong


def main() -> None:
    """Print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--slow", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    model = given_.artifact.absolute().name.removesuffix(".nw")
    with server(given_.artifact, PORT) as running:
        found, memory, files = asyncio.run(mutated(running, model, given_.count, given_.seed))
        asyncio.run(not_http(running, model, found))
        seconds = asyncio.run(stopped(running, model, given_.slow, found))
        schema = schemathesis.openapi.from_url("http://{}:{}/openapi.json".format(*running.place))
        wrong = described(schema, model, given_.examples)
        time.sleep(2)
        said: dict[str, Any] = {
            "machine": asdict(machine(1)),
            "count": given_.count,
            "seed": given_.seed,
            "statuses": {kind: dict(sorted(seen.items())) for kind, seen in sorted(found.statuses.items())},
            "faults": found.faults,
            "slow_clients": given_.slow,
            "slow_clients_let_go_after": round(seconds, 1),
            "schemathesis": {"examples": given_.examples, "wrong": wrong},
            "crashes": int(running.process.poll() is not None),
            "errors": running.errors(),
            "megabytes": [*memory, running.resident()],
            "files_kept": running.files() - files,
        }
    for kind, seen in said["statuses"].items():
        print(f"{kind:20}  " + "  ".join(f"{status}: {n:,}" for status, n in seen.items()))
    print(json.dumps({k: v for k, v in said.items() if k not in ("statuses", "machine")}, indent=1))
    RESULTS.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    grown = said["megabytes"][-1] - said["megabytes"][0]
    sys.exit(bool(found.faults or wrong or said["crashes"] or said["errors"] or grown > KEPT or said["files_kept"] > 0))


if __name__ == "__main__":
    main()
