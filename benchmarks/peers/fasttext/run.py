"""fastText's supervised classifier; its own autotuning chooses on dev, within the size of a small artifact."""

from __future__ import annotations

import re

import fasttext
import numpy as np
from protocol import Data, Options, Predict, Scores, main

SECONDS = 300  # of autotuning: fastText's default
SIZE = "25M"
# Words and punctuation apart, as fastText's own tutorial does; scripts without blanks, character by character.
_PARTS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")


def words(text: str) -> str:
    """One line of lower-case words."""
    return " ".join(_PARTS.findall(text.lower()))


def train(options: Options) -> None:
    """Autotune on dev."""
    paths = {}
    for name in ("train", "dev"):
        rows: Data = options.rows(name)
        lines = [f"__label__{k} {words(text)}\n" for text, k in zip(rows.text, rows.label, strict=True)]
        paths[name] = options.out / f"{name}.txt"
        paths[name].write_text("".join(lines), encoding="utf-8")
    model = fasttext.train_supervised(
        str(paths["train"]),
        autotuneValidationFile=str(paths["dev"]),
        autotuneDuration=20 if options.quick else SECONDS,
        autotuneModelSize=SIZE,
        thread=options.threads,
        seed=options.seed,
        verbose=0,
    )
    model.save_model(str(options.model / "model.ftz"))


def load(options: Options) -> Predict:
    """The quantized model."""
    model, width = fasttext.load_model(str(options.model / "model.ftz")), len(options.labels)

    def predict(texts: list[str], batch: int) -> Scores:
        labels, shares = model.predict([words(text) for text in texts])
        out = np.full((len(texts), width), -20.0, np.float32)
        for i, (label, share) in enumerate(zip(labels, shares, strict=True)):
            if label:  # a text without a known word has none
                out[i, int(label[0].removeprefix("__label__"))] = np.log(max(float(share[0]), 1e-6))
        return out

    return predict


if __name__ == "__main__":
    # It reads line by line and pads nothing, so all texts go at once.
    main(train, load, ("fasttext", "numpy"), (1024,))
