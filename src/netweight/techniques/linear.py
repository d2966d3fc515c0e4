"""The trivial floor: TF-IDF and logistic (or ridge) regression. What does not beat it is not worth shipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from netweight.data import Rows
from netweight.encode import Tokens
from netweight.errors import ModelError
from netweight.features import features
from netweight.model import Model
from netweight.network import Linear
from netweight.run import InOnePlace, Run
from netweight.task import Classify
from netweight.train import Plan

_RIDGE = 10.0  # with the default strength, scikit-learn's own alpha of 1
# That are fitted at most: of each, scikit-learn's L-BFGS holds some 25 numbers of 8 bytes. BANKING77 has 5 million.
_MOST_WEIGHTS = 10_000_000
# Rows times labels that are fitted at most: the solver holds two numbers of 8 bytes for each, and more for a while, and
# knows no time box. BANKING77 has 0.8 million.
_MOST_CELLS = 50_000_000


@dataclass(frozen=True)
class LinearFloor:
    """Ignores the given network; fits scikit-learn's solver on token and hashed-bigram counts of the rows, where labels
    are many on the most frequent ones: on 10 million weights at most. Where rows times labels are more than 50 million,
    so many rows are drawn, with the plan's seed: of each label its share, and one at least.

    `strength` is the inverse of the L2 penalty: C of logistic regression; alpha of ridge regression is 10 / strength.
    `reads`: tokens of a text, where they are not as many as the model reads. Needs rows in one place: `Local` and
    `Parallel` have them, a federated run has not.
    """

    buckets: int = 2**15
    strength: float = 10.0
    reads: int | None = None

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        from sklearn.linear_model import LogisticRegression, Ridge

        if not isinstance(run, InOnePlace):
            raise ModelError("LinearFloor needs all rows in one place; run it under Local or Parallel.")
        rows = _drawn(run.data.train, model.task.outputs, plan.seed)
        model = model.reading(self.reads)
        tokens = model.encoder.encode(rows.text, rows.pair)
        vocabulary = model.encoder.vocabulary
        idf, kept, matrix = _table(tokens, vocabulary, self.buckets, _MOST_WEIGHTS // model.task.outputs)
        targets = model.task.targets(rows.label or ())
        if isinstance(model.task, Classify):
            fitted = LogisticRegression(C=self.strength, max_iter=60, tol=1e-3).fit(matrix, targets, rows.weight)
            coefficients, bias = fitted.coef_, fitted.intercept_
            if len(fitted.classes_) == 2:
                # One logit becomes two, half to each side, so that softmax gives the same probabilities.
                coefficients, bias = (
                    np.concatenate([-coefficients, coefficients]) / 2,
                    np.concatenate([-bias, bias]) / 2,
                )
        else:
            standard = (targets - model.task.mean) / model.task.scale
            fitted = Ridge(alpha=_RIDGE / self.strength).fit(matrix, standard, rows.weight)
            coefficients, bias = fitted.coef_[None, :], np.array([fitted.intercept_])
        network = Linear(vocabulary, self.buckets, model.task.outputs)
        with torch.no_grad():
            network.table.zero_()
            network.table[torch.from_numpy(kept)] = torch.from_numpy(coefficients.T.astype(np.float32))
            network.weight.copy_(torch.from_numpy(idf))
            network.bias.copy_(torch.from_numpy(bias))
        return model.with_network(network)


def _drawn(rows: Rows, labels: int, seed: int) -> Rows:
    """The rows, or as many as the solver may hold, in order."""
    if len(rows) * labels <= _MOST_CELLS:
        return rows
    _, label, counts = np.unique(np.array(rows.label, object), return_inverse=True, return_counts=True)
    mixed = np.random.default_rng(seed).permutation(len(rows))
    mixed = mixed[np.argsort(label[mixed], kind="stable")]
    # How much of a label's rows stands before each of them: nothing before the first, so that no label is left out.
    before = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) / np.repeat(counts, counts)
    return rows.take(np.sort(mixed[np.argsort(before, kind="stable")[: max(_MOST_CELLS // labels, labels)]]))


def _table(
    tokens: Tokens, vocabulary: int, buckets: int, most: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], Any]:
    """The idf of each column; the columns to fit, at most so many; and a sparse matrix of them (rows, fitted)."""
    from scipy.sparse import csr_matrix

    found, starts = features(tokens, vocabulary, buckets)
    columns, bounds = found.astype(np.int32), np.append(starts, len(found))
    del found  # as long as the table, as what follows
    n, width = len(tokens), vocabulary + buckets
    there = csr_matrix((np.ones(len(columns), bool), columns, bounds), (n, width), copy=True)
    there.sum_duplicates()
    documents = np.bincount(there.indices, minlength=width)
    del there
    idf = np.log((1 + n) / (1 + documents)) + 1
    # Each occurrence counts by itself, in the sum and in the norm: the formula that the engine uses.
    values, where = idf[columns], np.repeat(np.arange(n), np.diff(bounds))
    values /= np.sqrt(np.bincount(where, values**2, minlength=n)).clip(min=1e-6)[where]
    matrix = csr_matrix((values, columns, bounds), (n, width))
    matrix.sum_duplicates()
    # A column that no row has keeps the weight zero; left out, the solver's vectors are a fraction as long.
    common = np.argsort(-documents, kind="stable")[:most]
    fitted = np.sort(common[documents[common] > 0])
    return idf, fitted, matrix[:, fitted]
