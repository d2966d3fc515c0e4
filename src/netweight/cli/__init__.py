"""The command line: parse, call the library, print."""

from __future__ import annotations

import codecs
import importlib.metadata
import io
import json
import os
import re
import sys
from typing import Annotated, NoReturn

import typer

from netweight.cli.shared import app
from netweight.errors import MissingExtra, NetweightError

# isort: off
# In the order of --help.
from netweight.cli import make
from netweight.cli import run
from netweight.cli import look
from netweight.cli import federate
from netweight.cli import plan

# isort: on

__all__ = ["app", "federate", "look", "main", "make", "plan", "run"]

_SERVING = ("fastapi", "httptools", "prometheus_client", "starlette", "uvicorn", "uvloop")  # of the extra `serve`


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


def _command() -> None:
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C
            resumed = re.match(r"(optimize|demo|label|federate|predict .*--ray)\b", " ".join(sys.argv[1:]))
            more = "; the same command goes on where it was" if resumed else ""
            print(f"netweight: stopped{more}.", file=sys.stderr)
        raise
    finally:
        try:
            print(end="", flush=True)
        except OSError:
            # Python would try again at its exit, fail with noise of its own, and end with status 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def main() -> None:
    """Entry point. What is wrong with the input, or not installed, is one sentence on standard error, and status 1."""
    codecs.register_error("netweight", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="netweight")
    try:
        _command()
    except NetweightError as problem:
        _end(problem)
    except ModuleNotFoundError as problem:
        missing = (problem.name or "").partition(".")[0]
        if missing == "netweight":
            raise
        _end(MissingExtra(f"this command ({problem})", "serve" if missing in _SERVING else "train"))
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is left to say, and flushing at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as problem:
        # A file or an address that the system refuses; its words name it, where it has any.
        _end(str(problem) or type(problem).__name__)


def _escaped(problem: UnicodeError) -> tuple[str, int]:
    """What the output's encoding lacks, as JSON writes it, so that --json remains JSON."""
    assert isinstance(problem, UnicodeEncodeError)
    return json.dumps(problem.object[problem.start : problem.end])[1:-1], problem.end


def _end(sentence: object) -> NoReturn:
    print(f"netweight: {sentence}", file=sys.stderr)
    raise SystemExit(1) from None
