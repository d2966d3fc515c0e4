"""Write docs/cli.md from `--help`; with --check, say whether it is fresh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from netweight.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def commands(group: typer.Typer, before: str = "") -> list[str]:
    """Names of a group's commands, in the order of its --help; those of a group in it have its name before theirs."""
    found = [before + str(c.name or getattr(c.callback, "__name__", "")) for c in group.registered_commands]
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            found += [f"{before}{inner.name}", *commands(inner.typer_instance, f"{before}{inner.name} ")]
    return found


def page() -> str:
    """The page's text."""
    parts = ["# The command line\n\nWritten by `make docs` from `--help`.\n"]
    for name in ["", *commands(app)]:
        words = ["netweight", *name.split(), "--help"]
        # A fixed width and no colours, so that every terminal writes the same page.
        environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
        done = subprocess.run(
            [sys.executable, "-c", "from netweight.cli import main; main()", *words[1:]],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()).replace(
            "Usage: -c ", "Usage: netweight "
        )
        parts.append(f"## {' '.join(words[:-1])}\n\n```\n$ {' '.join(words)}\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write, or compare."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/cli.md is not what --help says; run `make docs` and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
