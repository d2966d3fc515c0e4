"""HTML that is safe by default: whatever is not `Html` is escaped where it enters."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence

# Neither XML nor UTF-8 can hold these, and bidirectional overrides would reorder the words around them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def esc(value: object) -> Html:
    """`value` as HTML; what already is HTML stays."""
    return value if isinstance(value, Html) else Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def cut(text: str, most: int) -> str:
    """At most `most` characters, the last one an ellipsis where something is missing."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def join(parts: Iterable[object], between: str = "") -> Html:
    """HTML of the parts in order."""
    return Html(between.join(esc(part) for part in parts))


def element(tag: str, *parts: object, kind: str = "") -> Html:
    """`<tag class=kind>parts</tag>`."""
    return Html(f"<{tag}{_class(kind)}>{join(parts)}</{tag}>")


def _class(kind: str) -> str:
    return f' class="{esc(kind)}"' if kind else ""


def code(text: str) -> Html:
    """A command or an identifier."""
    return element("code", text)


def section(ident: str, title: str, *parts: object) -> Html:
    """A part of the page with its heading."""
    return Html(
        f'<section id="{ident}" aria-labelledby="{ident}-title"><h2 id="{ident}-title">{esc(title)}</h2>'
        f"{join(parts)}</section>\n"
    )


def source(*parts: object) -> Html:
    """Where the numbers above it come from."""
    return element("p", *parts, kind="from")


def definitions(facts: Iterable[tuple[object, object]]) -> Html:
    """Names with their values."""
    return element("dl", *(join((element("dt", name), element("dd", value))) for name, value in facts))


def figure(picture: Html, caption: object) -> Html:
    """A plot with the sentence beneath it."""
    return Html(f"<figure>{picture}<figcaption>{esc(caption)}</figcaption></figure>")


def table(
    caption: str,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    numeric: Collection[int] = (),
    kind: str = "",
) -> Html:
    """A table whose first column names its rows, in a box of its own that scrolls when the page is narrow.

    `numeric` columns are set flush right.
    """

    def side(column: int) -> str:
        return ' class="n"' if column in numeric else ""

    top = "".join(f'<th scope="col"{side(i)}>{esc(name)}</th>' for i, name in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>'
        + "".join(f"<td{side(i)}>{esc(cell)}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>\n"
        for row in rows
    )
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(caption)}">'
        f"<table{_class(kind)}><caption>{esc(caption)}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )
