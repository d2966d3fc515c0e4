"""The trivial floor: TF-IDF and logistic (or ridge) regression. What does not beat it is not worth shipping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from netweight.errors import ModelError
from netweight.features import features
from netweight.model import Model
from netweight.network import Linear
from netweight.run import InOnePlace, Run
from netweight.task import Classify
from netweight.techniques.base import read
from netweight.train import Plan

_RIDGE = 10.0  # with the default strength, scikit-learn's own alpha of 1


@dataclass(frozen=True)
class LinearFloor:
    """Ignores the given network; fits scikit-learn's solver on token and hashed-bigram counts of the rows.

    `strength` is the inverse of the L2 penalty: C of logistic regression; alpha of ridge regression is 10 / strength.
    `reads`: tokens of a text, where they are not as many as the model reads. Needs rows in one place: `Local` and
    `Parallel` have them, a federated run has not.
    """

    buckets: int = 2**15
    strength: float = 10.0
    reads: int | None = None

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        from scipy.sparse import csr_matrix
        from sklearn.linear_model import LogisticRegression, Ridge

        if not isinstance(run, InOnePlace):
            raise ModelError("LinearFloor needs all rows in one place; run it under Local or Parallel.")
        rows = run.data.train
        model = read(model, self.reads)
        tokens = model.encoder.encode(rows.text, rows.pair)
        vocabulary, n = model.encoder.vocabulary, len(tokens)
        columns, starts = features(tokens, vocabulary, self.buckets)
        where = np.repeat(np.arange(n), np.diff(np.append(starts, len(columns))))
        width = vocabulary + self.buckets
        present = csr_matrix((np.ones(len(columns)), (where, columns)), (n, width))
        documents = np.asarray((present > 0).sum(axis=0)).ravel()
        idf = np.log((1 + n) / (1 + documents)) + 1
        # Each occurrence counts by itself, in the sum and in the norm: the formula that the engine uses.
        norm = np.sqrt(np.bincount(where, idf[columns] ** 2, minlength=n)).clip(min=1e-6)
        # A column that no row has keeps the weight zero; left out, the solver's vectors are a fraction as long.
        seen = np.flatnonzero(documents)
        matrix = csr_matrix((idf[columns] / norm[where], (where, columns)), (n, width))[:, seen]
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
            network.table[torch.from_numpy(seen)] = torch.from_numpy(coefficients.T.astype(np.float32))
            network.weight.copy_(torch.from_numpy(idf))
            network.bias.copy_(torch.from_numpy(bias))
        return model.with_network(network)
