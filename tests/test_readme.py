"""The README's code runs, its commands exist, and both languages show the same code."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

import netweight.model
from conftest import Shop, many_rows, tiny_base
from netweight.cli import app
from netweight.data import Rows

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def code(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def reviews(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerows([("review", "sentiment"), *zip(rows.text, rows.label or (), strict=True)])


@pytest.mark.usefixtures("quick")
def test_the_code_runs(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(netweight.model, "_folder", lambda name: shop.base)
    rows = many_rows(1300, seed=3)
    ends = {"reviews.csv": (0, 400), "dev.csv": (400, 600), "certify.csv": (600, 1000), "unlabelled.csv": (1000, 1300)}
    for name, (a, b) in ends.items():
        reviews(tmp_path / name, rows.take(range(a, b)))
    scope: dict[str, Any] = {}
    blocks = code(ENGLISH)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["engine"].predict(["great"])[0].label in ("good", "bad")
    assert scope["result"].certificate.verdict in ("certified", "not certified", "worse")


def test_the_code_of_the_techniques_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base(tmp_path / "base")
    monkeypatch.setattr(netweight.model, "_folder", lambda name: base)
    reviews(tmp_path / "reviews.csv", many_rows(600))
    (block,) = code((ROOT / "docs" / "techniques" / "README.md").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    exec(compile(block.replace("Static()", "Static(width=8, buckets=64, epochs=1)"), "README.md", "exec"), scope)
    assert 0.5 < scope["run"].quality(scope["model"]) <= 1
    assert 0 <= scope["run"].quality(scope["student"]) <= 1


def test_both_languages_show_the_same_code() -> None:
    without = [re.sub(r"#.*", "", block) for block in code(ENGLISH)]
    assert [re.sub(r"#.*", "", block) for block in code(CHINESE)] == without
    commands = re.compile(r"^    (?:netweight|make) [a-z]+", re.MULTILINE)
    assert commands.findall(CHINESE) == commands.findall(ENGLISH)
    tables = [re.findall(r"^\|.*\|$", text, re.MULTILINE)[1:] for text in (ENGLISH, CHINESE)]
    digits = [re.findall(r"\d+(?:[.,]\d+)*", "".join(lines)) for lines in tables]
    assert len(digits[0]) > 10
    assert digits[0] == digits[1], "the tables tell different numbers"


def test_every_command_that_it_shows_exists() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {group.name for group in app.registered_groups if group.name}
    shown = set(re.findall(r"^    netweight ([a-z]+)", ENGLISH, re.MULTILINE))
    assert shown
    assert shown <= names


def test_where_the_commands_are_is_said_before_they_are_shown() -> None:
    for text in (ENGLISH, CHINESE):
        said, shown = text.index("`source .venv/bin/activate`"), text.index("    netweight ")
        assert text.index("    make demo") < said < shown
    assert re.search(r"^BIN := \.venv/bin$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
