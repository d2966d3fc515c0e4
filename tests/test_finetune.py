"""All ways of fine-tuning: what moves, what each loss is by its paper's formula, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import FAMILIES, Asked, net, tiny_model, tiny_rows
from netweight.anatomy import blocks
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import ModelError, OptionError
from netweight.layers import LowRank
from netweight.loss import Batch, Supervised
from netweight.model import Model
from netweight.objectives import Adversarial, RDrop, embeddings_moved, inner
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.task import Classify, Score
from netweight.techniques import Finetune, Quantize, QuantizeAware, Shrink, Static
from netweight.techniques.finetune import LabelCounts, inverse_frequencies
from netweight.techniques.lora import adapt, merge
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
WITHOUT_DROPOUT = ("modernbert", "qwen3")
WAYS = {
    "head": Finetune(epochs=1, learning_rate=1e-2, train="head"),
    "lora": Finetune(epochs=1, learning_rate=1e-3, train="lora", rank=2, alpha=4.0),
    "r-drop": Finetune(epochs=1, learning_rate=1e-3, regularizer="r-drop", kl_weight=0.5),
    "penalty": Finetune(epochs=1, learning_rate=1e-3, penalty="group", strength=1e-4),
    "adversarial": Finetune(epochs=1, learning_rate=1e-3, regularizer="adversarial", epsilon=0.05, class_weights=True),
}


def moved(before: Model, after: Model) -> set[str]:
    was, now = before.network.state_dict(), after.network.state_dict()
    assert list(was) == list(now)
    return {name for name in was if not torch.equal(was[name], now[name])}


def some(model: Model, targets: Tensor | None = None, weight: Tensor | None = None) -> Batch:
    tokens = model.encoder.encode(tiny_rows(5).text)
    ids, mask, types = map(torch.from_numpy, tokens.padded(torch.arange(5).numpy(), 0))
    targets = torch.tensor([0, 1, 1, 0, 1]) if targets is None else targets
    return Batch(ids, mask, types, targets, torch.ones(5) if weight is None else weight)


@pytest.mark.parametrize(("labels", "rows"), [(2, 2000), (77, 7700), (1500, 10_000)])
def test_a_probe_looks_at_so_many_rows_at_most_and_in_the_time_box(
    labels: int, rows: int, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(Classify(("good", "bad", *map(str, range(2, labels)))))
    run, now = Asked(dataset), [0.0]
    monkeypatch.setattr("netweight.techniques.finetune.time", SimpleNamespace(monotonic=lambda: now[0]))

    def probed(*_: object) -> None:
        now[0] += 30.0

    monkeypatch.setattr("netweight.techniques.finetune.set_probe", probed)
    for seconds in (None, 100.0, 20.0):
        Finetune()(model, run, replace(PLAN, seconds=seconds))
    assert run.limits == [rows] * 3
    assert [plan.seconds for *_, plan in run.fits] == [None, 70.0, 1.0]


@pytest.mark.parametrize("way", [pytest.param(w, marks=[] if w == "lora" else [pytest.mark.slow]) for w in WAYS])
def test_contract(way: str, dataset: Dataset, tmp_path: Path) -> None:
    TechniqueContract(WAYS[way], tiny_model(), lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
@pytest.mark.parametrize("way", WAYS)
def test_contract_in_every_family(way: str, family: str, dataset: Dataset, tmp_path: Path) -> None:
    run = lambda: Local(dataset)  # noqa: E731
    if way == "r-drop" and family in WITHOUT_DROPOUT:
        with pytest.raises(OptionError, match=f"two passes under dropout, and this {family} has none"):
            WAYS[way](tiny_model(family=family), run(), PLAN)
        return
    TechniqueContract(WAYS[way], tiny_model(family=family), run, PLAN, dataset.train.text).check(tmp_path)


def test_what_quantization_knew_is_dropped(dataset: Dataset) -> None:
    run = Local(dataset)
    before = QuantizeAware(Quantize(rows=16, weight_bits=4), epochs=0.1)(tiny_model(layers=1), run, PLAN)
    assert before.ranges
    assert before.weights
    made = Finetune(epochs=1)(before, run, PLAN)
    assert not made.ranges
    assert not made.weights
    assert before.ranges, "the given model keeps its own"


def test_the_head_alone_moves(dataset: Dataset) -> None:
    model = tiny_model()
    made = WAYS["head"](model, Local(dataset), PLAN)
    assert moved(model, made) == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in made.network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_move_the_layers_they_stand_beside_and_the_head(family: str, dataset: Dataset) -> None:
    model = tiny_model(family=family, layers=1)
    made = replace(WAYS["lora"], epochs=1.0)(model, Local(dataset), PLAN)
    (block,) = blocks(net(model))
    linears = {f"{name}.weight" for name in (*block.qkv, block.out, *block.up, block.down)}
    assert moved(model, made) == {*linears, "head.weight", "head.bias"}
    assert [type(m) for m in made.network.modules()] == [type(m) for m in model.network.modules()]
    assert all(p.requires_grad for p in made.network.parameters())
    assert not hasattr(made.network, "peft_config")
    change = made.network.state_dict()[f"{block.out}.weight"] - model.network.state_dict()[f"{block.out}.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2


def test_adapters_say_what_their_formula_says_before_and_after_merging() -> None:
    model = tiny_model()
    name = blocks(net(model))[0].down
    plain = net(model).get_submodule(name).weight.detach().clone()
    adapted = model.copy()
    adapt(net(adapted), 3, 12.0)
    tokens = model.encoder.encode(tiny_rows(6).text)
    assert torch.equal(logits_of(model, tokens), logits_of(adapted, tokens)), "an adapter starts at zero"
    layer = net(adapted).get_submodule(name)
    torch.nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[index,union-attr]
    a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach() for x in "AB")
    before = logits_of(adapted, tokens)
    merge(net(adapted))
    torch.testing.assert_close(net(adapted).get_submodule(name).weight.detach(), plain + 12 / 3 * b @ a)
    torch.testing.assert_close(logits_of(adapted, tokens), before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, logits_of(model, tokens), atol=1e-3)


def test_adapters_of_another_alpha_are_another_fit() -> None:
    digests = set()
    for alpha in (16.0, 64.0):
        model = tiny_model()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapt(net(model), 4, alpha)
        digests.add(replace(model).digest)
        merge(net(model))
        assert replace(model).digest == tiny_model().digest, "nothing of it is left"
    assert len(digests) == 2


def test_adapters_stand_inside_what_was_factored(dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(layers=1)
    name = blocks(net(model))[0].up[0]
    net(model).replace(name, LowRank(32, 4, 64, True))
    made = WAYS["lora"](model, Local(dataset), PLAN)
    assert {f"{name}.down.weight", f"{name}.up.weight"} < moved(model, made)
    made.save(tmp_path)
    assert Model.load(tmp_path).digest == made.digest


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns(way: str, dataset: Dataset) -> None:
    run = Local(dataset)
    # Without the probe, which solves these rows by itself.
    rate, frozen = {"head": (5e-2, True), "lora": (1e-2, True)}.get(way, (5e-3, False))
    made = replace(WAYS[way], epochs=6, learning_rate=rate, probe=False, freeze_embeddings=frozen)
    assert run.quality(made(tiny_model(), run, PLAN)) >= 0.9


def test_smoothing_and_class_weights_reach_the_loss(dataset: Dataset) -> None:
    seen = []

    class Kept(Local):
        def fit(self, *given: Any) -> Model:
            seen.append(given[1])
            return cast(Model, given[0])

    Finetune(epochs=1, smoothing=0.2, class_weights=True)(tiny_model(), Kept(dataset), PLAN)
    (loss,) = seen
    assert loss.smoothing == 0.2
    assert loss.class_weights == pytest.approx((1.0, 1.0)), "both labels have as many rows"


def test_class_weights_are_torchs() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    batch = Batch(logits, logits, logits, targets, torch.ones(5))
    found = Supervised(Classify(("a", "b")), 0.1, class_weights=(0.5, 1.5)).of(logits, batch)
    per_row = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    w = torch.tensor([0.5, 1.5])[targets]
    torch.testing.assert_close(found, (per_row * w).sum() / w.sum())
    found = Supervised(Classify(("a", "b")), class_weights=(0.5, 1.5)).of(logits, batch)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, weight=torch.tensor([0.5, 1.5])))
    unlabelled = Batch(logits, logits, logits, torch.full((5,), -1), torch.ones(5))
    assert Supervised(Classify(("a", "b")), class_weights=(0.5, 1.5)).of(logits, unlabelled) == 0


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=30))
def test_inverse_frequencies_balance_the_labels(counts: list[int]) -> None:
    weights = torch.tensor(inverse_frequencies(torch.tensor(counts, dtype=torch.double)), dtype=torch.double)
    mass = weights * torch.tensor(counts)
    assert float(weights.mean()) == pytest.approx(1)
    assert mass.tolist() == pytest.approx([float(mass[0])] * len(counts))


def test_labels_are_counted_and_rare_ones_count_for_more() -> None:
    rows = tiny_rows(60)
    kept = [i for i, label in enumerate(rows.label or ()) if label == "bad" or i % 10 == 0]
    few = rows.take(kept)
    data = Dataset(few, rows.take(range(10)), rows.take(range(10, 20)), Sealed(rows.take(range(20, 30))))
    model, run = tiny_model(), Local(data)
    assert run.reduce(model, LabelCounts(2))["rows"].tolist() == [30, 6]
    plain = Finetune(epochs=1, probe=False)
    made, weighted = (t(model, run, PLAN) for t in (plain, replace(plain, class_weights=True)))
    tokens = model.encoder.encode(rows.text)
    leaning = [float((x := logits_of(m, tokens))[:, 1].sub(x[:, 0]).mean()) for m in (made, weighted)]
    assert leaning[1] > leaning[0]


def test_r_drop_is_its_formula() -> None:
    model, score = tiny_model(), tiny_model(Score())
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])
    for m, targets in ((model, None), (score, torch.tensor([0.5, -1.0, 2.0, float("nan"), 0.0]))):
        batch, network = some(m, targets, weight), m.network.train()
        given = (batch.ids, batch.mask, batch.types)
        base = Supervised(m.task)
        torch.manual_seed(3)
        found = RDrop(base, 0.7)(network, batch)
        torch.manual_seed(3)
        one, two = network(*given), network(*given)
        p, q = one.log_softmax(1), two.log_softmax(1)
        apart = ((p.exp() - q.exp()) * (p - q)).sum(1) / 2 if m is model else (one - two).square()[:, 0]
        assert apart.min() > 0
        wanted = (base.of(one, batch) + base.of(two, batch)) / 2 + 0.7 * (apart * weight).sum() / weight.sum()
        torch.testing.assert_close(found, wanted)
        network.eval()
        torch.testing.assert_close(RDrop(base, 0.7)(network, batch), base(network, batch))


def test_adversarial_training_is_its_formula() -> None:
    model = tiny_model()
    batch, base, network = some(model), Supervised(model.task), net(model)
    found = Adversarial(base, 0.3)(network, batch)
    vectors = network.backbone.get_input_embeddings()(batch.ids.long()).detach().requires_grad_(True)  # type: ignore[operator]

    def loss_at(vectors: Tensor) -> Tensor:
        hidden = network.backbone(inputs_embeds=vectors, attention_mask=batch.mask.long()).last_hidden_state
        weight = batch.mask[..., None].float()
        return F.cross_entropy(network.head((hidden * weight).sum(1) / weight.sum(1)), batch.targets)

    plain = loss_at(vectors)
    (gradient,) = torch.autograd.grad(plain, vectors)
    step = torch.stack([0.3 * g / g.norm() for g in gradient])
    torch.testing.assert_close(found, plain + loss_at(vectors + step))
    assert loss_at(vectors + step) > plain > loss_at(vectors - step), "the step goes uphill"
    # Frozen tables change nothing of this, and no hook stays behind.
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    torch.testing.assert_close(Adversarial(base, 0.3)(network, batch), found)
    torch.testing.assert_close(base(network, batch), plain)
    with embeddings_moved(network) as added:
        assert not added
    assert not network.backbone.get_input_embeddings()._forward_hooks  # type: ignore[operator]


def test_the_adversary_gives_up_where_nothing_can_be_learned() -> None:
    model = tiny_model()
    assert Adversarial(Supervised(model.task))(model.network, some(model, torch.full((5,), -1))) == 0


@pytest.mark.parametrize("regularizer", ["none", "adversarial"])
def test_a_group_penalty_leaves_neurons_that_shrink_can_take(regularizer: Any, dataset: Dataset) -> None:
    model, run = tiny_model(), Local(dataset)
    usual: dict[str, Any] = {} if regularizer == "none" else {"epsilon": 0.05}
    plain = Finetune(epochs=6, learning_rate=5e-3, regularizer=regularizer, **usual)
    made = [t(model, run, PLAN) for t in (plain, replace(plain, penalty="group", strength=1e-2))]
    spread = []
    for one in made:
        # How much of all neurons' weight the better half holds: more, where the rest has been pulled to zero.
        rows = torch.cat([net(one).get_parameter(f"{b.up[0]}.weight").detach().norm(dim=1) for b in blocks(net(one))])
        spread.append(float(rows.sort(descending=True).values[: len(rows) // 2].sum() / rows.sum()))
    assert spread[1] > spread[0]
    quality = [
        run.quality(Shrink(neurons=0.5, importance="magnitude", multiple=8, epochs=0)(m, run, PLAN)) for m in made
    ]
    assert quality[1] >= quality[0]


def test_the_default_is_what_it_was(dataset: Dataset) -> None:
    model, run = tiny_model(), Local(dataset)
    plain = Finetune(epochs=1)(model, run, PLAN)
    assert not any("embeddings" in name and "LayerNorm" not in name for name in moved(model, plain))
    assert all(p.requires_grad for p in plain.network.parameters())
    assert (
        Finetune(epochs=1, train="full", regularizer="none", class_weights=False)(model, run, PLAN).digest
        == plain.digest
    )


def test_refusals(dataset: Dataset) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"train": "half"}, "unknown train 'half'; use full, head, lora"),
        ({"regularizer": "hope"}, "unknown regularizer 'hope'; use none, r-drop, adversarial"),
        ({"rank": 4}, "rank is for train='lora'; with 'full' leave it out"),
        ({"train": "head", "alpha": 4.0}, "alpha is for train='lora'; with 'head' leave it out"),
        ({"train": "lora", "rank": 0}, "rank is 0; use a number above 0"),
        ({"kl_weight": 1.0}, "kl_weight is for regularizer='r-drop'; with 'none'"),
        ({"regularizer": "r-drop", "epsilon": 1.0}, "epsilon is for regularizer='adversarial'; with 'r-drop'"),
        ({"regularizer": "adversarial", "epsilon": -1.0}, "epsilon is -1.0; use a number above 0"),
        ({"train": "head", "freeze_embeddings": False}, "train='head' keeps the embeddings as they are"),
        ({"penalty": "l3", "strength": 1.0}, "unknown penalty 'l3'; use one of none, l1, l2, group"),
        ({"penalty": "l1"}, "penalty 'l1' with strength 0.0: give both or none"),
        ({"strength": 1.0}, "penalty 'none' with strength 1.0: give both or none"),
        ({"penalty": "l1", "strength": -1.0}, "strength of the penalty is -1.0; use a number above 0"),
        (
            {"penalty": "l1", "strength": 1.0, "train": "lora"},
            "train='lora' keeps the weights that a penalty would shrink",
        ),
    ]
    for options, text in wrong:
        with pytest.raises(OptionError, match=text):
            Finetune(**options)  # type: ignore[arg-type]
    labels = tuple(str(i % 7) for i in range(80))
    rows = Rows(dataset.train.text, labels)
    run = Local(replace(dataset, train=rows))
    for name, value in {"class_weights": True, "smoothing": 0.1}.items():
        with pytest.raises(OptionError, match=f"{name}={value} is for classification; this model predicts scores"):
            Finetune(**{name: value})(tiny_model(Score()), run, PLAN)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="two passes under dropout, and this qwen3 has none"):
        Finetune(regularizer="r-drop")(tiny_model(family="qwen3"), Local(dataset), PLAN)
    static = Static(width=4, buckets=8, epochs=0.2)(tiny_model(), Local(dataset), PLAN)
    with pytest.raises(ModelError, match="Finetune works on a transformer"):
        Finetune()(static, Local(dataset), PLAN)
    with pytest.raises(ModelError, match="reads a transformer's hidden states; Static has none"):
        inner(static.network)
