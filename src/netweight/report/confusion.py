"""Which labels are taken for which; for scores, prediction against truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from netweight.certify.certificate import Certificate, Outcomes
from netweight.report.format import count, percent
from netweight.report.html import Html, code, cut, element, esc, figure, join, section, source, table
from netweight.report.plots import heat_map, hexbin
from netweight.task import Classify

_READABLE, _PAIRS = 12, 15
Counts = NDArray[np.int64]


def confusion_section(certificate: Certificate, outcomes: Outcomes) -> Html:
    """The section, or nothing where the outcomes hold no rows of the shipped model."""
    found = outcomes.candidates.get(certificate.shipped.name)
    if found is None or len(found) == 0:
        return Html()
    task = certificate.registration.task
    origin = source(
        f"From {count(len(found))} certify rows, shipped model; ",
        code("outcomes.json"),
        " in the artifact's folder holds them row by row.",
    )
    if not isinstance(task, Classify):
        picture = hexbin("hexbin", found[:, 0], found[:, 1])
        return section("confusion", "Predicted against true", figure(picture, "On the dashed line, exact."), origin)
    matrix, before = matrix_of(found, task.outputs), matrix_of(outcomes.reference, task.outputs)
    body = _small(matrix, task) if task.outputs <= _READABLE else _large(matrix, before, task)
    return section("confusion", "Which labels are mistaken for which", body, origin)


def matrix_of(outcomes: NDArray[np.float64], labels: int) -> Counts:
    """Counts (true, predicted)."""
    predicted, true = outcomes[:, 0].astype(np.int64), outcomes[:, 1].astype(np.int64)
    return np.bincount(true * labels + predicted, minlength=labels * labels).reshape(labels, labels)


def _small(matrix: Counts, task: Classify) -> Html:
    rows = []
    for i, label in enumerate(task.labels):
        total = int(matrix[i].sum())
        right = percent(matrix[i, i] / total) if total else "no rows"
        rows.append((cut(label, 60), *(_cell(int(n), total, i == j) for j, n in enumerate(matrix[i])), right))
    head = ("true \\ predicted", *(cut(label, 60) for label in task.labels), "right")
    return _matrix_table("Rows of each true label (line) by predicted label (column).", head, rows)


def _matrix_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    top = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{join(row[1:-1])}{element("td", row[-1])}</tr>\n' for row in rows
    )
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(caption)}"><table class="matrix">'
        f"<caption>{esc(caption)}</caption><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _cell(rows: int, total: int, right: bool) -> Html:
    """Shaded by the root of its share of the true label's rows, at most 35 %, so that the number stays readable."""
    shade = round(35 * math.sqrt(rows / total)) if total else 0
    kind = "hit" if right else "miss"
    return Html(f'<td class="cell {kind}" style="--s:{shade}%">{count(rows)}</td>')


def _large(matrix: Counts, before: Counts, task: Classify) -> Html:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    pairs = sorted(np.argwhere(wrong > 0).tolist(), key=lambda ij: (-int(wrong[ij[0], ij[1]]), ij))
    rows = [
        (
            cut(task.labels[i], 60),
            cut(task.labels[j], 60),
            count(int(matrix[i, j])),
            count(int(before[i, j])),
            count(int(matrix[i].sum())),
        )
        for i, j in pairs[:_PAIRS]
    ]
    listed = (
        table(
            f"The {len(rows)} most confused pairs of {len(pairs)} that occur; of how many rows.",
            ("true label", "predicted", "rows, shipped", "rows, reference", "of"),
            rows,
            numeric={2, 3, 4},
            kind="dense",
        )
        if rows
        else element("p", "No row is mistaken.")
    )
    caption = (
        f"All {task.outputs} labels: blue on the diagonal is right, red off it is wrong; a stronger shade is more rows "
        "(logarithmic)."
    )
    return Html(f'<div class="pair wide">{figure(heat_map("heat", matrix), caption)}{listed}</div>')
