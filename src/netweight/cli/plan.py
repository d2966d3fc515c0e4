"""The command that plans a parallel run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from netweight.cli.shared import AsJson, app, print_table, size


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="starter, a Hub id, or a folder of a base or saved model.")] = "starter",
    processes: Annotated[int, typer.Option(help="How many share the work.")] = 2,
    memory: Annotated[str, typer.Option(help="Of each device, for example 24GB.")] = "24GB",
    batch: Annotated[int, typer.Option(help="Rows of a global batch.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or rmsprop.")] = "adamw",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for what is kept between layers.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: what this machine has.")] = "auto",
    activation_checkpointing: Annotated[bool, typer.Option(help="Compute activations again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict the memory that each strategy of a parallel run needs in each process, and say which fits."""
    from netweight.model import skeleton
    from netweight.run.planner import Job, needs, recommended

    job = Job(
        batch,
        length,
        optimizer,  # type: ignore[arg-type]
        precision,  # type: ignore[arg-type]
        device,  # type: ignore[arg-type]
        activation_checkpointing=activation_checkpointing,
    )
    room = size(memory)
    found = needs(skeleton(model), processes, job)
    best = recommended(found, room)
    if as_json:
        rows = [asdict(need) | {"fits": need.fits(room)} for need in found]
        print(json.dumps({"needs": rows, "recommended": best.strategy if best else None}, indent=1))
        return
    table = [["strategy", "parameters", "gradients", "optimizer", "activations", "working", "total", "fits"]]
    for need in found:
        parts = (need.parameters, need.gradients, need.optimizer, need.activations, need.working, need.total)
        cells = ["-"] * len(parts) if need.refused else [f"{part / 1e6:,.1f}" for part in parts]
        table.append([need.strategy, *cells, "refused" if need.refused else "yes" if need.fits(room) else "no"])
    print_table(table)
    lines = [f"{need.strategy}: {need.refused}" for need in found if need.refused]
    again = ",activation-checkpointing" if activation_checkpointing and best and best.strategy != "ddp" else ""
    lines.append(f"MB in each of {processes} processes (local: in one); the largest where they differ.")
    lines.append(
        f"Use --run {best.strategy}:{processes}{again}, the first that fits into {memory}."
        if best
        else f"Nothing fits into {memory}: use more processes or a smaller batch"
        + ("." if activation_checkpointing else ", or plan with --activation-checkpointing.")
    )
    Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)
