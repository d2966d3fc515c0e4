"""What a crew says to its members when some are lost, and when a reporter fails; the members here only play."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from conftest import tiny_model
from netweight.data import Dataset
from netweight.errors import RunError
from netweight.loss import Supervised
from netweight.reporter import Silent
from netweight.run.commands import Cancel, Do, Done, Failed, Fit, Give, Idle, Open, Result, Setup, Strategy, Told, Waits
from netweight.run.crew import Crew
from netweight.run.group import File, Join
from netweight.train import Plan

GONE = None  # what a member that is lost says
WAITS = Waits("the others are gone")
FAILED = Failed("", "RuntimeError: the others are gone", "")
RESULT = Result({"x": torch.ones(1)})


@dataclass(eq=False)
class Player:
    """Says what it was given, one after the other."""

    rank: int
    lines: deque[object]
    heard: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"rank {self.rank}"

    def say(self, message: object) -> None:
        """Keep."""
        self.heard.append(message)

    def hear(self) -> Any:
        """The next of the lines."""
        return self.lines.popleft()


class Play(Crew[Player]):
    """Each start has a cast: a list of lines for each member."""

    def __init__(self, *casts: list[list[object]], processes: int, restarts: int = 0) -> None:
        super().__init__(processes, 1, restarts)
        self.casts = deque(casts)

    def ready(self, members: Collection[Player], timeout: float | None) -> list[Player]:
        """Everyone."""
        return list(members)

    def lose(self, member: Player, how: str | None = None) -> list[str]:
        """Take it off."""
        self.members.remove(member)
        return [f"{member.name} was lost"]

    def _place(self, number: int) -> File:
        return File(f"group-{number}")

    def _started(self, fewer: bool) -> None:
        self.members = [Player(i, deque(lines)) for i, lines in enumerate(self.casts.popleft())]

    def _stopped(self) -> None:
        pass


class Notes(Silent):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes = list[str]()

    def note(self, message: str) -> None:
        """Keep."""
        self.notes.append(message)


class Full(Silent):
    """Has no room for notes."""

    def note(self, message: str) -> None:
        """Fail."""
        raise OSError("disk full")


def fit(crew: Play, data: Dataset, strategy: Strategy, reporter: Silent, tensor: int | None = None) -> object:
    model = tiny_model()
    number = crew.open(Open(-1, data, None, strategy, Setup(tensor=tensor)))
    return crew.do(number, Fit(model, Supervised(model.task), Plan(), "fit"), reporter)


def kinds(member: Player) -> list[type]:
    return [type(message) for message in member.heard]


def test_those_that_cannot_divide_the_network_idle(dataset: Dataset) -> None:
    lost, works, told = [GONE], [FAILED, Done(), RESULT], Notes()
    crew = Play([works, works, [FAILED], lost], processes=4)
    with crew:
        assert fit(crew, dataset, "tensor", told, tensor=2) == RESULT.held
        assert told.notes == ["rank 3 was lost: going on with 2 processes, from the last checkpoint"]
        first, second, idle = crew.members
        assert kinds(first) == [Open, Do, Join, Do, Join, Give]
        assert kinds(idle) == [Open, Do, Join]
        assert [(join.rank, join.size) for join in (first.heard[4], second.heard[4])] == [(0, 2), (1, 2)]


def test_who_dies_with_the_result_in_hand_takes_none_of_it_along(dataset: Dataset) -> None:
    told, waits = Notes(), [WAITS, Idle(), Done(), RESULT]
    with Play([[Done(), GONE], waits, [Done(), RESULT, Done()]], processes=3) as crew:
        assert fit(crew, dataset, "ddp", told) == RESULT.held
        assert not told.notes, "nothing is made again"
        assert fit(crew, dataset, "ddp", told) == RESULT.held
        second, third = crew.members
        assert kinds(second) == [Open, Do, Join, Cancel, Open, Do, Join, Give]
        assert kinds(third) == [Open, Do, Join, Give, Open, Do, Join]


def test_where_too_few_are_left_all_are_new(dataset: Dataset) -> None:
    told = Notes()
    with Play([[FAILED], [GONE]], [[Done(), RESULT], [Done()]], processes=2, restarts=1) as crew:
        assert fit(crew, dataset, "tensor", told, tensor=2) == RESULT.held
    assert told.notes == ["rank 1 was lost: going on with 2 processes, from the last checkpoint"]
    with (
        Play([[FAILED], [GONE]], processes=2) as crew,
        pytest.raises(RunError, match=r"^1 process is left, too few for tensor=2: rank 1 was lost; the fit goes on"),
    ):
        fit(crew, dataset, "tensor", Silent(), tensor=2)
    with (
        Play([[FAILED], [GONE]], [[]], processes=2, restarts=1) as crew,
        pytest.raises(RunError, match="rank 1 was lost; after a new start 1 process is left, too few for tensor=2"),
    ):
        fit(crew, dataset, "tensor", Silent(), tensor=2)


def test_a_reporter_that_fails_leaves_nobody_waiting(dataset: Dataset) -> None:
    with Play([[WAITS, Idle()], [GONE], [WAITS, Idle()]], processes=3) as crew:
        with pytest.raises(OSError, match="disk full"):
            fit(crew, dataset, "ddp", Full())
        assert [kinds(member) for member in crew.members] == [[Open, Do, Join, Cancel]] * 2
    with Play([[Told("note", ("half way",)), Done()], [WAITS, Idle()]], processes=2) as crew:
        with pytest.raises(OSError, match="disk full"):
            fit(crew, dataset, "ddp", Full())
        assert kinds(crew.members[1])[-1] is Cancel


def test_an_error_in_the_midst_of_a_step_ends_all(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[Player]:
        raise OSError("no line to anyone")

    monkeypatch.setattr(Play, "ready", broken)
    with Play([[], []], processes=2) as crew, pytest.raises(OSError, match="no line to anyone"):
        fit(crew, dataset, "ddp", Silent())
    assert not crew.members
