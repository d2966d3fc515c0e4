"""The command line: parse, call the library, print."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from typing import Annotated

import typer

from netweight.cli.shared import app
from netweight.errors import NetweightError

# isort: off
# In the order of --help.
from netweight.cli import make
from netweight.cli import run
from netweight.cli import look
from netweight.cli import federate
from netweight.cli import plan

# isort: on

__all__ = ["app", "federate", "look", "main", "make", "plan", "run"]


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
    """Entry point. What is wrong with the input is one sentence on standard error, and exit status 1."""
    try:
        _command()
    except NetweightError as problem:
        print(f"netweight: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is left to say, and flushing at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as problem:
        # A file or an address that the system refuses; its words name it, where it has any.
        print(f"netweight: {str(problem) or type(problem).__name__}", file=sys.stderr)
        raise SystemExit(1) from None
