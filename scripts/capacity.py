"""Write docs/capacity.md from benchmarks/results/serve.json: how many machines, and what they cost.

.venv/bin/python scripts/capacity.py --cores 16 --utilisation 0.5      prints the page under other assumptions
.venv/bin/python scripts/capacity.py --write                           writes it under these; --check compares
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netweight.measure import VCPU_HOUR

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "capacity.md"
MEASURED = ROOT / "benchmarks" / "results" / "serve.json"
MONTH = 730.0  # hours
NAMES = {"static": "the first tier alone", "cascade": "the whole cascade"}


@dataclass(frozen=True)
class Plan:
    """What is assumed: the share of a core that may be busy, dollars for an hour of one core, cores of a machine, zones of
    which any one may be lost, and texts a second."""

    utilisation: float = 0.6
    price: float = VCPU_HOUR
    cores: int = 8
    zones: int = 3
    rates: tuple[int, ...] = (1_000, 100_000, 1_000_000)

    def machines(self, rate: float, each: float) -> int:
        """So many that those of all zones but one carry `rate`, as many in every zone; `each` is what a core answers a
        second when it does nothing else."""
        needed = rate / (each * self.cores * self.utilisation)
        return self.zones * math.ceil(needed / max(1, self.zones - 1))

    def month(self, machines: int) -> float:
        """Dollars."""
        return machines * self.cores * self.price * MONTH


def speeds(found: dict[str, Any]) -> list[tuple[str, float]]:
    """Texts that one core answers a second, by what is asked how."""
    rows: list[tuple[str, float]] = []
    for key, name in NAMES.items():
        rows.append((f"{name}, one text a request", float(found[key]["capacity"])))
        rows.append((f"{name}, 64 texts a request", float(found[key]["batches"]["http"])))
    return rows


def page(found: dict[str, Any], plan: Plan) -> str:
    """The page's text."""
    machine = found["machine"]
    spare = "no zone may be lost" if plan.zones < 2 else f"{plan.zones} zones, any one of which may be lost"
    parts = [
        "# Capacity: a model, not a measurement\n",
        "Written by `make docs` from `benchmarks/results/serve.json`. One core was measured; everything below that is multiplied from it.\n",
        f"Measured: BANKING77's artifact on one core of {machine['cpu']}, {machine['date']}, commit {machine['commit']}; the load came from "
        "the core beside it, so these are lower bounds.\n",
        "| asked of | texts a second and core |\n|---|---|",
    ]
    parts += [f"| {name} | {each:,.0f} |" for name, each in speeds(found)]
    parts.append(
        f"\nAssumed, each one an option of `scripts/capacity.py`: cores are busy {100 * plan.utilisation:g} % of the time (`--utilisation`; what is "
        f"left is for peaks and for latency), a core costs ${plan.price:g} an hour (`--price`), machines have {plan.cores} cores (`--cores`), {spare} "
        f"(`--zones`; with the rest at {100 * plan.utilisation:g} %), a month has {MONTH:g} hours.\n"
    )
    parts.append("| texts a second | asked of | machines | $ a month | $ per million texts |\n|---|---|---|---|---|")
    for rate in plan.rates:
        for name, each in speeds(found):
            count = plan.machines(rate, each)
            money = plan.month(count)
            parts.append(
                f"| {rate:,} | {name} | {count:,} | {money:,.0f} | {1e6 * money / (rate * MONTH * 3600):.4f} |"
            )
    parts.append("""
What the model leaves out, and in which direction that errs:

- Cores are taken to be alike and independent: one worker with one engine thread on each. Shared caches, memory bandwidth and two hyperthreads on
  one core make the second one slower; on machines that sell hyperthreads as cores, halve the speeds until you have measured.
- Load balancers, TLS, traffic between zones, logs and monitoring cost extra. A balancer that is not aware of load needs a lower utilisation.
- Rates are even within a second, and the day is flat: you pay for the peak. An autoscaler (`deploy/kubernetes/`) follows slow changes only.
- The share of rows that the cascade hands over, and the length of texts, are those of BANKING77 (some 12 words). Yours decide: `make bench-serve`.
- Nothing at 100,000 a second or more was ever run.
""")
    return "\n".join(parts).rstrip("\n") + "\n"


def main() -> int:
    """Print, write, or compare."""
    usual = Plan()
    parser = argparse.ArgumentParser()
    parser.add_argument("--utilisation", type=float, default=usual.utilisation)
    parser.add_argument("--price", type=float, default=usual.price)
    parser.add_argument("--cores", type=int, default=usual.cores)
    parser.add_argument("--zones", type=int, default=usual.zones)
    parser.add_argument("--rate", type=int, action="append")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    plan = Plan(given.utilisation, given.price, given.cores, given.zones, tuple(given.rate or usual.rates))
    if not (0 < plan.utilisation <= 1 and plan.price > 0 and plan.cores > 0 and plan.zones > 0):
        parser.error("a utilisation lies in (0, 1]; price, cores and zones are above zero.")
    text = page(json.loads(MEASURED.read_text(encoding="utf-8")), plan)
    if given.write:
        PAGE.write_text(text, encoding="utf-8")
    elif not given.check:
        print(text)
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/capacity.md is not what serve.json says; run `make docs` and commit it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
