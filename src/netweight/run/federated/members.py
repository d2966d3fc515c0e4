"""Who takes part: clients are asked once what they have, and refused where it does not fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from netweight.errors import ClientError
from netweight.run.federated.checks import capped, differing
from netweight.run.federated.messages import Channel, Join, Joined, Lost, Manifest
from netweight.run.federated.options import Rounds

_LOOK = 0.2  # seconds between two looks at who is there


class Members:
    """The clients of a run, as they come and go.

    The first manifest that is asked for holds for the whole run: techniques may change tokenizer and labels' order of a
    model later, and clients follow. Columns are those of the server's rows, or of the first client where it has none.
    `refuses` hears of each client that is refused, why, and whether for good.
    """

    def __init__(self, channel: Channel, rounds: Rounds, refuses: Callable[[str, str, bool], None]) -> None:
        self.channel, self.rounds, self.refuses = channel, rounds, refuses
        self.manifest: Manifest | None = None
        self.joined: dict[str, Joined] = {}
        self.refused: dict[str, str] = {}
        self._anew: set[str] = set()

    def gather(self) -> None:
        """Wait until `minimum` clients are connected; whether they fit is asked later. Raises ClientError where they do
        not come in time."""
        end = time.monotonic() + self.rounds.wait
        while len(names := self.channel.clients()) < self.rounds.minimum:
            if time.monotonic() >= end:
                raise ClientError(self._absent(names))
            time.sleep(min(_LOOK, max(0.0, end - time.monotonic())))

    def there(self, manifest: Manifest, least: int = 0) -> dict[str, Joined]:
        """Those that are there, fit, and have rows, by name. Raises ClientError where they are fewer than `minimum`, or
        than `least`."""
        self.manifest = self.manifest or manifest
        least = max(least, self.rounds.minimum)
        end = time.monotonic() + self.rounds.wait
        while True:
            names = self.channel.clients()
            self._ask([name for name in names if name not in self.joined or name in self._anew])
            known = sorted(set(names) & set(self.joined) - self._anew)
            usable = {name: self.joined[name] for name in known if self.joined[name].rows}
            if len(usable) >= least:
                return usable
            if time.monotonic() >= end:
                raise ClientError(self._lacking(names, usable, least))
            time.sleep(min(_LOOK, max(0.0, end - time.monotonic())))

    def drawn(self, usable: Mapping[str, Joined], seed: int, round_: int, least: int = 0) -> list[str]:
        """Those that take part in a round, sorted; a share of them (at least `least`), drawn by seed."""
        names = sorted(usable)
        count = min(len(names), max(least, self.rounds.minimum, math.ceil(self.rounds.share * len(names))))
        picked = np.random.default_rng([seed, 3, round_]).permutation(len(names))[:count]
        return sorted(names[i] for i in picked)

    def forget(self, names: Iterable[str]) -> None:
        """These are asked again what they have before they take part again: they may come back with other rows."""
        self._anew |= set(names)

    def weights(self, usable: Mapping[str, Joined]) -> dict[str, float]:
        """By how much each client counts: by its rows, within the bound of the rounds."""
        return capped({name: about.rows for name, about in usable.items()}, self.rounds.heaviest)

    def notes(self) -> tuple[str, ...]:
        """Sentences on clients that are special: refused, without rows, with one label, with very many rows."""
        weights = self.weights({name: about for name, about in self.joined.items() if about.rows})
        said = [f"{name} was refused: {reason}" for name, reason in sorted(self.refused.items())]
        for name, about in sorted(self.joined.items()):
            if not about.rows:
                said.append(f"{name} has no training rows and takes no part.")
            elif about.labels == 1:
                said.append(f"{name} has rows of one label only.")
            if about.rows > weights.get(name, math.inf):
                said.append(
                    f"{name} says that it has {about.rows:,} rows and counts as {weights[name]:,.0f}, "
                    f"{self.rounds.heaviest:g} times the median."
                )
        return tuple(said)

    def _ask(self, names: list[str]) -> None:
        if not names:
            return
        assert self.manifest is not None
        answers = self.channel.exchange({name: Join(self.manifest) for name in names}, self.rounds.seconds)
        for name in sorted(answers):
            answer = answers[name]
            if not isinstance(answer, Joined):
                self._refuse(name, answer.reason if isinstance(answer, Lost) else "it did not say what it has.", False)
                continue
            if not self.manifest.columns:
                self.manifest = replace(self.manifest, columns=answer.manifest.columns)
            problem = differing(self.manifest, answer)
            self._anew.discard(name)
            if problem:
                self.joined.pop(name, None)
                self._refuse(name, problem, True)
            else:
                self.joined[name] = answer
                self.refused.pop(name, None)

    def _refuse(self, name: str, reason: str, final: bool) -> None:
        self.refused[name] = reason
        self.refuses(name, reason, final)

    def _lacking(self, names: tuple[str, ...], usable: Mapping[str, Joined], least: int) -> str:
        if not names and self.joined:
            return (
                f"all clients left ({', '.join(sorted(self.joined))}); start them again: a run with a folder goes on "
                "from its last finished round."
            )
        if not names and not self.refused:
            return self._absent(names)
        why = " ".join(self.notes()) or "The others left."
        if least > self.rounds.minimum:
            why += (
                " Privacy hides a client among so many; --privacy off (in Python RowLevel(secure=False), too) needs no "
                "others."
            )
        return f"{len(usable)} of {len(names)} clients can take part, and {least} must. {why}"

    def _absent(self, names: tuple[str, ...]) -> str:
        came = f"{', '.join(names)} and no other" if names else "no"
        return (
            f"{came} client appeared within {self.rounds.wait:g} s, and {self.rounds.minimum} must; start them, or "
            "wait longer (--wait, Rounds.wait)."
        )


def too_few(answered: int, lost: tuple[Lost, ...], least: int, what: str) -> ClientError:
    """The error of a round in which not enough clients answered soundly."""
    why = " ".join(f"{one.client}: {one.reason}" for one in lost)
    return ClientError(f"{what}: {answered} clients answered, and {least} must. {why}")
