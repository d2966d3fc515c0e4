"""Write docs/scaling.md: a model of what each strategy sends, and where it stops paying, up to 1,000 devices."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, MEASURED = ROOT / "docs" / "scaling.md", ROOT / "benchmarks" / "results" / "runs.json"
NUMBERS = (2, 8, 64, 256, 1000)
FLOAT, HALF = 4, 2  # bytes of a gradient or parameter, and of an activation in bf16
FLOPS = 200e12  # of a device in bf16, as reached and not as stated by its maker
INSIDE, BETWEEN = 300e9, 25e9  # bytes a second between devices of one machine, and of different ones
MACHINE = 8  # devices of one machine
MICRO = 32  # micro-batches of a pipeline


@dataclass(frozen=True)
class Network:
    """A transformer: its name, parameters, layers and hidden width."""

    name: str
    parameters: float
    layers: int
    hidden: int


@dataclass(frozen=True)
class Work:
    """Rows of a global batch for each device, and tokens of a row."""

    rows: int = 32
    length: int = 128


NETWORKS = (Network("BERT base", 110e6, 12, 768), Network("7 B decoder", 7e9, 32, 4096))


def sent(strategy: str, network: Network, work: Work, devices: int, activation: int = HALF) -> float:
    """Bytes that each device sends in a step; `activation` is what a hidden state's number takes."""
    ring = (devices - 1) / devices
    tokens = work.rows * work.length
    if strategy == "ddp":
        return 2 * ring * FLOAT * network.parameters
    if strategy == "fsdp":
        return 3 * ring * FLOAT * network.parameters
    if strategy == "tensor":
        # All devices see all rows.
        return 4 * network.layers * 2 * ring * activation * devices * tokens * network.hidden
    # The first stage sends hidden states, the second gradients; those between send both.
    return 2 * activation * devices * tokens * network.hidden * (devices - 1) / devices


def efficiency(strategy: str, network: Network, work: Work, devices: int) -> float:
    """Part of the time that a device computes, when nothing is sent while it does."""
    computing = 6 * network.parameters * work.rows * work.length / FLOPS
    sending = sent(strategy, network, work, devices) / (INSIDE if devices <= MACHINE else BETWEEN)
    busy = computing / (computing + sending)
    return busy * MICRO / (devices + MICRO - 1) if strategy == "pipeline" else busy


def table(network: Network, work: Work) -> list[str]:
    """Rows for the page."""
    lines = [
        f"## {network.name}",
        "",
        f"| strategy | {' | '.join(f'{n}' for n in NUMBERS)} | stops paying at |",
        "|---" * (len(NUMBERS) + 2) + "|",
    ]
    for strategy in ("ddp", "fsdp", "tensor", "pipeline"):
        cells = []
        for devices in NUMBERS:
            if strategy == "pipeline" and devices > network.layers:
                cells.append("-")
                continue
            gigabytes = sent(strategy, network, work, devices) / 1e9
            cells.append(f"{gigabytes:,.2f} GB, {efficiency(strategy, network, work, devices):.0%}")
        most = network.layers if strategy == "pipeline" else NUMBERS[-1]
        ends = next((n for n in range(2, most + 1) if efficiency(strategy, network, work, n) < 0.5), None)
        lines.append(f"| {strategy} | {' | '.join(cells)} | {ends or f'not up to {most}'} |")
    return [*lines, ""]


def page() -> str:
    """All of it."""
    work = Work()
    head = f"""# How far each strategy scales: a model

**This is a model, not a measurement.** It counts bytes and divides; nothing is overlapped, and no device waits for a slow
one. Written by `scripts/scaling_model.py`. At the end, its bytes are compared with those of two processes.

Assumed: {FLOPS / 1e12:g} TFLOP/s reached by each device in bf16, {INSIDE / 1e9:g} GB/s between the {MACHINE} devices of a machine
and {BETWEEN / 1e9:g} GB/s between machines, {work.rows} rows of {work.length} tokens for each device, {MICRO} micro-batches in a pipeline.
Computing takes 6 x parameters x tokens operations (Kaplan et al., 2020).

Sent by each of N devices in a step, with P parameters, L layers, hidden width h and T tokens for each device:

| strategy | bytes | source |
|---|---|---|
| ddp | 2 (N - 1) / N x {FLOAT} P | a ring all-reduce (Patarasuk and Yuan, 2009) |
| fsdp | 3 (N - 1) / N x {FLOAT} P | two gathers and one scatter (Rajbhandari et al., ZeRO, 2020, section 7) |
| tensor | 4 L x 2 (N - 1) / N x {HALF} N T h | four all-reduces for each layer (Shoeybi et al., 2019, section 3) |
| pipeline | 2 (N - 1) / N x {HALF} N T h, on average | hidden states down, gradients up; idle (p - 1) / (m + p - 1) (Huang et al., 2019) |

Each cell has bytes sent and the part of the time in which a device computes. A strategy stops paying where that falls below
one half.
"""
    lines = [line for network in NETWORKS for line in table(network, work)]
    return "\n".join([head, *lines, *compared()]).rstrip() + "\n"


def compared() -> list[str]:
    """What two processes sent, beside what the model says; nothing where nobody has measured."""
    found = json.loads(MEASURED.read_text(encoding="utf-8")).get("sent") if MEASURED.exists() else None
    if found is None:
        return []
    network = Network(found["model"], found["trained"], found["layers"], found["hidden"])
    lines = [
        "## Two processes, measured",
        "",
        f"The {network.name} model ({network.parameters / 1e6:.1f} M parameters), {found['batch']} rows of "
        f"{found['tokens'] // found['batch']} tokens together, fp32, over the loopback device (`benchmarks/runs_sharded.py`). "
        "Sums for the loss and for clipping, and what TCP adds, are in the measured bytes only.",
        "",
        "| strategy | model | measured | measured / model |",
        "|---|---|---|---|",
    ]
    for strategy, measured in found["bytes"].items():
        modelled = sent(strategy, network, Work(1, found["tokens"] // 2), 2, FLOAT)
        lines.append(f"| {strategy} | {modelled / 1e6:.1f} MB | {measured / 1e6:.1f} MB | {measured / modelled:.2f} |")
    return [*lines, ""]


def main(arguments: list[str]) -> int:
    """Write the page, or with --check say whether it is fresh."""
    if "--check" in arguments:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
