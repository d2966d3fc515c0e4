"""Times an artifact's static tier beside the model2vec classifier of `model2vec_peer.py`, in turn, on the same texts.

The two live in different environments, so each runs in a process of its own and answers when asked; rounds are
interleaved, each at its best batch size, tokenization included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

from netweight import artifact, load
from netweight.data import Columns, read
from netweight.engine import Engine
from netweight.engine.cascade import tier_engine

BATCHES = (32, 128, 512, 1024)


def alone(folder: Path) -> Engine:
    """The first tier by itself."""
    manifest, whole = artifact.read_manifest(folder), load(folder)
    tier = manifest.tiers[0]
    runs = tier_engine(tier, artifact.read_file(folder, manifest, tier.file), manifest.pad, 1)
    return Engine(whole.task, whole.encoder, [(tier, runs)], tier.name)


def main() -> None:
    """Print accuracy and both speeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("test")
    parser.add_argument("--peer", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = read(given.test, Columns("text", "label")).rows
    engine = alone(given.artifact)
    right = sum(p.label == wanted for p, wanted in zip(engine.predict(rows.text), rows.label or (), strict=True))
    print(f"{engine.tiers[0].name} alone: accuracy {right / len(rows):.4f} on {len(rows)} rows")
    script = Path(__file__).with_name("model2vec_peer.py")
    peer = subprocess.Popen(
        [given.peer, str(script), given.test, given.test, "--serve", given.folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert peer.stdin
    assert peer.stdout
    while not (line := peer.stdout.readline()).startswith("ready"):
        pass
    print(f"model2vec: accuracy {float(line.split()[1]):.4f}")

    def theirs(batch: int) -> float:
        print(batch, file=peer.stdin, flush=True)
        return len(rows) / float(peer.stdout.readline())  # type: ignore[union-attr]

    def ours(batch: int) -> float:
        began = time.perf_counter()
        engine.predict(rows.text, batch=batch)
        return len(rows) / (time.perf_counter() - began)

    best = [max(BATCHES, key=lambda b, f=f: max(f(b), f(b))) for f in (ours, theirs)]
    pairs = [(ours(best[0]), theirs(best[1])) for _ in range(given.rounds)]
    peer.stdin.close()
    peer.wait(timeout=30)
    for name, batch, found in (("ours", best[0], [p[0] for p in pairs]), ("model2vec", best[1], [p[1] for p in pairs])):
        print(
            f"{name}: {statistics.median(found):,.0f} texts/s ({min(found):,.0f} to {max(found):,.0f}), batch {batch}"
        )
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"ratio, median over rounds: {ratio:.2f}")
    kept = {"accuracy": right / len(rows), "peer_accuracy": float(line.split()[1]), "ratio": ratio}
    path = Path(__file__).parent / "results" / "static_tier.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
