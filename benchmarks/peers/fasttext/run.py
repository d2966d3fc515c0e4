"""fastText's supervised classifier; learning rate, epochs and subwords chosen on dev.

Its own autotuning stops by the clock, so that what it finds would depend on the machine's load.
"""

from __future__ import annotations

import itertools
import re

import fasttext
import numpy as np
from protocol import Options, Predict, Scores, main, quality

BUCKETS = 100_000  # for word pairs and subwords; the default of two million makes a file of 800 MB
# Words and punctuation apart, as fastText's own tutorial does; scripts without blanks, character by character.
_PARTS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")


def words(text: str) -> str:
    """One line of lower-case words."""
    return " ".join(_PARTS.findall(text.lower()))


def train(options: Options) -> None:
    """The best of eight on dev; of one where it must be quick."""
    rows, dev, metric = options.rows("train"), options.rows("dev"), options.task["metric"]
    lines = [f"__label__{k} {words(text)}\n" for text, k in zip(rows.text, rows.label, strict=True)]
    path = options.out / "train.txt"
    path.write_text("".join(lines), encoding="utf-8")
    best = -1.0
    tries = itertools.product((0.3, 1.0), (10, 40), ((0, 0), (2, 5)))
    for rate, epochs, (least, most) in itertools.islice(tries, 1 if options.quick else None):
        model = fasttext.train_supervised(
            str(path),
            lr=rate,
            epoch=epochs,
            wordNgrams=2,
            minn=least,
            maxn=most,
            bucket=BUCKETS,
            thread=options.threads,
            seed=options.seed,
            verbose=0,
        )
        if (reached := quality(_predict(model, len(options.labels))(dev.text, 1024), dev.label, metric)) > best:
            best = reached
            model.save_model(str(options.model / "model.bin"))


def load(options: Options) -> Predict:
    """The saved model."""
    return _predict(fasttext.load_model(str(options.model / "model.bin")), len(options.labels))


def _predict(model: fasttext.FastText._FastText, width: int) -> Predict:
    column = {f"__label__{k}": k for k in range(width)}

    def predict(texts: list[str], batch: int) -> Scores:
        labels, shares = model.predict([words(text) for text in texts])
        out = np.full((len(texts), width), -20.0, np.float32)
        # A text without a known word has no label.
        rows = [i for i, label in enumerate(labels) if label]
        said = [column[labels[i][0]] for i in rows]
        out[rows, said] = np.log(np.maximum([shares[i][0] for i in rows], 1e-6))
        return out

    return predict


if __name__ == "__main__":
    # It reads line by line and pads nothing, so all texts go at once.
    main(train, load, ("fasttext", "numpy"), (1024,))
