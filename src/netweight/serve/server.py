"""Processes: one or several workers behind one port, replaced when they die; models that follow their folders."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netweight import artifact
from netweight.errors import MissingExtra, NetweightError, OptionError
from netweight.monitor import Webhook, monitors
from netweight.quiet import cores
from netweight.serve.options import Options, Rollout

if TYPE_CHECKING:
    from netweight.serve.hosted import Models
    from netweight.serve.metrics import Metrics
    from netweight.serve.recorder import Recorder
    from netweight.serve.watching import Watching

log = logging.getLogger("netweight.serve")
_VARIABLE = "NETWEIGHT_SERVE"  # how workers learn what to serve: they are processes of their own
_LOOK = 0.5  # seconds between looks at folders
_DRAIN = 30  # seconds that requests may take when the server is told to end


def serve(options: Options) -> None:
    """Serve artifacts until SIGTERM or SIGINT; requests that run by then are answered.

    Raises ArtifactError, CorruptArtifact, OptionError, MissingExtra before anything is bound.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingExtra("serving over HTTP", "serve") from None
    options = checked(options)
    options = replace(options, threads=options.threads or max(1, cores() // options.workers))
    certificate, key = options.tls or (None, None)
    os.environ[_VARIABLE] = json.dumps(asdict(options))
    uvicorn.run(
        "netweight.serve.server:worker",
        factory=True,
        host=options.host,
        port=options.port,
        workers=options.workers,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN,
        timeout_keep_alive=75,
        http="netweight.serve.wire:Wire",
        ws="none",
    )


def checked(options: Options) -> Options:
    """The same with absolute paths. Raises ArtifactError, CorruptArtifact, OptionError, MissingExtra."""
    try:
        from netweight.serve.keys import read_keys
        from netweight.serve.rollout import comparable
        from netweight.serve.watching import writable
    except ImportError:
        raise MissingExtra("serving over HTTP", "serve") from None
    folders = [Path(folder).absolute() for folder in options.folders]
    for folder in folders:
        artifact.check(folder)
    names = [artifact.name_of(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise OptionError(f"two folders would serve under one name ({', '.join(names)}); rename one.")
    held = {name: artifact.read_manifest(folder) for name, folder in zip(names, folders, strict=True)}
    candidates = tuple((name, Path(folder).absolute()) for name, folder in options.candidates)
    for name, folder in candidates:
        if name not in held:
            raise OptionError(
                f"the candidate is for {name!r}, which is not served here; there are: {', '.join(names)}."
            )
        comparable(name, held[name], artifact.check(folder))
    if options.keys is not None:
        read_keys(Path(options.keys))
        options = replace(options, keys=str(Path(options.keys).absolute()))
    if options.keep is not None and not any(manifest.task.confident for manifest in held.values()):
        raise OptionError(
            "--keep is for texts of which a model is not sure, and scores carry no confidence: leave it out."
        )
    if options.log is not None:
        monitors(folders, options.false_alarms)
        writable(Path(options.log))
    if options.webhook is not None:
        Webhook(options.webhook)
    if options.tls is not None:
        for file in options.tls:
            if not Path(file).is_file():
                raise OptionError(f"{file} is not there; TLS needs a certificate and its key, both PEM.")
        certificate, key = (str(Path(file).absolute()) for file in options.tls)
        options = replace(options, tls=(certificate, key))
    return replace(
        options,
        folders=tuple(map(str, folders)),
        candidates=tuple((name, str(folder)) for name, folder in candidates),
    )


def worker() -> Any:
    """The application of one process, as `serve` described it."""
    given = json.loads(os.environ[_VARIABLE])
    given["folders"], given["rollout"] = tuple(given["folders"]), Rollout(**given["rollout"])
    app = built(Options(**given))
    # What is there now stays: looking through all of it again and again would stop requests for a tenth of a second.
    gc.collect()
    gc.freeze()
    return app


def built(options: Options) -> Any:
    """The application, with its models loaded (`state.models`), which follow their folders while it runs."""
    from netweight.serve.app import application
    from netweight.serve.hosted import Models
    from netweight.serve.metrics import Metrics
    from netweight.serve.rollout import begin

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    metrics = Metrics()
    models = Models(options.threads, options.patience, metrics.batch, options.memory)
    for folder in options.folders:
        models.load(Path(folder))
    for name, folder in options.candidates:
        try:
            begin(models, name, Path(folder), options.rollout)
        except NetweightError as problem:  # it was there when the server started: by now it may have the model's place
            log.error("the candidate of %s is not asked: %s", name, problem)
    recorder, watching = written(options, models, metrics)
    app = application(models, metrics, Path(options.keys) if options.keys else None, recorder)
    app.state.models = models
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def life(which: Any) -> AsyncIterator[None]:
        async with inner(which):
            following = asyncio.create_task(follow(models))
            try:
                yield
            finally:
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await following
        for each in (recorder, watching):
            if each is not None:
                await asyncio.to_thread(each.close)

    app.router.lifespan_context = life
    return app


def written(options: Options, models: Models, metrics: Metrics) -> tuple[Recorder | None, Watching | None]:
    """What writes records, and what watches them; neither without a log."""
    from netweight.serve.recorder import Recorder
    from netweight.serve.watching import Watching

    if options.log is None:
        return None, None
    path, keep = Path(options.log), Path(options.keep) if options.keep else None
    post = Webhook(options.webhook) if options.webhook else None
    watching = Watching(path, models, metrics, options.false_alarms, post)
    return Recorder(path, options.rate / options.workers, keep), watching


async def follow(models: Any) -> None:
    """Load a model again when its folder was replaced. One that does not load is refused, and the old one stays; it is
    tried again when its files change, since it may have been copied in place, and its manifest before its tiers."""
    refused: dict[str, tuple[Any, str]] = {}  # the files that were there, and why they were not loaded
    while True:
        await asyncio.sleep(_LOOK)
        for hosted in models:
            if not hosted.replaced:
                continue
            files, (tried, told) = _files(hosted.folder), refused.get(hosted.name, (None, ""))
            if files == tried:
                continue
            try:
                newer = await models.exchange(hosted.name)
            except Exception as problem:  # whole files that no engine can load: every library has errors of its own
                # Half a file has another hash each time.
                why = re.sub("[0-9a-f]{64}", "", str(problem))
                refused[hosted.name] = files, why
                if why != told:
                    ours = isinstance(problem, NetweightError | OSError)
                    version = hosted.engine.version
                    log.error("%s stays at version %s: %s", hosted.name, version, problem, exc_info=not ours)
            else:
                refused.pop(hosted.name, None)
                log.info("%s: version %s in the place of %s", hosted.name, newer.engine.version, hosted.engine.version)


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in (Path(where, name) for where, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(OSError):  # it is gone by now
            held = path.stat()
            found[str(path)] = held.st_ino, held.st_size, held.st_mtime_ns
    return found
