"""One process that owns all rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from netweight.data import Dataset, Rows, concat
from netweight.data.files import atomic, beside
from netweight.data.rows import MOST_SAID
from netweight.encode import MOST_TOKENS, TextEncoder, Tokens
from netweight.errors import OptionError, RunError
from netweight.loss import Batch, Loss
from netweight.matching import placed
from netweight.model import Model
from netweight.run.base import Statistic, merge
from netweight.run.group import device_of
from netweight.seams import Seams
from netweight.task import Classify
from netweight.train import Plan, fit, fit_digest, half_pays

_CHUNK = 64
# Rows in one pass of a teacher, and seconds between saves of its logits so far: labelling a large pool takes hours.
# The pass has a fixed size, not one by the clock: the last bits of a row's logits depend on the rows beside it.
_ASKED, _OFTEN = 2048, 60.0
_LABELLING = 0.25  # of a fit's time box that labels of spliced rows may take
# In a time box in which real rows would be seen less often than this, spliced ones take more than they bring: half of
# an encoder, trained for 110 s on BANKING77, agreed with its teacher on 93.4 % of dev without them, 92.4 % with them.
_PASSES = 4
# Where a box has fewer steps, batches are halved, down to so many rows and tokens: smaller ones cost more than their
# share. On BANKING77 32 rows instead of 128 gave 94.3 %.
_STEPS, _ROWS, _TOKENS = 500, 16, 500
# Times that a token costs in training what it costs to run: counted on students of BANKING77, in batches of 32.
_TRAINED = 5
# Tokens of a spliced row, at most. What a teacher says of few tokens tells more of each, and costs less: students of
# long reviews learnt more from stretches of 32 tokens than from halves of whole rows.
_STRETCH = 32


class Local:
    """Trains and adds up in this process.

    Args:
        data: train rows (labelled) and pool (not), of which teachers label `Dataset.taught`; `select` serves early
            stopping.
        folder: where checkpoints and teachers' outputs are kept, so that a killed fit goes on, and one that has ended
            gives its result again (until `forget`); None keeps nothing.
        seams: where other runs step into the loop; None: one process alone, on a graphics card where there is one.
    """

    def __init__(self, data: Dataset, folder: str | Path | None = None, seams: Seams | None = None) -> None:
        self.data = data
        self.folder = None if folder is None else Path(folder)
        self.seams = seams or Seams(device_of(0))
        self._tokens: dict[tuple[str, int, int], Tokens] = {}

    @cached_property
    def taught(self) -> Dataset:
        """The rows that teachers label."""
        return self.data.taught()

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        """A trained copy of `model`. What teachers say of the rows is computed first, in the plan's precision, and
        counts in `plan.seconds` where it was not asked for before (`outputs`)."""
        began = time.monotonic()
        plan = replace(plan, limit=plan.limit or plan.seconds)
        new = model.copy()
        frozen = [name for name, p in model.network.named_parameters() if not p.requires_grad]
        data = self.taught if loss.teachers else self.data
        tokens = self._encoded(model.encoder, data, loss.unlabelled)
        half = plan.precision != "fp32"
        teachers = tuple(self.outputs(teacher, loss.unlabelled, half) for teacher in loss.teachers)
        if plan.splice:
            if not teachers:
                raise OptionError("spliced rows have no labels; only a loss with teachers can use them.")
            if any(t.encoder.definition != model.encoder.definition for t in loss.teachers):
                raise OptionError("spliced rows are token ids: teachers must share the vocabulary; use splice=0.")
            longest = min(_STRETCH, model.encoder.max_length, *(t.encoder.max_length for t in loss.teachers))
            plan = _paced(plan, tokens, longest, self._affordable(model, loss, tokens, plan, began))
            added = self._spliced(model, loss, tokens, plan, longest)
            said = [self._kept(t, added, loss.unlabelled, half, _drawn(plan, longest)) for t in loss.teachers]
            teachers = tuple(torch.cat(pair) for pair in zip(teachers, said, strict=True))
            every = tokens.joined(added)
            plan = replace(plan, epochs=plan.epochs * len(tokens.ids) / len(every.ids))
            tokens = every
        source = _Source(tokens, data.train, model, teachers)
        digest = fit_digest(
            {
                "model": model.digest,
                "loss": repr(loss),
                "teachers": [t.digest for t in loss.teachers],
                "plan": plan.describe(),
                "frozen": frozen,
                "data": data.fingerprint,
            }
            | ({"seams": terms} if (terms := self.seams.terms) else {})
        )
        if plan.seconds:
            plan = replace(plan, seconds=max(plan.seconds - (time.monotonic() - began), 1.0))
        checkpoint = (self.folder / f"fit-{digest[:16]}.safetensors", digest) if self.folder else None
        told = float(int(fit_digest({"model": model.digest, "plan": plan.describe(), "frozen": frozen})[:12], 16))
        if self.seams.agree(told) != told:
            raise RunError("processes of one run were given different models or plans; seeds and inputs must be equal.")
        fit(
            new.network,
            source,
            placed(loss, self.seams.device),
            plan,
            seams=self.seams,
            evaluate=lambda: self.quality(new),
            checkpoint=checkpoint,
            label=label,
        )
        return new

    def forget(self) -> None:
        """Delete the checkpoints of all fits in the folder, also of one that was broken off: what they gave is saved
        elsewhere by now."""
        if self.seams.first:
            forget(self.folder)

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        """The statistic over the training rows and, with `unlabelled`, the pool (over `limit` rows, evenly spaced)."""
        source = _Source(self._encoded(model.encoder, self.data, unlabelled), self.data.train, model, ())
        n = len(source)
        chosen = np.arange(n) if limit is None or limit >= n else np.linspace(0, n - 1, limit).astype(np.int64)
        chosen = chosen[np.argsort(source.tokens.lengths[chosen], kind="stable")]
        rng, device = np.random.default_rng(0), self.seams.device
        parts: dict[str, Tensor] = {}
        starts = range(0, len(chosen), _CHUNK)
        network = model.on(device).network
        with torch.no_grad():
            for start in starts[self.seams.stretch(len(starts))]:
                part = statistic(network, source.batch(chosen[start : start + _CHUNK], rng, 0.0).to(device))
                parts = merge(statistic, [parts, part])
        return merge(statistic, [{n: t.cpu() for n, t in part.items()} for part in self.seams.collect(parts)])

    def outputs(self, model: Model, unlabelled: bool = False, half: bool = False) -> Tensor:
        """Logits of the taught rows of train (and of pool behind them), computed once per content of the model; with
        `half` in bf16 where that pays, which is good enough for what students learn from."""
        return self._kept(model, self._encoded(model.encoder, self.taught, unlabelled), unlabelled, half, {})

    def _once(self, kind: str, named: dict[str, Any], plan: Plan, decide: Callable[[], float]) -> float:
        """A number that a clock decides, decided once for each fit and `limit` and kept in the folder: a fit that is
        resumed trains on the same rows, in the same batches. `kind` and `named` make the file's name."""
        named = {**named, "plan": plan.describe(), "limit": plan.limit}
        kept = self.folder and self.folder / f"{kind}-{fit_digest(named)[:16]}.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept and self.seams.first and kept.exists() else -1.0
        if (known := self.seams.agree(known)) >= 0:
            return known
        found = self.seams.agree(decide())
        if kept and self.seams.first:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic(kept) as out:
                out.write(json.dumps(found).encode())
        return found

    def _affordable(self, model: Model, loss: Loss, tokens: Tokens, plan: Plan, began: float) -> float:
        """How many training tokens, each counted once an epoch, the rest of a fit's time box pays for: a forward pass
        over a few rows is timed. Infinite without a time box, without rows, and for a part of a schedule."""
        if not plan.seconds or not len(tokens) or plan.part != (0.0, 1.0):
            return math.inf
        seconds, mine = plan.seconds, np.arange(len(tokens))[self.seams.stretch(len(tokens))]
        few = tokens.take(np.linspace(0, len(tokens) - 1, min(_CHUNK, len(tokens))).astype(np.int64))

        def decide() -> float:
            student, half = model.on(self.seams.device), plan.precision != "fp32" and half_pays(self.seams.device)
            for _ in range(2):  # the first time, memory is taken and kernels are chosen
                now = time.monotonic()
                logits_of(student, few, half)
            took, filled = time.monotonic() - now, len(few) * int(few.lengths.max())  # tokens, padding too
            left = max(seconds - (time.monotonic() - began), 0.0)
            # Processes that share the rows are as many times as fast.
            return left * filled / (_TRAINED * max(took, 1e-9)) * len(tokens) / max(len(mine), 1)

        digests = [t.digest for t in loss.teachers]
        named = {"model": model.digest, "loss": repr(loss), "teachers": digests, "data": self.taught.fingerprint}
        return self._once("affordable", named, plan, decide)

    def _spliced(self, model: Model, loss: Loss, tokens: Tokens, plan: Plan, longest: int) -> Tokens:
        """Rows of at most `longest` tokens, spliced of the texts whose `tokens` the model reads; none of pairs. As many
        as the plan asks for, or fewer where their logits would be too many (`MOST_SAID`), or where a few of them tell
        that labelling would eat the time box. What is labelled already, for another fit, costs nothing."""
        if not len(tokens) or self.taught.train.pair is not None:
            return spliced(tokens, 0, longest, plan.seed)
        # The whole texts, whatever this model reads of them, so that students of every kind share what is said.
        whole = int(tokens.lengths.max(initial=0)) < model.encoder.max_length
        texts = tokens if whole else self._encoded(model.encoder.reading(MOST_TOKENS), self.taught, loss.unlabelled)
        mean = float(np.minimum(texts.lengths, longest).mean())
        room = max(MOST_SAID // model.task.outputs - len(texts), 0)
        count = min(round(plan.splice * len(texts)), int(plan.spliced_tokens / mean), room)
        if not plan.seconds or not count:
            return spliced(texts, count, longest, plan.seed)
        digests = [t.digest for t in loss.teachers]
        named = {"model": model.digest, "teachers": digests, "data": self.taught.fingerprint, "longest": longest}
        seconds, half = plan.seconds, plan.precision != "fp32"

        def decide() -> float:
            few = spliced(texts, _CHUNK, longest, plan.seed)
            teachers = [teacher.on(self.seams.device) for teacher in loss.teachers]
            for _ in range(2):
                began = time.monotonic()
                for teacher in teachers:
                    logits_of(teacher, few, half and half_pays(self.seams.device))
                each = (time.monotonic() - began) / len(few)
            free = min(_rows_of(self._file(t, loss.unlabelled, half, _drawn(plan, longest))) for t in loss.teachers)
            return min(count, free + int(_LABELLING * seconds / max(each, 1e-9)))

        return spliced(texts, int(self._once("spliced", named, plan, decide)), longest, plan.seed)

    def _kept(self, model: Model, tokens: Tokens, unlabelled: bool, half: bool, key: dict[str, Any]) -> Tensor:
        """The model's logits of these rows; `key` names a sequence of rows that are not those of the data, of which
        more may be asked for another time. What was said before a kill is not asked for again."""
        kept = self._file(model, unlabelled, half, key)
        known = min(int(self.seams.agree(_rows_of(kept))), len(tokens))
        before = load_file(kept)["logits"][:known] if kept and known else torch.zeros(0, model.task.outputs)
        if known == len(tokens):
            return before
        logits = torch.empty(len(tokens), model.task.outputs)  # of thousands of labels too large to be copied often
        logits[:known] = before
        del before
        model, half, written = model.on(self.seams.device), half and half_pays(self.seams.device), time.monotonic()
        for begin in range(known, len(tokens), _ASKED):
            end = min(begin + _ASKED, len(tokens))
            logits[begin:end] = self._said(model, tokens.take(np.arange(begin, end)), half)
            enough = end == len(tokens) or time.monotonic() - written >= _OFTEN
            if kept and enough and self.seams.first:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with beside(kept) as new:
                    save_file({"logits": logits[:end]}, new)
                written = time.monotonic()
        return logits

    def _file(self, model: Model, unlabelled: bool, half: bool, key: dict[str, Any]) -> Path | None:
        """Where the model's logits of the data's rows, or of those that `key` names, are kept."""
        named = {"model": model.digest, "data": self.taught.fingerprint, "pool": unlabelled, "half": half, **key}
        return self.folder and self.folder / f"outputs-{fit_digest(named)[:16]}.safetensors"

    def quality(self, model: Model) -> float:
        """The task's metric on the select rows."""
        rows = self.data.select
        logits = self._said(model, model.encoder.encode(rows.text, rows.pair)).numpy()
        return float(model.task.quality(model.task.outcomes(logits, model.task.targets(rows.label or ()))))

    def _said(self, model: Model, tokens: Tokens, half: bool = False) -> Tensor:
        """Outputs of the model, each process those of its own stretch of the rows."""
        mine = np.arange(len(tokens))[self.seams.stretch(len(tokens))]
        part = logits_of(model.on(self.seams.device), tokens.take(mine) if len(mine) < len(tokens) else tokens, half)
        return torch.cat([found["logits"] for found in self.seams.collect({"logits": part})])

    def _encoded(self, encoder: TextEncoder, data: Dataset, unlabelled: bool) -> Tokens:
        """The training rows of `data`, which is all of this run's or what of it teachers label; and the pool."""
        pool = data.pool if unlabelled else None
        key = (encoder.fingerprint, len(data.train), len(pool or ()))
        if key not in self._tokens:
            rows = _joined(data.train, pool)
            self._tokens[key] = encoder.encode(rows.text, rows.pair)
        return self._tokens[key]


def forget(folder: Path | None) -> None:
    """Delete the checkpoints of fits in a folder."""
    if folder is not None:
        for left in folder.glob("fit-*.safetensors"):
            left.unlink(missing_ok=True)


def logits_of(model: Model, tokens: Tokens, half: bool = False) -> Tensor:
    """Outputs (n, outputs) of a model, batched by length, in order; in fp32, or with `half` in bf16 where that is
    good enough (targets of students)."""
    out, device = torch.zeros(len(tokens), model.task.outputs), next(model.network.parameters()).device
    model.network.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        for rows in tokens.buckets(_CHUNK):
            given = (torch.from_numpy(part).to(device) for part in tokens.padded(rows, model.encoder.pad))
            out[torch.from_numpy(rows)] = model.network(*given).float().cpu()
    return out


def _paced(plan: Plan, tokens: Tokens, longest: int, affordable: float) -> Plan:
    """The plan, without spliced rows where so many tokens are few passes over those of the rows, and with smaller
    batches where they are few steps. The rate falls with the root of their size, as Adam's should (Malladi et al.,
    NeurIPS 2022)."""
    if affordable < _PASSES * len(tokens.ids):
        plan = replace(plan, splice=0.0)
    mean, size = max(float(tokens.lengths.mean()), 1.0) if len(tokens) else 1.0, plan.batch_size
    mean = (mean + plan.splice * min(mean, longest)) / (1 + plan.splice)
    while size >= 2 * max(_ROWS, _TOKENS / mean) and affordable < _STEPS * mean * size * plan.accumulate:
        size //= 2
    return replace(plan, batch_size=size, learning_rate=plan.learning_rate * math.sqrt(size / plan.batch_size))


def _drawn(plan: Plan, longest: int) -> dict[str, Any]:
    """Names the sequence of spliced rows that a plan draws from."""
    return {"spliced": plan.seed, "longest": longest}


def _rows_of(kept: Path | None) -> int:
    """How many rows a file of outputs holds."""
    if kept is None or not kept.exists():
        return 0
    try:
        with safe_open(kept, framework="pt") as file:
            return int(file.get_slice("logits").get_shape()[0])
    except SafetensorError:
        return 0  # damaged; it is made anew


def spliced(texts: Tokens, count: int, longest: int, seed: int) -> Tokens:
    """`count` rows of at most `longest` tokens, each made of the beginning of one text and the end of another, cut at
    random; of a text that is longer, a stretch from anywhere in it stands for it. They are the first of one sequence,
    whatever their number.
    """
    within = np.minimum(texts.lengths, longest)
    # Row by row, and cuts and places from generators of their own: more rows begin with the same ones.
    first, second = np.random.default_rng([seed, 2]).integers(0, max(1, len(texts)), (count, 2)).T
    begins, ends = np.random.default_rng([seed, 3]).random((count, 2)).T
    before, behind = np.random.default_rng([seed, 4]).random((count, 2)).T
    # At least the first token of one and the last of the other stay: [CLS] and [SEP].
    head = 1 + (begins * (within[first] - 1)).astype(np.int64)
    tail = 1 + (ends * (within[second] - 1)).astype(np.int64)
    most = int(within.max(initial=0))
    tail = np.minimum(tail, most - 1)
    head = np.minimum(head, most - tail)
    # Tokens left out behind the first one, and before the last.
    before = (before * (texts.lengths[first] - within[first] + 1)).astype(np.int64)
    behind = (behind * (texts.lengths[second] - within[second] + 1)).astype(np.int64)
    lengths = head + tail
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    left = np.repeat(lengths, lengths) - at
    begin = np.repeat(texts.offsets[:-1][first], lengths) + at + np.where(at > 0, np.repeat(before, lengths), 0)
    end = np.repeat(texts.offsets[1:][second], lengths) - left - np.where(left > 1, np.repeat(behind, lengths), 0)
    ids = texts.ids[np.where(at < np.repeat(head, lengths), begin, end)]
    return Tokens(ids, np.zeros(len(ids), np.uint8), offsets)


def _joined(train: Rows, pool: Rows | None) -> Rows:
    if not pool:
        return train
    one, other = (replace(rows, label=None, group=None, weight=None, slices={}) for rows in (train, pool))
    return concat(one, other)


class _Source:
    """Training rows as the loop draws them: shuffled, then bucketed by length within stretches of 20 batches."""

    def __init__(self, tokens: Tokens, rows: Rows, model: Model, teachers: tuple[Tensor, ...]) -> None:
        self.tokens, self.teachers, self.pad = tokens, teachers, model.encoder.pad
        labels = rows.label or ()
        task = model.task
        if isinstance(task, Classify):
            known = torch.from_numpy(task.targets(labels))
            self.targets = torch.full((len(tokens),), -1)
        else:
            known = torch.from_numpy((task.targets(labels) - task.mean) / task.scale).float()
            self.targets = torch.full((len(tokens),), float("nan"))
        self.targets[: len(known)] = known
        self.weight = torch.ones(len(tokens))
        if rows.weight is not None:
            self.weight[: len(rows.weight)] = torch.tensor(rows.weight)

    def __len__(self) -> int:
        return len(self.tokens)

    def epoch(self, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        order = rng.permutation(len(self))
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(order), 20 * size):
            stretch = order[start : start + 20 * size]
            stretch = stretch[np.argsort(self.tokens.lengths[stretch], kind="stable")]
            batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        ids, mask, types = self.tokens.padded(rows, self.pad)
        if hide:
            # The first token stays: a row must keep something to attend to.
            gone = (rng.random(mask.shape) < hide) & (np.arange(mask.shape[1]) > 0)
            mask = np.where(gone, 0, mask)
        at = torch.from_numpy(rows)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            torch.from_numpy(types),
            self.targets[at],
            self.weight[at],
            tuple(t[at] for t in self.teachers),
        )
