"""DP-SGD: clipped sums against a loop over single rows, draws, noise, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Killed, Killer, tiny_model, tiny_rows
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.errors import OptionError
from netweight.loss import Penalized, PseudoLabels, SoftTargets, Supervised
from netweight.matching import Matching
from netweight.network import Static
from netweight.objectives import Adversarial, CausalLM, Contrastive, MaskedLM, RDrop
from netweight.run import Local
from netweight.run.federated.private import RowPrivate, by_row, parts, require
from netweight.run.local import _Source
from netweight.techniques.finetune import freeze_embeddings
from netweight.techniques.lora import adapt
from netweight.train import Plan


def without_dropout(model):
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def prepared(family="bert", train="full"):
    model = without_dropout(tiny_model(family=family))
    freeze_embeddings(model.network, True)
    if train != "full":
        model.network.backbone.requires_grad_(False)
    if train == "lora":
        torch.manual_seed(0)
        adapt(model.network, 4, 8.0)
        for name, p in model.network.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1)  # at zero the other half would have no gradient
        model.network.head.requires_grad_(True)
    return model


def batch_of(model, n=12, teachers=()):
    rows = replace(tiny_rows(n), weight=tuple(0.5 + (i % 3) for i in range(n)))
    tokens = model.encoder.encode(rows.text, rows.pair)
    batch = _Source(tokens, rows, model, teachers).batch(np.arange(n), np.random.default_rng(0), 0.0)
    return replace(batch, everywhere=lambda total: torch.full_like(total, 8.0))


def naive(network, loss, batch, clip):
    """Sum of each row's clipped gradient, one row after the other; the smallest and largest norm."""
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in trained.items()}
    norms = []
    for one in parts(batch, 1):
        torch.manual_seed(1)
        found = torch.autograd.grad(loss(network, one) * 8.0, list(trained.values()), allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained.values())]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        for name, g in zip(trained, grads):
            total[name] += g * min(1.0, clip / max(norms[-1], 1e-12))
    return total, norms


def clipped(network, loss, batch, clip, checked=False):
    network.zero_grad(set_to_none=True)
    seams = RowPrivate(0.0, clip, 8, seed=0)
    seams.checked = checked
    seams.backward(network, loss, batch, 1.0)
    return {n: p.grad for n, p in network.named_parameters() if p.requires_grad}


def compare(model, loss, batch):
    _, norms = naive(model.network, loss, batch, 1.0)
    clip = float(np.median(norms))
    assert min(norms) < clip < max(norms)
    wanted, _ = naive(model.network, loss, batch, clip)
    got = clipped(model.network, loss, batch, clip)
    largest = max(float(w.abs().max()) for w in wanted.values())
    for name, value in wanted.items():
        there = torch.zeros_like(value) if got[name] is None else got[name]
        assert float((there - value).abs().max()) <= 1e-5 * largest, name
    _, rows = by_row(model.network, loss, batch)
    assert (rows.norms() * 8.0).tolist() == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("train", ["full", "lora", "head"])
def test_clipped_sums_equal_a_loop_over_rows(train):
    model = prepared(train=train)
    compare(model, Supervised(model.task), batch_of(model))


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert", "gpt2", "qwen3"])
def test_they_do_in_every_family(family):
    model = prepared(family)
    compare(model, Supervised(model.task), batch_of(model))


@pytest.mark.parametrize("kind", ["soft", "pseudo", "causal", "weights"])
def test_they_do_with_every_loss_over_rows(kind):
    model = prepared("gpt2" if kind == "causal" else "bert")
    teacher = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    batch = batch_of(model, teachers=(teacher,))
    if kind == "pseudo":
        batch = replace(batch, targets=torch.where(torch.arange(12) < 6, batch.targets, -1))
    task = model.task
    loss = {
        "soft": SoftTargets(task, (model,), hard=0.3),
        "pseudo": PseudoLabels(task, (model,), 0.6, (1.0, 2.0)),
        "causal": CausalLM(),
        "weights": Supervised(task, class_weights=(0.5, 1.5)),
    }[kind]
    if kind in ("pseudo", "causal"):
        # Some rows may weigh nothing here; norms of zero are compared as well.
        model.network.head.requires_grad_(kind == "pseudo")
    compare(model, loss, batch)


def test_one_row_more_changes_a_step_by_the_clip_at_most():
    """Masks of dropout are drawn for a whole batch: one row more would change those of all behind it."""
    model = tiny_model()
    freeze_embeddings(model.network, True)
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    found = []
    for begin in (0, 1):
        torch.manual_seed(0)
        model.network.train()
        batch = batch_of(model).part(slice(begin, 12))
        grads = clipped(model.network, Supervised(model.task), batch, 0.1, checked=True).values()
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    assert float((found[0] - found[1]).norm()) <= 0.1 * (1 + 1e-3)


def test_what_is_hidden_of_a_row_is_drawn_as_secretly_as_the_rows_are():
    model = prepared(train="head")
    rows = tiny_rows(12)
    source = _Source(model.encoder.encode(rows.text), rows, model, ())
    every = np.arange(12)
    masks = [
        RowPrivate(1.0, 1.0, 12, seed=seed).share(source, every, np.random.default_rng(0), 0.5).mask
        for seed in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_many_rows_are_worked_on_in_parts():
    model = prepared(train="head")
    compare(model, Supervised(model.task), batch_of(model, 70))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("train", ["full", "head"])
def test_a_row_whose_gradient_is_no_number_adds_nothing(train, value):
    """Else whoever makes a token's vector NaN sees, through any noise, whether a row has that token."""
    model = prepared(train=train)
    batch, loss = batch_of(model), Supervised(model.task)
    there = (batch.ids == 4).any(dim=1)
    assert 0 < int(there.sum()) < len(there)
    others = replace(batch, weight=batch.weight * ~there)
    wanted = clipped(model.network, loss, others, 0.1)
    model.network.backbone.get_input_embeddings().weight.data[4] = value
    assert not by_row(model.network, loss, batch)[1].norms()[there].isfinite().any()
    for name, got in clipped(model.network, loss, batch, 0.1, checked=True).items():
        torch.testing.assert_close(got, wanted[name], msg=name)
    # Nor is it trained with: what is tried first says so of any rows.
    with pytest.raises(OptionError, match="not what its layers account for"):
        clipped(model.network, loss, others, 0.1)


def test_what_is_tried_first_is_a_row_of_nobody():
    """Whether the network is refused would else tell of a row."""
    model, seen = prepared(train="head"), []

    class Looking(Supervised):
        def __call__(self, network, batch):
            seen.append(batch)
            return super().__call__(network, batch)

    loss, batch = Looking(model.task), batch_of(model)
    for rows in (batch.part(slice(0, 2)), batch.part(slice(5, 6))):
        RowPrivate(0.0, 1.0, 8, seed=0).backward(model.network, loss, rows, 1.0)
    first, again, real, other, _, last = seen
    assert torch.equal(real.ids, batch.ids[:2])
    assert torch.equal(last.ids, batch.ids[5:6])
    for one in (first, again, other):
        assert one.ids.tolist() == [list(range(1, 17))]
        assert (one.targets.tolist(), one.weight.tolist()) == ([0], [1.0])


def test_models_that_are_not_finite_are_refused():
    model = prepared(train="head")
    model.network.backbone.get_input_embeddings().weight.data[4] = torch.nan
    with pytest.raises(OptionError, match="word_embeddings.weight of the model has values that are not finite; begin"):
        require(model.network, Supervised(model.task), Plan())


class Spy(RowPrivate):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sizes = []

    def share(self, source, rows, rng, hide):
        batch = super().share(source, rows, rng, hide)
        self.sizes.append(int((batch.weight > 0).sum()))
        return batch


def fitted(seams, model=None, n=80, **plan):
    model = model or prepared(train="head")
    none = tiny_rows(2).take(range(0))
    run = Local(Dataset(tiny_rows(n), none, none, Sealed(none)), seams=seams)
    plan = Plan(**{"epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", **plan})
    return run.fit(model, Supervised(model.task), plan)


def test_rows_are_drawn_each_by_itself():
    seams = Spy(0.0, 1.0, 8, seed=3)
    fitted(seams, epochs=20)
    sizes = np.array(seams.sizes)
    assert len(sizes) == 200
    # Binomial(80, 0.1): mean 8, variance 7.2.
    assert abs(sizes.mean() - 8) < 4 * np.sqrt(7.2 / 200)
    assert 5 < sizes.var() < 10


def test_an_empty_draw_is_a_step_of_noise():
    seams = Spy(1.0, 1.0, 1, seed=0)
    model = prepared(train="head")
    after = fitted(seams, model, n=6, batch_size=1, epochs=3)
    assert 0 in seams.sizes
    assert not torch.equal(after.network.head.weight, model.network.head.weight)
    assert after.network.head.weight.isfinite().all()


def test_noise_has_the_stated_size_and_is_divided_by_the_expected_rows():
    model = prepared()
    seams = RowPrivate(2.0, 0.5, 8, seed=0)
    batch = batch_of(model)
    plain = clipped(model.network, Supervised(model.task), batch, 0.5)
    plain = {n: g.clone() for n, g in plain.items() if g is not None}
    model.network.zero_grad(set_to_none=True)
    seams.backward(model.network, Supervised(model.task), batch, 1.0)
    seams.sync(model.network, 0.0)
    noise = torch.cat([(p.grad * 8.0 - plain[n]).flatten() for n, p in model.network.named_parameters() if n in plain])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.03


def test_weights_move_also_of_adapters_under_clipping_and_noise():
    """Clip-and-noise in LoRA layers trains nothing elsewhere, silently: one half has no gradient at first."""
    model = prepared(train="lora")
    for name, p in model.network.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    after = fitted(RowPrivate(0.5, 1.0, 8, seed=0), model)
    held = dict(after.network.named_parameters())
    for name, was in model.network.named_parameters():
        assert torch.equal(held[name], was) != was.requires_grad, name


def test_half_precision_is_no_reason_to_refuse():
    """The comparison of one row with autograd allows for the rounding of bf16."""
    after = fitted(RowPrivate(0.5, 1.0, 8, seed=0), prepared(train="lora"), epochs=1, precision="bf16")
    assert after.network.head.weight.isfinite().all()


def test_without_noise_and_clipping_it_learns_as_plain_training_does():
    model = prepared(train="head")
    after = fitted(RowPrivate(0.0, 1e6, 8, seed=0), model, epochs=20)
    run = Local(Dataset(tiny_rows(80), tiny_rows(80), tiny_rows(2), Sealed(tiny_rows(2))))
    assert run.quality(after) > 0.9


def test_draws_and_noise_come_from_the_operating_system_unless_a_seed_is_given():
    one, two = (fitted(RowPrivate(1.0, 1.0, 8), prepared(train="head"), epochs=1) for _ in range(2))
    assert not torch.equal(one.network.head.weight, two.network.head.weight)
    one, two = (fitted(RowPrivate(1.0, 1.0, 8, seed=5), prepared(train="head"), epochs=1) for _ in range(2))
    assert torch.equal(one.network.head.weight, two.network.head.weight)


def test_seeds_count_in_whole():
    """torch's generator looks at their last 32 bits on a CPU: so many can be tried."""
    network = prepared(train="head").network
    noises = []
    for seed in (5, 5 + 2**40):
        seams = RowPrivate(1.0, 1.0, 8, seed=seed)
        seams.expected = 8.0
        network.zero_grad(set_to_none=True)
        seams.sync(network, 0.0)
        noises.append(network.head.weight.grad)
    assert not torch.equal(*noises)


def test_a_resumed_fit_takes_the_same_number_of_noisy_steps(tmp_path):
    model = prepared(train="head")
    none = tiny_rows(2).take(range(0))
    data = Dataset(tiny_rows(80), none, none, Sealed(none))
    plan = Plan(epochs=2, batch_size=8, learning_rate=1e-2, precision="fp32", checkpoint_every=0.0)
    run = Local(data, tmp_path, seams=RowPrivate(1.0, 1.0, 8))
    with pytest.raises(Killed):
        run.fit(model, Supervised(model.task), replace(plan, reporter=Killer(7)))
    second = Spy(1.0, 1.0, 8)
    # Not one with other noise, nor one without: the ledger would count the first steps at that.
    for other in (RowPrivate(5.0, 1.0, 8), RowPrivate(1.0, 2.0, 8), None):
        killer = Killer(1)
        with pytest.raises(Killed):
            Local(data, tmp_path, seams=other).fit(model, Supervised(model.task), replace(plan, reporter=killer))
        assert killer.resumed_at == 0
    killer = Killer(10**9)
    Local(data, tmp_path, seams=second).fit(model, Supervised(model.task), replace(plan, reporter=killer))
    assert killer.resumed_at == 6
    assert len(second.sizes) == 20 - 6


def test_losses_that_are_no_sum_over_rows_are_refused():
    model = prepared()
    loss = Supervised(model.task)
    inside = Matching(SoftTargets(model.task, (model,)), ("logits", "hidden"), (0, 1), 4, 1.0)
    drawing = (MaskedLM(1, (0,), 10), RDrop(loss))
    for bad in (Contrastive(), Adversarial(loss), inside, Penalized(loss, "l1", 0.1, ("head.weight",)), *drawing):
        with pytest.raises(OptionError, match=f"{type(bad).__name__} is no sum over rows"):
            require(model.network, bad, Plan())
    for good in (loss, CausalLM()):
        require(model.network, good, Plan())


def test_plans_that_mix_rows_or_split_steps_are_refused():
    model = prepared()
    with pytest.raises(OptionError, match="spliced rows mix two rows each"):
        require(model.network, Supervised(model.task), Plan(splice=1.0))
    with pytest.raises(OptionError, match="use batch_size=128 and accumulate=1"):
        require(model.network, Supervised(model.task), Plan(accumulate=4))


def test_layers_whose_gradients_by_row_are_not_known_are_refused():
    model = tiny_model()
    with pytest.raises(OptionError, match="embeddings is a Embedding.* use freeze_embeddings=True"):
        require(model.network, Supervised(model.task), Plan())
    other = prepared()
    other.network.head = nn.Bilinear(32, 32, 2)
    with pytest.raises(OptionError, match="head is a Bilinear, whose gradients row by row are not known"):
        require(other.network, Supervised(other.task), Plan())
    with pytest.raises(OptionError, match="the network is a Static"):
        require(Static(30, 8, 4, 2), Supervised(other.task), Plan())


def test_a_parameter_that_is_used_outside_of_its_layer_is_found():
    class Sly(Supervised):
        def __call__(self, network, batch):
            return super().__call__(network, batch) + network.head.weight.square().sum() / 10

    model = prepared(train="head")
    with pytest.raises(OptionError, match="is used outside of its layer"):
        clipped(model.network, Sly(model.task), batch_of(model), 1.0)


def test_a_layer_that_does_not_keep_rows_apart_is_found():
    class Folded(Supervised):
        def __call__(self, network, batch):
            logits = network.head(torch.zeros(3, 32))
            return logits.sum()

    model = prepared(train="head")
    with pytest.raises(OptionError, match="head does not keep rows apart"):
        clipped(model.network, Folded(model.task), batch_of(model), 1.0)


def test_clip_and_noise_out_of_range_are_refused():
    with pytest.raises(OptionError, match="clip is 0 and noise 1"):
        RowPrivate(1, 0, 8)
