"""A job that is stopped or killed at any moment ends, run again, as one that never was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Shop, again, journal, looks, store_of
from netweight import artifact, summary
from netweight.reporter import Silent
from netweight.ship import Result
from netweight.trials import _SHORT

TESTS = Path(__file__).parent


class Stopped(BaseException):
    """Not an Exception, so that nothing can handle it."""


@pytest.mark.usefixtures("quick")
def test_an_interrupted_job_ends_as_an_uninterrupted_one(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made.nw"
    same(shop.result, interrupted(shop, out, monkeypatch, most=12, apart=90), shop.folder, out)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_interrupted_search_ends_as_an_uninterrupted_one(
    shop: Shop, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SHORT, "standard", 1)
    whole, out = tmp_path / "whole.nw", copied
    shutil.copytree(store_of(copied), store_of(whole))
    result = again(shop, whole, effort="standard")
    same(result, interrupted(shop, out, monkeypatch, most=8, apart=90, effort="standard"), whole, out)


def same(one: Result, other: Result, folder: Path, again: Path) -> None:
    assert journal(again) == journal(folder)
    assert looks(again) == looks(folder)
    assert other.certificate == one.certificate
    assert other.manifest.digest == one.manifest.digest


def interrupted(
    shop: Shop, out: Path, monkeypatch: pytest.MonkeyPatch, most: int, apart: int, **options: Any
) -> Result:
    """The job's result after it was stopped up to `most` times, each within `apart` steps, notes and writes."""
    rng = np.random.default_rng(11)
    left = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
            return function(*args, **options)

        return call

    class Reporter(Silent):
        step = counted(Silent.step)
        note = counted(Silent.note)

    monkeypatch.setattr("os.fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    stops = 0
    while True:
        left[0] = int(rng.integers(5, apart)) if stops < most else 10**9
        try:
            result = again(shop, out, reporter=Reporter(), **options)
            break
        except Stopped:
            stops += 1
    assert stops >= 5
    return result


_KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy as np
import pytest
from conftest import many_rows, quick_measuring, tiny_base, tiny_model
from netweight.export import export
from netweight.pipeline import optimize
from netweight.techniques import Distill, Quantize
from netweight.reporter import Silent

folder, seed = Path(sys.argv[1]), int(sys.argv[3])
quick_measuring(pytest.MonkeyPatch())
base = tiny_base(folder / "base")
export(tiny_model())  # what exporting makes on first use, each child inherits
rows = many_rows(900, noise=0.02)
train, dev, certify = (rows.take(range(a, b)) for a, b in ((0, 300), (300, 500), (500, 900)))
rng = np.random.default_rng(seed)

def attempt(out, events):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    def counted(function):
        def call(*args, **options):
            nonlocal events
            events -= 1
            if events == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call
    Silent.step, Silent.note, os.fsync = counted(Silent.step), counted(Silent.note), counted(os.fsync)
    os.rename, os.replace, os.mkdir = counted(os.rename), counted(os.replace), counted(os.mkdir)
    try:
        optimize(train, dev=dev, certify=certify, out=out, model=str(base), max_drop=5.0, minimise="size", threads=1)
    except BaseException as problem:
        print(repr(problem), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

assert attempt(folder / "whole.nw", 10**9) == 0
kills = 0
while status := attempt(folder / "killed.nw", int(rng.integers(5, 90)) if kills < 10 else 10**9):
    assert status == signal.SIGKILL, status
    kills += 1
print(kills)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_job_ends_as_an_uninterrupted_one(tmp_path: Path, seed: int) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(TESTS), str(seed)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 5
    whole, killed = tmp_path / "whole.nw", tmp_path / "killed.nw"
    assert journal(killed) == journal(whole)
    assert looks(killed) == looks(whole)
    manifests = [artifact.check(out) for out in (whole, killed)]
    assert manifests[0].digest == manifests[1].digest
    certificates = [summary.certificate_of(out)[0] for out in (whole, killed)]
    assert certificates[0] == certificates[1]
