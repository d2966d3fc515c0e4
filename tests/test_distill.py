"""Distillation: what is matched is what the papers say, in every family; teachers of any kind; nothing is left behind."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import FAMILIES, net, tiny_encoder, tiny_model, tiny_rows
from netweight.anatomy import blocks, keep_neurons
from netweight.data import Dataset
from netweight.errors import ModelError, OptionError
from netweight.loss import Batch, Loss, SoftTargets, confident
from netweight.matching import Match, Matching, attention_maps, hidden_states, mapped, relations, watched
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.task import Classify, Score
from netweight.techniques import Distill, Static, describe
from netweight.techniques.distill import shallower
from netweight.techniques.finetune import freeze_embeddings
from netweight.testing import TechniqueContract, fresh_digest
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
INSIDE: tuple[Match, ...] = ("hidden", "attention", "relations")
QUICK = Distill(layers=1, epochs=1, splice=0.0)
TEXTS = ("the zip was broken", "lovely dress", "my parcel was late after a week and wrong", "soft")


def sized(width: int, heads: int, layers: int = 2, seed: int = 3) -> Model:
    """A BERT of other sizes than the tiny one, over the same tokens."""
    from transformers import AutoConfig, AutoModel

    made = tiny_model()
    config = AutoConfig.for_model(
        "bert",
        vocab_size=made.encoder.vocabulary,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made.with_network(Transformer(AutoModel.from_config(config), made.task.outputs, "mean").eval())


def padded(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    tokens = model.encoder.encode(TEXTS)
    ids, mask, types = map(torch.from_numpy, tokens.padded(np.arange(len(tokens)), model.encoder.pad))
    return ids, mask, types


@dataclass
class Recorder:
    """A run that keeps what it was asked to fit, and what came of it."""

    run: Local
    given: Any = None
    fitted: Any = None
    loss: Any = None

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        self.given, self.loss = model.copy(), loss
        made = self.run.fit(model, loss, plan, label)
        self.fitted = made.copy()
        return made

    def reduce(self, *given: Any) -> dict[str, Tensor]:
        return self.run.reduce(*given)


# --- the formulas ---


def test_hidden_states_by_hand() -> None:
    teacher = torch.tensor([[[1.0, -1.0], [3.0, 1.0], [9.0, 9.0]]])
    student = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    # Squares 4 and 1 over two tokens of two columns; the teacher's mean square is (1 + 1 + 9 + 1) / 4 = 3.
    assert hidden_states(student, teacher, mask).tolist() == pytest.approx([(4 + 1) / 4 / 3])
    both = hidden_states(*(torch.cat([x, 5 * x + 1]) for x in (student, teacher)), mask.expand(2, -1))
    assert both[0].item() == pytest.approx(5 / 12), "a row does not depend on its neighbours"
    assert hidden_states(7 * student, 7 * teacher, mask).tolist() == pytest.approx([(4 + 1) / 4 / 3])


def test_relations_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 5, 12, generator=generator)
    lengths, heads = (5, 3), 3
    mask = torch.arange(5)[None, :] < torch.tensor(lengths)[:, None]
    wanted = []
    for row, n in enumerate(lengths):
        total = 0.0
        for a in range(heads):
            maps = []
            for vectors in (teacher, student):
                d = vectors.shape[-1] // heads
                part = vectors[row, :n, a * d : (a + 1) * d]
                maps.append((part @ part.T / math.sqrt(d)).log_softmax(dim=-1))
            total += F.kl_div(maps[1], maps[0], reduction="sum", log_target=True).item()
        wanted.append(total / (heads * n))
    assert relations(student, teacher, mask, heads).tolist() == pytest.approx(wanted, rel=1e-5)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    turned = (teacher.unflatten(-1, (heads, 4)) @ turn).flatten(-2)
    assert relations(turned, teacher, mask, heads).abs().max() < 1e-5, "relations do not see rotations within a head"


def test_attention_maps_are_compared_by_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 4, 4, generator=generator).softmax(dim=-1)
    mask = torch.ones(3, 4)
    wanted = F.kl_div(student.log(), teacher, reduction="none").sum(-1).mean((1, 2))
    torch.testing.assert_close(attention_maps(student, teacher, mask), wanted, rtol=1e-5, atol=1e-6)


def test_layer_maps_end_at_the_last_layer() -> None:
    assert mapped("uniform", 6, 12) == (1, 3, 5, 7, 9, 11)
    assert mapped("last", 6, 12) == (6, 7, 8, 9, 10, 11)
    assert mapped("uniform", 4, 6) == (0, 2, 3, 5)
    assert mapped((2, 2, 1), 3, 2) == (1, 1, 0)
    with pytest.raises(OptionError, match="layer_map 'uniform' needs a teacher at least as deep"):
        mapped("uniform", 3, 2)
    with pytest.raises(OptionError, match=r"layer_map is \(1, 4\); give a teacher layer, 1 to 3"):
        mapped((1, 4), 2, 3)
    with pytest.raises(OptionError, match="unknown layer_map 'skip'"):
        mapped("skip", 2, 3)  # type: ignore[arg-type]


def test_confidence_weighs_each_row() -> None:
    said = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    p, q = torch.sigmoid(torch.tensor([4.0, 2.0])).tolist()
    wanted = [[4 * p / (p + 0.5), 0], [0, 2 * q / (q + 0.5)]]
    np.testing.assert_allclose(confident(said), wanted, rtol=1e-6)
    batch = Batch(*(torch.zeros(2, 1),) * 3, torch.tensor([-1, -1]), torch.ones(2), tuple(said))
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    by_hand = SoftTargets(Classify(("a", "b")), (), temperature=1.0)
    one = replace(batch, teachers=(torch.tensor(wanted),))
    network = lambda *_: student  # noqa: E731
    assert replace(by_hand, combine="confidence")(network, batch) == pytest.approx(by_hand(network, one).item())  # type: ignore[arg-type]


# --- what hooks see ---


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_is_what_the_network_computes(family: str) -> None:
    model = tiny_model(family=family)
    network, before = net(model), fresh_digest(model)
    ids, mask, types = padded(model)
    plain = network.config._attn_implementation
    with torch.no_grad(), watched(network, ("hidden", "attention", "relations")) as seen:
        outputs = network(ids, mask, types)
    with torch.no_grad():
        torch.testing.assert_close(network(ids, mask, types), outputs, rtol=1e-4, atol=1e-5)
        # Asked for hidden states, transformers leaves hooks of its own behind.
        reference = net(model.copy())
        reference.config._attn_implementation = "eager"
        kinds = {"token_type_ids": types.long()} if family == "bert" else {}
        said = reference.backbone(
            ids.long(), attention_mask=mask.long(), output_hidden_states=True, output_attentions=True, **kinds
        )
    torch.testing.assert_close(seen.hidden[0], said.hidden_states[1])
    assert len(seen.hidden) == len(seen.maps) == 2
    for found, wanted in zip(seen.maps, said.attentions, strict=True):
        torch.testing.assert_close(found, wanted)
    key_width = 16 if family == "qwen3" else 32
    assert [a.shape[-1] for a in seen.qkv] == [32, key_width, key_width]
    assert fresh_digest(model) == before
    assert network.config._attn_implementation == plain
    assert not any(module._forward_hooks for module in network.modules())


# --- the technique ---


def test_the_default_is_what_it_was(model: Model, dataset: Dataset) -> None:
    technique = Distill(layers=1, epochs=1)
    student = model.with_network(shallower(net(model), 1))
    freeze_embeddings(net(student), True)
    loss = SoftTargets(model.task, (model,), 2.0, 0.1)
    plan = replace(PLAN, epochs=1.0, learning_rate=2e-4, token_dropout=0.1, splice=4.0)
    assert technique(model, Local(dataset), PLAN).digest == Local(dataset).fit(student, loss, plan).digest


def matching(match: Any, **changed: Any) -> Distill:
    heads = 4 if "relations" in match else QUICK.relation_heads
    return replace(QUICK, match=match, **{"relation_heads": heads, **changed})


def test_contract(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    technique = matching(("logits", *INSIDE))
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text[:16]).check(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_matches_its_inside(family: str, dataset: Dataset) -> None:
    few = replace(dataset, train=dataset.train.take(range(16)))
    model = tiny_model(family=family)
    contract = TechniqueContract(matching(("logits", *INSIDE)), model, lambda: Local(few), PLAN, TEXTS)
    contract.repeats_itself(contract.returns_a_new_model())


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_contract_of_other_families(family: str, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(family=family)
    technique = matching(("logits", *INSIDE))
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text[:16]).check(tmp_path)


@pytest.mark.parametrize("match", INSIDE)
def test_what_is_matched_comes_closer(match: Match, model: Model, dataset: Dataset) -> None:
    """Only the inside is asked for, so that nothing else can bring the student closer."""
    teacher = tiny_model(seed=7)
    with torch.no_grad():
        # Fresh weights are so small that every map is flat.
        for module in net(teacher).layers().modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(8)
    technique = matching(match, layers=None, teachers=(teacher,), hard=0.0, epochs=5, learning_rate=3e-3)
    recorder = Recorder(Local(dataset))
    technique(model, recorder, PLAN)
    ids, mask, types = padded(model)
    batch = Batch(ids, mask, types, torch.zeros(4).long(), torch.ones(4), (torch.zeros(4, 2),))
    with torch.no_grad():
        before, after = (recorder.loss(m.network, batch).item() for m in (recorder.given, recorder.fitted))
    assert after < 0.8 * before


def test_half_precision(model: Model, dataset: Dataset) -> None:
    """Networks compute in bf16 there, and what compares their insides does not."""
    teacher = tiny_model(seed=7)
    loss = Matching(SoftTargets(model.task, (teacher,), 2.0, 0.0), INSIDE, (0, 1), 4, 1.0)
    ids, mask, types = padded(model)
    batch = Batch(ids, mask, types, torch.zeros(4).long(), torch.ones(4), (torch.zeros(4, 2),))
    with torch.no_grad():
        full = loss(model.network, batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = loss(model.network, batch)
        with watched(net(model), INSIDE) as seen, watched(net(teacher), INSIDE) as shown:
            model.network(ids, mask, types)
            teacher.network(ids, mask, types)
        inside = loss._inside(net(model), seen, shown, mask)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss._inside(net(model), seen, shown, mask), inside)
    assert half.item() == pytest.approx(full.item(), rel=0.05)
    few = replace(dataset, train=dataset.train.take(range(16)))
    made = matching(("logits", *INSIDE))(model, Local(few), replace(PLAN, precision="bf16"))
    assert made.digest != matching(("logits", *INSIDE))(model, Local(few), PLAN).digest


def test_the_whole_loss_is_its_parts(model: Model) -> None:
    teacher = tiny_model(seed=7)
    targets = SoftTargets(model.task, (teacher,), 2.0, 0.2)
    ids, mask, types = padded(model)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    batch = Batch(ids, mask, types, torch.tensor([0, 1, 1, 0]), weight, (torch.randn(4, 2),))
    with torch.no_grad():
        with watched(net(teacher), INSIDE) as shown:
            teacher.network(ids, mask, types)
        with watched(net(model), INSIDE) as seen:
            plain = targets(model.network, batch)
        # Two student layers look at the teacher's second one.
        hidden = [hidden_states(h, shown.hidden[1], mask) for h in seen.hidden]
        maps = [attention_maps(a, shown.maps[1], mask) for a in seen.maps]
        kin = [relations(a, b, mask, 4) for a, b in zip(seen.qkv, shown.qkv, strict=True)]
        rows = sum(torch.stack(part).mean(dim=0) for part in (hidden, maps, kin))
        found = Matching(targets, ("logits", *INSIDE), (1, 1), 4, 3.0)(model.network, batch)
    torch.testing.assert_close(found, plain + 3.0 * (rows * weight).sum() / weight.sum())


def test_projections_are_trained_and_dropped(dataset: Dataset, tmp_path: Path) -> None:
    teacher, student = sized(32, 4), sized(16, 2, layers=1)
    technique = matching(("logits", "hidden", "relations"), layers=None, teachers=(teacher,), relation_heads=2)
    recorder = Recorder(Local(dataset))
    made = technique(student, recorder, PLAN)
    name = "match_0.weight"
    was, now = (dict(m.network.named_parameters())[name] for m in (recorder.given, recorder.fitted))
    assert was.shape == (32, 16)
    assert not torch.equal(was, now)
    # While it trains, the student is a whole model: it can be saved and sent elsewhere with its projections.
    recorder.fitted.save(tmp_path)
    assert torch.equal(dict(Model.load(tmp_path).network.named_parameters())[name], now)
    assert not [n for n, _ in made.network.named_parameters() if "match_" in n]
    assert made.network.spec() == student.network.spec()
    with torch.no_grad():
        network = net(recorder.fitted)
        assert torch.equal(network(*padded(student)), made.network(*padded(student)))


def test_tables_are_frozen_where_they_are_the_teachers(model: Model, dataset: Dataset) -> None:
    def moved(technique: Distill, student: Model) -> bool:
        made = technique(student, Local(dataset), PLAN)
        before, after = (m.network.backbone.embeddings.word_embeddings.weight for m in (student, made))  # type: ignore[union-attr]
        return not torch.equal(before, after)  # type: ignore[arg-type]

    other = tiny_model(seed=8)
    assert not moved(QUICK, model)
    assert moved(replace(QUICK, teachers=(other,)), model)
    assert not moved(replace(QUICK, teachers=(other,), freeze_embeddings=True), model)
    assert moved(replace(QUICK, freeze_embeddings=False), model)


def test_students_and_teachers_of_any_kind(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    several = replace(QUICK, layers=None, teachers=(static, tiny_model(seed=5)), splice=1.0)
    mean, confidence = several(model, run, PLAN), replace(several, combine="confidence")(model, run, PLAN)
    assert len({model.digest, mean.digest, confidence.digest}) == 3
    # Another tokenizer will do where no row is made of token ids.
    other = replace(model, encoder=tiny_encoder(more=("gloves",)))
    assert replace(QUICK, layers=None, teachers=(other,))(model, run, PLAN).digest != model.digest
    with pytest.raises(ModelError, match="another tokenizer than the model"):
        replace(QUICK, layers=None, teachers=(other,), splice=1.0)(model, run, PLAN)
    with pytest.raises(ModelError, match="another tokenizer than the model"):
        replace(QUICK, layers=None, teachers=(other,), match="hidden")(model, run, PLAN)


@pytest.mark.parametrize("reads", [6, 40])
def test_a_teacher_may_read_more_of_a_text_or_less(reads: int, model: Model, dataset: Dataset) -> None:
    """Its tokens are the same; but the inside of those that it does not read cannot be matched."""
    run, teacher = Local(dataset), replace(tiny_model(seed=7), encoder=tiny_encoder(max_length=reads))
    technique = replace(QUICK, layers=None, teachers=(teacher,), splice=1.0)
    assert technique(model, run, PLAN).digest != model.digest
    inside = replace(technique, match=("logits", "hidden"))
    if reads > model.encoder.max_length:
        assert inside(model, run, PLAN).digest != model.digest
        return
    said = "the teacher reads 6 tokens of a text and the model 32, .* max_length=32 or more, let the model read 6, or"
    with pytest.raises(ModelError, match=said):
        inside(model, run, PLAN)


def test_a_teacher_is_learned_from(dataset: Dataset) -> None:
    """A student from scratch, narrower and shallower, comes to say what its teacher says."""
    teacher, student = tiny_model(seed=2), sized(16, 2, layers=1)
    tokens = student.encoder.encode(tiny_rows().text)
    with torch.no_grad():
        net(teacher).head.weight.mul_(20)
        net(teacher).head.bias.sub_(logits_of(teacher, tokens).mean(dim=0))
    wanted = logits_of(teacher, tokens).argmax(1)
    assert 0.2 < wanted.float().mean() < 0.8
    technique = Distill(None, 12, 3e-3, hard=0.0, splice=0, teachers=(teacher,))
    made = technique(student, Local(dataset), PLAN)
    assert (logits_of(made, tokens).argmax(1) == wanted).float().mean() > 0.9


def test_scores_are_distilled_too(dataset: Dataset) -> None:
    rows = replace(dataset.train, label=tuple(str(len(text)) for text in dataset.train.text))
    select = replace(dataset.select, label=tuple("1" for _ in dataset.select.text))
    model = tiny_model(Score(20.0, 5.0))
    run, technique = Local(replace(dataset, train=rows, select=select)), matching(("logits", "hidden"))
    assert technique(model, run, PLAN).digest != model.digest
    with pytest.raises(OptionError, match="temperature=3.0 is for classification; this model predicts scores"):
        replace(technique, temperature=3.0)(model, run, PLAN)
    with pytest.raises(OptionError, match="combine='confidence' is for classification"):
        Distill(layers=1, teachers=(model, model), combine="confidence")(model, run, PLAN)


def test_a_recipe_with_teachers_is_plain(model: Model) -> None:
    said = describe((Distill(teachers=(model,), match=("logits", "hidden")),))
    assert json.loads(json.dumps(said))[0]["teachers"] == [model.digest]
    assert "Model" not in repr(Distill(teachers=(model,)))


def test_a_killed_fit_goes_on_with_its_projections(dataset: Dataset, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Killer:
        at = 3

        def start(self, label: str, steps: int, done: int) -> None:
            self.resumed_at = done

        def step(self, step: int, loss: float, rate: float) -> None:
            if step == self.at:
                raise Stop

        def note(self, message: str) -> None:
            pass

    student, killer = sized(16, 2, layers=1), Killer()
    technique = matching(("logits", "hidden"), layers=None, teachers=(sized(32, 4),))
    plan = replace(PLAN, checkpoint_every=0, reporter=killer)
    with pytest.raises(Stop):
        technique(student, Local(dataset, tmp_path), plan)
    killer.at = -1
    assert technique(student, Local(dataset, tmp_path), plan).digest == technique(student, Local(dataset), PLAN).digest
    assert killer.resumed_at == 2


@pytest.mark.parametrize(
    ("technique", "said"),
    [
        (replace(QUICK, match="smell"), "match is 'smell'; use one or several of logits"),
        (replace(QUICK, match=()), r"match is \(\); use one or several"),
        (replace(QUICK, combine="max"), "combine is 'max'; use mean or confidence"),
        (replace(QUICK, layers=None), "layers=None trains the given model as it is"),
        (matching("hidden", teachers=(tiny_model(),) * 2), "hidden of 2 teachers cannot be matched"),
        (matching("hidden", temperature=3.0), "temperature=3.0 does not apply"),
        (replace(QUICK, match_weight=3.0), "match_weight=3.0 does not apply"),
        (matching("relations", layer_map="last"), "layer_map='last' does not apply"),
        (matching("hidden", relation_heads=4), "relation_heads=4 does not apply"),
        (replace(QUICK, combine="confidence"), "combine='confidence' does not apply"),
        (matching("relations", match_weight=0.0), "match_weight must be above 0"),
        (matching("relations", relation_heads=5), "32 columns cannot be cut into 5 relation heads"),
        (matching("relations", relation_heads=0), "relation_heads 1 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_options(technique: Distill, said: str, model: Model, dataset: Dataset) -> None:
    with pytest.raises(OptionError, match=said):
        technique(model, Local(dataset), PLAN)


def test_one_teacher_will_do(model: Model) -> None:
    assert Distill(teachers=model) == Distill(teachers=(model,))  # type: ignore[arg-type]


def test_refused_models(model: Model, dataset: Dataset) -> None:
    run = Local(dataset)
    plain = replace(QUICK, layers=None)
    with pytest.raises(ModelError, match="a teacher has another task"):
        replace(plain, teachers=(tiny_model(Classify(("good", "bad"))),))(model, run, PLAN)
    with pytest.raises(ModelError, match="a teacher has another task"):
        replace(plain, teachers=(tiny_model(Score(0.0, 1.0)),))(model, run, PLAN)
    with pytest.raises(ModelError, match="4 attention maps and its teacher layer 2"):
        replace(plain, teachers=(sized(32, 2),), match="attention")(model, run, PLAN)
    with pytest.raises(ModelError, match="this loss reads a transformer.s hidden states"):
        Matching(SoftTargets(model.task, (model,)), ("hidden",), (0,), 1, 1.0)(nn.Identity(), None)  # type: ignore[arg-type]
    static = Static(width=4, buckets=8, epochs=1)(model, run, PLAN)
    with pytest.raises(ModelError, match="inside works on a transformer"):
        replace(plain, teachers=(static,), match="hidden")(model, run, PLAN)
    with pytest.raises(ModelError, match="matched without a projection"):
        hidden_states(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2))
    odd = model.copy()
    del net(odd).layers()[0].attention.self.query  # type: ignore[union-attr]
    net(odd).layers()[0].attention.self.query_of_another = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="does not know the parts of the layers"), watched(net(odd), ("relations",)):
        pass


def test_a_narrower_student_learns_from_what_it_was_cut_from(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    """What a technique that cuts neurons leaves is a model like any other, with its teacher's tables."""
    narrow = model.copy()
    for block in blocks(net(narrow)):
        keep_neurons(net(narrow), block, torch.arange(24))
    made = matching(("logits", "hidden", "attention"), layers=None, teachers=(model,))(narrow, Local(dataset), PLAN)
    assert [block.neurons for block in blocks(net(made))] == [24, 24]
    tables = [m.network.backbone.embeddings.word_embeddings.weight for m in (made, model)]  # type: ignore[union-attr]
    assert torch.equal(*tables)  # type: ignore[arg-type]
    made.save(tmp_path)
    assert Model.load(tmp_path).digest == made.digest != narrow.digest
