"""The command line: parse, call the library, print."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from netweight.errors import NetweightError, OptionError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The lightest model that provably still does the job.",
)

Text = Annotated[str, typer.Option(help="Column that holds the text.")]
MaybePair = Annotated[str | None, typer.Option(help="Column of the second text, for pairs.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; without it, the cores of this process.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.")]


class Track(StrEnum):
    """Trackers."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


class Against(StrEnum):
    """Baselines."""

    teacher = "teacher"
    onnx = "onnx"
    onnx_int8 = "onnx-int8"
    openvino_int8 = "openvino-int8"


class Runtime(StrEnum):
    """Formats of other runtimes."""

    onnx = "onnx"
    openvino = "openvino"
    litert = "litert"


def _version(asked: bool) -> None:
    if asked:
        print(f"netweight {importlib.metadata.version('netweight')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def optimize(
    train: Annotated[str, typer.Argument(help="csv, tsv, jsonl (also .gz), parquet, or hf:NAME.")],
    label: Annotated[str, typer.Option(help="Column that holds the label, or the score.")],
    out: Annotated[Path, typer.Option(help="Folder of the artifact. OUT.run beside it keeps the state of the job.")],
    text: Text,
    pair: MaybePair = None,
    task: Annotated[Literal["classify", "score"], typer.Option(help="Labels, or numbers.")] = "classify",
    dev: Annotated[str | None, typer.Option(help="Rows to choose by; else cut from TRAIN.")] = None,
    certify: Annotated[str | None, typer.Option(help="Rows that no search sees; else cut from TRAIN.")] = None,
    pool: Annotated[str | None, typer.Option(help="Rows without labels, to distil on.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of what belongs together (customer, product).")] = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Column to break quality down by.")] = None,
    model: Annotated[str, typer.Option(help="starter, scratch, a folder, or a Hub id.")] = "starter",
    max_drop: Annotated[
        str, typer.Option(metavar="<points|auto>", help="Points of quality that may be lost; auto: what can be proven.")
    ] = "1.0",
    confidence: Annotated[float, typer.Option(help="Confidence of the certificate.")] = 0.95,
    metric: Annotated[
        Literal["accuracy", "macro-f1", "spearman", "mae"] | None, typer.Option(help="Else by balance of the labels.")
    ] = None,
    minimise: Annotated[Literal["cost", "latency", "size"], typer.Option(help="What to make small.")] = "cost",
    time_limit: Annotated[str, typer.Option(help="Such as 90s, 20m, 2h.")] = "20m",
    effort: Annotated[
        Literal["quick", "standard", "thorough"], typer.Option(help="How much is tried beyond the ladder.")
    ] = "quick",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    track: Annotated[list[Track] | None, typer.Option(help="Also log training there.")] = None,
) -> None:
    """Make the lightest artifact that passes. Run again with the same --out: it goes on where it was."""
    from netweight.pipeline import optimize as run
    from netweight.progress import Bar

    seconds = _seconds(time_limit)
    with Bar(Console(stderr=True)) as bar:
        result = run(
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
            max_drop=_points(max_drop),
            confidence=confidence,
            minimise=minimise,
            seconds=seconds,
            threads=threads,
            seed=seed,
            effort=effort,
            reporter=bar,
            track=[t.value for t in track or ()],
        )
    _print_summary(result.folder)


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
    _print_summary(result.folder)


@app.command()
def predict(
    folder: Folder,
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A table, or - for lines on standard input.")],
    text: Text = "text",
    pair: MaybePair = None,
    out: Annotated[Path | None, typer.Option(help="Output table; without it, standard output.")] = None,
    threads: Threads = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="INPUT and OUT are folders of parts, worked on by a Ray cluster: "
            "local, auto or HOST:PORT. Run again: it goes on where it was.",
        ),
    ] = None,
) -> None:
    """Add the columns prediction, confidence and tier to a table, in constant memory."""
    from netweight.predict import predict as run

    if ray is not None:
        from netweight.cluster import predict_parts
        from netweight.progress import Parts

        if out is None:
            raise OptionError("--ray writes a folder of parts; name it with --out.")
        with Parts("parts") as bar:
            batch = predict_parts(
                folder, source, out=out, address=ray, text=text, pair=pair, threads=threads or 1, progress=bar
            )
        print(batch.sentence, file=sys.stderr)
        return
    done = run(folder, source, text=text, pair=pair, out=out or "-", threads=threads)
    print(done.sentence, file=sys.stderr)


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
    _print_table(report.rows())
    Console().print(report.sentence, markup=False, highlight=False)


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


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """What an artifact is: verdict, tiers, size, provenance."""
    from netweight.summary import summary

    if as_json:
        print(json.dumps(summary(folder), ensure_ascii=False, indent=1))
    else:
        _print_summary(folder)


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
    suite: Annotated[Path, typer.Option(help="TOML: [[scenario]] with name, data, and maybe text, label, pair.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Score artifacts over several scenarios and say where they are worst."""
    from netweight.evaluate import evaluate as run
    from netweight.evaluate import suite as read

    found = run(folders, read(suite), threads)
    if as_json:
        print(found.to_json())
        return
    _print_table(found.rows())
    print(found.sentence)


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


@app.command()
def label(
    source: Annotated[str, typer.Argument(metavar="POOL", help="A table of rows without labels.")],
    labels: Annotated[str, typer.Option(help="The labels, with commas between them.")],
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, such as https://host/v1.")],
    model: Annotated[str, typer.Option(help="As the endpoint names it.")],
    limit: Annotated[int, typer.Option(help="Distinct texts to ask at most, those of earlier runs included.")],
    out: Annotated[Path, typer.Option(help="Table of the rows that got a label. OUT.cache.jsonl keeps the answers.")],
    text: Text = "text",
    pair: MaybePair = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    token_limit: Annotated[int | None, typer.Option(help="Tokens to pay for at most.")] = None,
    instructions: Annotated[str, typer.Option(help="What the labels mean.")] = "Classify the text.",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
) -> None:
    """Let a large language model label a table. Run again with the same --out: no text is asked twice."""
    from netweight.data import Columns, read, rows_file, write_rows
    from netweight.llm import LLMTeacher, label_pool
    from netweight.task import Classify

    file = rows_file(out)
    teacher = LLMTeacher(url, model, key_env, instructions, concurrency=concurrency)
    task = Classify(tuple(name.strip() for name in labels.split(",")))
    rows = read(source, Columns(text, pair=pair), label_required=False).rows
    cache = out.with_name(f"{out.name}.cache.jsonl")
    done = label_pool(rows, task, teacher, cache, limit=limit, token_limit=token_limit)
    write_rows(file, done.rows)
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
    seed: Annotated[int, typer.Option(help="The same seed chooses the same rows.")] = 0,
    threads: Threads = None,
) -> None:
    """Choose the rows of a pool whose labels would help most."""
    from netweight.active import select_with
    from netweight.data import Columns, read, rows_file, write_rows
    from netweight.engine import load

    file = rows_file(out)
    rows = read(source, Columns(text, pair=pair), label_required=False).rows
    chosen = select_with(load(folder, threads), rows, count, seed, method)
    write_rows(file, rows.take(chosen))
    print(f"wrote {len(chosen):,} of {len(rows):,} rows to {out}", file=sys.stderr)


@app.command()
def serve(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Artifacts; DIR.nw serves as DIR.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes; one that dies is replaced.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each worker; else the cores, shared out.")] = None,
    queue_ms: Annotated[int, typer.Option(min=1, help="Who would wait longer than this gets a 429 at once.")] = 100,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; without it, everybody may ask.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="On a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT."),
    ] = None,
    min_replicas: Annotated[int | None, typer.Option(min=1, help="With --ray; else 1.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="With --ray; else what its CPUs hold.")] = None,
    target_queue: Annotated[
        float | None, typer.Option(help="With --ray: requests in a replica above which there will be more; else 8.")
    ] = None,
) -> None:
    """Answer over HTTP. A folder that is replaced is loaded again, without a dropped request."""
    from netweight.cluster.online import Scale
    from netweight.cluster.online import serve as run_on_ray
    from netweight.serve import Options
    from netweight.serve import serve as run

    if (tls_certificate is None) != (tls_key is None):
        raise OptionError("--tls-certificate and --tls-key go together.")
    tls = (str(tls_certificate), str(tls_key)) if tls_certificate else None
    names = tuple(map(str, folders))
    options = Options(names, host, port, workers, threads or 0, queue_ms / 1000, str(keys) if keys else None, tls)
    if ray is not None:
        target = Scale.target if target_queue is None else target_queue
        wanted = Scale(min_replicas or Scale.least, max_replicas or Scale.most, target)
        run_on_ray(options, ray, wanted, lambda url: print(f"serving on {url}", file=sys.stderr))
    elif (min_replicas, max_replicas, target_queue) != (None, None, None):
        raise OptionError("--min-replicas, --max-replicas and --target-queue go with --ray.")
    else:
        run(options)


@app.command()
def keys(
    file: Annotated[Path, typer.Argument(help="Where hashes of keys are kept.")],
    add: Annotated[str | None, typer.Option(help="Make a key under this name and print it, once.")] = None,
    remove: Annotated[str | None, typer.Option(help="Take away the keys of this name.")] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests that the new key may make.")] = None,
) -> None:
    """Make, remove and list the API keys of a server, which sees the change within a second."""
    from netweight.serve.keys import add_key, read_keys, remove_key

    if add is not None:
        print(add_key(file, add, per_minute))
    elif remove is not None:
        print(f"removed {remove_key(file, remove)}")
    else:
        for key in read_keys(file):
            print(f"{key.name}  {key.sha256[:12]}  {key.per_minute or 'no limit'}")


def _points(given: str) -> float | Literal["auto"]:
    if given == "auto":
        return "auto"
    try:
        return float(given)
    except ValueError:
        raise OptionError(f"--max-drop is a number of points, or auto; given was {given!r}.") from None


def _seconds(given: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", given.strip())
    if not found:
        raise OptionError(f"a time limit is a number with s, m or h, such as 90s or 20m; given was {given!r}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, None: 60}[found[2]]


def _print_table(rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    head, *rest = rows
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rest:
        table.add_row(*row)
    Console().print(table, markup=False, highlight=False)


def _print_summary(folder: Path) -> None:
    from netweight.summary import lines

    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines(folder):
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)


def main() -> None:
    """Entry point. What is wrong with the input is one sentence on standard error, and exit status 1."""
    try:
        app()
    except NetweightError as problem:
        print(f"netweight: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is left to say, and flushing at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
