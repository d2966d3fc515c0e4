"""The part of docs/results.md that comes from `make bench-serve`, bench-servers, bench-endure and bench-fuzz."""

from __future__ import annotations

import json
from typing import Any

import peers

_KINDS = ("static", "cascade")
_HEAD = "| figure | target | reached | |\n|---|---|---|---|"
_MISSING = f"| {{}} | {{}} | {peers.NOT_RUN} | |"

Stored = dict[str, Any]


def stored(name: str) -> Stored | None:
    """A result, if there is one."""
    path = peers.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def row(figure: str, target: str, said: str, fine: bool | None) -> str:
    """A line of a table of targets."""
    verdict = "" if fine is None else "reached" if fine else "**missed**"
    return f"| {figure} | {target} | {said} | {verdict} |"


def _each(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{kind} {form.format(value)}" for kind, value in values.items())


def _serve(found: Stored | None) -> list[str]:
    if found is None:
        return [_MISSING.format("`make bench-serve`", "")]
    both = {kind: found[kind] for kind in _KINDS}
    batches = {kind: one["batches"]["ratio"] for kind, one in both.items()}
    singles = {kind: one["singles"] for kind, one in both.items()}
    ready = max(one["ready"] for one in both.values())
    hot = {kind: one["overload"] for kind, one in both.items()}
    kept = {kind: o["p99"] <= 1.1 * o["then"]["p99"] for kind, o in hot.items()}
    others = {kind: {s for s in o["statuses"] if s not in ("200", "429")} for kind, o in hot.items()}
    recovered = {kind: o["recovered_after"] for kind, o in hot.items()}
    shares = {k: o["statuses"].get("200", 0) / sum(o["statuses"].values()) for k, o in hot.items()}
    return [
        row(
            "rows a second over HTTP in batches of 64 / the engine called in process",
            "85 % (cascade)",
            _each({k: 100 * v for k, v in batches.items()}, "{:.0f} %"),
            batches["cascade"] >= 0.85,
        ),
        *(
            row(
                f"single texts, one worker, {kind}, {one['rate']:,.0f} a second ({100 * one['busy']:.0f} % busy): p99",
                "10 ms",
                f"{one['p99']:.1f} ms (p50 {one['p50']:.1f})",
                one["p99"] <= 10,
            )
            for kind, one in singles.items()
        ),
        row("start to ready, one model", "1.0 s", f"{ready:.2f} s", ready <= 1),
        row(
            f"twice what it can do ({_each({k: o['rate'] for k, o in hot.items()}, '{:,.0f}')} a second): p99 of those let in",
            "as at a quarter of it",
            "; ".join(
                f"{k} {o['p99']:,.0f} ms (calm {o['then']['p99']:.1f} ms; the generator itself was late by {o['late_p99']:,.0f} ms)"
                for k, o in hot.items()
            ),
            all(kept.values()),
        ),
        row(
            "the same: all others get 429",
            "yes",
            "; ".join(f"{k} {100 * shares[k]:.0f} % let in, other statuses: {len(others[k])}" for k in _KINDS),
            not any(others.values()),
        ),
        row("the same: last refusal after it ended", "2 s", _each(recovered, "{:.1f} s"), max(recovered.values()) <= 2),
    ]


def _servers(found: Stored | None) -> list[str]:
    if found is None:
        return [_MISSING.format("throughput; p99 / LitServe and plain Ray Serve", "3x; 1/2")]
    rows = []
    for kind, ones in found["artifact"].items():
        for peer, one in ones.items():
            r, m = one["ratios"], one["measured"]
            rows.append(
                row(
                    f"{kind} behind {peer}, {one['rate']:,.0f} a second: throughput; p99, Netweight's / its",
                    "3x; 0.50",
                    f"{r['throughput']:.2f}x ({m['netweight']['throughput']:,.0f} and {m[peer]['throughput']:,.0f} requests "
                    f"a second); {r['p99']:.2f} ({m['netweight']['p99']:.1f} and {m[peer]['p99']:.1f} ms)",
                    r["throughput"] >= 3 and r["p99"] <= 0.5,
                )
            )
    return rows


def _endure(found: Stored | None) -> list[str]:
    if found is None:
        return [_MISSING.format("soak, exchanges, `kill -9`", "0 errors; 0 failed; 2 s")]
    soak, swaps, kills = found["soak"], found["exchanges"], found["kills"]
    errors = sum(n for status, n in soak["statuses"].items() if status != "200")
    growth = 100 * soak["grown_after_warm_up"] / soak["megabytes"][0]
    failed = sum(n for status, n in swaps["statuses"].items() if status != "200")
    slowest = max(kills["answers_after"])
    broke = sum(n for status, n in kills["statuses"].items() if status != "200")
    return [
        row(
            f"soak of {soak['requests']:,} requests: errors; growth of resident memory after a tenth",
            "0; 2 %",
            f"{errors}; {growth:.1f} % ({soak['megabytes'][0]:.0f} MB, {soak['grown_after_warm_up']:+.1f} MB)",
            errors == 0 and growth < 2,
        ),
        row(f"{swaps['count']} new versions under load: failed requests", "0", f"{failed}", failed == 0),
        row(
            f"`kill -9` of a worker under load, {kills['kills']} times: seconds until another one answers",
            "2",
            f"{slowest:.2f} at most; {broke} of {sum(kills['statuses'].values()):,} requests broke; the client, which sends "
            f"again, gave up {len(kills['client']['given_up'])} of {kills['client']['requests']:,}",
            slowest <= 2 and not kills["client"]["given_up"],
        ),
    ]


def _fuzz(found: Stored | None) -> list[str]:
    if found is None:
        return [_MISSING.format("fuzzing", "no 5xx, no crash, no leak")]
    wrong = len(found["faults"]) + len(found["errors"]) + found["crashes"]
    memory = found["megabytes"]
    return [
        row(
            f"{found['count']:,} mutated requests, and schemathesis: 5xx, crashes, wrong answers; memory",
            "0; no leak",
            f"{wrong}; {memory[1]:.0f} MB after a tenth, {memory[-1]:.0f} MB at the end",
            wrong == 0 and memory[-1] < 1.1 * memory[1],
        )
    ]


def section() -> str:
    """Figures against targets."""
    serve = stored("serve")
    parts = [
        "## Serving\n\n    make bench-serve ARTIFACT=... INPUT=...     (and bench-servers, bench-endure, bench-fuzz)\n"
    ]
    if serve is not None:
        m = serve["machine"]
        parts.append(
            f"{m['cpu']}; the server has one core and one engine thread, the generator the other; latency is counted from when a "
            f"request was due; {m['date']}, commit {m['commit']}. *static* is the artifact's first tier alone.\n"
        )
    rows = [*_serve(serve), *_servers(stored("servers")), *_endure(stored("endure")), *_fuzz(stored("fuzz"))]
    return "\n".join(parts) + "\n" + "\n".join([_HEAD, *rows]) + "\n"
