"""What a large language model answered, kept on disk as soon as it is there."""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from netweight.data.files import append
from netweight.errors import StoreError


@dataclass(frozen=True)
class Answer:
    """A label, or None where the model abstained, and the tokens that were paid for it."""

    label: str | None
    tokens: int


_LINE = b'{"key": '  # how a line of the cache begins


class Answers:
    """Answers by the digest of what was asked; each is on disk when `put` returns. One process at a time.

    What was cut off at `room` tokens is known for as many only: with more the text is asked again.
    """

    def __init__(self, path: str | Path, room: int) -> None:
        self.room, path = room, Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StoreError(f"another process labels with the cache {path}; wait for it, or name another.") from None
        except OSError as problem:
            self._file.close()
            raise StoreError(
                f"the cache {path} lies on a file system without locks ({problem.strerror}); name one elsewhere."
            ) from None
        data = path.read_bytes()
        # A process that was killed may have left half a line behind.
        whole = data.rfind(b"\n") + 1
        self.answers: dict[str, Answer] = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                label = entry["label"]
                if not (label is None or isinstance(label, str)):
                    raise ValueError
                self.answers[str(entry["key"])] = Answer(label, int(entry["tokens"]))
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise StoreError(f"line {number} of {path} is damaged; remove that line, or the file.") from None
        if not data[whole:].startswith(_LINE[: len(data) - whole]):
            self._file.close()
            raise StoreError(f"{path} is no cache of answers; name another file, or one that does not exist yet.")
        self._file.truncate(whole)

    def get(self, key: str) -> Answer | None:
        """What is known."""
        return self.answers.get(key) or self.answers.get(self._cut(key))

    def _cut(self, key: str) -> str:
        return hashlib.sha256(f"{key} cut off at {self.room}".encode()).hexdigest()

    def put(self, key: str, answer: Answer, cut: bool = False) -> None:
        """Keep an answer; `cut` says that it was cut off."""
        key = self._cut(key) if cut else key
        line = json.dumps({"key": key, "label": answer.label, "tokens": answer.tokens}, ensure_ascii=False)
        append(self._file.fileno(), line.encode("utf-8", "surrogatepass") + b"\n")
        self.answers[key] = answer

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
