"""The folder that ships: every damaged byte is noticed, and saving is all or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from conftest import Shop, tiny_encoder
from netweight import artifact, load
from netweight.artifact import MANIFEST, TOKENIZER, Manifest, Tier, check, read_manifest, save, tier_file
from netweight.errors import ArtifactError, CorruptArtifact, NetweightError
from netweight.task import Classify

STATIC, ONNX = tier_file(0, "static", "static"), tier_file(1, "half-int8", "openvino")


def contents_of(text: str = "new") -> dict[str, bytes]:
    return {
        TOKENIZER: tiny_encoder().definition.encode(),
        STATIC: b"table " + text.encode(),
        ONNX: b"graph",
        "certificate.json": b"{}",
        "report.html": b"<html></html>",
    }


def manifest_of() -> Manifest:
    tiers = (Tier("static", "static", STATIC, {"buckets": 0}, 1.5, 0.75), Tier("half-int8", "openvino", ONNX))
    return Manifest(Classify(("bad", "gut ✓")), 32, 0, tiers, {"seed": 1})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    save(tmp_path / "a.nw", manifest_of(), contents_of())
    return tmp_path / "a.nw"


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(stored)
    stored.pop("sha256", None)
    (folder / MANIFEST).write_bytes(artifact.sealed(stored))


# --- saving ---


def test_what_is_saved_is_read(made: Path) -> None:
    manifest = check(made)
    assert manifest == artifact.hashed(manifest_of(), contents_of())
    assert sorted(manifest.files) == sorted(contents_of())
    for name, data in contents_of().items():
        assert artifact.read_file(made, manifest, name) == data
    sizes = [(made / name).stat().st_size for name in (MANIFEST, TOKENIZER, STATIC, ONNX)]
    assert artifact.size(made, manifest) == sum(sizes)
    assert STATIC == "tiers/0-static.safetensors"
    assert ONNX == "tiers/1-half-int8.onnx"


def test_saving_again_replaces_and_leaves_nothing_behind(made: Path) -> None:
    fewer = {name: data for name, data in contents_of("other").items() if name != "report.html"}
    save(made, manifest_of(), fewer)
    assert check(made).files == artifact.hashed(manifest_of(), fewer).files
    assert not (made / "report.html").exists()
    assert [p.name for p in made.parent.iterdir()] == ["a.nw"]


def test_saving_again_without_an_exchange_of_names(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_exchanged", lambda one, other: False)
    test_saving_again_replaces_and_leaves_nothing_behind(made)


def test_what_cannot_be_put_in_place_leaves_the_old_one_there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_exchanged", lambda one, other: False)
    rename, before = Path.rename, check(made)

    def stale(self: Path, target: Path) -> Path:
        if target == made and self.name != "replaced":
            raise OSError(116, "Stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        save(made, manifest_of(), {**contents_of(), "report.html": b"other"})
    assert check(made) == before
    assert [p.name for p in made.parent.iterdir()] == ["a.nw"]


def test_nothing_but_an_artifact_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    for name in ("holiday", "file"):
        with pytest.raises(ArtifactError, match=f"{name} exists and is not an artifact; choose another folder"):
            save(tmp_path / name, manifest_of(), contents_of())
    assert (tmp_path / "holiday" / "photo.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"dear"
    monkeypatch.chdir(tmp_path / "holiday")
    for nameless in (".", ".."):
        with pytest.raises(ArtifactError, match=r"the folder '\.+' has no name of its own; name a new one"):
            save(Path(nameless), manifest_of(), contents_of())
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", manifest_of(), contents_of())
    # A link is exchanged like a folder, and nothing of it stays.
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save(tmp_path / "link", manifest_of(), contents_of())
    assert not list(tmp_path.glob(".link*"))
    assert check(tmp_path / "link") == check(tmp_path / "empty")
    save(tmp_path / "some" / "where" / "else", manifest_of(), contents_of())
    assert check(tmp_path / "empty") == check(tmp_path / "some" / "where" / "else")


@pytest.mark.parametrize("text", [b'{"name": "Webshop", "icons": []}', b"{}", b""])
def test_a_file_of_the_name_makes_no_artifact_and_a_damaged_one_is_left_to_its_owner(made: Path, text: bytes) -> None:
    for manifest in (text, (made / MANIFEST).read_bytes().replace(b"bad", b"sad")):
        (made / MANIFEST).write_bytes(manifest)
        with pytest.raises(ArtifactError, match=r"a\.nw exists and is not an artifact; .* this one by hand\. .*manif"):
            save(made, manifest_of(), contents_of("other"))
        assert (made / STATIC).read_bytes() == b"table new"


@pytest.mark.parametrize("name", ["keys.jsonl", "tiers/rows.log", "my texts/rows.csv", "link"])
def test_files_of_others_in_an_artifact_are_not_deleted_with_it(made: Path, name: str) -> None:
    (made / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (made / name).symlink_to(made.parent)
    else:
        (made / name).write_bytes(b"dear")
    with pytest.raises(ArtifactError, match=rf"a\.nw/{name} is no file of the artifact that .* move it away"):
        save(made, manifest_of(), contents_of("other"))
    assert (made / name).exists()
    (made / name).unlink()
    (made / STATIC).write_bytes(b"damaged")  # what the manifest lists may be replaced, whatever has become of it
    (made / ONNX).unlink()
    save(made, manifest_of(), contents_of("other"))
    assert (made / STATIC).read_bytes() == b"table other"


def test_what_cannot_be_exchanged_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"link is a link to .*gone, which is not there; remove it, or choose"):
        artifact.writable(tmp_path / "link")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(
        ArtifactError, match=r"out is a mount point, .*; name a folder inside it, such as .*out/shop\.nw"
    ):
        artifact.writable(tmp_path / "out")
    artifact.writable(tmp_path / "out" / "shop.nw")
    save(tmp_path / "gone", manifest_of(), contents_of())
    artifact.writable(tmp_path / "link")


def test_a_failing_save_leaves_the_old_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = check(made)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(made, manifest_of(), contents_of("other"))
    assert check(made) == before
    assert [p.name for p in made.parent.iterdir()] == ["a.nw"]


def test_an_artifact_that_is_exchanged_while_it_is_read_is_read_anew(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, usual = shutil.copytree(shop.folder, tmp_path / "a.nw"), artifact.read_file
    before = read_manifest(folder)
    contents = {name: usual(folder, before, name) for name in before.files}
    contents[TOKENIZER] += b"\n"
    calls = []

    def exchanged(*given: Any) -> bytes:
        calls.append(given)
        if len(calls) == 1:
            save(folder, before, contents)
        return usual(*given)

    monkeypatch.setattr(artifact, "read_file", exchanged)
    assert load(folder).version == read_manifest(folder).digest[:12] != before.digest[:12]
    (folder / TOKENIZER).write_bytes(b"{}")
    with pytest.raises(CorruptArtifact, match=r"tokenizer\.json is damaged"):
        load(folder)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from netweight import artifact
from netweight.task import Classify

def contents_of(text):
    return {"tokenizer.json": text.encode(), "tiers/0-t.safetensors": text.encode(), "report.html": b"same"}

folder = Path(sys.argv[1])
manifest = artifact.Manifest(Classify(("a", "b")), 32, 0, (artifact.Tier("t", "static", "tiers/0-t.safetensors"),))
old, new = (artifact.hashed(manifest, contents_of(text)).files for text in ("old", "new"))
artifact.save(folder, manifest, contents_of("old"))
said = []
for kill_at in range(1000):
    child = os.fork()
    if child == 0:
        events = 0
        def counted(function):
            def call(*args, **options):
                global events
                for after in (False, True):
                    events += 1
                    if events > kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if not after:
                        found = function(*args, **options)
                return found
            return call
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (os, "open"),
                            (artifact, "_exchanged"), (Path, "open")):
            setattr(owner, name, counted(getattr(owner, name)))
        artifact.save(folder, manifest, contents_of("new"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    try:
        files = artifact.check(folder).files
        said.append("old" if files == old else "new" if files == new else "mixed")
    except Exception as problem:
        said.append(repr(problem))
    if status == 0:
        break
    artifact.save(folder, manifest, contents_of("old"))
print(json.dumps(said))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_old_one_or_the_new_one_is_there(made: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(made)], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert len(said) > 20
    assert set(said) == {"old", "new"}
    assert said == sorted(said, reverse=True), "once it is new, it stays new"


# --- damage ---


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_refused_with_the_name_of_its_file(made: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(contents_of())))
    whole = (made / name).read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    try:
        (made / name).write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
        with pytest.raises(CorruptArtifact, match=rf"{name} is damaged: its SHA-256 is .* Copy it again"):
            check(made)
        (made / name).write_bytes(whole[:at])
        with pytest.raises(CorruptArtifact, match=rf"{name} is damaged"):
            check(made)
    finally:
        (made / name).write_bytes(whole)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_manifest_is_refused(made: Path, data: st.DataObject) -> None:
    whole = (made / MANIFEST).read_bytes()
    at, new = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    cut = data.draw(st.booleans())
    assume(cut or whole[at] != new)
    try:
        (made / MANIFEST).write_bytes(whole[:at] if cut else whole[:at] + bytes([new]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match="manifest"):
            check(made)
    finally:
        (made / MANIFEST).write_bytes(whole)


@pytest.mark.parametrize("name", sorted(contents_of()))
def test_missing_files_and_links(made: Path, tmp_path: Path, name: str) -> None:
    (made / name).rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifact, match=rf"{name} is missing or no plain file"):
        check(made)
    (made / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifact, match=rf"{name} is missing or no plain file"):
        check(made)
    (made / name).unlink()
    (made / name).mkdir()
    with pytest.raises(CorruptArtifact, match=rf"{name} is missing or no plain file"):
        check(made)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "tiers/../../x", "a\\b", "", ".."])
def test_names_outside_the_folder_are_refused(made: Path, name: str) -> None:
    edited(made, lambda stored: stored["files"].update({name: "0" * 64}))
    with pytest.raises(CorruptArtifact, match="which lies outside the folder"):
        read_manifest(made)


def test_files_that_no_manifest_lists_are_never_read(made: Path) -> None:
    edited(made, lambda stored: stored["tiers"][0].update(file="../secret"))
    with pytest.raises(CorruptArtifact, match="lists no file '../secret'"):
        load(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(format=2), r"a\.nw has format 2; this version reads 1\. Update netweight\.$"),
        (
            lambda s: s["tiers"][0]["options"].update(rounds="even", bits=4),
            r"a\.nw has tiers with the options bits, rounds; this version knows buckets, .*\. Update netweight\.$",
        ),
    ],
)
def test_what_a_newer_version_wrote_is_neither_read_nor_replaced(
    made: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edited(made, change)
    for use in (load, artifact.writable):
        with pytest.raises(ArtifactError, match=said) as told:
            use(made)
        assert not isinstance(told.value, CorruptArtifact)
        assert "by hand" not in str(told.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["tiers"][0].update(shiny=True),
        lambda s: s["tiers"][0].pop("engine"),
        lambda s: s.pop("format"),
        lambda s: s.pop("task"),
        lambda s: s.update(task=[]),
        lambda s: s["task"].update(kind="rank"),
        lambda s: s["task"].update(labels=["one"]),
        lambda s: s["task"].update(labels=None),
        lambda s: s.update(tiers=[3]),
        lambda s: s.update(tiers=None),
        lambda s: s["tiers"][0].update(threshold="high"),
        lambda s: s["tiers"][0].update(file=None),
        lambda s: s["tiers"][0].update(options=None),
        lambda s: s["tiers"][0].update(options={"reads": 3}),
        lambda s: s["tiers"][0].update(options={"reads": [10**6, 1]}),
        lambda s: s["tiers"][0].update(options={"reads": [4.5, 1]}),
        lambda s: s["tiers"][0].update(options={"reads": [4, 4]}),
        lambda s: s.update(max_length="long"),
        lambda s: s.update(max_length=True),
        lambda s: s.update(pad=None),
        lambda s: s.update(pad=10**30),
        lambda s: s.update(pad=-1),
        lambda s: s["tiers"][0].update(temperature=10**400),
        lambda s: s.update(files=["tokenizer.json"]),
        lambda s: s["files"].update({"x": 3}),
        lambda s: s.update(provenance=3),
    ],
)
def test_manifests_of_the_wrong_shape_are_corrupt(made: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edited(made, change)
    with pytest.raises(CorruptArtifact, match=r"manifest.json cannot be read as a manifest"):
        load(made)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, "\xff", '"manifest"'])
def test_what_is_no_json_object_is_corrupt(made: Path, text: str) -> None:
    (made / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptArtifact, match=r"manifest.json cannot be read as a manifest"):
        load(made)


def test_a_huge_manifest_is_not_even_read(made: Path) -> None:
    with (made / MANIFEST).open("ab") as file:
        file.truncate(16 * 2**20 + 1)
    with pytest.raises(CorruptArtifact, match=r"manifest.json is larger than 16777216 bytes"):
        load(made)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="is no artifact: it has no manifest.json"):
            load(folder)


def test_a_manifest_without_tiers_cannot_answer(made: Path) -> None:
    edited(made, lambda stored: stored.update(tiers=[]))
    with pytest.raises(ArtifactError, match="has no tier; it cannot answer"):
        load(made)


def test_every_refusal_is_one_of_ours(made: Path) -> None:
    shutil.rmtree(made / "tiers")
    with pytest.raises(NetweightError):
        load(made)


# --- digest ---


def test_the_digest_covers_what_answers_and_nothing_else() -> None:
    base = artifact.hashed(manifest_of(), contents_of())
    same = [
        replace(base, provenance={"seed": 2}),
        artifact.hashed(manifest_of(), contents_of() | {"report.html": b"other", "certificate.json": b"other"}),
    ]
    other = [
        artifact.hashed(manifest_of(), contents_of("other")),
        artifact.hashed(manifest_of(), contents_of() | {TOKENIZER: b"other"}),
        replace(base, pad=1),
        replace(base, max_length=33),
        replace(base, task=Classify(("gut ✓", "bad"))),
        replace(base, tiers=(replace(base.tiers[0], threshold=0.76), base.tiers[1])),
        replace(base, tiers=(replace(base.tiers[0], temperature=1.6), base.tiers[1])),
        replace(base, tiers=(base.tiers[0], replace(base.tiers[1], before=0.5))),
        replace(base, tiers=base.tiers[::-1]),
    ]
    assert {m.digest for m in same} == {base.digest}
    assert len({m.digest for m in (base, *other)}) == 1 + len(other)
    assert all("before" not in tier for tier in base.to_dict()["tiers"]), "artifacts from before it keep their digest"


def test_what_a_killed_save_left_is_removed_by_the_next(made: Path) -> None:
    left = made.parent / f".{made.name}-saving-abcdefgh"
    other = made.parent / f".{made.name}-settings"
    for folder in (left, other):
        (folder / "tiers").mkdir(parents=True)
    linked = made.parent / f".{made.name}-saving-link"
    linked.symlink_to(other)
    save(made, manifest_of(), contents_of())
    assert not left.exists()
    assert (other / "tiers").exists()
    assert linked.is_symlink()


def test_a_save_that_is_still_going_on_is_left_alone(made: Path) -> None:
    going = made.parent / f".{made.name}-saving-abcdefgh"
    going.mkdir()
    held = os.open(going, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    save(made, manifest_of(), contents_of())
    assert going.exists()
    os.close(held)
    save(made, manifest_of(), contents_of())
    assert not going.exists()


def test_a_folder_of_tiers_that_is_a_link_is_refused(made: Path, tmp_path: Path) -> None:
    (made / "tiers").rename(tmp_path / "elsewhere")
    (made / "tiers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifact, match="tiers is a link to elsewhere; copy the artifact again, with its files"):
        check(made)
    with pytest.raises(CorruptArtifact, match="is a link to elsewhere"):
        load(made)


def test_the_artifact_itself_may_be_a_link(made: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(made)
    check(tmp_path / "current")
