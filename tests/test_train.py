"""The optimizer loop against closed forms, and its ways to stop and go on."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from conftest import full_disk
from netweight import train
from netweight.errors import OptionError, StoreError
from netweight.loss import Batch
from netweight.network import Network
from netweight.progress import Bar
from netweight.seams import Lost, Seams, State
from netweight.train import Plan, fit, fit_digest, half_pays

ROWS = 24


class Plane(Network):
    """w x + b, with dropout between."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(3, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        found: Tensor = self.head(self.dropout(ids))
        return found

    @property
    def weights(self) -> list[float]:
        return [*self.head.weight.detach()[0].tolist(), self.head.bias.item()]


class Numbers:
    """Rows of three numbers whose sum is to be learnt, in the order given or shuffled."""

    def __init__(self, n: int = ROWS, shuffle: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32))
        self.shuffle = shuffle
        self.hidden: set[float] = set()

    def __len__(self) -> int:
        return len(self.x)

    def epoch(self, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        order = rng.permutation(len(self)) if self.shuffle else np.arange(len(self))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def batch(self, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        self.hidden.add(hide)
        x = self.x[torch.from_numpy(rows)]
        return Batch(x, x, x, x.sum(dim=1), torch.ones(len(x)))


class Squares:
    teachers = ()
    unlabelled = False

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        return (network(batch.ids, batch.mask, batch.types)[:, 0] - batch.targets).square().mean()


class Flat:
    """A loss without slope: whatever moves is not moved by it."""

    teachers = ()
    unlabelled = False

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        return 0.0 * network(batch.ids, batch.mask, batch.types).sum()


class Watcher:
    """Keeps what a fit reports; raises at step `stop`."""

    def __init__(self, stop: int = -1) -> None:
        self.stop, self.rates, self.losses, self.notes = stop, [], [], []  # type: ignore[var-annotated]
        self.starts: list[tuple[str, int, int]] = []

    def start(self, label: str, steps: int, done: int) -> None:
        self.starts.append((label, steps, done))

    def step(self, step: int, loss: float, rate: float) -> None:
        self.losses.append(loss)
        self.rates.append(rate)
        if step == self.stop:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


def plan_of(**options: Any) -> Plan:
    given = {"epochs": 1.0, "batch_size": 8, "learning_rate": 0.1, "warmup": 0.0, "precision": "fp32", "clip": 0.0}
    return Plan(**{**given, "schedule": "constant", "weight_decay": 0.0, **options})


def fitted(plan: Plan, source: Numbers | None = None, loss: Any = None, **options: Any) -> Plane:
    network = Plane(options.pop("dropout", 0.0))
    fit(network, source or Numbers(), loss or Squares(), plan, **options)
    return network


# --- plans ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", 10.0),
        ("accumulate", 0),
        ("seed", -1),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("clip", -1.0),
        ("token_dropout", 1.0),
        ("precision", "fp64"),
    ],
)
def test_plans_refuse_what_makes_no_sense(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name} of a plan is {value}; use [0-9a-z]"):
        Plan(**{name: value})


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(OptionError, match="optimizer of a plan is lion; use adamw, adam"):
        fitted(plan_of(optimizer="lion"))
    with pytest.raises(OptionError, match="schedule of a plan is saw; use cosine, linear"):
        fitted(plan_of(schedule="saw"))


def test_a_plan_describes_what_changes_the_result_and_nothing_else() -> None:
    usual = Plan().describe()
    assert Plan(seconds=9, limit=99, checkpoint_every=1, reporter=Watcher()).describe() == usual
    for name, value in {"seed": 1, "clip": 0.5, "optimizer": "sgd", "accumulate": 2, "patience": 1}.items():
        assert fit_digest(Plan(**{name: value}).describe()) != fit_digest(usual)  # type: ignore[arg-type]


# --- optimizers and schedules ---


def gradient(network: Plane, source: Numbers) -> Tensor:
    """Of Squares at the network, by hand: weights then bias."""
    x, w = source.x.double(), torch.tensor(network.weights, dtype=torch.float64)
    off = 2 * (x @ w[:3] + w[3] - x.sum(dim=1)) / len(x)
    return torch.cat([x.T @ off, off.sum()[None]])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_first_steps_equal_closed_forms(optimizer: train.Optimizer) -> None:
    source, before = Numbers(), Plane()
    g = gradient(before, source)
    made = fitted(plan_of(batch_size=ROWS, optimizer=optimizer, learning_rate=0.01), source)
    moved = torch.tensor(made.weights) - torch.tensor(before.weights)
    # Adam's first moments divide out to the sign; RMSprop's average holds a hundredth of g squared.
    step = {"sgd": g, "rmsprop": g / (0.1 * g.abs() + 1e-8)}.get(optimizer, g / (g.abs() + 1e-8))
    assert moved.tolist() == pytest.approx((-0.01 * step).tolist(), rel=1e-3, abs=1e-6)


def test_momentum_of_sgd() -> None:
    source, network = Numbers(), Plane()
    velocity, w = torch.zeros(4, dtype=torch.float64), torch.tensor(network.weights, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            network.head.weight.copy_(w[None, :3].float())
            network.head.bias.copy_(w[3:].float())
        velocity = 0.9 * velocity + gradient(network, source)
        w = w - 0.05 * velocity
    made = fitted(plan_of(epochs=3, batch_size=ROWS, optimizer="sgd", learning_rate=0.05), source)
    assert made.weights == pytest.approx(w.tolist(), rel=1e-5)


def test_decay_shrinks_matrices_and_no_biases() -> None:
    before, made = Plane(), fitted(plan_of(batch_size=ROWS, weight_decay=0.5), loss=Flat())
    assert made.weights[:3] == pytest.approx([w * (1 - 0.1 * 0.5) for w in before.weights[:3]])
    assert made.weights[3] == before.weights[3]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_follow_warm_up_and_schedule(schedule: train.Schedule) -> None:
    seen = Watcher()
    fitted(plan_of(epochs=20, batch_size=ROWS, schedule=schedule, warmup=0.25, learning_rate=0.5, reporter=seen))
    warm = [0.5 * (i + 1) / 6 for i in range(5)]
    down = {
        "cosine": [0.5 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(15)],
        "linear": [0.5 * (15 - i) / 15 for i in range(15)],
        "constant": [0.5] * 15,
    }[schedule]
    assert seen.rates == pytest.approx(warm + down)
    assert seen.starts == [("fit", 20, 0)]


def test_accumulating_equals_a_larger_batch() -> None:
    for n in (24, 20):  # 20: the last group holds one batch of 4 rows
        source = Numbers(n, shuffle=False)
        one = fitted(plan_of(epochs=3, batch_size=8, optimizer="sgd"), source)
        many = fitted(plan_of(epochs=3, batch_size=4, accumulate=2, optimizer="sgd"), source)
        assert many.weights == pytest.approx(one.weights, rel=1e-5)
        assert many.weights != Plane().weights


def test_a_ragged_group_weighs_its_rows_alike() -> None:
    source = Numbers(11, shuffle=False)
    one = fitted(plan_of(batch_size=11, optimizer="sgd"), source)
    many = fitted(plan_of(batch_size=4, accumulate=3, optimizer="sgd"), source)
    assert many.weights == pytest.approx(one.weights, rel=1e-5)


def test_clipping_bounds_the_gradient() -> None:
    source, before = Numbers(), Plane()
    g = gradient(before, source)
    assert float(g.norm()) > 0.02
    made = fitted(plan_of(batch_size=ROWS, optimizer="sgd", clip=0.01), source)
    moved = torch.tensor(made.weights) - torch.tensor(before.weights)
    assert float(moved.norm()) == pytest.approx(0.1 * 0.01, rel=1e-2)
    free = fitted(plan_of(batch_size=ROWS, optimizer="sgd", clip=1e6), source)
    assert free.weights == pytest.approx(fitted(plan_of(batch_size=ROWS, optimizer="sgd"), source).weights)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Nosy(Squares):
        def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), network(batch.ids, batch.mask, batch.types).dtype))
            return super().__call__(network, batch)

    exact = fitted(plan_of(), loss=Nosy())
    half = fitted(plan_of(precision="bf16"), loss=Nosy())
    assert set(seen[:3]) == {(False, torch.float32)}
    assert set(seen[3:]) == {(True, torch.bfloat16)}
    assert half.head.weight.dtype == torch.float32
    assert half.weights == pytest.approx(exact.weights, abs=0.05)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        seen.clear()
        fitted(plan_of(precision="auto"), loss=Nosy())
        assert {half for half, _ in seen} == {able}


def test_half_pays_where_bf16_is_native_and_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    here = half_pays(cpu)
    assert isinstance(here, bool)
    assert half_pays(cpu) is here
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.is_autocast_enabled("cpu")
    for avx, amx in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert half_pays(cpu) is (avx or amx)
    # An old card, which does so in software; what the processor can is nothing to it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert half_pays(card) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert half_pays(card) is True


def test_a_fit_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    one = fitted(plan_of(epochs=2), dropout=0.5)
    assert torch.equal(torch.rand(3), wanted)
    assert fitted(plan_of(epochs=2), dropout=0.5).weights == one.weights
    assert fitted(plan_of(epochs=2, seed=1), dropout=0.5).weights != one.weights


def test_frozen_parameters_stay_and_nothing_to_fit_is_an_error() -> None:
    network = Plane()
    network.head.weight.requires_grad_(False)
    fit(network, Numbers(), Squares(), plan_of())
    assert network.weights[:3] == Plane().weights[:3]
    assert network.weights[3] != Plane().weights[3]
    network.head.bias.requires_grad_(False)
    with pytest.raises(OptionError, match="every parameter is frozen"):
        fit(network, Numbers(), Squares(), plan_of())


# --- stopping and going on ---


def scripted(values: list[float], seen: list[list[float]], network: Plane) -> Callable[[], float]:
    answers = iter(values)

    def evaluate() -> float:
        assert not network.training
        seen.append(network.weights)
        return next(answers)

    return evaluate


@pytest.mark.parametrize(("patience", "epochs"), [(0, 3), (1, 4), (2, 5)])
def test_early_stopping_restores_the_best(patience: int, epochs: int) -> None:
    network, seen, watcher = Plane(), [], Watcher()  # type: ignore[var-annotated]
    evaluate = scripted([0.1, 0.9, 0.5, 0.9, 0.2, 0.3], seen, network)
    fit(network, Numbers(), Squares(), plan_of(epochs=6, patience=patience, reporter=watcher), evaluate=evaluate)
    assert len(seen) == epochs
    assert network.weights == seen[1]
    assert network.weights != seen[-1]
    assert not network.training
    assert watcher.notes[:2] == ["quality on select: 0.1000", "quality on select: 0.9000"]


@pytest.mark.parametrize(("epochs", "asked"), [(0.5, 1), (1.5, 2), (2.0, 2)])
def test_the_last_part_of_an_epoch_is_judged_too(epochs: float, asked: int) -> None:
    network, seen = Plane(), []  # type: ignore[var-annotated]
    evaluate = scripted([0.1, 0.2, 0.3], seen, network)
    fit(network, Numbers(), Squares(), plan_of(epochs=epochs, patience=5), evaluate=evaluate)
    assert len(seen) == asked
    assert network.weights == seen[-1] == fitted(plan_of(epochs=epochs)).weights


def test_without_patience_nothing_is_evaluated() -> None:
    def evaluate() -> float:
        raise AssertionError("asked")

    assert fitted(plan_of(epochs=2), evaluate=evaluate).weights == fitted(plan_of(epochs=2)).weights


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_killed_fit_goes_on_to_the_same_weights(tmp_path: Path, optimizer: train.Optimizer, stop: int) -> None:
    options = {
        "epochs": 4,
        "optimizer": optimizer,
        "schedule": "cosine",
        "learning_rate": 0.01,
        "checkpoint_every": 0.0,
    }
    whole = fitted(plan_of(**options), dropout=0.3)
    kept = (tmp_path / "fit.safetensors", "a" * 64)
    with pytest.raises(KeyboardInterrupt):
        fitted(plan_of(**options, reporter=Watcher(stop)), dropout=0.3, checkpoint=kept)
    seen = Watcher()
    assert fitted(plan_of(**options, reporter=seen), dropout=0.3, checkpoint=kept).weights == whole.weights
    assert seen.starts == [("fit", 12, stop - 1)]
    # Its model may not be on disk yet: one that has ended gives the same at once.
    ended = Watcher()
    assert fitted(plan_of(**options, reporter=ended), dropout=0.3, checkpoint=kept).weights == whole.weights
    assert ended.starts == [("fit", 12, 12)]
    assert not ended.losses


@pytest.mark.parametrize("stop", range(1, 12, 2))
def test_resuming_under_early_stopping(tmp_path: Path, stop: int) -> None:
    options = {"epochs": 6, "patience": 1, "checkpoint_every": 0.0, "learning_rate": 0.01}

    def quality(network: Plane) -> Callable[[], float]:
        # Best after the second epoch of three steps, whoever asks and however often.
        return lambda: {2: 0.9}.get(round(network.asked.item()), 0.1)

    class Counting(Plane):
        def __init__(self) -> None:
            super().__init__(0.2)
            self.register_buffer("asked", torch.zeros(()))

        def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
            self.asked += 1 / 3
            return super().forward(ids, mask, types)

    def run(reporter: Watcher, kept: tuple[Path, str] | None) -> Counting:
        network = Counting()
        plan = plan_of(**options, reporter=reporter)
        fit(network, Numbers(), Squares(), plan, evaluate=quality(network), checkpoint=kept)
        return network

    whole, seen, after = Watcher(), Watcher(stop), Watcher()
    wanted, kept = run(whole, None), (tmp_path / "fit.safetensors", "b" * 64)
    assert len(whole.losses) == 12
    assert wanted.asked.item() == pytest.approx(2, abs=0.01)
    with pytest.raises(KeyboardInterrupt):
        run(seen, kept)
    again = run(after, kept)
    assert again.weights == wanted.weights
    assert seen.losses[: stop - 1] + after.losses == whole.losses
    ended = Watcher()
    assert run(ended, kept).weights == wanted.weights, "the best, not the last"
    assert not ended.losses


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_checkpoints_leave_out_what_is_frozen(tmp_path: Path, stop: int) -> None:
    """Of a model with a large vocabulary that is most bytes, each half minute."""

    def run(reporter: Watcher, kept: tuple[Path, str] | None) -> Plane:
        network = Plane(0.2)
        network.register_parameter("still", nn.Parameter(torch.ones(2), requires_grad=False))
        plan = plan_of(epochs=3, patience=1, checkpoint_every=0.0, reporter=reporter)
        fit(network, Numbers(), Squares(), plan, evaluate=lambda: 0.5, checkpoint=kept)
        return network

    wanted, kept = run(Watcher(), None), (tmp_path / "fit.safetensors", "c" * 64)
    with pytest.raises(KeyboardInterrupt):
        run(Watcher(stop), kept)
    with safe_open(kept[0], "pt") as file:
        held = {name for name in file.keys() if not name.startswith("optimizer/")}  # noqa: SIM118
    kinds = ("model", "best") if stop > 4 else ("model",)
    assert held == {f"{kind}/head.{name}" for kind in kinds for name in ("weight", "bias")}
    assert run(Watcher(), kept).weights == wanted.weights


def test_checkpoints_that_take_long_are_far_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = [0.0], list[float]()
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])

    class Slow(Seams):
        def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
            saved.append(now[0])
            now[0] += 5.0
            return super().gather(held)

        def correct(self, network: nn.Module) -> None:
            now[0] += 10.0

    fit(Plane(), Numbers(), Squares(), plan_of(epochs=10), seams=Slow(), checkpoint=(tmp_path / "kept", "mine"))
    assert saved[:-1] == [40.0, 155.0, 270.0], "after 30 seconds, and then after twenty times what the last one took"
    assert saved[-1] == now[0] - 5.0, "and at the end"


def test_a_checkpoint_takes_no_copy_of_the_weights(tmp_path: Path) -> None:
    """On a device there may be no room for one."""
    network, seen = Plane(), list[bool]()

    class Looks(Seams):
        def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
            seen.append(held["model/head.weight"].data_ptr() == network.head.weight.data_ptr())
            return super().gather(held)

    plan = plan_of(checkpoint_every=0.0)
    fit(network, Numbers(), Squares(), plan, seams=Looks(), checkpoint=(tmp_path / "kept", "mine"))
    assert seen
    assert all(seen)


def test_a_full_disk_is_an_error_of_the_system_and_no_half_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "save_file", full_disk)
    with pytest.raises(OSError, match=r"fit\.safetensors cannot be written: .*No space left on device"):
        fitted(plan_of(checkpoint_every=0.0), checkpoint=(tmp_path / "fit.safetensors", "mine"))
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_others_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "fit.safetensors"
    plan = plan_of(checkpoint_every=0.0, reporter=Watcher(2))
    with pytest.raises(KeyboardInterrupt):
        fitted(plan, checkpoint=(kept, "mine"))
    assert kept.exists()
    with pytest.raises(StoreError, match=r"fit.safetensors belongs to another fit; delete it"):
        fitted(plan_of(), checkpoint=(kept, "yours"))
    whole = kept.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        kept.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match=r"fit.safetensors is damaged .* delete it to start that fit again"):
            fitted(plan_of(), checkpoint=(kept, "mine"))


def test_the_time_box_shortens_the_fit_and_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))
    seen = Watcher()
    # The clock is read after steps 2, 8 and 24. By the second reading six steps took one second and three are left: 18
    # more steps; by the third 16 steps took one second and two are left: 32 more.
    fitted(plan_of(epochs=100, seconds=5.0, schedule="linear", reporter=seen))
    assert len(seen.rates) == 56
    assert seen.starts == [("fit", 300, 0), ("fit", 26, 8), ("fit", 56, 24)]
    said = "epochs fit into the time that is left"
    assert seen.notes == [f"fit: 8.67 {said}", f"fit: 18.67 {said}"]
    assert seen.rates[8:24] == pytest.approx([0.1 * (26 - i) / 26 for i in range(8, 24)])
    assert seen.rates[24:] == pytest.approx([0.1 * (56 - i) / 56 for i in range(24, 56)])
    # 144 steps more by the reading after 24; then 72 took one second and eight are left, enough for all.
    later = Watcher()
    fitted(plan_of(epochs=100, seconds=12.0, reporter=later))
    assert later.starts[2:] == [("fit", 168, 24), ("fit", 300, 96)]
    assert len(later.rates) == 300
    short = Watcher()
    fitted(plan_of(epochs=100, seconds=1e-9, reporter=short))
    assert len(short.rates) == 9, "one step after the eight that were timed"
    enough = Watcher()
    fitted(plan_of(epochs=4, seconds=1e9, reporter=enough))
    assert len(enough.rates) == 12
    assert not enough.notes


@pytest.mark.parametrize(("seconds", "limit", "steps"), [(10.0, 50.0, 50), (10.0, 10.0, 29), (100.0, 100.0, 119)])
def test_a_fit_that_goes_on_under_another_time_limit_is_timed_anew(
    seconds: float, limit: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "_LOOKS", (1, 2))

    class Ticking(Seams):
        def correct(self, network: nn.Module) -> None:
            now[0] += 1.0

    # A step takes a second: 50 fit into the first limit, and the checkpoint after the 19th says so.
    plan, kept = plan_of(epochs=100, seconds=50.0, limit=50.0, checkpoint_every=0.0), (tmp_path / "kept", "mine")
    with pytest.raises(KeyboardInterrupt):
        fitted(replace(plan, reporter=Watcher(20)), seams=Ticking(), checkpoint=kept)
    seen = Watcher()
    fitted(replace(plan, seconds=seconds, limit=limit, reporter=seen), seams=Ticking(), checkpoint=kept)
    known = 50 if limit == plan.limit else 300  # all that was asked for, until the clock is looked at
    assert seen.starts[0] == ("fit", known, 19)
    assert seen.starts[-1][1] == steps
    assert 19 + len(seen.losses) == steps


def test_a_fit_that_ended_is_known_as_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "_LOOKS", (1, 2, 384))

    class Ticking(Seams):
        def correct(self, network: nn.Module) -> None:
            now[0] += 1.0

    # The clock cuts it to some 20 steps, which is too few for the first checkpoint at its usual time.
    plan, kept = plan_of(epochs=100, seconds=20.0, limit=20.0), (tmp_path / "kept", "mine")
    first, again = Watcher(), Watcher()
    wanted = fitted(replace(plan, reporter=first), seams=Ticking(), checkpoint=kept)
    assert 15 < len(first.losses) < 25
    made = fitted(replace(plan, reporter=again), seams=Ticking(), checkpoint=kept)
    assert not again.losses, "nothing is trained again"
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), made.parameters(), strict=True))
    longer = Watcher()
    fitted(replace(plan, epochs=100, seconds=1000.0, limit=1000.0, reporter=longer), seams=Ticking(), checkpoint=kept)
    assert longer.starts[0][2] == len(first.losses)
    assert len(first.losses) + len(longer.losses) == 300, "but not under another limit"
    # A client keeps what a federated round gave.
    fitted(plan_of(epochs=2, part=(0.0, 0.5)), checkpoint=(tmp_path / "round", "mine"))
    assert not (tmp_path / "round").exists()


def test_a_group_that_breaks_at_a_look_at_the_clock_is_told_all_that_the_look_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[tuple[int, int, int], dict[str, Any]]] = []

    class Breaks(Seams):
        """Its group breaks once, before this process has heard what the first says of the clock."""

        def agree(self, value: float) -> float:
            if not told:
                raise Lost("a process is gone")
            return 4.0

        def regroup(self, mine: State, at: tuple[int, int, int]) -> State:
            told.append((at, json.loads(mine.progress)))
            return replace(mine, progress=json.dumps(told[0][1] | {"epochs": 4.0}))

    monkeypatch.setattr(train, "_LOOKS", (1, 2))
    seen = Watcher()
    fitted(plan_of(epochs=100, seconds=1e9, reporter=seen), seams=Breaks())
    (at, progress), *others = told
    assert not others
    assert at == (2, 0, 300)
    assert progress["timed"], "as it is where the others were told in time"
    assert len(seen.rates) == 12, "the length that all go on with"


def test_evaluations_count_in_the_time_box(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], [0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])

    def evaluate() -> float:
        # Dear only late, when the last look at the clock of a short fit is over.
        asked[0] += 1
        now[0] += 100.0 if asked[0] >= 200 else 0.001
        return float(asked[0])

    fitted(plan_of(epochs=1000, seconds=200.0, patience=9999), evaluate=evaluate)
    assert asked[0] >= 200
    assert now[0] < 400


@pytest.mark.parametrize(("loss", "said"), [(0.5, "loss 0.5000"), (float("nan"), "loss not told")])
def test_lines_where_there_is_no_terminal(loss: float, said: str) -> None:
    file = io.StringIO()
    with Bar(Console(file=file, width=200)) as bar:
        bar.start("fine-tune", 2, 0)
        bar.step(1, loss, 1e-4)
        bar.step(2, loss, 1e-4)
    assert file.getvalue() == f"fine-tune: step 2 of 2, {said}, 0 s left\n"
