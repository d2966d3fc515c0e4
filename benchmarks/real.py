"""Run a whole job on a real table and keep what it printed, for `scripts/results.py`:

    .venv/bin/python benchmarks/real.py banking77 FOLDER --seed 0 [--work DIR] [--limit 30m] [--metric NAME]
                                                        [--effort quick] [--minimise cost]

FOLDER holds train.csv.gz, dev.csv.gz and test.csv.gz with the columns text and label; train and dev optimize, test
certifies. Writes benchmarks/results/NAME-seedS.json (NAME-EFFORT-seedS.json with another effort than quick,
NAME-size-seedS.json where bytes are minimised): wall seconds, what `inspect` and `explain` say of the artifact, and
what `bench` says of it on the test rows beside the teacher, ONNX Runtime's dynamic int8 and OpenVINO with NNCF's int8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NETWEIGHT = [sys.executable, "-c", "from netweight.cli import main; main()"]


def main() -> None:
    """Optimize, inspect, bench."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--limit", default="30m")
    parser.add_argument("--metric")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--minimise", default="cost")
    given = parser.parse_args()
    unusual = [word for word in (given.effort, given.minimise) if word not in ("quick", "cost")]
    called = "-".join((given.name, *unusual))
    table = {name: str(given.folder / f"{name}.csv.gz") for name in ("train", "dev", "test")}
    out = given.work / f"{called}-seed{given.seed}.nw"
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = ["--text", "text", "--label", "label"]
    words = ["optimize", table["train"], "--dev", table["dev"], "--certify", table["test"], *columns]
    words += ["--out", str(out), "--seed", given.seed, "--time-limit", given.limit, "--effort", given.effort]
    words += ["--minimise", given.minimise]
    words += ["--metric", given.metric] if given.metric else []
    resumed = out.with_name(f"{out.name}.run").exists()
    began = time.monotonic()
    subprocess.run([*NETWEIGHT, *words], check=True)
    # A resumed job's seconds would say nothing; `bench.py`, which makes the same job, may have counted them.
    counted = out.with_suffix(".peers") / "seconds.json"
    seconds = round(time.monotonic() - began)
    if resumed:
        seconds = json.loads(counted.read_text(encoding="utf-8")) if counted.exists() else None
    against = [word for name in ("teacher", "onnx-int8", "openvino-int8") for word in ("--against", name)]
    found = {"name": given.name, "seed": int(given.seed), "seconds": seconds}
    for key, command in (
        ("inspect", ["inspect", str(out), "--json"]),
        ("explain", ["explain", str(out), "--json"]),
        ("bench", ["bench", str(out), "--input", table["test"], *columns, *against, "--json"]),
    ):
        said = subprocess.run([*NETWEIGHT, *command], check=True, capture_output=True, text=True).stdout
        found[key] = json.loads(said)
    journal = out.with_name(f"{out.name}.run") / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    found["costs"] = next(line["value"] for line in reversed(lines) if line["key"].startswith("costs"))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{called}-seed{given.seed}.json"
    if seconds is None and path.exists():
        found["seconds"] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
