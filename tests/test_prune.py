"""Pruning against torch's own, closed forms and brute force; zeros stay zero, files shrink, outputs do not change."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as reference
from transformers import AutoConfig, AutoModel

from conftest import FAMILIES, net, tiny_model, tiny_rows
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import DataError, ModelError, OptionError
from netweight.export import export
from netweight.loss import Batch, Loss, Penalized, SoftTargets, Supervised, penalty
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Local
from netweight.run.federated import Client, ClientLevel, Federated, Rounds
from netweight.run.local import logits_of
from netweight.seams import Seams
from netweight.task import Score
from netweight.techniques import (
    Distill,
    EarlyExit,
    Finetune,
    Pretrain,
    Prune,
    Quantize,
    QuantizeAware,
    Static,
    SwapActivation,
    Technique,
)
from netweight.techniques.prune import Gradients, largest, largest_of_each, zeros
from netweight.testing import TechniqueContract, fresh_digest
from netweight.train import Plan
from quick import TECHNIQUES

PLAN = Plan(batch_size=16, precision="fp32")


def weights(model: Model) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in net(model).linears().items()}


def absent(model: Model) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in weights(model).items()}


def local(train: Rows) -> Local:
    return Local(Dataset(train, train, train, Sealed(tiny_rows(10))))


class Watched(Local):
    """Keeps what each fit was given."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.seen: list[tuple[float, Loss, Plan]] = []
        self.masks: list[dict[str, Tensor]] = []

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        self.seen.append((zeros(net(model).linears()), loss, plan))
        self.masks.append(absent(model))
        return super().fit(model, loss, plan, label)


@pytest.mark.parametrize(
    "technique",
    [
        Prune(0.9, importance="fisher", rows=20, epochs=1, learning_rate=1e-3),
        pytest.param(
            Prune(pattern=(2, 4), schedule="cubic", stages=2, epochs=1, penalty="group", strength=1e-4),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fisher", "pattern"],
)
def test_contract(technique: Prune, model: Model, dataset: Dataset, tmp_path: Path) -> None:
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_contract_in_every_family(family: str, dataset: Dataset, tmp_path: Path) -> None:
    technique = Prune(0.8, importance="taylor", epochs=1)
    TechniqueContract(technique, tiny_model(family=family), lambda: Local(dataset), PLAN, dataset.train.text).check(
        tmp_path
    )


@pytest.mark.parametrize("importance", ["taylor", "fisher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_by_gradients(family: str, importance: Any, dataset: Dataset) -> None:
    model = tiny_model(family=family)
    made = Prune(0.75, importance=importance, rows=8, epochs=0.2, scope="layer")(model, Local(dataset), PLAN)
    assert {float(gone.float().mean()) for gone in absent(made).values()} == {0.75}
    assert made.network.spec() == model.network.spec() | {"zeros_stay": True}


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_magnitudes_equal_torchs_global_pruning(importance: Any, model: Model, dataset: Dataset) -> None:
    made = Prune(0.37, importance=importance, epochs=0)(model, Local(dataset), PLAN)
    other = model.copy()
    layers = net(other).linears()
    assert len(layers) == 12
    reference.global_unstructured([(m, "weight") for m in layers.values()], reference.L1Unstructured, amount=0.37)
    for name, layer in layers.items():
        assert torch.equal(weights(made)[name], layer.weight), name
    untouched = {n: t for n, t in model.network.state_dict().items() if n.removesuffix(".weight") not in layers}
    assert all(torch.equal(made.network.state_dict()[n], t) for n, t in untouched.items())


def test_a_layers_own_share_equals_torchs(model: Model, dataset: Dataset) -> None:
    made = Prune(0.5, scope="layer", epochs=0)(model, Local(dataset), PLAN)
    for name, weight in weights(model).items():
        wanted = reference.l1_unstructured(nn.Linear(*weight.T.shape), "weight", 0.5, importance_scores=weight)
        assert torch.equal(~absent(made)[name], wanted.weight_mask.bool()), name


def gradients_by_hand(model: Model, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient and mean squared gradient of the first rows' cross entropy, one backward pass for each row."""
    copied = model.copy()
    tokens = model.encoder.encode(tiny_rows().take(range(rows)).text)
    targets = torch.from_numpy(model.task.targets(tiny_rows().label or ()))
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for i in range(rows):
        copied.network.zero_grad()
        given = map(torch.from_numpy, tokens.padded(np.array([i]), 0))
        F.cross_entropy(copied.network(*given), targets[i : i + 1]).backward()
        for name, layer in net(copied).linears().items():
            assert layer.weight.grad is not None
            first[name] = first.get(name, 0) + layer.weight.grad / rows
            second[name] = second.get(name, 0) + layer.weight.grad.square() / rows
    return first, second


def test_gradient_importances_equal_one_backward_for_each_row(model: Model) -> None:
    rows = tiny_rows()
    run = local(rows.take(range(12)))
    first, second = gradients_by_hand(model, 12)
    before = fresh_digest(model)
    taylor, fisher = (Prune(0.5, importance=kind).scores(model, run) for kind in ("taylor", "fisher"))  # type: ignore[arg-type]
    for name, weight in weights(model).items():
        torch.testing.assert_close(taylor[name], (weight * first[name]).abs(), atol=1e-9, rtol=1e-3)
        torch.testing.assert_close(fisher[name], weight.square() * second[name], atol=1e-12, rtol=1e-3)
    assert fresh_digest(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.network.parameters())


def test_taylor_predicts_what_removing_a_weight_costs(model: Model) -> None:
    rows = tiny_rows()
    run = local(rows.take(range(12)))
    score = Prune(0.5, importance="taylor").scores(model, run)
    tokens, targets = model.encoder.encode(rows.take(range(12)).text), model.task.targets(rows.label or ())[:12]

    def loss(given: Model) -> float:
        return float(F.cross_entropy(logits_of(given, tokens).double(), torch.from_numpy(targets)))

    name = "backbone.encoder.layer.1.output.dense"
    for at in score[name].flatten().topk(3).indices.tolist():
        cut = model.copy()
        with torch.no_grad():
            net(cut).get_submodule(name).weight.view(-1)[at] = 0  # type: ignore[operator,index]
        assert abs(loss(cut) - loss(model)) == pytest.approx(float(score[name].flatten()[at]), rel=0.25)


def test_rows_without_a_label_have_no_gradient(model: Model) -> None:
    rows = tiny_rows(12)
    ids, mask, types = map(torch.from_numpy, model.encoder.encode(rows.text).padded(np.arange(12), 0))
    targets, weight = torch.from_numpy(model.task.targets(rows.label or ())), torch.arange(1.0, 13.0)
    for squared in (False, True):
        statistic = Gradients(model.task, tuple(weights(model)), squared)
        some = statistic(model.network, Batch(ids, mask, types, targets.where(torch.arange(12) < 7, -1), weight))
        alone = statistic(model.network, Batch(ids[:7], mask[:7], types[:7], targets[:7], weight[:7]))
        for name, value in alone.items():
            torch.testing.assert_close(some[name], value, atol=1e-6, rtol=1e-3)
    run = local(rows.unlabelled())
    with pytest.raises(DataError, match="importance 'taylor' needs labels, and no row has one; use 'l1'"):
        Prune(0.5, importance="taylor")(model, run, PLAN)
    assert zeros(net(Prune(0.5, epochs=0.5)(model, run, PLAN)).linears()) == 0.5


def test_scores_have_gradients_too(dataset: Dataset) -> None:
    rows = replace(tiny_rows(16), label=tuple(str(i % 5) for i in range(16)))
    model = tiny_model(Score(mean=2.0, scale=1.5))
    run = local(rows)
    made = Prune(0.5, importance="fisher", epochs=1)(model, run, PLAN)
    assert zeros(net(made).linears()) == 0.5
    # Standardised targets below the mean are negative, and count as all others.
    targets = (torch.from_numpy(model.task.targets(rows.label or ())).float() - 2.0) / 1.5
    assert (targets < 0).any()
    found = run.reduce(model, Gradients(model.task, tuple(weights(model)), True))
    ids, mask, types = map(torch.from_numpy, model.encoder.encode(rows.text).padded(np.arange(16), 0))
    name, parameter = next(iter((n, net(model).get_parameter(f"{n}.weight")) for n in weights(model)))
    total = torch.zeros_like(parameter)
    for i in range(16):
        said = model.network(ids[i : i + 1], mask[i : i + 1], types[i : i + 1])[0, 0]
        total += torch.autograd.grad((said - targets[i]).square(), parameter)[0].square()
    torch.testing.assert_close(found[name], total, rtol=1e-3, atol=1e-9)
    assert found["labelled"] == 16


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**31))
def test_the_largest_stay(size: int, share: float, seed: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, size).astype(np.float32))
    kept = largest(scores, share)
    assert int((~kept).sum()) == round(share * size)
    assert not kept.any() or kept.all() or scores[kept].min() >= scores[~kept].max()


@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 8)]), st.integers(0, 2**31))
def test_a_pattern_keeps_the_best_of_every_group(pattern: tuple[int, int], seed: int) -> None:
    n, m = pattern
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    kept = largest_of_each(scores, n, m)
    for row in range(3):
        for start in range(0, 16, m):
            group, chosen = scores[row, start : start + m], kept[row, start : start + m]
            assert set(group[chosen].tolist()) == set(sorted(group.tolist())[m - n :])


@pytest.mark.parametrize("kind", ["l1", "l2", "group"])
def test_removed_weights_stay_exactly_zero_through_healing(kind: Any, model: Model, dataset: Dataset) -> None:
    technique = Prune(0.6, epochs=2, learning_rate=1e-2, penalty=kind, strength=1e-3)
    run = Watched(dataset)
    made = technique(model, run, replace(PLAN, weight_decay=0.1))
    assert all(torch.equal(gone, run.masks[0][name]) for name, gone in absent(made).items())
    assert not any(torch.equal(weights(made)[name], weights(model)[name]) for name in weights(model))


def shifted(seams: Seams, network: nn.Module) -> None:
    """A gradient everywhere, as noise for privacy is."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad += 0.5


def test_noise_does_not_bring_them_back(model: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seams, "correct", shifted)
    run = Watched(dataset)
    made = Prune(0.6, epochs=0.2)(model, run, PLAN)
    assert all(torch.equal(gone, run.masks[0][name]) for name, gone in absent(made).items())


LATER = [
    one for one in TECHNIQUES if type(one) in (Distill, EarlyExit, Finetune, Pretrain, QuantizeAware, SwapActivation)
]


@pytest.mark.parametrize("later", LATER, ids=lambda one: type(one).__name__)
def test_they_stay_zero_whatever_trains_the_model_later(later: Technique, model: Model, dataset: Dataset) -> None:
    pruned = Prune(0.6, epochs=0)(model, Local(dataset), PLAN)
    made = later(pruned, Local(dataset), PLAN)
    assert zeros(net(made).linears()) >= 0.5
    assert any(not torch.equal(weights(made)[name], weights(pruned)[name]) for name in weights(made))


@pytest.mark.parametrize("privacy", [None, ClientLevel(epsilon=1e7)], ids=["plain", "noise on updates"])
def test_they_stay_zero_where_others_train_it(privacy: ClientLevel | None, dataset: Dataset) -> None:
    pruned = Prune(0.6, epochs=0)(tiny_model(), Local(dataset), PLAN)
    shops = [Client(str(i), replace(dataset, train=dataset.train.take(range(4 * i, 4 * i + 4)))) for i in range(20)]
    made = Finetune(probe=False, epochs=2)(pruned, Federated(shops, rounds=Rounds(1), privacy=privacy), PLAN)
    assert all(torch.equal(gone, absent(pruned)[name]) for name, gone in absent(made).items())
    assert made.digest != pruned.digest


def test_a_pruned_model_is_saved_as_one(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    made = Prune(0.7, epochs=0)(model, Local(dataset), PLAN)
    made.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert loaded.digest == made.digest
    tuned = Finetune(epochs=1)(loaded, Local(dataset), PLAN)
    assert all(torch.equal(gone, absent(made)[name]) for name, gone in absent(tuned).items())


def test_what_lora_learns_would_fill_zeros(model: Model, dataset: Dataset) -> None:
    made = Prune(0.7, epochs=0)(model, Local(dataset), PLAN)
    with pytest.raises(OptionError, match="would fill the zeros of a pruned model; use train='full' or 'head'"):
        Finetune(train="lora")(made, Local(dataset), PLAN)


def test_the_cubic_schedule_is_zhu_and_guptas(model: Model, dataset: Dataset) -> None:
    run = Watched(dataset)
    made = Prune(0.8, schedule="cubic", stages=3, epochs=1.5)(model, run, replace(PLAN, seed=5))
    wanted = [0.8 * (1 - (1 - k / 3) ** 3) for k in (1, 2, 3)]
    assert [share for share, _, _ in run.seen] == pytest.approx(wanted, abs=1e-4)
    assert [(plan.epochs, plan.seed) for _, _, plan in run.seen] == [(0.5, 5), (0.5, 6), (0.5, 7)]
    for before, after in zip(run.masks, [*run.masks[1:], absent(made)]):
        assert all((after[name] | ~gone).all() for name, gone in before.items()), "a removed weight came back"
    # A network that is sparse already starts from there.
    again = Watched(dataset)
    Prune(0.9, schedule="cubic", stages=2, epochs=0.5)(made, again, PLAN)
    assert [share for share, _, _ in again.seen] == pytest.approx([0.9 - 0.1 / 8, 0.9], abs=1e-4)


def test_a_pattern_grows_too(model: Model, dataset: Dataset) -> None:
    run = Watched(dataset)
    made = Prune(pattern=(1, 4), schedule="cubic", stages=3, epochs=0.5)(model, run, PLAN)
    assert [share for share, _, _ in run.seen] == [0.5, 0.5, 0.75]
    for weight in weights(made).values():
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 1).all()
    with pytest.raises(OptionError, match="the weights have the pattern 1:4 already; ask for fewer of 4"):
        Prune(pattern=(1, 4))(made, run, PLAN)
    with pytest.raises(OptionError, match=r"75.0% of the weights are zero already; sparsity 0.75 would remove none"):
        Prune(0.75)(made, run, PLAN)


def test_healing_brings_the_model_closer_and_reads_rows_without_labels(model: Model, dataset: Dataset) -> None:
    model = Finetune(epochs=3, learning_rate=2e-3)(model, Local(dataset), PLAN)
    rows = tiny_rows(80)
    run = Watched(replace(dataset, train=rows.take(range(20)), pool=rows.take(range(20, 80)).unlabelled()))
    tokens = model.encoder.encode(tiny_rows().text)
    hurt = Prune(0.9, epochs=0)(model, run, PLAN)
    assert not run.seen
    healed = Prune(0.9, epochs=4, learning_rate=3e-3)(model, run, PLAN)
    (_, loss, _) = run.seen[0]
    assert isinstance(loss, SoftTargets)
    assert loss.unlabelled
    assert loss.teachers[0].digest == model.digest
    # Only differences of logits count: the teacher's have a large common part.
    wanted, *found = (logits_of(m, tokens).diff(dim=1) for m in (model, hurt, healed))
    gap = [float((said - wanted).square().mean()) for said in found]
    assert gap[1] < 0.5 * gap[0], gap
    assert all(p.requires_grad for p in healed.network.parameters())


def test_files_shrink_and_int8_ones_do_so_too(dataset: Dataset, tmp_path: Path) -> None:
    from netweight.engine.onnx import OnnxEngine
    from netweight.packing import unpacked_file

    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bert", vocab_size=25, max_position_embeddings=40, **sizes)
    model = tiny_model().with_network(Transformer(AutoModel.from_config(config), 2, "mean").eval())
    run = Local(dataset)
    made = Prune(0.9, epochs=0)(model, run, PLAN)
    linear = sum(4 * weight.numel() for weight in weights(model).values())
    saved = [_saved(m, tmp_path / name) for name, m in (("dense", model), ("pruned", made))]
    # A tenth of the values and a bit for each place.
    assert saved[0] - saved[1] == pytest.approx(linear * (1 - 0.1 - 1 / 32), rel=0.03)
    tokens = made.encoder.encode(dataset.train.text)
    dense, sparse = (export(Quantize(rows=40)(m, run, PLAN)) for m in (model, made))
    assert sparse.options == {"packed": True}
    assert len(dense.data) - len(sparse.data) > 0.6 * linear / 4
    engine = OnnxEngine(unpacked_file(sparse.data), made.encoder.pad, 1)
    np.testing.assert_allclose(engine.logits(tokens, 16), logits_of(made, tokens), atol=0.05)


def _saved(model: Model, folder: Path) -> int:
    model.save(folder)
    return (folder / "model.safetensors").stat().st_size


def test_nothing_outside_is_touched(model: Model, dataset: Dataset) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    Prune(0.5, importance="taylor", epochs=0.5)(model, Local(dataset), PLAN)
    assert torch.equal(torch.rand(1), wanted)


def test_the_pages_code_runs(model: Model, dataset: Dataset) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "techniques" / "prune.md"
    run = local(tiny_rows(24))
    scope: dict[str, Any] = {"model": model, "run": run, "plan": PLAN}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), scope)
    assert zeros(net(scope["pruned"]).linears()) == pytest.approx(0.7, abs=1e-4)
    assert zeros(net(scope["pattern"]).linears()) == 0.5


# --- penalties ---


def test_penalties_equal_their_formulas() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    assert penalty(weight, "l1").item() == 8
    assert penalty(weight, "l2").item() == 26
    assert penalty(weight, "group").item() == pytest.approx(2**0.5 * (5 + 0 + 1))
    penalty(weight, "group").backward()
    wanted = 2**0.5 * torch.tensor([[0.6, -0.8], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(weight.grad, wanted)


def test_a_penalty_is_added_and_the_rest_is_the_loss_it_wraps(model: Model, dataset: Dataset) -> None:
    inner = SoftTargets(model.task, (model,))
    name = "backbone.encoder.layer.0.output.dense.weight"
    loss = Penalized(inner, "l1", 0.5, (name,))
    assert loss.teachers == (model,)
    assert loss.unlabelled
    assert not Penalized(Supervised(model.task), "l1", 0.5, (name,)).unlabelled
    found: list[Tensor] = []

    class Ask:
        combine = "sum"

        def __call__(self, network: nn.Module, batch: Any) -> dict[str, Tensor]:
            batch = replace(batch, teachers=(torch.zeros(len(batch), 2),))
            found.extend([inner(network, batch), loss(network, batch)])
            with pytest.raises(ModelError, match="a penalty names tail.weight, which the network does not have"):
                Penalized(inner, "l2", 1.0, ("tail.weight",))(network, batch)
            return {}

    Local(replace(dataset, train=dataset.train.take(range(8)))).reduce(model, Ask())  # type: ignore[arg-type]
    added = 0.5 * model.network.get_parameter(name).abs().sum()
    torch.testing.assert_close(found[1], found[0] + added)


def test_a_penalty_shrinks_what_it_names(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    sizes = []
    for strength in (1e-4, 1.0):
        made = Prune(0.5, epochs=2, learning_rate=1e-2, penalty="group", strength=strength)(model, run, PLAN)
        sizes.append(sum(float(penalty(w, "group")) for w in weights(made).values()))
    assert sizes[1] < 0.9 * sizes[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give sparsity or pattern, one of them"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "give sparsity or pattern, one of them"),
        ({"sparsity": 1.0}, "sparsity is 1.0; it must lie between 0 and 1"),
        ({"pattern": (4, 4)}, r"pattern 4:4 is none; keep n of m weights with 1 <= n < m, as in \(2, 4\)"),
        ({"pattern": (0, 0)}, "pattern 0:0 is none"),
        ({"pattern": (2, 4), "scope": "layer"}, "scope 'layer' does not apply to a pattern"),
        ({"sparsity": 0.5, "importance": "l3"}, "unknown importance 'l3'; use one of l1, l2, taylor, fisher"),
        ({"sparsity": 0.5, "scope": "world"}, "unknown scope 'world'; use one of global, layer"),
        ({"sparsity": 0.5, "schedule": "slow"}, "unknown schedule 'slow'; use one of oneshot, cubic"),
        ({"sparsity": 0.5, "penalty": "l0"}, "unknown penalty 'l0'; use one of none, l1, l2, group"),
        ({"sparsity": 0.5, "epochs": -1}, "epochs of healing are -1; use 0 for none, or more"),
        ({"sparsity": 0.5, "schedule": "cubic", "epochs": 0}, "a cubic schedule heals between its stages"),
        ({"sparsity": 0.5, "stages": 3}, "one shot has no stages, but stages is 3; use schedule='cubic'"),
        ({"sparsity": 0.5, "schedule": "cubic", "stages": 1}, "stages is 1; a cubic schedule has 2 or more"),
        ({"sparsity": 0.5, "rows": 9}, "rows does not apply to importance 'l1', which reads none"),
        ({"sparsity": 0.5, "rows": 0, "importance": "taylor"}, "rows is 0; an importance must see one row or more"),
        ({"sparsity": 0.5, "penalty": "l1"}, "penalty 'l1' with strength 0.0: give both or none"),
        ({"sparsity": 0.5, "strength": 1.0}, "penalty 'none' with strength 1.0: give both or none"),
        ({"sparsity": 0.5, "penalty": "l1", "strength": -1.0}, "strength of the penalty is -1.0; use a number above 0"),
        ({"sparsity": 0.5, "penalty": "l1", "strength": 1.0, "epochs": 0}, "a penalty is part of the healing loss"),
    ],
)
def test_options_that_do_not_apply_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Prune(**options)


def test_refusals(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    with pytest.raises(OptionError, match=r"pattern 2:5 needs inputs in 5s, but backbone\.\S+\.query has 32"):
        Prune(pattern=(2, 5))(model, run, PLAN)
    with pytest.raises(ModelError, match="Prune works on a transformer; this model's network is Static"):
        Prune(0.5)(Static(width=4, buckets=8, epochs=1)(model, run, PLAN), run, PLAN)
