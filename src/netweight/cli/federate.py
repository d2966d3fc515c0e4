"""Commands of federated runs: keys, a server, and clients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from netweight.cli.shared import MaybePair, Text, Threads, app

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
    """Make a certificate authority, the server's certificate, and a key pair for each client."""
    from netweight.federate.keys import make_keys

    for path in make_keys(folder, _names(clients), _names(hosts)):
        print(path)


@federate.command()
def server(
    out: Annotated[Path, typer.Option(help="Gets the model and the report; run again: it goes on where it was.")],
    keys: Annotated[Path, typer.Option(help="Folder with ca.crt, server.crt, server.key and clients/NAME.pub.")],
    address: Annotated[str, typer.Option(help="HOST:PORT to listen on; 0.0.0.0:PORT for all.")] = "127.0.0.1:9092",
    model: Annotated[str, typer.Option(help="starter, a folder, or a Hub id.")] = "starter",
    labels: Annotated[str | None, typer.Option(help="The labels, with commas; else those of DEV.")] = None,
    dev: Annotated[
        str | None, typer.Option(help="The server's own labelled rows, for quality; none is trained on.")
    ] = None,
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column of DEV that holds the label.")] = "label",
    pair: MaybePair = None,
    train: Annotated[
        Literal["full", "lora", "head"] | None,
        typer.Option(help="What is trained, and travels.", show_default="lora; full with --privacy off"),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Over each client's rows, in all rounds together.")] = 5.0,
    learning_rate: Annotated[float, typer.Option(help="Of clients.")] = 1e-4,
    rounds: Annotated[int, typer.Option(help="Rounds in all.")] = 10,
    minimum: Annotated[int, typer.Option(help="Clients that must take part in each round.")] = 2,
    wait: Annotated[float, typer.Option(help="Seconds that clients are given to appear.")] = 600.0,
    deadline: Annotated[float | None, typer.Option(help="Seconds of a round; who is later is left out of it.")] = None,
    algorithm: Annotated[
        Literal["fedavg", "fedprox", "fedadam", "scaffold"], typer.Option(help="How a round is made of its clients.")
    ] = "fedavg",
    aggregate: Annotated[
        Literal["mean", "median", "trimmed-mean", "krum"], typer.Option(help="All but mean withstand false updates.")
    ] = "mean",
    travel: Annotated[
        Literal["full", "int8", "random-k", "top-k"], typer.Option(help="How updates are encoded.")
    ] = "full",
    personal_head: Annotated[bool, typer.Option(help="Each client keeps a head of its own.")] = False,
    privacy: Annotated[
        Literal["on", "off"],
        typer.Option(help="On: noise within the budget, and the server sees sums of updates."),
    ] = "on",
    epsilon: Annotated[float, typer.Option(help="Privacy budget of each client's rows; 8 is weak, 1 strong.")] = 8.0,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of training and of drawing clients.")] = 0,
) -> None:
    """Train a model over the clients that connect. Their rows stay with them; updates travel."""
    from netweight.data import Columns, read
    from netweight.federate.options import run_of, task_of
    from netweight.federate.start import Place, held_out, serve
    from netweight.model import pretrained
    from netweight.progress import Bar
    from netweight.run.federated import Automatic, Rounds
    from netweight.techniques import Finetune
    from netweight.train import Plan

    _use(threads)
    rows = read(dev, Columns(text, label, pair)).rows if dev else None
    base = pretrained(model, task_of(labels and _names(labels), rows), seed=seed)
    private = Automatic(epsilon) if privacy == "on" else None
    train = train or ("lora" if private else "full")
    run = run_of(
        Rounds(rounds, minimum=minimum, wait=wait, seconds=deadline),
        (algorithm, aggregate, travel),
        personal_head,
        held_out(rows) if rows else None,
        private,
    )
    with Bar(Console(stderr=True)) as bar:
        serve(
            Place(address, keys, out),
            base,
            Finetune(epochs, learning_rate, train=train, probe=private is None),
            run,
            Plan(seed=seed, reporter=bar),
            bar.note,
        )
    print(out / "model")


@federate.command()
def client(
    source: Annotated[str, typer.Argument(metavar="TABLE", help="This client's rows, with labels.")],
    name: Annotated[str, typer.Option(help="As the server knows this client.")],
    keys: Annotated[Path, typer.Option(help="Folder with ca.crt and client.key.")],
    folder: Annotated[Path, typer.Option(help="Keeps what is needed to go on after a kill.")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:9092",
    text: Text = "text",
    label: Annotated[str, typer.Option(help="Column that holds the label.")] = "label",
    pair: MaybePair = None,
    patience: Annotated[float, typer.Option(help="Seconds that the server may be away.")] = 300.0,
    threads: Threads = None,
) -> None:
    """Take part in a run with this table, until the server ends it. A tenth of the rows only measures quality."""
    from netweight.data import Columns, read
    from netweight.federate.keys import ClientKeys
    from netweight.federate.start import join, kept_apart
    from netweight.run.federated import Client

    _use(threads)
    found = ClientKeys.load(keys / "ca.crt", keys / "client.key")
    loaded = read(source, Columns(text, label, pair), quarantine=folder / "quarantine.jsonl")
    data = kept_apart(loaded.rows)
    _say(f"{name}: {len(data.train)} rows to train on, {len(data.select)} to measure quality. {loaded.note or ''}")
    join(server, found, Client(name, data, folder), patience, _say)


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _use(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
