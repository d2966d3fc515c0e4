"""Commands that look at artifacts."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from netweight.cli.shared import AsJson, Folder, MaybePair, Text, Threads, app, print_summary, print_table


class Against(StrEnum):
    """Baselines."""

    teacher = "teacher"
    onnx = "onnx"
    onnx_int8 = "onnx-int8"
    openvino_int8 = "openvino-int8"


@app.command()
def bench(
    folder: Folder,
    source: Annotated[str | None, typer.Option("--input", help="A table; without it, the job's dev rows.")] = None,
    text: Text = "text",
    label: Annotated[str | None, typer.Option(help="Column that holds the label: adds quality.")] = None,
    pair: MaybePair = None,
    against: Annotated[
        list[Against] | None,
        typer.Option(help="Baseline, timed beside it; may be repeated. Needs DIR.run."),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure an artifact, and baselines beside it in the same run."""
    from netweight.bench import bench as run

    report = run(
        folder, source, text=text, label=label, pair=pair, against=[a.value for a in against or ()], threads=threads
    )
    if as_json:
        print(report.to_json())
        return
    print_table(report.rows())
    Console().print(report.sentence, markup=False, highlight=False)


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """What an artifact is: verdict, tiers, size, provenance."""
    from netweight.summary import summary

    if as_json:
        print(json.dumps(summary(folder), ensure_ascii=False, indent=1))
    else:
        print_summary(folder)


@app.command()
def explain(folder: Folder, threads: Threads = None, as_json: AsJson = False) -> None:
    """What each step bought in quality, bytes and time, and what was tried and not taken. Needs DIR.run."""
    from netweight.explain import explain as run

    found = run(folder, threads)
    if as_json:
        print(found.to_json())
        return
    for sentence in found.sentences:
        print(sentence)


@app.command()
def evaluate(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Artifacts.")],
    suite: Annotated[Path, typer.Option(help="TOML: scenarios with name, data, and maybe text, label, pair, by.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Score artifacts over several scenarios and say where they are worst."""
    from netweight.evaluate import evaluate as run
    from netweight.evaluate import suite as read

    found = run(folders, read(suite), threads)
    for note in found.notes:
        print(note, file=sys.stderr)
    if as_json:
        print(found.to_json())
    else:
        print_table(found.rows())
        print(found.sentence)
    if found.failed:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Folder,
    data: Annotated[
        str | None, typer.Option(help="The certify rows: also compares what the artifact says now.")
    ] = None,
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column that holds the label.")] = "label",
    pair: MaybePair = None,
) -> None:
    """Check every file's hash and recompute the certificate."""
    from netweight.summary import verify as run

    for sentence in run(folder, data, text=text, label=label, pair=pair):
        print(sentence)


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Where to write it; without it, report.html here.")] = None,
    examples: Annotated[
        str | None, typer.Option(help="The certify rows: shows texts on which answers flipped. Customers' words!")
    ] = None,
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column that holds the label.")] = "label",
    pair: MaybePair = None,
) -> None:
    """Write the report again, with examples if asked."""
    from netweight.summary import write_report

    path = write_report(folder, out or Path("report.html"), examples, text=text, label=label, pair=pair)
    print(f"wrote {path}")
