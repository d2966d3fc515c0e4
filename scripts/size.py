"""Lines per file, held to the budget: median 150, no file over 500, no function body over 60 lines."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

FILE, MEDIAN, FUNCTION = 500, 150, 60
SOURCE = Path(__file__).resolve().parents[1] / "src"


def main() -> int:
    """Print the table; 1 where the budget is not held."""
    sizes: dict[Path, int] = {}
    faults: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(SOURCE)
        sizes[name] = len(text.splitlines())
        if sizes[name] > FILE:
            faults.append(f"{name} has {sizes[name]} lines; {FILE} are allowed")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                body = (node.end_lineno or 0) - first.lineno + 1
                if body > FUNCTION:
                    faults.append(f"{name}: {node.name} has {body} lines of body; {FUNCTION} are allowed")
    for name, lines in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{lines:5}  {name}")
    middle = statistics.median(sizes.values())
    print(f"{sum(sizes.values()):5}  in {len(sizes)} files, median {middle:g}")
    if middle > MEDIAN:
        faults.append(f"the median file has {middle:g} lines; {MEDIAN} are allowed")
    for fault in faults:
        print(f"over budget: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
