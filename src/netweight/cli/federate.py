"""Commands of federated runs: keys, a server, and clients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from netweight.cli.make import points, seconds_of
from netweight.cli.shared import (
    Confidence,
    Drop,
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

federate = typer.Typer(no_args_is_help=True, help="Train over clients that keep their rows: a server and its clients.")
app.add_typer(federate, name="federate")


@federate.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets server/ and a folder for each client.")],
    clients: Annotated[str, typer.Option(help="Names of the clients, with commas between them.")],
    hosts: Annotated[
        str, typer.Option(help="Names and addresses of the server, as clients call it.")
    ] = "localhost,127.0.0.1",
) -> None:
    """Make a certificate authority, the server's certificate, and a key pair for each client; or add clients."""
    from netweight.federate.keys import make_keys

    for path in make_keys(folder, listed(clients), listed(hosts)):
        print(path)


Keys = Annotated[Path, typer.Option(help="Folder with ca.crt, server.crt, server.key and clients/NAME.pub.")]
Address = Annotated[str, typer.Option(help="HOST:PORT to listen on; 0.0.0.0:PORT for all.")]
Start = Annotated[str, typer.Option(help="starter, a folder, or a Hub id.")]
Labels = Annotated[str | None, typer.Option(help="The labels, with commas (, or ，); else those of DEV.")]
Trained = Annotated[
    Literal["full", "lora", "head"] | None,
    typer.Option(help="What is trained, and travels.", show_default="head; full with --privacy off"),
]
Epochs = Annotated[float, typer.Option(help="Over each client's rows, in all rounds together.")]
Rate = Annotated[
    float | None,
    typer.Option(help="Of clients.", show_default="full 1e-4, lora 2e-3; head 2e-2, or 5e-3 with --privacy off"),
]
Number = Annotated[int, typer.Option(help="Rounds in all.")]
Minimum = Annotated[int, typer.Option(help="Clients that must take part in each round.")]
Wait = Annotated[float, typer.Option(help="Seconds that clients are given to appear.")]
Deadline = Annotated[float | None, typer.Option(help="Seconds of a round; who is later is left out of it.")]
How = Annotated[
    Literal["fedavg", "fedprox", "fedadam", "scaffold"], typer.Option(help="How a round is made of its clients.")
]
Aggregate = Annotated[
    Literal["mean", "median", "trimmed-mean", "krum"],
    typer.Option(help="Against false updates: median of 3 clients or more; trimmed-mean or krum of 5."),
]
Encoded = Annotated[Literal["full", "int8", "random-k", "top-k"], typer.Option(help="How updates are encoded.")]
Private = Annotated[
    Literal["on", "off"], typer.Option(help="On: noise within the budget, and the server sees sums of updates.")
]
Epsilon = Annotated[float, typer.Option(help="Privacy budget of each client's rows; 8 is weak, 1 strong.")]
Delta = Annotated[float, typer.Option(help="Chance that it fails; well below 1 / the rows of the largest client.")]


@federate.command()
def server(
    out: Annotated[Path, typer.Option(help="Gets the model and the report; run again: it goes on where it was.")],
    keys: Keys,
    address: Address = "127.0.0.1:9092",
    model: Start = "starter",
    labels: Labels = None,
    dev: Annotated[
        str | None, typer.Option(help="The server's own labelled rows, for quality; none is trained on.")
    ] = None,
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column of DEV that holds the label, or the score.")] = "label",
    pair: MaybePair = None,
    task: Kind = "classify",
    train: Trained = None,
    epochs: Epochs = 5.0,
    learning_rate: Rate = None,
    rounds: Number = 10,
    minimum: Minimum = 2,
    wait: Wait = 600.0,
    deadline: Deadline = None,
    algorithm: How = "fedavg",
    aggregate: Aggregate = "mean",
    travel: Encoded = "full",
    personal_head: Annotated[bool, typer.Option(help="Each client keeps a head of its own.")] = False,
    privacy: Private = "on",
    epsilon: Epsilon = 8.0,
    delta: Delta = 1e-5,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of training and of drawing clients.")] = 0,
) -> None:
    """Train a model over the clients that connect. Their rows stay with them; updates travel."""
    from netweight.data import Columns, read
    from netweight.federate.options import task_of, terms_of, tuned
    from netweight.federate.start import Place, held_out, serve
    from netweight.model import pretrained
    from netweight.progress import Bar
    from netweight.run.federated import Automatic, Rounds
    from netweight.train import Plan

    _use(threads)
    rows = noted(read(dev, Columns(text, label, pair))) if dev else None
    base = pretrained(model, task_of(labels and listed(labels), rows, task), seed=seed)
    terms = terms_of(
        Rounds(rounds, minimum=minimum, wait=wait, seconds=deadline),
        (algorithm, aggregate, travel),
        personal_head,
        Automatic(epsilon, delta) if privacy == "on" else None,
    )
    data = held_out(rows) if rows else None
    with Bar(Console(stderr=True)) as bar:
        plan = Plan(seed=seed, reporter=bar)
        serve(Place(address, keys, out), base, tuned(terms, epochs, learning_rate, train), data, terms, plan, bar.note)
    print(out / "model")


@federate.command()
def optimize(
    out: Annotated[Path, typer.Option(help="Folder of the artifact. OUT.run beside it keeps the state of the job.")],
    keys: Keys,
    dev: Annotated[str, typer.Option(help="The server's own labelled rows, to choose by.")],
    certify: Annotated[str, typer.Option(help="Labelled rows of the server's own that no search sees.")],
    pool: Annotated[
        str | None,
        typer.Option(help="Its own rows without labels: students are made here, of these. Needed with privacy."),
    ] = None,
    address: Address = "127.0.0.1:9092",
    model: Start = "starter",
    labels: Labels = None,
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column that holds the label, or the score.")] = "label",
    pair: MaybePair = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Column to break quality down by.")] = None,
    task: Kind = "classify",
    train: Trained = None,
    epochs: Epochs = 5.0,
    learning_rate: Rate = None,
    rounds: Number = 10,
    minimum: Minimum = 2,
    wait: Wait = 600.0,
    deadline: Deadline = None,
    algorithm: How = "fedavg",
    aggregate: Aggregate = "mean",
    travel: Encoded = "full",
    privacy: Private = "on",
    epsilon: Annotated[
        float, typer.Option(help="Privacy budget of each client's rows for the whole job; 8 is weak, 1 strong.")
    ] = 8.0,
    delta: Delta = 1e-5,
    max_drop: Drop = "1.0",
    confidence: Confidence = 0.95,
    metric: Metric = None,
    minimise: Minimised = "cost",
    time_limit: Annotated[
        str, typer.Option(help="Such as 90s, 20m, 2h; a bare number is minutes; waiting for clients does not count.")
    ] = "1h",
    effort: Tried = "quick",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of training and of drawing clients.")] = 0,
) -> None:
    """The main job over the clients that connect: a certified artifact. Run again with the same --out: it goes on."""
    from netweight.data import Columns
    from netweight.federate.job import optimize as made
    from netweight.federate.options import terms_of, tuned
    from netweight.federate.start import Place
    from netweight.job import Budget, Job, Options, Tables
    from netweight.progress import Bar
    from netweight.quiet import cores
    from netweight.run.federated import Automatic, Rounds

    terms = terms_of(
        Rounds(rounds, minimum=minimum, wait=wait, seconds=deadline),
        (algorithm, aggregate, travel),
        privacy=Automatic(epsilon, delta) if privacy == "on" else None,
    )
    columns = Columns(text, label, pair, slices=tuple(slices or ()))
    options = Options(
        task,
        metric,
        model,
        seconds=seconds_of(time_limit),
        threads=threads or cores(),
        seed=seed,
        effort=effort,
        finetune=tuned(terms, epochs, learning_rate, train),
    )
    job = Job(
        Tables(None, columns, dev, certify, pool, listed(labels or "")),
        Budget(points(max_drop), confidence, minimise),
        options,
    )
    with Bar(Console(stderr=True)) as bar:
        result = made(Place(address, keys, out), job, terms, bar)
    print_summary(result.folder)


@federate.command()
def client(
    source: Annotated[str, typer.Argument(metavar="TABLE", help="This client's rows, with labels.")],
    name: Annotated[str, typer.Option(help="As the server knows this client.")],
    keys: Annotated[Path, typer.Option(help="Folder with ca.crt and client.key.")],
    folder: Annotated[Path, typer.Option(help="Keeps what is needed to go on after a kill.")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:9092",
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column that holds the label, or the score.")] = "label",
    pair: MaybePair = None,
    patience: Annotated[float, typer.Option(help="Seconds that the server may be away.")] = 300.0,
    epsilon: Annotated[
        float | None, typer.Option(help="What all runs together may cost these rows; else no limit.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Take part in a run with this table, until the server ends it. A tenth of the rows only measures quality."""
    from netweight.data import Columns, read
    from netweight.federate.keys import ClientKeys
    from netweight.federate.start import join, kept_apart, owned
    from netweight.run.federated import Client

    _use(threads)
    found = ClientKeys.load(keys / "ca.crt", keys / "client.key")
    loaded = read(source, Columns(text, label, pair), quarantine=folder / "quarantine.jsonl")
    data = kept_apart(loaded.rows)
    _say(f"{name}: {len(data.train)} rows to train on, {len(data.select)} to measure quality. {loaded.note or ''}")
    with owned(folder):
        join(server, found, Client(name, data, folder, limit=epsilon, said=_say), patience, _say)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _use(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
