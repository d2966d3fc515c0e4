"""Pretraining: what is hidden and what is asked for, by the papers' formulas; what moves; what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, net, tiny_model, tiny_rows
from netweight.data import Dataset
from netweight.errors import ModelError, OptionError
from netweight.layers import FactoredEmbedding
from netweight.loss import Batch
from netweight.model import Model
from netweight.objectives import CausalLM, Contrastive, MaskedLM, hidden_states, pooled, vocabulary_logits
from netweight.reporter import Silent
from netweight.run import Local
from netweight.techniques import Pretrain, Static
from netweight.techniques.pretrain import Objective, special_ids
from netweight.testing import TechniqueContract
from netweight.train import Plan

PLAN = Plan(batch_size=16, precision="fp32")
CAUSAL, WITHOUT_DROPOUT = ("gpt2", "qwen3"), ("modernbert", "qwen3")
OBJECTIVES: tuple[Objective, ...] = ("masked", "causal", "contrastive")


def base(family: str = "bert", layers: int = 2) -> Model:
    return tiny_model(family=family, layers=layers, more=("[MASK]",))


def batch_of(model: Model, n: int = 6) -> Batch:
    tokens = model.encoder.encode(tiny_rows(n).text)
    ids, mask, types = map(torch.from_numpy, tokens.padded(torch.arange(n).numpy(), model.encoder.pad))
    assert not mask.all(), "no row is padded"
    return Batch(ids, mask, types, torch.full((n,), -1), torch.arange(1.0, n + 1))


def refused(family: str, objective: Objective) -> str | None:
    if objective == "contrastive":
        return f"views of a text under dropout, and this {family} has none" if family in WITHOUT_DROPOUT else None
    if (objective == "causal") == (family in CAUSAL):
        return None
    return f"{objective} language modelling does not suit {family}"


def check(objective: Objective, family: str, dataset: Dataset, folder: Path) -> None:
    technique = Pretrain(objective, epochs=1, learning_rate=1e-3)
    if text := refused(family, objective):
        with pytest.raises(OptionError, match=text):
            technique(base(family), Local(dataset), PLAN)
        return
    TechniqueContract(technique, base(family), lambda: Local(dataset), PLAN, dataset.train.text).check(folder)


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_contract(objective: Objective, dataset: Dataset, tmp_path: Path) -> None:
    check(objective, "bert", dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract_in_every_family(objective: Objective, family: str, dataset: Dataset, tmp_path: Path) -> None:
    check(objective, family, dataset, tmp_path)


class Heard(Silent):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, step: int, loss: float, rate: float) -> None:
        self.losses.append(loss)


@pytest.mark.parametrize(
    ("family", "objective"), [("bert", "masked"), ("gpt2", "causal"), ("qwen3", "causal"), ("bert", "contrastive")]
)
def test_the_loss_falls_and_the_head_stays(family: str, objective: Objective, dataset: Dataset) -> None:
    heard, model = Heard(), base(family, layers=1)
    pool = replace(dataset, pool=tiny_rows(160).take(range(120, 160)).unlabelled())
    plan = replace(PLAN, reporter=heard, patience=0, weight_decay=0.5)
    made = Pretrain(objective, epochs=6, learning_rate=5e-3)(model, Local(pool), plan)
    assert len(heard.losses) == 6 * math.ceil((80 + 40) / 16), "the pool is read, and patience does not count"
    first, last = (sum(part) / 8 for part in (heard.losses[:8], heard.losses[-8:]))
    assert last < 0.9 * first
    assert torch.equal(net(made).head.weight, net(model).head.weight)
    assert torch.equal(net(made).head.bias, net(model).head.bias)
    assert all(p.requires_grad for p in made.network.parameters())
    before, after = (net(m).backbone.get_input_embeddings().weight for m in (model, made))  # type: ignore[operator]
    assert not torch.equal(before, after)


@given(st.integers(0, 2**31 - 1), st.floats(0.05, 0.9))
def test_hiding_follows_the_paper(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(0, 500, (64, 128), dtype=torch.int32)
    mask = (torch.rand(64, 128) < 0.8).int()
    specials = (1, 2, 3, 4)
    new, chosen = MaskedLM(4, specials, 500, share).hide(ids, mask)
    may = (mask > 0) & ~torch.isin(ids, torch.tensor(specials))
    assert not (chosen & ~may).any(), "padding or a special token was chosen"
    assert torch.equal(new[~chosen], ids[~chosen])

    def near(found: Tensor, of: Tensor, wanted: float) -> bool:
        n = int(of.sum())
        return abs(float((found & of).sum()) / n - wanted) < 6 * math.sqrt(wanted * (1 - wanted) / n)

    assert near(chosen, may, share)
    assert near(new == 4, chosen, 0.8 + 0.1 / 500)
    assert near(new == ids, chosen, 0.1 + 0.1 / 500)
    other = chosen & (new != 4) & (new != ids)
    assert len(new[other].unique()) > 1, "random tokens are all the same"


def test_hiding_is_drawn_from_torchs_generator() -> None:
    model = base()
    batch, loss = batch_of(model), MaskedLM(4, (0, 2, 3), 26, 0.5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(loss.hide(batch.ids, batch.mask)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_masked_language_modelling_is_its_formula() -> None:
    model = base()
    batch, network = batch_of(model), model.network.eval()
    mask_id, specials = special_ids(model)
    assert model.encoder.tokens()[mask_id] == "[MASK]"
    assert specials == (0, 2, 3, mask_id)
    loss = MaskedLM(mask_id, specials, model.encoder.vocabulary, 0.4)
    torch.manual_seed(5)
    found = loss(network, batch)
    torch.manual_seed(5)
    ids, chosen = loss.hide(batch.ids, batch.mask)
    hidden = net(model).backbone(input_ids=ids.long(), attention_mask=batch.mask.long()).last_hidden_state
    logits = hidden @ net(model).backbone.get_input_embeddings().weight.T  # type: ignore[operator]
    per_token = F.cross_entropy(logits.transpose(1, 2), batch.ids.long(), reduction="none")
    weight = chosen * batch.weight[:, None]
    torch.testing.assert_close(found, (per_token * weight).sum() / weight.sum())
    nothing = replace(loss, share=1e-9)(network, batch)
    assert nothing == 0
    nothing.backward()


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_language_modelling_is_transformers_own(family: str) -> None:
    model = base(family)
    batch = replace(batch_of(model), weight=torch.ones(6))
    config = model.network.config  # type: ignore[union-attr]
    config.tie_word_embeddings = True
    reference = AutoModelForCausalLM.from_config(config).eval()
    # Ours has linear layers where GPT-2 keeps them transposed.
    held = {n: v.T if "c_" in n and n.endswith("weight") else v for n, v in net(model).backbone.state_dict().items()}
    reference.base_model.load_state_dict(held)
    reference.tie_weights()
    labels = torch.where(batch.mask > 0, batch.ids.long(), -100)
    wanted = reference(input_ids=batch.ids.long(), attention_mask=batch.mask.long(), labels=labels).loss
    torch.testing.assert_close(CausalLM()(model.network.eval(), batch), wanted, atol=1e-5, rtol=1e-5)


def test_the_table_that_logits_are_tied_to_may_be_factored() -> None:
    model = base()
    factored = FactoredEmbedding(model.encoder.vocabulary, 4, 32)
    network = net(model)
    network.replace("backbone.embeddings.word_embeddings", factored)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(
        vocabulary_logits(network, hidden), hidden @ factored(torch.arange(model.encoder.vocabulary)).T
    )


def test_contrastive_learning_is_its_formula() -> None:
    model = base()
    batch, network = batch_of(model), model.network.train()
    torch.manual_seed(2)
    found = Contrastive(0.1)(network, batch)
    torch.manual_seed(2)
    one, two = (net(model).features(batch.ids, batch.mask, batch.types) for _ in range(2))
    similar = F.cosine_similarity(one[:, None], two[None], dim=2) / 0.1
    per_row = -(similar.diagonal() - similar.logsumexp(dim=1))
    torch.testing.assert_close(found, (per_row * batch.weight).sum() / batch.weight.sum())


def test_what_is_inside_is_read_and_no_hook_stays() -> None:
    model = base()
    network, batch = model.network.eval(), batch_of(model)
    features = net(model).features(batch.ids, batch.mask, batch.types)
    assert torch.equal(pooled(network, batch), features)
    assert hidden_states(network, batch.ids, batch.mask, batch.types).shape == (*batch.ids.shape, 32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_causal_families_are_those_whose_tokens_do_not_see_what_comes() -> None:
    for family in FAMILIES:
        network = net(tiny_model(family=family, layers=1)).eval()
        ids, ones = torch.tensor([[2, 5, 7], [2, 5, 9]]), torch.ones(2, 3, dtype=torch.long)
        with torch.no_grad():
            one, two = hidden_states(network, ids, ones, torch.zeros_like(ids))
        blind = torch.allclose(one[:2], two[:2], atol=1e-6)
        assert network.causal == blind == (family in CAUSAL)
    decoder = tiny_model(layers=1)
    decoder.network.config.is_decoder = True  # type: ignore[union-attr]
    assert net(decoder).causal


def test_refusals(dataset: Dataset) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"objective": "magic"}, "unknown objective 'magic'; use masked, causal, contrastive"),
        ({"objective": "causal", "share": 0.2}, "share is for objective 'masked'; with 'causal' no token is hidden"),
        ({"share": 1.0}, "share is 1.0; hide more than 0 and less than 1"),
        ({"temperature": 0.1}, "temperature is for objective 'contrastive', not for 'masked'"),
        ({"objective": "contrastive", "temperature": 0.0}, "temperature is 0.0; use a number above 0"),
    ]
    for options, text in wrong:
        with pytest.raises(OptionError, match=text):
            Pretrain(**options)  # type: ignore[arg-type]
    run = Local(dataset)
    for family in FAMILIES:
        for objective in OBJECTIVES:
            if said := refused(family, objective):
                with pytest.raises(OptionError, match=said):
                    Pretrain(objective)(base(family, 1), run, PLAN)
    with pytest.raises(OptionError, match=r"needs a mask token, and this tokenizer has none of \[MASK\], <mask>"):
        Pretrain()(tiny_model(), run, PLAN)
    with pytest.raises(OptionError, match="spliced rows have no labels"):
        Pretrain()(base(), run, replace(PLAN, splice=1.0))
    static = Static(width=4, buckets=8, epochs=0.2)(tiny_model(), run, PLAN)
    with pytest.raises(ModelError, match="Pretrain works on a transformer"):
        Pretrain()(static, run, PLAN)
