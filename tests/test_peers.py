"""The bench beside peers: its protocol, its margin, its driver on a peer that works and one that does not, its tables."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from conftest import Shop
from netweight.certify.compare import Pairs
from netweight.certify.power import binary_power, normal_power
from netweight.pipeline import store_of
from netweight.task import Classify

ROOT = Path(__file__).parents[1]

# A peer that says what the first row's label is: no training, no packages.
PEER = """
import numpy as np
from protocol import main

def train(options):
    (options.model / "label.txt").write_text(str(options.rows("train").label[0]))

def load(options):
    label, width = int((options.model / "label.txt").read_text()), len(options.labels)
    print("a library prints")
    return lambda texts, batch: np.tile(np.eye(width, dtype=np.float32)[label], (len(texts), 1))

main(train, load, ("numpy",), (8, 32))
"""
BROKEN = "raise SystemExit('this peer is not for this machine')"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("benchmarks", "scripts", "benchmarks/peers"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    for name in ("bench", "rounds", "figures", "peers", "protocol", "results", "examples", "serving", "runs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench as module  # type: ignore[import-not-found]

    return module


def pairs(task: Classify, n: int, lost: int, gained: int) -> Pairs:
    """Outcomes of n rows of label 0 and 1 in turn."""
    true = np.arange(n) % 2
    reference, candidate = true.copy(), true.copy()
    candidate[:lost] = 1 - candidate[:lost]
    reference[lost : lost + gained] = 1 - reference[lost : lost + gained]
    return Pairs(task, *(np.stack([said, true], axis=1).astype(float) for said in (reference, candidate)))


def test_the_margin_is_the_least_with_power(bench: ModuleType) -> None:
    task = Classify(("a", "b"))
    found = bench.margin_of(task, pairs(task, 1000, 40, 40), 2000, 0.025)
    assert found > 1.0
    assert binary_power(0.08, 0.0, 2000, found / 100, 0.025) >= 0.8
    assert binary_power(0.08, 0.0, 2000, found / 100 - 0.001, 0.025) < 0.8
    assert bench.margin_of(task, pairs(task, 1000, 2, 2), 20000, 0.025) == 1.0, "never less than a point"
    # Which of the two was better on dev must not matter.
    assert found == bench.margin_of(task, pairs(task, 1000, 80, 0), 2000, 0.025)


def test_the_margin_of_macro_f1_follows_the_bootstrap(bench: ModuleType) -> None:
    task = Classify(("a", "b"), "macro-f1")
    found = bench.margin_of(task, pairs(task, 1000, 50, 50), 1000, 0.025)
    # For balanced labels the difference of macro-F1s has about the error of that of accuracies.
    error = np.sqrt(0.1 / 1000)
    assert (
        normal_power(error * 0.85, 0.0, found / 100, 0.025) > 0.8 > normal_power(error * 1.15, 0.0, found / 100, 0.025)
    )
    assert bench.margin_of(task, pairs(task, 1000, 50, 50), 4000, 0.025) == pytest.approx(found / 2, abs=0.15)


@pytest.fixture
def given(bench: ModuleType, shop: Shop, tmp_path: Path) -> Any:
    """A command line over the session's job, with a peer that works and one that does not."""
    peers = tmp_path / "benchmarks" / "peers"
    shutil.copytree(ROOT / "benchmarks" / "peers" / "netweight", peers / "netweight")
    shutil.copy(ROOT / "benchmarks" / "peers" / "protocol.py", peers)
    for name, text in (("constant", PEER), ("broken", BROKEN)):
        (peers / name).mkdir()
        (peers / name / "run.py").write_text(text, encoding="utf-8")
    bench.HERE = tmp_path / "benchmarks"
    data, work = tmp_path / "data", tmp_path / "runs"
    (data / "made").mkdir(parents=True)
    for name, rows in (("train", shop.train), ("dev", shop.dev), ("test", shop.certify)):
        with gzip.open(data / "made" / f"{name}.csv.gz", "wt", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(rows.text, rows.label or ())])
    for source in (shop.folder, store_of(shop.folder)):
        shutil.copytree(source, work / source.name.replace("made", "made-seed0"))
    return bench.Given(data, work, work / "env", tmp_path / "cells", 1, "30m", "quick", 1.0, True, False)


def test_a_peer_and_a_broken_one(
    bench: ModuleType, shop: Shop, given: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rounds._PILOT", 0.001)
    monkeypatch.setattr("rounds._PAUSE", 0.0)
    monkeypatch.setattr("rounds._ROUND", 0.01)
    shops: dict[tuple[str, int], Any] = {}
    looks, certify, before_labels = given.results / "looks.jsonl", bench.certify, []
    given.results.mkdir()
    looks.write_text('{"set": "ma', encoding="utf-8")  # what a kill tore

    def opening(*words: Any) -> Any:
        before_labels.append([json.loads(line) for line in looks.read_text(encoding="utf-8").splitlines()])
        return certify(*words)

    monkeypatch.setattr(bench, "certify", opening)
    for peer in ("constant", "broken"):
        bench.cell("made", peer, 0, given, shops)
    fine, broken = (
        json.loads((given.results / f"made--{p}--seed0.trial.json").read_text()) for p in ("constant", "broken")
    )
    assert "this peer is not for this machine" in broken["error"]
    assert "timing" not in broken
    c, n = fine["certificate"], len(shop.result.certificate.registration.task.labels)  # type: ignore[union-attr]
    assert c["reference"] == pytest.approx(shop.result.certificate.reference.value)
    assert c["quality"]["value"] < 2 / n
    assert c["verdict"] == "worse"
    assert c["margin"] >= 1.0
    assert fine["timing"]["constant"]["batch"] in (8, 32)
    assert fine["timing"]["netweight"]["ratio"] == 1.0
    ((one,),) = before_labels
    assert one["rows"] == shop.result.certificate.registration.fingerprint  # type: ignore[union-attr]
    for key in ("set", "peer", "seed", "quick", "artifact"):
        assert one[key] == fine[key], "a look stands in the ledger before labels are opened"
    assert (one["commit"], one["date"]) == (fine["machine"]["commit"], fine["machine"]["date"])
    said = capsys.readouterr().out
    assert said.index("margin") < said.index("worse"), "the margin is known before the labels are"
    held = (given.work / "made-seed0.trial" / "data" / "test.jsonl").read_text(encoding="utf-8")
    assert "label" not in json.loads(held.splitlines()[0]), "peers never see certify labels"
    path = given.results / "made--constant--seed0.trial.json"
    before = path.read_bytes()
    bench.cell("made", "constant", 0, given, {})
    assert path.read_bytes() == before
    # What was measured stays where the same fails today.
    (given.work / "made-seed0.trial" / "peers" / "constant" / "train.json").unlink()
    (bench.HERE / "peers" / "constant" / "run.py").write_text(BROKEN, encoding="utf-8")
    bench.cell("made", "constant", 0, replace(given, again=True), {})
    assert path.read_bytes() == before
    assert f"{path.name} keeps what was measured before" in capsys.readouterr().out
    assert len(looks.read_text(encoding="utf-8").splitlines()) == 1, "who fails in training opens nothing"
    # Nor does it stand beside another artifact.
    manifest = given.work / "made-seed0.nw" / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"made-seed0\.trial is of another made-seed0\.nw; delete the folder"):
        bench.Shop("made", 0, given)


def test_peers_tell_nobody_that_they_run(bench: ModuleType, given: Any) -> None:
    one = bench.Peer("constant", SimpleNamespace(name="made", seed=0, given=given, folder=given.work / "made"))
    told = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "CI": "true", "NNCF_CI": "1"}
    assert told.items() <= one.environment.items()


def test_what_is_stopped_is_stopped_with_its_children(
    bench: ModuleType, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
        "print(child.pid, flush=True); time.sleep(99)"
    )
    shop = SimpleNamespace(name="made", seed=0, given=given, folder=given.work / "made")
    one = bench.Peer("constant", shop)
    monkeypatch.setattr(bench.Peer, "environment", dict(os.environ))
    with pytest.raises(bench.Failed, match="train: not done after 5 s"):
        one._shell([sys.executable, "-c", script], 5, "train")
    child = Path("/proc", (one.out / "train.log").read_text(encoding="utf-8").strip(), "stat")
    for _ in range(200):
        try:
            if ") Z " in child.read_text():
                break
        except OSError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of what was stopped lives")


@dataclass
class Clocked:
    """A process whose requests take a time that is known: `cost(lengths of the texts in one batch)`."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    fixed: float
    asked: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def ask(self, start: int, count: int, batch: int) -> Any:
        if not batch:
            return [self.fixed] * count
        self.asked.append(count)
        part = sorted(self.lengths[(start + i) % self.rows] for i in range(count))
        cut = [part[i : i + batch] for i in range(0, count, batch)]
        return sum(self.fixed + 1e-5 * len(rows) * rows[-1] for rows in cut)


def test_the_pilot_finds_the_best_batch_of_a_round(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import rounds  # type: ignore[import-not-found]

    lengths = tuple(np.random.default_rng(0).integers(4, 100, 400).tolist())
    made = Clocked(lengths, (1, 4, 16, 64), 1e-3)
    monkeypatch.setattr(Clocked, "rate", rounds.Served.rate, raising=False)
    monkeypatch.setattr(Clocked, "best", rounds.Served.best, raising=False)
    alone = {batch: made.ask(0, 400, batch) for batch in made.batches}
    assert made.best() == min(alone, key=lambda batch: alone[batch])
    for batch, seconds in alone.items():
        assert made.rate(batch) == pytest.approx(400 / seconds, rel=0.02)
    # Its first requests, of eight texts, would have said otherwise.
    few = {batch: made.ask(0, 8, batch) for batch in made.batches}
    assert min(few, key=lambda batch: few[batch]) != made.best()


def test_turns_are_of_one_length(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import rounds

    for name in ("rate", "best"):
        monkeypatch.setattr(Clocked, name, getattr(rounds.Served, name), raising=False)
    fast, slow = Clocked((1,) * 50, (10,), 1e-3), Clocked((1,) * 50, (10,), 1.0)
    found = rounds.interleaved({"fast": fast, "slow": slow})
    for one in (fast, slow):
        turns = one.asked[-rounds.ROUNDS :]
        assert set(turns) == {50 if one is fast else 10}
    assert found["slow"]["ratio"] == pytest.approx(found["fast"]["rows_per_second"] / found["slow"]["rows_per_second"])
    assert found["fast"]["rows_per_second"] == pytest.approx(10 / 1.1e-3)
    assert sum(fast.asked) > 7 * 5000, "a second of passes in each round"


MACHINE = {"cpu": "a processor", "threads": 2, "date": "2026-11-30", "commit": "2222222"}


def test_tables_say_what_was_not_run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import peers  # type: ignore[import-not-found]

    (tmp_path / "cells").mkdir()
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    text, plots = peers.tables()
    assert "\n".join(text).count(peers.NOT_RUN) == len(bench.SETS)
    assert not plots
    timing = {"rows_per_second": 1234.5, "ratio": 0.5, "p50": 1.0, "p99": 2.0}
    cell = {
        "set": "banking77",
        "peer": "tfidf",
        "seed": 0,
        "quick": False,
        "machine": MACHINE,
        "made": {"seconds": 3.0, "bytes": 4_000_000},
        "certificate": {
            "quality": {"value": 0.9},
            "drop": {"value": 0.01, "high": 0.02},
            "margin": 1.5,
            "verdict": "not certified",
            "reference": 0.91,
            "metric": "accuracy",
            "rows": 3075,
        },
        "timing": {"tfidf": timing},
    }
    failed = {"set": "banking77", "peer": "olive", "seed": 0, "quick": False, "error": "pip | said\nno"}
    stopped = failed | {"peer": "setfit", "error": "train: not done after 540 s"}
    trial = cell | {"peer": "fasttext", "quick": True}
    for one in (cell, failed, stopped, trial):
        (tmp_path / "cells" / f"{one['peer']}.json").write_text(json.dumps(one))
    page = "\n".join(peers.tables()[0])
    assert "| TF-IDF + logistic regression | 90.00 | 1.00, at most 2.00 | 1.5 | not certified | 1,234 | 0.5 |" in page
    assert "failed: pip / said no" in page
    assert "| stopped by us: train: not done after 540 s |" in page
    assert f"| fastText | {peers.NOT_RUN}: still to be done |" in page, "a trial is no result"
    assert "**Netweight**" not in page.split("Seed 0; ")[1].splitlines()[0]
    assert "TF-IDF + logistic regression: a processor, 2 threads, 2026-11-30, commit 2222222." in page
    assert peers.APART not in page
    why = {"fasttext": {"": "for one reason"}, "model2vec": {"banking77": "for another", "other": "for none"}}
    (tmp_path / "not-run.json").write_text(json.dumps(why))
    told = "\n".join(peers.tables()[0])
    assert f"| fastText | {peers.NOT_RUN}: for one reason |" in told
    assert f"| model2vec classifier | {peers.NOT_RUN}: for another |" in told
    assert "1,234" in page
    assert list(peers.tables()[1]) == ["peers-banking77-seed0.svg"]
    ours = cell | {"peer": "netweight", "timing": {"netweight": timing}}
    for allowed, said in ((2.1, "| not certified; would be at 2.1 |"), (2.0, "| not certified |")):
        own = ours | {"certificate": cell["certificate"] | {"margin": allowed, "verdict": "certified"}}  # type: ignore[operator]
        (tmp_path / "cells" / "netweight.json").write_text(json.dumps(own))
        (line,) = [line for line in "\n".join(peers.tables()[0]).splitlines() if line.startswith("| TF-IDF")]
        assert said in line


def test_reasons_are_of_sets_and_peers(bench: ModuleType) -> None:
    import peers

    why = json.loads((peers.RESULTS / "not-run.json").read_text(encoding="utf-8"))
    cells = peers.cells()
    assert set(why) <= set(bench.PEERS)
    assert {name for of in why.values() for name in of} <= {"", *bench.SETS}
    for peer, of in why.items():
        for name, words in of.items():
            missing = [seed for seed in bench.SEEDS if (name, seed, peer) not in cells]
            assert missing or not name, f"{peer} was run on all of {name}"
            assert "|" not in words


def test_a_row_of_another_artifact_or_machine_is_marked(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers

    (tmp_path / "cells").mkdir()
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    early = {"date": "2026-11-29", "commit": "1111111"}
    teacher = {"certificate": {"reference": 0.9, "dev": {"reference": 0.8}}}
    own = {"artifact": "b", "machine": MACHINE} | teacher
    bare = {"machine": MACHINE} | teacher
    for cell, of, why in (
        (own, own, ""),
        (own | {"machine": MACHINE | early}, own, ""),
        (own | {"artifact": "a"}, own, "another artifact"),
        (bare, own, ""),
        (own, bare, ""),
        # Without digests the day tells, and the teacher.
        (bare | {"machine": MACHINE | early}, own, "the artifact of an earlier day"),
        (bare | {"machine": MACHINE | early}, bare, "the artifact of an earlier day"),
        (bare | {"machine": MACHINE | early | {"commit": "2222222"}}, bare, ""),
        (bare, bare | {"machine": MACHINE | early}, ""),
        (bare | {"certificate": {"reference": 0.9, "dev": {"reference": 0.7}}}, bare, "another artifact"),
        ({"error": "no", "machine": MACHINE | early}, own, "the artifact of an earlier day"),
        ({"error": "no", "machine": MACHINE}, {}, ""),
        # The name of a processor with AVX2 alone was longer later on.
        (own | {"machine": MACHINE | {"cpu": "a processor with avx2"}}, own, ""),
        (own | {"machine": MACHINE | {"cpu": "a processor with avx512_vnni"}}, own, "another machine"),
        (bare | {"machine": MACHINE | early | {"cpu": "x"}}, own, "the artifact of an earlier day, another machine"),
    ):
        assert peers.apart(cell, of) == why, (cell, of)
    timing = {"rows_per_second": 9.0, "ratio": 1.0, "p50": 1.0, "p99": 2.0}
    whole = {"quality": {"value": 0.9}, "drop": {"value": 0.0, "high": 0.01}, "margin": 1.0, "verdict": "certified"}
    whole |= {"reference": 0.9, "metric": "accuracy", "rows": 10}
    for peer, artifact in (("netweight", "b"), ("tfidf", "a"), ("olive", "b")):
        found = {"set": "banking77", "seed": 0, "peer": peer, "quick": False, "artifact": artifact, "machine": MACHINE}
        found |= {"made": {"seconds": 3.0, "bytes": 1}, "certificate": whole, "timing": {peer: timing}}
        (tmp_path / "cells" / f"{peer}.json").write_text(json.dumps(found))
    page = "\n".join(peers.tables()[0])
    assert "| TF-IDF + logistic regression † | 90.00 |" in page
    (said,) = [line for line in page.splitlines() if line.startswith(peers.APART)]
    assert "(another artifact: a processor, 2 threads, 2026-11-30, commit 2222222)" in said
    assert page.count(peers.APART) == 2, "what is of this artifact has no sign"


def test_the_readmes_show_the_plot_of_their_table(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers
    import results  # type: ignore[import-not-found]

    (tmp_path / "cells").mkdir()
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    whole = {"quality": {"value": 0.9}, "drop": {"value": 0.0, "high": 0.005}, "margin": 1.0, "verdict": "certified"}
    whole |= {"reference": 0.9, "metric": "accuracy", "rows": 10, "level": 0.025}

    def cell(seed: int, peer: str, ratio: float, artifact: str = "b") -> None:
        timing = {"rows_per_second": 9.0, "ratio": ratio, "p50": 1.0, "p99": 2.0}
        found = {"set": "banking77", "seed": seed, "peer": peer, "quick": False, "artifact": artifact}
        made = {"seconds": 3.0, "bytes": 1, "tiers": ["conv"]}
        found |= {"made": made, "certificate": whole, "timing": {peer: timing}}
        (tmp_path / "cells" / f"{peer}-{seed}.json").write_text(json.dumps(found | {"machine": MACHINE}))

    for seed, ratio in ((0, 12.0), (1, 8.0), (2, 10.0)):
        cell(seed, "netweight", 1.0)
        cell(seed, "olive", ratio)
    plots = peers.tables()[1]
    for language in ("en", "zh"):
        lines = results.headline(language).splitlines()
        assert lines[-1].endswith("](docs/peers-banking77-seed2.svg)"), "of the median seed, below its table"
        assert "peers-banking77-seed2.svg" in plots
        assert peers.APART not in "".join(lines)
    cell(2, "olive", 10.0, "a")
    for language, words in (("en", "took turns with another artifact"), ("zh", "与另一个模型产物")):
        said = results.headline(language)
        assert said.count(peers.APART) == 2
        assert f"{peers.APART} {words}" in said


def test_where_time_goes_and_the_peak_say_commit_and_date(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers
    import results

    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    peak = {"operations": 1e9, "name": "a product"}
    stored: dict[str, Any] = {"machine": MACHINE, "peak": peak, "peaks": {"a product": 1e9}, "rows": 8, "tokens": 5.0}
    (tmp_path / "roofline.json").write_text(json.dumps(stored | {"tiers": {}}))
    steps = [{"rows": rows, "seconds": 1.0, "memory": 10} for rows in (10, 100)]
    (tmp_path / "scaling-predict.json").write_text(json.dumps({"set": "x", "machine": MACHINE, "steps": steps}))
    run = {"seed": 0, "inspect": {"tiers": []}, "costs": {"": [1e-6]}, "bench": {"machine": MACHINE}}
    for page in (peers.roofline(), "\n".join(peers.scaling()[0]), results.profile(run)):
        assert "(a processor, 2 threads, 2026-11-30, commit 2222222)" in page


def test_make_bench_writes_the_page_of_results(bench: ModuleType) -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nbench: ")[1].split("\n\n")[0]
    assert recipe.index("benchmarks/bench.py") < recipe.index("scripts/results.py")


def test_every_peer_has_a_script_a_title_and_pinned_requirements(bench: ModuleType) -> None:
    import peers

    for name in bench.PEERS:
        folder = ROOT / "benchmarks" / "peers" / name
        assert (folder / "run.py").exists(), name
        assert name in peers.TITLES
        wanted = folder / "requirements.txt"
        # What runs the teacher's own weights is pinned with Netweight, by requirements.lock.
        assert wanted.exists() != (name in ("netweight", "teacher", "onnx_int8", "openvino_int8", "openvino_accuracy"))
        if wanted.exists():
            assert all("==" in line for line in wanted.read_text(encoding="utf-8").splitlines()), name


def test_figures_take_the_best_certified_peer(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import figures  # type: ignore[import-not-found]
    import peers

    (tmp_path / "cells").mkdir()
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    assert figures.table().count(peers.NOT_RUN) == 16
    own = {"rows_per_second": 1000.0, "ratio": 1.0, "p50": 1.0, "p99": 8.0}

    def cell(name: str, peer: str, verdict: str, ratio: float, p50: float, size: int, margin: float = 1.0) -> None:
        theirs = {"ratio": ratio, "p50": p50, "p99": 9.6 if peer == "openvino_int8" else 10.0}
        timing = {"netweight": own, peer: theirs} if peer != "netweight" else {peer: own}
        certificate = {"verdict": verdict, "dev": {"reference": 0.93}, "margin": margin}
        certificate["drop"] = {"value": 0.004, "high": 0.0262}
        made = {"bytes": size, "points": {"static": 0.9, "conv": 0.92}}
        found = {"set": name, "peer": peer, "seed": 0, "quick": False, "made": made}
        found |= {"certificate": certificate, "timing": timing}
        (tmp_path / "cells" / f"{name}-{peer}.json").write_text(json.dumps(found))

    for name, light in (("banking77", "worse"), ("bitext_support", "certified")):
        cell(name, "netweight", "certified", 1.0, 1.0, 10)
        cell(name, "teacher", "certified", 0.1, 0.1, 1)
        cell(name, "onnx_int8", "certified", 12.0, 10.0, 40)
        cell(name, "openvino_int8", "certified", 11.0, 12.0, 20)
        cell(name, "olive", "not certified", 2.0, 1.0, 5)
        cell(name, "tfidf", light, 0.5, 0.5, 1)
    cell("womens_clothing", "netweight", "not certified", 1.0, 1.0, 10)
    lines = figures.table().splitlines()[4:]
    assert lines[2].endswith("| 10x | 11.00x | reached |"), "of the sets where no light peer certifies"
    assert lines[3].endswith("| 10x | 11.00x | reached |"), "all were held to one point"
    assert lines[4].endswith("| 1.0x | 0.50x | **missed** |"), "where one does, it counts"
    assert "0.10 in the geometric mean (banking77 0 0.10, bitext_support 0 0.10) | reached" in lines[5]
    assert "0.80 in the geometric mean" in lines[6]
    assert "0.83 in the geometric mean" in lines[7]
    assert "0.50 in the geometric mean" in lines[8]
    assert "1.00 (banking77 0 1.00, bitext_support 0 1.00, womens_clothing 0 1.00) | reached" in lines[9]
    assert "3.00 (banking77 0 3.00, bitext_support 0 3.00, womens_clothing 0 3.00) | **missed**" in lines[10]
    assert "| 6 MB or less | 0.0 MB | reached |" in lines[11]
    assert f"| 3x | {peers.NOT_RUN} | |" in lines[13]
    said = figures.table()
    assert "in none of the first seven rows: womens_clothing 0" in said
    assert "- No transformer peer is certified, so that rows against one lack it: womens_clothing 0.\n" in said
    missing = ("bitext_support 1", "bitext_support 2", "online_shopping_10_cats 0")
    assert ", ".join(missing) in said.split("- Not measured at all: ")[1].splitlines()[0]
    assert "Torch-Pruning was not" not in said, "a peer that was measured nowhere is in the tables"
    assert "another artifact" not in said
    stale = tmp_path / "cells" / "banking77-onnx_int8.json"
    kept, before = stale.read_text(), lines[2]
    for one, digest in ((stale, "a"), (tmp_path / "cells" / "banking77-netweight.json", "b")):
        one.write_text(json.dumps(json.loads(one.read_text()) | {"artifact": digest}))
    assert "no weaker rival: the teacher, ONNX Runtime dynamic int8 (banking77 0).\n" in figures.table()
    assert figures.table().splitlines()[6] == before, "it counts all the same"
    stale.write_text(kept)
    cell("amazon_multidomain", "netweight", "certified", 1.0, 1.0, 10, margin=3.3)
    cell("amazon_multidomain", "onnx_int8", "certified", 44.0, 10.0, 40)
    assert "| 10x | 22.00x in the geometric mean" in figures.table()
    assert "amazon_multidomain 0: 3.3 points (lost 0.40, at most 2.62)." in figures.table()
    assert "| the same on sets where one point was allowed | 10x | 11.00x | reached |" in figures.table()
    cell("amazon_multidomain", "olive", "not certified", 11.0, 10.0, 40)
    assert "| 10x | 11.00x in the geometric mean" in figures.table(), "it loses no more than Netweight may"
    cell("amazon_multidomain", "olive", "not certified", 22.0, 10.0, 40)
    cell("banking77", "openvino_int8", "certified", 8.0, 12.0, 20)
    assert "(amazon_multidomain 0 22.00x, banking77 0 8.00x) | reached, not by banking77 0 |" in figures.table()
    for seed, seconds in ((0, 750), (1, None)):
        run = {"seed": seed, "seconds": seconds}
        (tmp_path / f"banking77-standard-seed{seed}.json").write_text(json.dumps(run))
    (tmp_path / "finetune.json").write_text(json.dumps({"seconds": 100, "epochs": 2.0}))
    assert (
        "6 epochs, of which 2 timed (in a time limit that decides it: see the notes) | 3x | 2.50x | reached |"
        in figures.table()
    )
    for seed, verdict, size in ((0, "certified", 5_800_000), (1, "not certified", 10)):
        run = {"seed": seed, "inspect": {"bytes": size, "certificate": {"verdict": verdict}}}
        (tmp_path / f"banking77-size-seed{seed}.json").write_text(json.dumps(run))
    assert "`--minimise size` | 6 MB or less | 5.8 MB | reached |" in figures.table()
    steps = [{"rows": 400, "seconds": 20.0}, {"rows": 40, "seconds": 1.0}]
    (tmp_path / "scaling-predict.json").write_text(json.dumps({"steps": steps}))
    assert "ten times the rows / few | 1.0, below is better | 2.00x | **missed** |" in figures.table()
    steps.append({"rows": 80, "seconds": 2.0})
    (tmp_path / "scaling-predict.json").write_text(json.dumps({"steps": steps}))
    # A row costs 1 / 40 s from 40 to 80 rows, and 18 / 320 s from there on.
    assert "of each row more, last step / first | 1.0, below is better | 2.25x | **missed** |" in figures.table()


def test_the_interval_of_a_geometric_mean_is_students(bench: ModuleType) -> None:
    import figures

    of = {"a 0": 8.0, "a 1": 12.0, "a 2": 10.0}
    mean, interval = figures._geometric(of)
    held = ttest_1samp(np.log(list(of.values())), 0).confidence_interval(0.95)
    assert interval is not None
    assert mean == pytest.approx(960 ** (1 / 3))
    assert interval == pytest.approx((np.exp(held.low), np.exp(held.high)))
    assert figures._geometric({"a 0": 8.0, "b 0": 2.0}) == (pytest.approx(4.0), None), "no seed to compare with"
    # Two sets of two seeds each: the mean of two means, with the variance of both.
    _, both = figures._geometric({"a 0": 1.0, "a 1": np.e, "b 0": 1.0, "b 1": np.e})
    half = 4.302653 * np.sqrt(0.5 * (1 / 2 + 1 / 2)) / 2
    assert np.log(both) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
