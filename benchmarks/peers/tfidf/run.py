"""TF-IDF and logistic regression; words or characters, the strength of the penalty and, where rare labels count as much
as others, weights of labels, chosen on dev."""

from __future__ import annotations

import itertools
import json

import numpy as np
from protocol import Options, Predict, Scores, main, quality
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

WORDS = {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
CHARACTERS = {"analyzer": "char_wb", "ngram_range": (2, 4)}


def train(options: Options) -> None:
    """The best on dev."""
    rows, dev, metric = options.rows("train"), options.rows("dev"), options.task["metric"]
    best = -1.0
    for features in (WORDS, CHARACTERS):
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, dtype=np.float32, **features)
        x, x_dev = vectorizer.fit_transform(rows.text), vectorizer.transform(dev.text)
        for c, weight in itertools.product((3.0, 30.0), (None,) if metric == "accuracy" else (None, "balanced")):
            linear = LogisticRegression(C=c, class_weight=weight, max_iter=300, random_state=options.seed)
            found = linear.fit(x, rows.label)
            scores = found.predict_proba(x_dev)
            if (reached := quality(scores, dev.label, metric)) > best:
                best = reached
                kept = {"features": features, "vocabulary": vectorizer.vocabulary_, "classes": found.classes_.tolist()}
                arrays = (vectorizer.idf_, found.coef_, found.intercept_)
    kept["vocabulary"] = {word: int(i) for word, i in kept["vocabulary"].items()}
    (options.model / "words.json").write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    idf, coef, intercept = (a.astype(np.float32) for a in arrays)
    np.savez(options.model / "weights.npz", idf=idf, coef=coef, intercept=intercept)


def load(options: Options) -> Predict:
    """The vectorizer, and the matrix of the linear model."""
    kept = json.loads((options.model / "words.json").read_text(encoding="utf-8"))
    weights = np.load(options.model / "weights.npz")
    features = kept["features"] | {"ngram_range": tuple(kept["features"]["ngram_range"])}
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, vocabulary=kept["vocabulary"], **features)
    vectorizer.idf_ = weights["idf"]
    coef, intercept = np.ascontiguousarray(weights["coef"].T), weights["intercept"]
    if coef.shape[1] == 1:  # two labels: one column, the log odds of the second
        coef = np.concatenate([np.zeros_like(coef), coef], axis=1)
        intercept = np.concatenate([np.zeros(1, np.float32), intercept])
    classes, width = kept["classes"], len(options.labels)

    def predict(texts: list[str], batch: int) -> Scores:
        x: csr_matrix = vectorizer.transform(texts)
        out = np.full((len(texts), width), -1e9, np.float32)
        out[:, classes] = x @ coef + intercept
        return out

    return predict


if __name__ == "__main__":
    # Sparse rows pad nothing, so all texts go at once.
    main(train, load, ("scikit-learn", "scipy", "numpy"), (1024,))
