"""The main job on the built-in sample, sized for a few minutes on two cores."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from netweight.pipeline import optimize
from netweight.reporter import Reporter
from netweight.samples import sample
from netweight.ship import Result

# What two cores train on in minutes; the other labelled rows are left to the certificate, up to 5,000.
TRAIN, DEV, CERTIFY, POOL = 3_000, 1_200, 5_000, 3_000


def demo(out: Path, threads: int | None, seed: int, reporter: Reporter) -> Result:
    """Optimize on synthetic messages of an online shop's customers."""
    reporter.note("The sample is synthetic: messages to an online shop, written by a grammar of this project.")
    made = sample(seed)
    ends = (0, TRAIN, TRAIN + DEV, TRAIN + DEV + CERTIFY)
    train, dev, certify = (made.labelled.take(range(a, b)) for a, b in pairwise(ends))
    return optimize(
        train,
        dev=dev,
        certify=certify,
        pool=made.pool.take(range(POOL)),
        out=out,
        seconds=240.0,
        threads=threads,
        seed=seed,
        reporter=reporter,
    )
