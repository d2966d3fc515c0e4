"""What a server is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from netweight.errors import OptionError

Mode = Literal["shadow", "canary"]


@dataclass(frozen=True)
class Rollout:
    """How a candidate is tried: on which share of requests, and on which share of rows it may say something else."""

    mode: Mode = "shadow"
    share: float = 0.05
    allowed: float = 0.05

    def __post_init__(self) -> None:
        if self.mode not in ("shadow", "canary"):
            raise OptionError(f"the mode of a rollout is {self.mode!r}; use shadow or canary.")
        for name, value in (("of requests", self.share), ("of rows that may differ", self.allowed)):
            if not 0 < value <= 1:
                raise OptionError(f"the share {name} is {value:g}; use more than 0 and at most 1.")


@dataclass(frozen=True)
class Options:
    """Of a server.

    patience: seconds; who would wait longer for the engine is refused at once. keys: a file; without one, everybody may
    ask. tls: files of a certificate and its key. log: a file of records, at most `rate` rows a second, which is watched
    with `false_alarms` a month; alerts also go to the URL `webhook`. keep: a file of texts that are worth labelling.
    memory: bytes that models may take together. candidates: names of models, and folders that may follow them.
    """

    folders: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 0
    patience: float = 0.1
    keys: str | None = None
    tls: tuple[str, str] | None = None
    log: str | None = None
    rate: float = 5.0
    false_alarms: float = 0.1
    webhook: str | None = None
    keep: str | None = None
    memory: int | None = None
    candidates: tuple[tuple[str, str], ...] = ()
    rollout: Rollout = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        counted = (self.rate, self.false_alarms) != (Options.rate, Options.false_alarms)
        if self.log is None and (self.webhook or self.keep or counted):
            raise OptionError("rows written down, alerts and rows to label come from a log; name one with --log.")
        if not self.candidates and self.rollout != Rollout():
            raise OptionError("mode, share and allowed are those of a candidate; name one with --candidate.")
        if not 0 < self.rate <= 1000:
            raise OptionError(f"{self.rate:g} rows a second of a log; use more than 0 and at most 1,000.")
