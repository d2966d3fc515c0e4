"""Write docs/parallel-techniques.md: which technique works under which run, found out by trying (a few minutes)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_parallel_techniques import PAGE, table


def main() -> None:
    """Try them all."""
    PAGE.write_text(table(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
