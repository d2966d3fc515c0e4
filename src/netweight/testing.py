"""Contract suites: whoever writes a technique, a run or an engine inherits their tests.

Each class takes the thing under test and has one method for each promise; `check` keeps them all. They use plain
asserts, so any test runner will do:

    def test_contract(tmp_path):
        TechniqueContract(MyTechnique(), model, lambda: Local(data), plan).check(tmp_path)

`EngineContract` needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from netweight.artifact import Tier
from netweight.encode import Tokens
from netweight.engine import Engine
from netweight.engine.cascade import tier_engine
from netweight.errors import OptionError
from netweight.task import Classify, Prediction, ScorePrediction

if TYPE_CHECKING:
    from torch import Tensor

    from netweight.loss import Batch, Loss
    from netweight.model import Model
    from netweight.network import Network
    from netweight.run import Run
    from netweight.run.aggregate import Aggregator
    from netweight.techniques import Technique
    from netweight.train import Plan

_BATCHES = (1, 7, 32, 128)
_THREADS = 8
_CLOSE = 1e-4  # of the largest value: what predicted scores may move by when sums are taken in another order


def fresh_digest(model: Model) -> str:
    """The model's digest, computed now: the one on the model is remembered from the first time it was asked."""
    return replace(model).digest


@dataclass(frozen=True)
class TechniqueContract:
    """What every technique promises.

    `technique` is applied to `model` with `run()`, a new run for each call, under `plan`, whose seed is fixed. `texts`
    (and `pairs`) are rows to compare outputs on.
    """

    technique: Technique
    model: Model
    run: Callable[[], Run]
    plan: Plan
    texts: Sequence[str]
    pairs: Sequence[str] | None = None

    def check(self, folder: Path) -> None:
        """All promises; `folder` is empty and may be written to."""
        made = self.returns_a_new_model()
        self.repeats_itself(made)
        self.survives_saving(made, folder)
        self.survives_export(made)

    def returns_a_new_model(self) -> Model:
        """The given model stays as it was, bit for bit; the new one differs. Returns the new one."""
        before = fresh_digest(self.model)
        made = self.technique(self.model, self.run(), self.plan)
        assert fresh_digest(self.model) == before, "the given model was changed"
        assert made.digest != before, "nothing happened"
        assert all(p.requires_grad for p in self.model.network.parameters()), "the given model was left frozen"
        held = dict(self.model.network.named_parameters())
        kept = [p for name, p in made.network.named_parameters() if name in held]
        assert all(p.requires_grad for p in kept), "the new model was left frozen"
        return made

    def repeats_itself(self, made: Model) -> None:
        """The same seed gives the same model, whatever the global random state is."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            again = self.technique(self.model, self.run(), self.plan)
        assert again.digest == made.digest, "the same seed gave another result"

    def survives_saving(self, made: Model, folder: Path) -> None:
        """Saved and loaded, it is the same model and says the same, bit for bit."""
        import torch

        from netweight.model import Model
        from netweight.run.local import logits_of

        made.save(folder)
        again = Model.load(folder)
        tokens = made.encoder.encode(self.texts, self.pairs)
        assert again.digest == made.digest, "loading gave another model"
        assert torch.equal(logits_of(again, tokens), logits_of(made, tokens)), "loading changed outputs"

    def survives_export(self, made: Model) -> None:
        """The file that an engine runs says what the model says: within 2 % of the largest logit."""
        import torch

        from netweight.export import export, lowered

        exported = export(made)
        tier = Tier("tier", exported.kind, "file", exported.options)
        engine = tier_engine(tier, exported.data, made.encoder.pad, 1)
        tokens = made.encoder.encode(self.texts, self.pairs)
        network = lowered(made) if made.ranges or made.weights else made.network
        with torch.no_grad():
            padded = tokens.padded(np.arange(len(tokens)), made.encoder.pad)
            wanted = network(*map(torch.from_numpy, padded)).numpy()
        # int8 tables round each row by half a step at most; ONNX Runtime's integer kernels round as ours do.
        assert np.abs(engine.logits(tokens, 16) - wanted).max() < 0.02 * np.abs(wanted).max() + 1e-3
        one, many = engine.logits(tokens, 1), engine.logits(tokens, 64)
        assert (one.argmax(1) == many.argmax(1)).all(), "labels depend on the batch"


@dataclass(frozen=True)
class Count:
    """A statistic whose value is known: rows of a batch (`sum`), or the longest of them (`max`)."""

    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        import torch

        found = len(batch) if self.combine == "sum" else int(batch.mask.sum(dim=1).max())
        return {"found": torch.tensor(float(found))}


@dataclass(frozen=True)
class RunContract:
    """What every run promises. `run()` gives a new run over `texts` as training rows each time."""

    run: Callable[[], Run]
    model: Model
    loss: Loss
    plan: Plan
    texts: Sequence[str]
    pairs: Sequence[str] | None = None

    def check(self) -> None:
        """All promises."""
        self.fits_a_copy()
        self.leaves_frozen_parameters()
        self.adds_up_every_row_once()

    def fits_a_copy(self) -> None:
        """`fit` trains a copy: the given model stays, weights of the copy moved, and the seed fixes where to."""
        before = fresh_digest(self.model)
        made = self.run().fit(self.model, self.loss, self.plan)
        assert fresh_digest(self.model) == before, "the given model was changed"
        assert made.digest != before, "no weight moved"
        assert self.run().fit(self.model, self.loss, self.plan).digest == made.digest, (
            "the seed does not fix the result"
        )

    def leaves_frozen_parameters(self) -> None:
        """Parameters that require no gradient keep their values."""
        frozen = self.model.copy()
        first = next(iter(dict(frozen.network.named_parameters())))
        for name, parameter in frozen.network.named_parameters():
            parameter.requires_grad_(name != first)
        made = self.run().fit(frozen, self.loss, self.plan)
        was, now = (dict(m.network.named_parameters())[first].detach() for m in (frozen, made))
        assert bool((was == now).all()), f"{first} was frozen and moved"

    def adds_up_every_row_once(self) -> None:
        """`reduce` meets each training row once, `limit` of them where asked, and combines as the statistic says."""
        n = len(self.texts)
        longest = int(self.model.encoder.encode(self.texts, self.pairs).lengths.max())
        assert float(self.run().reduce(self.model, Count())["found"]) == n
        assert float(self.run().reduce(self.model, Count(), limit=n // 2)["found"]) == n // 2
        assert float(self.run().reduce(self.model, Count("max"))["found"]) == longest


@dataclass(frozen=True)
class AggregateContract:
    """What every aggregator of a federated run promises, for `clients` clients."""

    aggregate: Aggregator
    clients: int = 7
    seed: int = 0

    def check(self) -> None:
        """All promises."""
        self.keeps_one_as_it_is()
        self.keeps_what_all_agree_on()
        self.does_not_depend_on_the_order()
        self.keeps_shapes_and_dtypes()
        self.leaves_what_it_is_given()

    def updates(self) -> dict[str, dict[str, Tensor]]:
        """Random tensors by client: a matrix, a vector in bf16, a count, a flag, and one without elements."""
        import torch

        drawn = torch.Generator().manual_seed(self.seed)
        return {
            f"client{i}": {
                "matrix": torch.randn(3, 4, generator=drawn),
                "vector": torch.randn(5, generator=drawn).to(torch.bfloat16),
                "count": torch.randint(0, 2**40, (2,), generator=drawn),
                "flag": torch.rand(3, generator=drawn) > 0.5,
                "nothing": torch.zeros(0, 2),
            }
            for i in range(self.clients)
        }

    def weights(self) -> dict[str, float]:
        """Rows of each client, all different."""
        return {f"client{i}": 3.0 + i for i in range(self.clients)}

    def keeps_one_as_it_is(self) -> None:
        """One client alone: its tensors, bit for bit, unless it is refused (OptionError) as too few."""
        one = self.updates()["client0"]
        with suppress(OptionError):
            self._same(self.aggregate({"client0": one}, {"client0": 3.0}), one)

    def keeps_what_all_agree_on(self) -> None:
        """All clients alike: their tensors, bit for bit."""
        one = self.updates()["client0"]
        self._same(self.aggregate(dict.fromkeys(self.weights(), one), self.weights()), one)

    def does_not_depend_on_the_order(self) -> None:
        """Who answered first changes nothing, bit for bit; nor does asking twice."""
        updates, weights = self.updates(), self.weights()
        usual = self.aggregate(updates, weights)
        self._same(self.aggregate(dict(reversed(updates.items())), dict(reversed(weights.items()))), usual)
        self._same(self.aggregate(updates, weights), usual)

    def keeps_shapes_and_dtypes(self) -> None:
        """Integers stay integers, and no value leaves the span of what came in."""
        updates = self.updates()
        made = self.aggregate(updates, self.weights())
        for name, like in updates["client0"].items():
            assert made[name].dtype == like.dtype, f"{name} came as {like.dtype} and left as {made[name].dtype}"
            assert made[name].shape == like.shape, f"{name} changed its shape"
            for where in np.ndindex(*like.shape):
                seen = [float(update[name][where]) for update in updates.values()]
                assert min(seen) <= float(made[name][where]) <= max(seen), f"{name} left the span of the updates"

    def leaves_what_it_is_given(self) -> None:
        """The updates stay as they were, and share no memory with the result."""
        updates = self.updates()
        for value in self.aggregate(updates, self.weights()).values():
            value.zero_()
        for client, update in self.updates().items():
            self._same(updates[client], update)

    def _same(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        import torch

        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), f"{name} differs"


@dataclass(frozen=True)
class EngineContract:
    """What every engine of an artifact promises, on rows of its own kind.

    Labels must not depend on batch size, order, padding or threads. Scores may move by rounding.
    """

    engine: Engine
    texts: Sequence[str]
    pairs: Sequence[str] | None = None

    def check(self) -> None:
        """All promises."""
        self.answers_in_order()
        self.answers_alike_in_any_batch()
        self.answers_alike_in_any_order()
        self.answers_alike_beside_long_rows()
        self.answers_one_and_none()
        self.serves_threads()
        self.refuses_what_is_no_text()

    def answers_in_order(self) -> None:
        """One answer a row, at its place: a row asked alone is answered as it is among all."""
        all_of_them = self._answers(self.texts, self.pairs)
        assert len(all_of_them) == len(self.texts)
        for i in range(0, len(self.texts), max(1, len(self.texts) // 25)):
            self._same(all_of_them[i : i + 1], self._answers(self.texts[i : i + 1], self._pairs(slice(i, i + 1))))

    def answers_alike_in_any_batch(self) -> None:
        """No label changes between batches of 1, 7, 32 and 128 rows."""
        first, *rest = (self._answers(self.texts, self.pairs, batch) for batch in _BATCHES)
        for other in rest:
            self._same(first, other)

    def answers_alike_in_any_order(self) -> None:
        """No label changes when rows are shuffled."""
        order = np.random.default_rng(0).permutation(len(self.texts))
        texts = [self.texts[i] for i in order]
        pairs = None if self.pairs is None else [self.pairs[i] for i in order]
        usual = self._answers(self.texts, self.pairs)
        self._same([usual[i] for i in order], self._answers(texts, pairs, 7))

    def answers_alike_beside_long_rows(self) -> None:
        """No label changes when a row stands in one batch with the longest row that the model takes, and is padded."""
        long = " ".join([self.texts[0]] * (1 + self.engine.encoder.max_length))
        texts, pairs = [long, *self.texts], None if self.pairs is None else [self.pairs[0], *self.pairs]
        tokens = self.engine.encoder.encode(texts, pairs)
        padded = self.engine.run(_Padded(tokens.ids, tokens.types, tokens.offsets, int(tokens.lengths.max())), 32)
        named = self._named(padded.logits, padded.confidence, padded.tier)
        self._same(self._answers(self.texts, self.pairs), named[1:])
        self._same(self._answers(self.texts, self.pairs), self._answers(texts, pairs, len(texts))[1:])

    def answers_one_and_none(self) -> None:
        """One text, an empty one, and no text at all."""
        assert len(self._answers(self.texts[:1], self._pairs(slice(0, 1)))) == 1
        assert len(self._answers([""], None if self.pairs is None else [""])) == 1
        assert self.engine.predict([], None if self.pairs is None else []) == []

    def serves_threads(self) -> None:
        """Eight threads that share the engine, each with its own batch size, get the same answers."""
        usual = self._answers(self.texts, self.pairs)
        with ThreadPoolExecutor(_THREADS) as pool:
            asked = [pool.submit(self._answers, self.texts, self.pairs, 1 + 5 * i) for i in range(_THREADS)]
            for found in asked:
                self._same(usual, found.result())

    def refuses_what_is_no_text(self) -> None:
        """A string instead of a list, numbers, None, and a batch of nothing are OptionErrors."""
        wrong: list[tuple[Any, int | None]] = [("text", None), ([1], None), ([None], None), (list(self.texts[:1]), 0)]
        for texts, batch in wrong:
            try:
                self.engine.predict(texts, batch=batch)
            except OptionError:
                continue
            raise AssertionError(f"predict({texts!r}, batch={batch}) was not refused")

    def _answers(
        self, texts: Sequence[str], pairs: Sequence[str] | None, batch: int | None = None
    ) -> Sequence[Prediction | ScorePrediction]:
        return self.engine.predict(texts, pairs, batch)

    def _pairs(self, part: slice) -> Sequence[str] | None:
        return None if self.pairs is None else self.pairs[part]

    def _named(
        self, logits: NDArray[Any], confidence: NDArray[Any], tier: NDArray[Any]
    ) -> Sequence[Prediction | ScorePrediction]:
        names = [t.name for t in self.engine.tiers]
        return self.engine.task.predictions(logits, confidence, [names[i] for i in tier.tolist()])

    def _same(self, one: Sequence[Prediction | ScorePrediction], other: Sequence[Prediction | ScorePrediction]) -> None:
        assert len(one) == len(other)
        if isinstance(self.engine.task, Classify):
            pairs = zip(cast(Sequence[Prediction], one), cast(Sequence[Prediction], other), strict=True)
            flips = [i for i, (a, b) in enumerate(pairs) if (a.label, a.tier) != (b.label, b.tier)]
            assert not flips, f"{len(flips)} of {len(one)} answers differ, the first at row {flips[0]}"
            return
        a, b = (np.array([p.value for p in cast(Sequence[ScorePrediction], rows)]) for rows in (one, other))
        assert np.abs(a - b).max(initial=0) <= _CLOSE * max(1.0, float(np.abs(a).max(initial=0)))


@dataclass(frozen=True)
class _Padded(Tokens):
    """Rows padded to at least `width` tokens, whatever their neighbours are."""

    width: int = 0

    def take(self, rows: NDArray[np.int64]) -> Tokens:
        part = super().take(rows)
        return _Padded(part.ids, part.types, part.offsets, self.width)

    def padded(
        self, rows: NDArray[np.int64], pad: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        ids, mask, types = super().padded(rows, pad)
        wide = ((0, 0), (0, max(0, self.width - ids.shape[1])))
        return np.pad(ids, wide, constant_values=pad), np.pad(mask, wide), np.pad(types, wide)
