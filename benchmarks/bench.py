"""Netweight beside its peers, one cell for each data set, peer and seed:

    make bench [SET=banking77] [PEER=tfidf] [SEED=0] [DATA=../shared/data] [WORK=runs]
    .venv/bin/python benchmarks/bench.py --set banking77 --peer tfidf --seed 0

Without a set or peer, all of them. Every cell uses the rows, the teacher and the threads of one Netweight job (made
here where WORK holds none), and is timed in rounds that take turns with that job's artifact. A cell is a JSON file in
benchmarks/results/cells/; one that is there is left alone, and so is every finished step under WORK. A peer with a
requirements.txt lives in an environment of its own, made on first use; one that cannot be installed or run leaves a
cell with its error.

The certificate is Netweight's own test of the peer against the same teacher. Its margin is the larger of 1.0 point and
the least margin (in tenths of a point) with 80 % power if the true drop were 0, from what dev shows of the two and the
number of certify rows. It is printed before the certify labels are read. Netweight has to fix one margin for all its
candidates, by the same rule (`--max-drop auto`), and is held to that.

Every such look at certify labels, a trial's too, is a line of looks.jsonl beside the cells before it is taken. No level
is lower for it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rounds import Served, interleaved
from safetensors.numpy import save_file

from netweight.artifact import CERTIFICATE, MEASUREMENTS, read_file, read_manifest
from netweight.certify import Answers, Candidate, Certificate, certify, register
from netweight.certify.compare import Pairs, extended
from netweight.certify.ledger import locked
from netweight.certify.power import CHANCE, binary_power
from netweight.certify.tails import normal_quantile, normal_tail
from netweight.data import Columns, Dataset
from netweight.data.files import append
from netweight.export import export
from netweight.job import Job, Options, Tables, prepare
from netweight.measure import cores, machine
from netweight.model import Model
from netweight.network import Transformer
from netweight.pipeline import store_of
from netweight.run.local import logits_of
from netweight.scratch import SCRATCH
from netweight.store import Store
from netweight.task import Task

HERE = Path(__file__).resolve().parent
SETS = ("banking77", "bitext_support", "womens_clothing", "amazon_multidomain", "online_shopping_10_cats")
SEEDS = (0, 1, 2)
PEERS = (
    "netweight",
    "teacher",
    "onnx_int8",
    "openvino_int8",
    "openvino_accuracy",
    "torch_pruning",
    "olive",
    "setfit",
    "model2vec",
    "fasttext",
    "tfidf",
)
# Options of a set's Netweight job beyond the defaults.
ASKED = {
    "womens_clothing": ("--metric", "macro-f1"),
    "online_shopping_10_cats": ("--model", "scratch"),
}
CONFIDENCE = 0.95
LEAST_POINTS = 1.0
LOOKS = "looks.jsonl"


@dataclass(frozen=True)
class Given:
    """The command line."""

    data: Path
    work: Path
    envs: Path
    results: Path
    threads: int
    limit: str
    effort: str
    hours: float
    quick: bool
    again: bool


class Failed(Exception):
    """A peer could not be installed or run; the text is the cell's error."""


class Shop:
    """One Netweight job, and what all peers of it share."""

    def __init__(self, name: str, seed: int, given: Given) -> None:
        self.name, self.seed, self.given = name, seed, given
        self.artifact = given.work / f"{name}-seed{seed}.nw"
        # What a trial makes is never taken for a peer that was trained.
        self.folder = given.work / f"{name}-seed{seed}.{'trial' if given.quick else 'peers'}"
        self.folder.mkdir(parents=True, exist_ok=True)
        source = {split: given.data / name / f"{split}.csv.gz" for split in ("train", "dev", "test")}
        self._optimize(source)
        with Store(store_of(self.artifact), None) as store:
            self.job = store.job
            self.teacher = Model.load(store.model_folder("teacher"))
        options = Options(model=self.job["model"], max_length=self.job["max length"], seed=seed)
        tables = Tables(source["train"], Columns("text", "label"), source["dev"], source["test"])
        self.data: Dataset = prepare(Job(tables, options=options), self.folder)[0]
        self.task: Task = self.teacher.task
        if self.data.fingerprint != self.job["data"]:
            sys.exit(f"{self.artifact} was made from other rows than {given.data / name} holds; use another --work.")
        self._hold_on()
        self._write_rows()
        self._write_teacher()

    def _optimize(self, source: Mapping[str, Path]) -> None:
        if (self.artifact / "manifest.json").exists():
            return
        resumed = store_of(self.artifact).exists()
        words = [sys.executable, "-c", "from netweight.cli import main; main()", "optimize", source["train"]]
        words += ["--dev", source["dev"], "--certify", source["test"], "--text", "text", "--label", "label"]
        words += ["--out", self.artifact, "--seed", self.seed, "--threads", self.given.threads]
        words += ["--max-drop", "auto", "--effort", self.given.effort, *ASKED.get(self.name, ())]
        began = time.monotonic()
        subprocess.run([*map(str, words), "--time-limit", self.given.limit], check=True)
        if not resumed:  # a resumed job's seconds would say nothing
            (self.folder / "seconds.json").write_text(json.dumps(round(time.monotonic() - began)), encoding="utf-8")

    def _hold_on(self) -> None:
        """What peers made is of one artifact: with another, answers of the old would stand beside its timings."""
        self.digest = hashlib.sha256((self.artifact / "manifest.json").read_bytes()).hexdigest()
        path = self.folder / "artifact.sha256"
        if path.exists() and path.read_text(encoding="utf-8") != self.digest:
            sys.exit(f"{self.folder} is of another {self.artifact.name}; delete the folder, or use another --work.")
        path.write_text(self.digest, encoding="utf-8")

    @property
    def seconds(self) -> float | None:
        """What the job took; None for one that was resumed."""
        path = self.folder / "seconds.json"
        return float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def _write_rows(self) -> None:
        """The job's own rows. Labels of certify rows are not written: no peer can read them."""
        folder = self.folder / "data"
        if (folder / "task.json").exists():
            return
        folder.mkdir(exist_ok=True)
        for name, rows in (("train", self.data.train), ("dev", self.data.dev), ("test", self.data.certify.rows)):
            cells = [{"text": text} for text in rows.text]
            for cell, label in zip(cells, rows.label or (), strict=bool(rows.label)):
                cell["label"] = label
            lines = [json.dumps(cell, ensure_ascii=False) + "\n" for cell in cells]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        task = self.task.to_dict()
        (folder / "task.json").write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")

    def _write_teacher(self) -> None:
        """The teacher in Hugging Face format, its head and pooling, its fp32 ONNX file, and what it answers."""
        folder, model = self.folder / "teacher", self.teacher
        if not (folder / "answers.npz").exists():
            network = model.network
            assert isinstance(network, Transformer)
            network.backbone.save_pretrained(folder)  # type: ignore[operator]
            (folder / "tokenizer.json").write_text(model.encoder.definition, encoding="utf-8")
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.encoder.max_length}
            (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
            head = {name: value.detach().numpy() for name, value in network.head.state_dict().items()}
            save_file(head, folder / "head.safetensors")
            rest = {"pooling": network.pooling, "max_length": model.encoder.max_length, "pad": model.encoder.pad}
            (folder / "teacher.json").write_text(json.dumps(rest), encoding="utf-8")
            exported = export(Model(network, model.encoder, model.task, model.base))
            (folder / "model.onnx").write_bytes(exported.plain)
            answers = {
                name: logits_of(model, model.encoder.encode(rows.text)).numpy()
                for name, rows in (("dev", self.data.dev), ("test", self.data.certify.rows))
            }
            np.savez(folder / "answers.new.npz", **answers)  # type: ignore[arg-type]
            (folder / "answers.new.npz").replace(folder / "answers.npz")
        self.said = dict(np.load(folder / "answers.npz"))


@dataclass(frozen=True)
class Peer:
    """One peer at work for one shop."""

    name: str
    shop: Shop

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.shop.folder / "peers" / self.name

    @property
    def _script(self) -> Path:
        return HERE / "peers" / self.name / "run.py"

    def python(self) -> Path:
        """The interpreter of its environment, which is made on first use. Raises Failed with pip's last words."""
        wanted = self._script.with_name("requirements.txt")
        if not wanted.exists():
            return Path(sys.executable)
        folder = self.shop.given.envs / self.name
        python, done = folder / "bin" / "python", folder / "installed.txt"
        text = wanted.read_text(encoding="utf-8")
        if done.exists() and done.read_text(encoding="utf-8") == text:
            return python
        print(f"installing {self.name} into {folder}", flush=True)
        self._shell([sys.executable, "-m", "venv", "--clear", folder], 300, "install")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        # torch goes first and alone: resolved together with the rest, pip may prefer another build of it.
        if torch := [line for line in text.split() if line.startswith("torch==")]:
            self._shell([*pip, *torch], 3600, "install")
        self._shell([*pip, "--requirement", wanted], 3600, "install")
        done.write_text(text, encoding="utf-8")
        return python

    def _shell(self, words: list[Any], seconds: float, log: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{log}.log"
        with path.open("wb") as file:
            began = subprocess.Popen(
                list(map(str, words)),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
            try:
                status = began.wait(seconds)
            except subprocess.TimeoutExpired:
                raise Failed(f"{log}: not done after {seconds:.0f} s") from None
            finally:
                # With its children, which would run on beside the timing of others.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(began.pid, signal.SIGKILL)
                began.wait()
        if status:
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Failed(f"{log}: {' | '.join(lines[-3:])[-600:]}")

    @property
    def environment(self) -> dict[str, str]:
        """Offline, with as many threads as everybody, and telling no maker of a library that it is used."""
        paths = [str(HERE / "peers")]
        if not self._script.with_name("requirements.txt").exists():
            paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        count = str(self.shop.given.threads)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
        rest = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        told = {"ORT_DISABLE_TELEMETRY": "1", "CI": "true", "NNCF_CI": "1"}
        return os.environ | threads | rest | told | {"RAYON_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}

    def words(self, what: str) -> list[str]:
        """Its command line."""
        shop = self.shop
        base = pretrained_folder(shop)
        found = [self.python(), self._script, what, "--data", shop.folder / "data", "--out", self.out]
        found += ["--seed", shop.seed, "--threads", shop.given.threads, "--teacher", shop.folder / "teacher"]
        found += ["--base", base, "--artifact", shop.artifact, *(["--quick"] if shop.given.quick else [])]
        return list(map(str, found))

    def train(self) -> dict[str, Any]:
        """Train, or take what an earlier run finished: seconds, bytes, versions."""
        done = self.out / "train.json"
        if not done.exists():
            print(f"{self.shop.name} seed {self.shop.seed}: {self.name} trains", flush=True)
            self._shell(self.words("train"), 3600 * self.shop.given.hours, "train")
        return dict(json.loads(done.read_text(encoding="utf-8")))

    def answers(self) -> dict[str, NDArray[np.float32]]:
        """Scores on dev and on the certify rows."""
        return dict(np.load(self.out / "answers.npz"))

    def served(self) -> Served:
        """A process that answers rounds."""
        try:
            return Served(self.words("serve"), self.environment, self.out / "serve.log")
        except RuntimeError as problem:
            raise Failed(f"serve: {problem}") from None


def pretrained_folder(shop: Shop) -> Path:
    """Where the pretrained model lies that the job started from; where it started from none, the teacher."""
    import netweight.model

    if shop.job["model"] == SCRATCH:
        return shop.folder / "teacher"
    return netweight.model._folder(shop.job["model"])


def margin_of(task: Task, dev: Pairs, rows: int, level: float) -> float:
    """The least margin, in points, with 80 % power at `rows` rows if the true drop were 0; at least 1.0, in tenths.

    From dev alone. Accuracy: the share of rows on which the two differ in being right. Else: the bootstrap's error.
    """
    n = len(dev)
    if dev.exact:
        # Two models that agree on all of dev may still differ on one row in n.
        discordant = max(sum(dev.lost_gained), 1) / n
        power = lambda margin: binary_power(discordant, 0.0, rows, margin, level)  # noqa: E731
    else:
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 500).astype(np.float64)
        spread = float((task.quality(dev.reference, weights) - task.quality(dev.candidate, weights)).std())
        error = float(np.sqrt((spread**2 + 1 / n**2) * n / rows))
        # As `auto` counts it: with the rows by which the test extends the sample.
        moved, added = (part * n / rows for part in extended(task, dev.reference, level))
        most = moved + normal_quantile(level) * float(np.hypot(error, added))
        power = lambda margin: normal_tail((most - margin) / error)  # noqa: E731
    tenths = next((t for t in range(10, 500) if power(t / 1000) >= CHANCE), 500)
    return max(LEAST_POINTS, tenths / 10)


def look(shop: Shop, peer: str, points: float, rows: str) -> None:
    """Write down, on disk when this returns, that labels are about to be opened: of which rows, and for what."""
    given = shop.given
    now = machine(given.threads)
    said: dict[str, Any] = {"set": shop.name, "seed": shop.seed, "peer": peer, "quick": given.quick}
    said |= {"artifact": shop.digest, "rows": rows, "margin": points, "commit": now.commit, "date": now.date}
    given.results.mkdir(parents=True, exist_ok=True)
    with locked(given.results / LOOKS) as file:
        data = os.pread(file, os.fstat(file).st_size, 0)
        os.ftruncate(file, data.rfind(b"\n") + 1)  # a line that a kill tore: nothing was opened after it
        append(file, (json.dumps(said) + "\n").encode())


def certified(shop: Shop, peer: str, said: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """The peer against the teacher: registered, then tested on the certify rows."""
    task, level = shop.task, (1 - CONFIDENCE) / 2
    targets = task.targets(shop.data.dev.label or ())
    dev = Pairs(task, task.outcomes(shop.said["dev"], targets), task.outcomes(said["dev"], targets))
    points = margin_of(task, dev, len(shop.data.certify), level)
    if peer == "netweight":
        points = Certificate.from_json((shop.artifact / CERTIFICATE).read_bytes()).registration.max_drop
    print(f"{shop.name} seed {shop.seed}: {peer}: margin {points:g} points, fixed from dev", flush=True)
    registration = register(
        Candidate("teacher", shop.teacher.digest),
        [Candidate(peer, "")],
        task,
        shop.data.certify,
        max_drop=points,
        confidence=CONFIDENCE,
        seed=shop.seed,
    )
    look(shop, peer, points, registration.fingerprint)
    mine, base = (Answers(s, task.confidence(s)) for s in (said["test"], shop.said["test"]))
    certificate, outcomes = certify(registration, shop.data.certify, base, {peer: mine})
    final = certificate.final
    print(
        f"  {certificate.verdict}: drop {100 * final.drop.value:.2f}, at most {100 * final.drop.high:.2f}", flush=True
    )
    return {
        "verdict": certificate.verdict,
        "metric": task.to_dict()["metric"],
        "rows": len(shop.data.certify),
        "margin": points,
        "level": level,
        "power": certificate.power,
        "reference": certificate.reference.value,
        "quality": asdict(final.quality),
        "drop": asdict(final.drop),
        "lost": final.lost,
        "gained": final.gained,
        "agreement": task.agreement(outcomes.candidates[peer], outcomes.reference),
        "dev": {"reference": float(task.quality(dev.reference)), "quality": float(task.quality(dev.candidate))},
    }


def measured(shop: Shop, peer: str) -> dict[str, Any]:
    """Train, certify, time."""
    one = Peer(peer, shop)
    made = one.train()
    if peer == "netweight":
        made["seconds"] = shop.seconds
        manifest = read_manifest(shop.artifact)
        made["tiers"] = [tier.name for tier in manifest.tiers]
        points = json.loads(read_file(shop.artifact, manifest, MEASUREMENTS))["candidates"]
        made["points"] = {point["name"]: point["quality"] for point in points}
    found: dict[str, Any] = {"made": made, "certificate": certified(shop, peer, one.answers())}
    ours = Peer("netweight", shop)
    ours.train()
    served = {name: p.served() for name, p in {"netweight": ours, peer: one}.items()}
    try:
        found["timing"] = interleaved(served, trial=shop.given.quick)
    except RuntimeError as problem:
        raise Failed(f"serve: {problem}") from None
    finally:
        for process in served.values():
            process.close()
    return found


def cell(name: str, peer: str, seed: int, given: Given, shops: dict[tuple[str, int], Shop]) -> None:
    """One cell, unless it is there."""
    path = given.results / f"{name}--{peer}--seed{seed}{'.trial' if given.quick else ''}.json"
    if path.exists() and not given.again:
        return
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    shop = shops.get((name, seed)) or Shop(name, seed, given)
    shops[name, seed] = shop
    found: dict[str, Any] = {"set": name, "peer": peer, "seed": seed, "quick": given.quick}
    found |= {"artifact": shop.digest, "machine": asdict(machine(given.threads))}
    try:
        found |= measured(shop, peer)
    except Failed as problem:
        found["error"] = str(problem).replace(str(given.work), "WORK").replace(str(given.envs), "ENVS")
        print(f"{name} seed {seed}: {peer} failed: {found['error']}", flush=True)
        if "timing" in held:
            print(f"  {path.name} keeps what was measured before.", flush=True)
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def main() -> None:
    """Every cell that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", action="append", help=f"folder of --data; default: {', '.join(SETS)}")
    parser.add_argument("--peer", action="append", choices=PEERS)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--envs", type=Path, help="environments of peers; default: WORK/env")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cells")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--limit", default="30m", help="time limit of a Netweight job that must be made")
    parser.add_argument("--effort", default="quick", help="of such a job; candidates in its cell name what was tried")
    parser.add_argument("--hours", type=float, default=3.0, help="after which a peer's training is stopped")
    parser.add_argument("--quick", action="store_true", help="peers train for a moment: to see whether they run")
    parser.add_argument("--again", action="store_true", help="measure cells that are there once more")
    words = vars(parser.parse_args())
    sets, peers, seeds = words.pop("set") or SETS, words.pop("peer") or PEERS, words.pop("seed") or SEEDS
    words["work"] = words["work"].absolute()
    given = Given(**words | {"envs": (words["envs"] or words["work"] / "env").absolute()})
    shops: dict[tuple[str, int], Shop] = {}
    for seed in seeds:
        for name in sets:
            for peer in peers:
                cell(name, peer, seed, given, shops)


if __name__ == "__main__":
    main()
