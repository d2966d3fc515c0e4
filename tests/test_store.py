"""The run store: what was finished stays finished, and nobody works on another's folder."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.answers import Answers
from netweight.data import Columns, Rows
from netweight.errors import DataError, StoreError
from netweight.pipeline import _lines
from netweight.store import DEV, JOURNAL, LOOKS, Store, rows_of, store_of

JOB = {"data": "abc", "model": "starter", "seed": 0, "task": {"labels": ["a", "b"]}}


def test_what_was_put_is_there_next_time(tmp_path: Path) -> None:
    with Store(tmp_path / "a.run", JOB) as store:
        store.put("point x", {"bytes": 3, "name": "größe 尺寸"})
        store.put("point x", {"bytes": 4})
        assert store.get("point x") == {"bytes": 4}
    with Store(tmp_path / "a.run", JOB) as store:
        assert store.get("point x") == {"bytes": 4}
        assert store.get("point y") is None
        assert store.job == JOB
    with Store(tmp_path / "a.run", None) as store:
        assert store.job == JOB


def test_values_are_those_that_a_restart_would_read(tmp_path: Path) -> None:
    with Store(tmp_path, JOB) as store:
        store.put("x", {"pair": (1, 2)})
        assert store.get("x") == {"pair": [1, 2]}


def test_work_of_one_kind_is_held_by_name(tmp_path: Path) -> None:
    with Store(tmp_path, JOB) as store:
        for key, value in (("point b c", 1), ("points", 2), ("point a", 3), ("point gone", 4), ("the point a", 5)):
            store.put(key, value)
        store.put("point gone", None)
        assert list(store.held("point").items()) == [("b c", 1), ("a", 3)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_torn_last_line_is_forgotten(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("torn")
    with Store(folder, JOB) as store:
        store.put("first", 1)
        whole = (folder / JOURNAL).stat().st_size
        store.put("second", {"some": "thing"})
    full = (folder / JOURNAL).read_bytes()
    kept = data.draw(st.integers(whole, len(full)))
    (folder / JOURNAL).write_bytes(full[:kept])
    with Store(folder, JOB) as store:
        assert store.get("first") == 1
        assert store.get("second") == ({"some": "thing"} if kept == len(full) else None)
        store.put("third", 3)
    with Store(folder, JOB) as store:
        assert (store.get("first"), store.get("third")) == (1, 3)


def test_a_store_cut_off_in_its_very_first_line_starts_over(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"key": "jo')
    with Store(tmp_path, JOB) as store:
        assert store.job == JOB


def test_another_job_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    Store(tmp_path, JOB).close()
    with pytest.raises(
        StoreError, match=r"another job \(model: 'starter' there, 'other' now; seed: 0 there, 7 now\)\. .* delete it\.$"
    ):
        Store(tmp_path, JOB | {"model": "other", "seed": 7})
    with pytest.raises(StoreError, match=r"or delete it\. New rows need an --out of their own\.$"):
        Store(tmp_path, JOB | {"data": "def"})
    with pytest.raises(StoreError, match=r"or delete it\.$"):
        Store(tmp_path, JOB | {"data": "def", "seed": 7})
    Store(tmp_path, JOB).close()  # the refusal left the lock and the journal alone
    Store(tmp_path / "folder", JOB | {"model": "base/"}).close()
    Store(tmp_path / "folder", JOB | {"model": "base"}).close()  # it is one folder
    with pytest.raises(StoreError, match=r"another job \(model: 'base/' there, 'other' now\)"):
        Store(tmp_path / "folder", JOB | {"model": "other"})


def test_long_values_of_another_job_are_shortened_and_what_differs_in_them_named(tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(1000)]
    Store(tmp_path, {"data": "0" * 64, "task": {"labels": labels, "metric": "macro-f1"}}).close()
    with pytest.raises(StoreError, match=r"another job \(task metric: 'macro-f1' there, 'accuracy' now\)\. Choose"):
        Store(tmp_path, {"data": "0" * 64, "task": {"labels": labels, "metric": "accuracy"}})
    with pytest.raises(StoreError, match=r"'000000.*\.\.\..*000000' there, '111111.*\.\.\..*111111' now") as refused:
        Store(tmp_path, {"data": "1" * 64, "task": {"labels": ["x"] * 1000, "metric": "macro-f1"}})
    assert len(str(refused.value)) < len(str(tmp_path)) + 400


def test_a_folder_that_holds_no_job_has_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no run store"):
        Store(tmp_path / "none.run", None)
    assert not (tmp_path / "none.run").exists()


@pytest.mark.parametrize("line", [b"not json", b"[]", b'"text"', b"{}", b'{"key": "x"}', b"\xff\xfe", b"3"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    with Store(tmp_path, JOB) as store:
        store.put("x", 1)
    whole = (tmp_path / JOURNAL).read_bytes().splitlines()
    (tmp_path / JOURNAL).write_bytes(b"\n".join([whole[0], line, whole[1]]) + b"\n")
    with pytest.raises(StoreError, match=r"line 2 of .*journal.jsonl is damaged; to start over, delete"):
        Store(tmp_path, JOB)


def test_who_starts_over_is_told_to_keep_the_looks_and_may(tmp_path: Path) -> None:
    with Store(tmp_path, JOB) as store:
        store.write(LOOKS, b"{}\n")
        kept = rf"delete {tmp_path}, but keep its looks\.jsonl: looks at certify are counted there\.$"
        with pytest.raises(StoreError, match=kept):
            store.read("x.bin")
        with pytest.raises(StoreError, match=kept):
            store.read_arrays("x")
    with pytest.raises(StoreError, match=r"delete it, but keep its looks\.jsonl: .* there\.$"):
        Store(tmp_path, JOB | {"seed": 7})
    (tmp_path / JOURNAL).write_bytes(b"{}\n")
    with pytest.raises(StoreError, match=kept):
        Store(tmp_path, JOB)
    (tmp_path / JOURNAL).unlink()
    with Store(tmp_path, JOB | {"seed": 7}) as store:
        assert store.job["seed"] == 7
        assert store.read(LOOKS) == b"{}\n"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from netweight.store import Store\n"
        "store = Store(Path(sys.argv[1]), None); print('open', flush=True); sys.stdin.read()"
    )
    Store(tmp_path, JOB).close()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="another process works in"):
            Store(tmp_path, JOB)
        other.kill()  # the lock goes with the process, however it ends
    Store(tmp_path, JOB).close()


def test_a_file_system_without_locks_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", lockless)
    without = r"lies on a file system without locks \(No locks available\)"
    with pytest.raises(StoreError, match=rf"a\.run {without}; choose another output\.$"):
        Store(tmp_path / "a.run", JOB)
    with pytest.raises(StoreError, match=rf"the cache .*said\.jsonl {without}; name one elsewhere\.$"):
        Answers(tmp_path / "said.jsonl", 8)


@pytest.mark.parametrize("pair", [None, ("", "b", "\\N")])
def test_dev_rows_come_back_as_they_were_whatever_they_say(tmp_path: Path, pair: tuple[str, ...] | None) -> None:
    rows = Rows(("good", "", "NULL"), ("a", "b", "a"), pair)
    with Store(store_of(tmp_path / "a.nw"), JOB) as store:
        store.write(DEV, _lines(rows))
    found = rows_of(tmp_path / "a.nw", None, Columns())
    assert found.rows == rows
    assert not found.note


LINE = b'{"text": "good", "label": "a"}\n'


@pytest.mark.parametrize(
    "data", [b"", b"3\n", b"{}\n", b"\xff\n", LINE[:-9], LINE + b'{"text": "bad"}\n', b'{"text": 3}\n']
)
def test_dev_rows_that_are_damaged(tmp_path: Path, data: bytes) -> None:
    with Store(store_of(tmp_path / "a.nw"), JOB) as store:
        store.write(DEV, data)
    with pytest.raises(
        DataError, match=r"dev\.jsonl is empty or damaged; the same `netweight optimize` writes it anew"
    ):
        rows_of(tmp_path / "a.nw", None, Columns())


def test_files_and_arrays(tmp_path: Path) -> None:
    with Store(tmp_path, JOB) as store:
        store.write("points/x.bin", b"one")
        store.write("points/x.bin", b"two")
        assert store.read("points/x.bin") == b"two"
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        store.write_arrays("points/x", {"logits": values.T})
        assert (store.read_arrays("points/x")["logits"] == values.T).all()
        with pytest.raises(StoreError, match=r"points/y.bin is missing; to start over, delete"):
            store.read("points/y.bin")
        with pytest.raises(StoreError, match=r"y.safetensors is missing or damaged"):
            store.read_arrays("y")
        (tmp_path / "points" / "x.safetensors").write_bytes(b"damaged")
        with pytest.raises(StoreError, match=r"x.safetensors is missing or damaged"):
            store.read_arrays("points/x")
        store.model_folder("m").mkdir(parents=True)
        store.discard("m")
        store.discard("m")
        assert not store.model_folder("m").exists()


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Store(tmp_path, JOB) as store:
        store.write("x.bin", b"old")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match="No space left"):
                store.write("x.bin", b"new")
        assert store.read("x.bin") == b"old"
        assert sorted(p.name for p in tmp_path.iterdir()) == [JOURNAL, "x.bin"]


def test_a_line_is_on_disk_when_put_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with Store(tmp_path, JOB) as store:
        monkeypatch.setattr("os.fsync", synced.append)
        store.put("x", 1)
        assert len(synced) == 1
        assert (tmp_path / JOURNAL).read_bytes().endswith(b'{"key": "x", "value": 1}\n')


def test_what_killed_processes_had_begun_is_removed(tmp_path: Path) -> None:
    Store(tmp_path, JOB).close()
    for name in ("points/.x.bin.1-00000000.part", "work/fit-1.new", "work/outputs-1.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    Store(tmp_path, JOB).close()
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [JOURNAL, "outputs-1.safetensors"]
