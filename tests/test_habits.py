"""What holds for the whole package: who imports whom, what serving needs, and what importing must not do."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import netweight
from conftest import Shop, many_rows, tiny_base, write_table
from netweight import measure, quiet
from netweight.job import Options

SOURCE = Path(netweight.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
# From left to right: a module imports only from its own group's left and from groups to the left.
GROUPS = (
    ("errors", "packing", "data", "task", "words", "encode", "features", "quiet", "connect"),
    (
        "layers",
        "network",
        "anatomy",
        "model",
        "quantizer",
        "scratch",
        "loss",
        "objectives",
        "matching",
        "answers",
        "llm",
        "seams",
        "reporter",
        "train",
        "track",
        "run",
        "techniques",
        "lower",
        "export",
    ),
    ("artifact", "engine", "signals", "convert", "measure", "certify", "report", "predict", "summary", "evaluate"),
    (
        "active",
        "store",
        "search",
        "space",
        "trials",
        "choose",
        "job",
        "baselines",
        "build",
        "ship",
        "pipeline",
        "bench",
        "explain",
        "litert",
        "deliver",
    ),
    ("monitor", "serve", "client", "cluster", "federate"),
    ("samples", "demo", "progress", "cli", "testing"),
)
ORDER = {name: i for i, name in enumerate(name for group in GROUPS for name in group)}
TRAINING, SERVING = GROUPS[1], GROUPS[2]
MODULES = 400  # that importing the package may load; most are numpy's and onnxruntime is not among them


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, nested ones included, those under TYPE_CHECKING not."""
    tree = ast.parse(source)
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_turns(source: str, name: str) -> list[str]:
    """Imports of other modules of the package that do not lie to the left of `name`, as NAME:LINE: text."""
    lines, found = source.splitlines(), []
    for line, full in imported(source, f"netweight.{name}"):
        parts = full.split(".")
        if parts[0] != "netweight" or len(parts) < 2 or parts[1] == name:
            continue
        if parts[1] not in ORDER or ORDER[parts[1]] >= ORDER[name]:
            found.append(f"{name}:{line}: {lines[line - 1].strip()}")
    return found


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path.read_text(encoding="utf-8")


def test_modules_import_only_from_their_left() -> None:
    offending = [line for name, source in sources() for line in wrong_turns(source, name)]
    assert not offending, "\n".join(offending)


def test_every_module_has_its_place() -> None:
    assert {name for name, _ in sources()} == set(ORDER)


def test_serving_does_not_import_training() -> None:
    offending = [
        f"{name}:{line}: {full}"
        for name, source in sources()
        if name in (*GROUPS[0], *SERVING)
        for line, full in imported(source, f"netweight.{name}")
        if full.split(".")[0] in ("torch", "transformers") or full.split(".")[1:2] in [[t] for t in TRAINING]
    ]
    assert not offending, "\n".join(offending)


def test_the_walk_sees_wrong_turns() -> None:
    source = (
        "from netweight.pipeline import run\n\ndef f():\n    import netweight.cli\n    from netweight import bench\n"
    )
    assert [turn.partition(": ")[0] for turn in wrong_turns(source, "task")] == ["task:1", "task:4", "task:5"]
    fine = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from netweight.cli import app\nimport numpy\n"
    assert not wrong_turns(fine, "task")
    assert not wrong_turns("from netweight.errors import OptionError\n", "task")


def test_no_module_reads_a_pickle_or_runs_foreign_code() -> None:
    for name, source in sources():
        for _, full in imported(source, f"netweight.{name}"):
            assert full.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"), name
        tree = ast.parse(source)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        told = {id(c.func) for c in calls if any(k.arg == "trust_remote_code" for k in c.keywords)}
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), name
                assert node.value.value is False, name
            # Where nothing is said, transformers asks on the terminal whether to run the code that a config names.
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config"):
                own = ast.unparse(node).startswith("nn.")  # torch's tables
                assert own or id(node) in told, f"{name}:{node.lineno}: say trust_remote_code=False"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), name


def test_a_container_has_as_many_cores_as_its_quota_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quiet, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    def found() -> int:
        (count,) = {quiet.cores(), measure.cores(), Options().threads}
        return count

    assert found() == 64
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in ((-1, 64), (250000, 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert found() == cores
    (tmp_path / "cpu" / "cpu.cfs_quota_us").unlink()
    for quota, cores in (("150000", 2), ("max", 64), ("1000", 1), ("9900000", 64)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert found() == cores


def test_cores_are_counted_in_one_place() -> None:
    count = re.compile(r"len\(os\.sched_getaffinity|cpu_count")
    assert {name for name, source in sources() if count.search(source)} == {"quiet"}


# --- in processes of their own ---

_BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "sklearn", "pandas", "scipy", "datasets", "onnx", "optuna",
                                  "pyarrow", "peft", "hypothesis", "pytest", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
_CONNECTIONS = """
import sys

def watch(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple) and given[1][0] not in ("127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"{event} to {given[1]}")
    if event == "socket.getaddrinfo" and given[0] not in ("127.0.0.1", "::1", "localhost", None):
        raise SystemExit(f"{event} of {given[0]}")

sys.addaudithook(watch)
"""


def python(code: str, *arguments: object, **env: str) -> str:
    """What a fresh interpreter prints; fails with its last words."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ORT_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, env=usual | env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_serving_works_without_what_training_needs(shop: Shop, tmp_path: Path) -> None:
    code = (
        _BLOCKED
        + """
import json
import netweight
import netweight.artifact, netweight.certify, netweight.engine, netweight.measure, netweight.predict
import netweight.report, netweight.summary
from netweight import summary
from netweight.predict import predict

folder, rows, out = sys.argv[1:]
texts = json.load(sys.stdin) if rows == "-" else [line.split("\\t")[0] for line in open(rows).read().splitlines()[1:]]
print(json.dumps([[p.label, p.confidence, p.tier] for p in netweight.load(folder, 1).predict(texts)]))
predict(folder, rows, out=out)
from pathlib import Path
summary.verify(Path(folder), rows)
summary.write_report(Path(folder), Path(out).with_name("report.html"), rows)
try:
    netweight.optimize
except netweight.NetweightError as problem:
    assert "pip install '.[train]'" in str(problem), problem
else:
    raise AssertionError("training worked without torch?")
assert not {"torch", "transformers", "pandas"} & set(sys.modules)
"""
    )
    table = write_table(tmp_path / "certify.tsv", shop.certify)
    found = json.loads(python(code, shop.folder, table, tmp_path / "out.tsv"))
    here = netweight.load(shop.folder, 1).predict(shop.certify.text)
    assert [label for label, _, _ in found] == [p.label for p in here]  # type: ignore[union-attr]
    assert [tier for _, _, tier in found] == [p.tier for p in here]
    assert [c for _, c, _ in found] == pytest.approx([p.confidence for p in here], abs=1e-5)  # type: ignore[union-attr]
    assert {tier for _, _, tier in found} <= {tier.name for tier in netweight.load(shop.folder, 1).tiers}


def test_without_an_extra_every_command_names_it_in_a_sentence(tmp_path: Path) -> None:
    code = (
        _BLOCKED.replace('"torch", ', '"torch", "starlette", ')
        + """
import contextlib, io, json
from netweight.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv, said = ["netweight", *words], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            print(json.dumps([words[0], end.code, said.getvalue()]))
"""
    )
    keys = str(tmp_path / "keys")
    federated = (
        ["server", "--out", "made", "--keys", keys],
        ["optimize", "--out", "made.nw", "--keys", keys, "--dev", "dev.csv", "--certify", "certify.csv"],
        ["client", "rows.csv", "--name", "shop", "--keys", keys, "--folder", "shop"],
    )
    commands = (
        ["optimize", "rows.csv", "--text", "text", "--label", "label", "--out", "made.nw"],
        *(["demo"], ["bench", "made.nw"], ["explain", "made.nw"], ["plan"], ["keys", keys]),
        *(["federate", *words] for words in federated),
    )
    found = [json.loads(line) for line in python(code, json.dumps(commands)).splitlines()]
    assert [name for name, _, _ in found] == [words[0] for words in commands]
    for name, status, said in found:
        module, extra = ("starlette", "serve") if name == "keys" else (r"\w+", "train")
        assert status == 1
        assert re.fullmatch(
            rf"netweight: this command \(No module named '{module}'\) needs an extra; in a clone of Netweight: "
            rf"pip install '\.\[{extra}\]'\n",
            said,
        ), (name, said)


def test_the_watch_sees_a_connection() -> None:
    code = _CONNECTIONS + "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    with pytest.raises(AssertionError, match="socket"):
        python(code)
    python(_CONNECTIONS + "import socket; s = socket.create_server(('127.0.0.1', 0)); "
           "socket.create_connection(s.getsockname())")  # fmt: skip


def test_serving_phones_nobody(shop: Shop) -> None:
    code = (
        _CONNECTIONS
        + """
import netweight
from netweight.engine.onnx import OpenvinoEngine
from netweight import summary
from pathlib import Path
print(len(netweight.load(sys.argv[1]).predict(["great zip"])))
summary.summary(Path(sys.argv[1]))
"""
    )
    assert python(code, shop.folder) == "1\n"


def test_engines_start_no_telemetry(shop: Shop, tmp_path: Path) -> None:
    """What C++ sends, no audit hook sees; but ONNX Runtime first makes a file in which it keeps what it would send."""
    code = """
import sys
import netweight
from netweight.export import export
from netweight.engine.onnx import session
sys.path.append(sys.argv[2])
from conftest import tiny_model
if sys.argv[1] == "loud":
    import onnxruntime
session(export(tiny_model()).plain, 1)
"""
    for how in ("quiet", "loud"):
        home = tmp_path / how
        python(code, how, ROOT / "tests", HOME=str(home), XDG_CACHE_HOME=str(home), HF_HUB_OFFLINE="1")
        kept = [f for f in home.rglob("*") if "onnxruntime" in f.name]
        if how == "quiet":
            assert not kept
        elif not kept:
            pytest.skip("this release of ONNX Runtime has no telemetry here")


@pytest.mark.parametrize("name", ["openvino", "nncf"])
def test_openvino_and_nncf_make_no_id_and_send_nothing(name: str, tmp_path: Path) -> None:
    """They ask for consent where they are imported, NNCF not in pytest: so in a process of its own."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed here")
    code = """
import os, sys
from netweight import quiet
quiet.openvino()
from openvino.tools import ovc
assert not getattr(ovc.telemetry, "consent", False), "this one sends what it is given"
if sys.argv[1] == "nncf":
    quiet.nncf()
    from nncf.telemetry import decorator, wrapper
    assert not isinstance(decorator.telemetry, wrapper.NNCFTelemetry)
assert "pytest" not in sys.modules
assert (os.environ["CI"], os.environ.get("NNCF_CI")) == ("", None), "told during the import alone"
"""
    python(code, name, HOME=str(tmp_path), CI="")
    assert not (tmp_path / "intel").exists(), "an id of this machine, for Google Analytics"


def test_openvino_and_nncf_are_imported_in_one_place() -> None:
    for name, source in sources():
        for line, full in imported(source, f"netweight.{name}"):
            assert full.split(".")[0] not in ("openvino", "nncf") or name == "quiet", f"{name}:{line}: {full}"


@pytest.mark.slow
def test_training_phones_nobody(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    table = write_table(tmp_path / "rows.tsv", many_rows(800))
    code = (
        _CONNECTIONS
        + """
from netweight import optimize
result = optimize(sys.argv[2], out=sys.argv[3], model=sys.argv[1], max_drop=8.0, threads=1)
print(result.certificate.verdict)
"""
    )
    python(code, base, table, tmp_path / "made.nw", OMP_NUM_THREADS="1")


_STATE = """
import logging, os, random, signal, sys
{first}
def state():
    import numpy as np
    found = dict(os.environ), list(logging.getLogger().handlers), logging.getLogger().level
    found += signal.getsignal(signal.SIGINT), os.getcwd(), sys.excepthook, sys.stdout, random.getstate()
    found += np.geterr(), [int(x) for x in np.random.get_state()[1]] + [int(np.random.get_state()[2])]
    if "torch" in sys.modules:
        import torch
        found += torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
        found += torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return found
import numpy
before = state()
{then}
after = state()
for i, (one, other) in enumerate(zip(before, after, strict=True)):
    assert one == other, (i, one, other)
print(len(sys.modules))
"""


def test_importing_the_package_changes_nothing() -> None:
    count = int(python(_STATE.format(first="", then="import netweight; assert 'torch' not in sys.modules")))
    assert count < MODULES


@pytest.mark.slow
def test_importing_training_changes_nothing_more_than_its_libraries_do() -> None:
    first = "import torch, transformers, onnx, onnxscript, safetensors, sklearn.linear_model, torch.onnx"
    then = "import netweight.pipeline, netweight.bench, netweight.cli, netweight.testing, netweight.demo"
    python(_STATE.format(first=first, then=then + "; assert 'pytest' not in sys.modules"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split(";")[0].strip().split("==") for line in lines if "==" in line)
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_the_lock_and_the_constraints_pin_the_same_versions() -> None:
    locked, constrained = pins("requirements.lock"), pins("constraints.txt")
    assert {"torch", "transformers", "onnxruntime", "openvino", "pytest"} <= set(locked)
    both = set(locked) & set(constrained)
    assert {name: locked[name] for name in both} == {name: constrained[name] for name in both}
    # What the lock has beyond the constraints is for other platforms.
    assert set(locked) - both <= {"cffi", "colorama", "httpx2-jsfetch", "pycparser", "setuptools"}


def contradicted(locked: dict[str, str], name: str) -> Iterator[str]:
    """What a package that is installed here wants, and the lock has in another version."""
    with suppress(PackageNotFoundError):
        for wanted in map(Requirement, requires(name) or ()):
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            version = locked.get(wanted.name.lower().replace("_", "-"))
            if applies and version and not wanted.specifier.contains(version, prereleases=True):
                yield f"{name} wants {wanted}"


def test_the_lock_is_installed_without_asking_its_packages_what_they_want_where_they_contradict_it() -> None:
    locked = pins("requirements.lock")
    against = [text for name in locked for text in contradicted(locked, name)]
    for page in ("README.md", "README.zh-CN.md"):
        (line,) = re.findall(r"uv pip install .*-r requirements\.lock", (ROOT / page).read_text(encoding="utf-8"))
        assert not against or "--no-deps" in line, (page, against)
