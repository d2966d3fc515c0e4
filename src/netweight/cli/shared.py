"""What commands share: the application, common options, tables and summaries."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from netweight.errors import OptionError

if TYPE_CHECKING:
    from netweight.data import Loaded, Rows

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
Kind = Annotated[Literal["classify", "score"], typer.Option(help="Labels, or numbers.")]
Drop = Annotated[
    str, typer.Option(metavar="<points|auto>", help="Points of quality that may be lost; auto: what can be proven.")
]
Confidence = Annotated[float, typer.Option(help="Confidence of the certificate.")]
Metric = Annotated[
    Literal["accuracy", "macro-f1", "spearman", "mae"] | None,
    typer.Option(help="Else by balance of the labels; of scores spearman."),
]
Minimised = Annotated[Literal["cost", "latency", "size"], typer.Option(help="What to make small.")]
Tried = Annotated[Literal["quick", "standard", "thorough"], typer.Option(help="How much is tried beyond the ladder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def size(text: str) -> int:
    """Bytes of 24GB, 80G or 512MB, and, by powers of two, of 2GiB or 512Mi. Raises OptionError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise OptionError(f"memory {text!r} is no size; write 24GB, 512MB or 2GiB.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("kmgt".index(found[2]) + 1))


def listed(given: str) -> tuple[str, ...]:
    """Names with commas between them; that of Chinese keyboards is one too."""
    return tuple(name.strip() for name in re.split("[,，]", given) if name.strip())


def noted(loaded: Loaded) -> Rows:
    """The rows; what could not be used is said on standard error."""
    if loaded.note:
        print(loaded.note, file=sys.stderr)
    return loaded.rows


def print_table(rows: list[list[str]]) -> None:
    """The first row is the head."""
    table = Table(box=None, pad_edge=False)
    head, *rest = rows
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rest:
        table.add_row(*row)
    Console().print(table, markup=False, highlight=False)


def print_summary(folder: Path) -> None:
    """Of a finished artifact."""
    from netweight.summary import lines

    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines(folder):
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
