"""Commands that answer: tables, HTTP, and what watches them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from netweight.cli.shared import AsJson, Folder, MaybePair, Text, app, size
from netweight.errors import OptionError


@app.command()
def predict(
    folder: Folder,
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A table, or - for lines on standard input.")],
    text: Text = "text",
    pair: MaybePair = None,
    out: Annotated[Path | None, typer.Option(help="Output table; without it, standard output.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; else the cores of this process, or 1 with --ray.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="INPUT and OUT are folders of parts, worked on by a Ray cluster: "
            "local, auto or HOST:PORT. Run again: it goes on where it was.",
        ),
    ] = None,
) -> None:
    """Add the columns prediction, confidence (of labels) and tier to a table, in constant memory."""
    from netweight.predict import predict as run
    from netweight.progress import Parts

    if ray is not None:
        from netweight.cluster import predict_parts

        if out is None:
            raise OptionError("--ray writes a folder of parts; name it with --out.")
        with Parts("parts") as bar:
            batch = predict_parts(
                folder, source, out=out, address=ray, text=text, pair=pair, threads=threads or 1, progress=bar
            )
        print(batch.sentence, file=sys.stderr)
        return
    if out is None or str(out) == "-":
        done = run(folder, source, text=text, pair=pair, threads=threads)
    else:
        with Parts("rows") as bar:
            done = run(folder, source, text=text, pair=pair, out=out, threads=threads, progress=bar)
    print(done.sentence, file=sys.stderr)


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
    log: Annotated[Path | None, typer.Option(help="Write down numbers of some rows, no text, and watch them.")] = None,
    log_rate: Annotated[float, typer.Option(help="Rows a second that are written down at most.")] = 5.0,
    false_alarms: Annotated[float, typer.Option(help="That a month may bring, for each version.")] = 0.1,
    webhook: Annotated[str | None, typer.Option(help="URL that alerts are posted to.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep texts worth labelling there. Customers' words!")] = None,
    memory: Annotated[str | None, typer.Option(help="What models may take, such as 2GB; else all stay awake.")] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="An artifact that may follow the model of its name.")
    ] = None,
    mode: Annotated[Literal["shadow", "canary"], typer.Option(help="Candidates listen, or answer.")] = "shadow",
    share: Annotated[float, typer.Option(help="Of requests that candidates see.")] = 0.05,
    allowed: Annotated[float, typer.Option(help="Share of rows on which a candidate may differ.")] = 0.05,
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
    from netweight.serve import Options, Rollout
    from netweight.serve import serve as run

    if (tls_certificate is None) != (tls_key is None):
        raise OptionError("--tls-certificate and --tls-key go together.")
    tls = (str(tls_certificate), str(tls_key)) if tls_certificate else None
    options = Options(
        tuple(map(str, folders)),
        host=host,
        port=port,
        workers=workers,
        threads=threads or 0,
        patience=queue_ms / 1000,
        keys=str(keys) if keys else None,
        tls=tls,
        log=str(log) if log else None,
        rate=log_rate,
        false_alarms=false_alarms,
        webhook=webhook,
        keep=str(keep) if keep else None,
        memory=size(memory) if memory else None,
        candidates=tuple(map(_candidate, candidate or ())),
        rollout=Rollout(mode, share, allowed),
    )
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
    remove: Annotated[
        str | None, typer.Option(metavar="NAME[:HASH]", help="Take away the key of this name (the one listed so).")
    ] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests that the new key may make.")] = None,
) -> None:
    """Make, remove and list the API keys of a server, which sees the change within a second."""
    from netweight.serve.keys import add_key, read_keys, remove_key

    if add is not None and remove is not None:
        raise OptionError("--add and --remove are two steps: clients move to the new key in between.")
    if per_minute is not None and add is None:
        raise OptionError("--per-minute goes with --add: it is the limit of the new key.")
    if add is not None:
        print(add_key(file, add, per_minute))
    elif remove is not None:
        name, _, sha256 = remove.partition(":")
        remove_key(file, name, sha256)
        print(f"removed {remove}")
    else:
        for key in read_keys(file):
            print(f"{key.name}  {key.sha256[:12]}  {key.per_minute or 'no limit'}")


@app.command()
def monitor(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What `netweight serve --log` writes.")],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Artifacts that answered.")],
    false_alarms: Annotated[float, typer.Option(help="That a month may bring, for each artifact.")] = 0.1,
    webhook: Annotated[str | None, typer.Option(help="URL that alerts are posted to.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for further lines.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say where rows have left what was certified: length, unknown tokens, distance, confidence, tiers, agreement."""
    import threading

    from netweight.monitor import Webhook, lines, monitors, replay

    watching, post = monitors(folders, false_alarms), Webhook(webhook) if webhook else None
    of = lambda name, version: watching.get((name, version))  # noqa: E731
    for alert in replay(lines(log, threading.Event() if follow else None), of):
        print(json.dumps(alert.to_dict()) if as_json else alert, flush=True)
        if post is not None:
            post(alert)


def _candidate(given: str) -> tuple[str, str]:
    from netweight.artifact import name_of

    name, equals, folder = given.partition("=")
    return (name, folder) if equals else (name_of(Path(given)), given)
