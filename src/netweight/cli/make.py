"""Commands that make artifacts and what they are made of."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from netweight.cli.shared import (
    Confidence,
    Drop,
    Folder,
    Kind,
    MaybePair,
    Metric,
    Minimised,
    Text,
    Threads,
    Tried,
    app,
    listed,
    noted,
    print_summary,
)
from netweight.errors import OptionError

if TYPE_CHECKING:
    from netweight.data import Columns, Rows


class Track(StrEnum):
    """Trackers."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


class Runtime(StrEnum):
    """Formats of other runtimes."""

    onnx = "onnx"
    openvino = "openvino"
    litert = "litert"


@app.command()
def optimize(
    train: Annotated[
        # The backslash is for rich, which takes [@...] for markup.
        str, typer.Argument(help="csv, tsv, jsonl (also .gz), parquet, or hf:NAME[:CONFIG]\\[@SPLIT].")
    ],
    label: Annotated[str, typer.Option(help="Column that holds the label, or the score.")],
    out: Annotated[Path, typer.Option(help="Folder of the artifact. OUT.run beside it keeps the state of the job.")],
    text: Text,
    pair: MaybePair = None,
    task: Kind = "classify",
    dev: Annotated[str | None, typer.Option(help="Rows to choose by; else cut from TRAIN.")] = None,
    certify: Annotated[str | None, typer.Option(help="Rows that no search sees; else cut from TRAIN.")] = None,
    pool: Annotated[str | None, typer.Option(help="Rows without labels, to distil on.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of what belongs together (customer, product).")] = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Column to break quality down by.")] = None,
    model: Annotated[str, typer.Option(help="starter, scratch, a folder, or a Hub id.")] = "starter",
    max_length: Annotated[int, typer.Option(help="Tokens of a text that encoders read; tables read on.")] = 128,
    max_drop: Drop = "1.0",
    confidence: Confidence = 0.95,
    metric: Metric = None,
    minimise: Minimised = "cost",
    time_limit: Annotated[str, typer.Option(help="Such as 90s, 20m, 2h; a bare number is minutes.")] = "20m",
    effort: Tried = "quick",
    vocabulary: Annotated[
        Literal["trimmed", "whole"],
        typer.Option(help="Tokens that tiers know: those of these rows and common ones, or all."),
    ] = "trimmed",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of cuts, training and sampling.")] = 0,
    track: Annotated[list[Track] | None, typer.Option(help="Also log training there.")] = None,
    run: Annotated[
        str,
        typer.Option(
            help="Where training happens: local, ddp:2 for two processes, ray://auto/ddp:2 on a Ray cluster; options "
            "follow, as in fsdp:2,activation-checkpointing."
        ),
    ] = "local",
) -> None:
    """Make the lightest artifact that passes. Run again with the same --out: it goes on where it was."""
    from netweight.pipeline import optimize as made
    from netweight.progress import Bar
    from netweight.run import named

    seconds, runs = seconds_of(time_limit), named(run, threads)
    with Bar(Console(stderr=True)) as bar:
        result = made(
            train,
            out=out,
            text=text,
            label=label,
            pair=pair,
            group=group,
            slices=slices or (),
            dev=dev,
            certify=certify,
            pool=pool,
            task=task,
            metric=metric,
            model=model,
            max_length=max_length,
            max_drop=points(max_drop),
            confidence=confidence,
            minimise=minimise,
            seconds=seconds,
            threads=threads,
            seed=seed,
            effort=effort,
            vocabulary=vocabulary,
            reporter=bar,
            track=[t.value for t in track or ()],
            runs=runs,
        )
    print_summary(result.folder)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the artifact.")] = Path("demo.nw"),
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the sample and of training.")] = 0,
) -> None:
    """The main job on the built-in sample of synthetic customer messages."""
    from netweight.demo import demo as run
    from netweight.progress import Bar

    with Bar(Console(stderr=True)) as bar:
        result = run(out, threads, seed, bar)
    print_summary(result.folder)


@app.command()
def label(
    source: Annotated[str, typer.Argument(metavar="POOL", help="A table of rows without labels.")],
    labels: Annotated[str, typer.Option(help="The labels, with commas between them (, or ，).")],
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, such as https://host/v1.")],
    model: Annotated[str, typer.Option(help="As the endpoint names it.")],
    limit: Annotated[int, typer.Option(help="Distinct texts of POOL to ask at most, those of earlier runs included.")],
    out: Annotated[Path, typer.Option(help="Table of the rows that got a label. OUT.cache.jsonl keeps the answers.")],
    text: Text = "text",
    pair: MaybePair = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    token_limit: Annotated[int | None, typer.Option(help="Tokens to pay for at most.")] = None,
    instructions: Annotated[str, typer.Option(help="What the labels mean.")] = "Classify the text.",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    constrain: Annotated[
        bool, typer.Option(help="Ask for JSON of a schema with the labels alone; not all endpoints know it.")
    ] = True,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer; a model that thinks aloud needs some hundred.")
    ] = None,
) -> None:
    """Let a large language model label a table. Run again with the same --out: no text is asked twice."""
    from netweight.data import Columns, read, rows_file, write_rows
    from netweight.llm import LLMTeacher, label_pool
    from netweight.progress import Parts
    from netweight.task import Classify

    file = rows_file(out, source)
    teacher = LLMTeacher(url, model, key_env, instructions, constrain, concurrency, answer_tokens=answer_tokens)
    task = Classify(listed(labels))
    rows = noted(read(source, Columns(text, pair=pair), label_required=False))
    cache = out.with_name(f"{out.name}.cache.jsonl")
    with Parts("texts") as bar:
        done = label_pool(rows, task, teacher, cache, limit=limit, token_limit=token_limit, progress=bar)
    write_rows(file, done.rows, source)
    print(done.sentence, file=sys.stderr)


@app.command()
def select(
    folder: Folder,
    source: Annotated[str, typer.Argument(metavar="POOL", help="A table of rows without labels.")],
    count: Annotated[int, typer.Option(help="Rows to choose.")],
    out: Annotated[Path, typer.Option(help="Table of the chosen rows, with an empty column label to fill in.")],
    text: Text = "text",
    pair: MaybePair = None,
    method: Annotated[
        Literal["badge", "coreset", "entropy", "margin"], typer.Option(help="Both, coverage, or uncertainty.")
    ] = "badge",
    labelled: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Rows that have labels: none like them is chosen.")
    ] = None,
    label: Annotated[
        str, typer.Option(help="Column of the labels in --labelled; a row without one does not count.")
    ] = "label",
    rounds: Annotated[
        Path | None, typer.Option(help="A file that says after some rounds whether labelling may stop.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed chooses the same rows.")] = 0,
    threads: Threads = None,
) -> None:
    """Choose the rows of a pool whose labels would help most, and say when more would not."""
    from netweight.active import judged, select_with, watched
    from netweight.data import Columns, read, rows_file, write_rows
    from netweight.engine import load

    if labelled is None and label != "label":
        raise OptionError("--label names a column of --labelled; without that table, leave it out.")
    file = rows_file(out, source, labelled)
    _without_labels(out)
    rows, engine = noted(read(source, Columns(text, pair=pair), label_required=False)), load(folder, threads)
    known, said = _labelled(labelled, Columns(text, label, pair)) if labelled else None, None
    if known is not None:
        there = set(known.keys)
        rows = rows.take([i for i, key in enumerate(rows.keys) if key not in there])
    if rounds:
        aside = rows.take(watched(rows))
        said, apart = judged(rounds, engine, aside), set(aside.keys)
        rows = rows.take([i for i, key in enumerate(rows.keys) if key not in apart])
    chosen = select_with(engine, rows, count, seed, method, known)
    write_rows(file, rows.take(chosen), source)
    print(f"wrote {len(chosen):,} of {len(rows):,} rows to {out}", file=sys.stderr)
    if said is not None:
        print(said, file=sys.stderr)


def _without_labels(out: Path) -> None:
    """Raises OptionError where a table to fill in has been filled in: nobody has those labels elsewhere."""
    from netweight.data.table import open_table

    if not out.exists() or not out.stat().st_size:
        return
    table = open_table(out)
    at = table.columns.index("label") if "label" in table.columns else len(table.columns)
    cells = (cell for record in table.records() for cell in record.cells[at : at + 1])
    if typed := sum(cell is not None and bool(str(cell).strip()) for cell in cells):
        raise OptionError(f"{out} holds {typed:,} labels; append its rows to --labelled, or name another file.")


def _labelled(source: str, columns: Columns) -> Rows:
    """A table with the pool's columns, or one that `label` or `select` wrote, which have names of their own."""
    from netweight.data import read
    from netweight.data.table import open_table

    if columns.text not in open_table(source).columns:
        columns = replace(columns, text="text", pair=None if columns.pair is None else "pair")
    return noted(read(source, columns))


@app.command()
def export(
    folder: Folder,
    to: Annotated[Runtime, typer.Option(help="LiteRT needs DIR.run and the extra litert.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    source: Annotated[
        str | None, typer.Option("--input", help="A table to compare on; without it, the job's dev rows.")
    ] = None,
    text: Text = "text",
    pair: MaybePair = None,
) -> None:
    """Write an artifact for another runtime, and compare what was written with the artifact."""
    from netweight.deliver import export as run

    for sentence in run(folder, to.value, out, source, text=text, pair=pair).sentences:
        print(sentence)


def points(given: str) -> float | Literal["auto"]:
    if given == "auto":
        return "auto"
    try:
        return float(given)
    except ValueError:
        raise OptionError(f"--max-drop is a number of points, or auto; given was {given!r}.") from None


def seconds_of(given: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", given.strip())
    if not found:
        raise OptionError(f"a time limit is a number with s, m or h, such as 90s or 20m; given was {given!r}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, None: 60}[found[2]]
