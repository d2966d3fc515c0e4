"""Messages of federated runs as bytes, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import tiny_model
from netweight.errors import WireError
from netweight.federate.kinds import STATISTICS, WIRE
from netweight.layers import put
from netweight.loss import Penalized, PseudoLabels, SoftTargets, Supervised
from netweight.matching import Matching
from netweight.model import Model, Range, Weights
from netweight.network import Transformer, tensors
from netweight.objectives import Adversarial, CausalLM, Contrastive, MaskedLM, RDrop
from netweight.run.federated.codecs import Full, Int8, RandomK, TopK
from netweight.run.federated.membership import Membership
from netweight.run.federated.messages import (
    FitTask,
    Fitted,
    Join,
    Joined,
    Manifest,
    Reduced,
    ReduceTask,
    Scored,
    ScoreTask,
)
from netweight.run.federated.wire import Packed, Wire, digest, fits, raw, tensor
from netweight.techniques.factor import SecondMoments
from netweight.techniques.finetune import LabelCounts, Moments
from netweight.techniques.lora import adapt
from netweight.techniques.mixed import Sensitivity
from netweight.techniques.prune import Gradients
from netweight.techniques.qat import faked
from netweight.techniques.quantize import Extremes, Histogram
from netweight.techniques.selftrain import Sure
from netweight.techniques.shrink import GateGradients
from netweight.techniques.static import SecondText, TokenCounts
from netweight.train import Plan

MANIFEST = Manifest(("text",), "classify accuracy", ("a", "b"), "0" * 64, 16, "1" * 64, "0.1")


def same(one: Any, two: Any) -> bool:
    """Equal to the last bit, whatever they hold."""
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and raw(one) == raw(two)
    if isinstance(one, Model):
        flags = [{n: p.requires_grad for n, p in m.network.named_parameters()} for m in (one, two)]
        return one.digest == two.digest and flags[0] == flags[1]
    if isinstance(one, Mapping):
        return set(one) == set(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(same, one, two))
    if is_dataclass(one):
        return type(one) is type(two) and all(
            same(getattr(one, f.name), getattr(two, f.name)) for f in fields(one) if f.compare
        )
    return bool(one == two) or (one != one and two != two)


def travelled(message: Any, wire: Wire = WIRE) -> Any:
    """As a transport carries it: text, and bytes of each tensor."""
    packed = wire.pack(message)
    sent = {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), bytes(raw(t))) for name, t in packed.tensors.items()
    }
    return wire.unpack(Packed(packed.header, {name: tensor(*parts) for name, parts in sent.items()}))


def losses(model: Model) -> list[Any]:
    task: Any = model.task
    soft, plain = SoftTargets(task, (model, model)), Supervised(task, 0.1, class_weights=(1.0,) * task.outputs)
    return [
        plain,
        soft,
        Penalized(plain, "l2", 0.1, ("head.weight",)),
        PseudoLabels(task, (model,), 0.9, (1.0,) * task.outputs),
        Matching(soft, ("logits", "hidden"), (0, 1), 2, 0.5),
        MaskedLM(3, (0, 1), 50),
        CausalLM(),
        Contrastive(),
        RDrop(plain),
        Adversarial(plain),
    ]


def statistics(model: Model) -> list[Any]:
    task: Any = model.task
    return [
        Extremes(),
        GateGradients(task, "taylor"),
        Gradients(task, ("head.weight",), True),
        Histogram((("head", (0.0, 1.0)),)),
        LabelCounts(3),
        Moments(task),
        SecondMoments(("head",)),
        SecondText(),
        Sensitivity(task, (("head", (Weights(4), Weights(8, "group", 32))),), (("head", (1.0, 0.5)),)),
        Sure(3, 0.9, 1.0),
        TokenCounts(50),
    ]


def test_every_loss_and_statistic_arrives_as_it_was_sent(model: Model) -> None:
    assert {type(s) for s in statistics(model)} == set(STATISTICS)
    for loss in losses(model):
        task = FitTask("f" * 64, 2, model, loss, Plan(epochs=0.5), codec=Int8(), personal=("head.weight",))
        assert same(travelled(task), task)
    for statistic in statistics(model):
        assert same(travelled(ReduceTask(model, statistic, 10)), ReduceTask(model, statistic, 10))


def test_every_other_message_arrives_as_it_was_sent(model: Model) -> None:
    odd = {"a": torch.tensor(3), "b": torch.zeros(0, 4), "c": torch.randn(2, 3).bfloat16(), "d": torch.ones(1).bool()}
    for message in (
        Join(MANIFEST),
        Joined(MANIFEST, 10, 2),
        Fitted(odd, 10, float("nan"), {"v": torch.randn(3)}),
        Reduced(odd),
        ScoreTask(model, "f"),
        Scored(None, 0),
        Scored(0.5, 7),
    ):
        assert same(travelled(message), message)
    for codec in (Full(), Int8("tensor", "stochastic"), RandomK(0.5), TopK(0.1)):
        task = FitTask("", 0, model, CausalLM(), Plan(), codec=codec, variate={"head.bias": torch.ones(3)})
        assert same(travelled(task), task)


def test_flags_and_what_quantization_knows_travel() -> None:
    model = tiny_model()
    model.network.head.requires_grad_(False)
    model = replace(
        model, ranges={"head": Range(-1.0, 2.0, 4, (0.5, 2.0))}, weights={"head": Weights(4, steps=(0.5, 0.25))}
    )
    came = travelled(ScoreTask(model)).model
    assert not came.network.head.weight.requires_grad
    assert same(came, model)


def test_a_model_stands_in_a_message_once(model: Model) -> None:
    once = WIRE.pack(ScoreTask(model)).bytes
    thrice = WIRE.pack(FitTask("", 0, model, SoftTargets(model.task, (model, model)), Plan()))  # type: ignore[arg-type]
    assert thrice.bytes < once + 5000


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.int64, torch.int8, torch.float16]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=4,
    ),
    st.integers(0, 10**9),
    st.floats(allow_nan=True),
)
def test_updates_of_any_shape_and_name_arrive(shapes: dict[str, Any], rows: int, loss: float) -> None:
    sent = {name: (torch.rand(shape) * 50).to(dtype) for name, (dtype, shape) in shapes.items()}
    assert same(travelled(Fitted(sent, rows, loss)), Fitted(sent, rows, loss))


# --- what techniques put into a network for the time of a fit ---


def test_adapters_are_put_in_again(model: Model) -> None:
    adapt(model.network, 2, 4.0)  # type: ignore[arg-type]
    for name, p in model.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    came = travelled(ScoreTask(model)).model
    assert same(came, model)
    answers(came, model)


@pytest.mark.parametrize("group", [0, 16])
def test_rounding_layers_are_put_in_again(model: Model, group: int) -> None:
    names = [n for n, m in model.network.named_modules() if isinstance(m, nn.Linear) and n.startswith("backbone.")]
    spec = Weights(4, "group", group, clip="mse") if group else Weights(4, clip="mse")
    start = replace(
        model,
        ranges={name: Range(-1.0, 1.5, 8) for name in names[1:]} | {f"{names[1]}.out": Range(-2.0, 2.0)},
        weights=dict.fromkeys(names, spec),
    )
    student = model.with_network(faked(start, learn=not group))
    came = travelled(ScoreTask(student)).model
    assert same(came, student)
    answers(came, student)


def answers(one: Model, two: Model) -> None:
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        given = (ids, torch.ones_like(ids), torch.zeros_like(ids))
        torch.testing.assert_close(one.network(*given), two.network.eval()(*given), rtol=0, atol=0)


def test_a_network_that_cannot_be_rebuilt_is_not_sent(model: Model) -> None:
    name = next(n for n, m in model.network.named_modules() if isinstance(m, nn.Linear) and n.startswith("backbone."))
    put(model.network, name, nn.Sequential(model.network.get_submodule(name)))
    with pytest.raises(WireError, match=r"cannot be rebuilt by a client, so it cannot be trained in a federated run"):
        WIRE.pack(ScoreTask(model))


# --- what must not be sent, and what may come ---


@dataclass(frozen=True)
class Foreign:
    value: int = 1


@dataclass(frozen=True)
class Plan2:
    """Not the Plan that is known."""


def test_only_known_kinds_are_sent(model: Model) -> None:
    with pytest.raises(WireError, match="a Foreign cannot travel: a federated run sends"):
        WIRE.pack(FitTask("", 0, model, Foreign(), Plan()))  # type: ignore[arg-type]
    Plan2.__name__ = "Plan"
    with pytest.raises(WireError, match="a Plan cannot travel"):
        WIRE.pack(FitTask("", 0, model, CausalLM(), Plan2()))  # type: ignore[arg-type]
    with pytest.raises(WireError, match="a Plan is no message"):
        WIRE.pack(Plan())
    with pytest.raises(WireError, match="keys are no strings"):
        WIRE.pack(Reduced({1: torch.ones(1)}))  # type: ignore[dict-item]
    deep: Any = 1
    for _ in range(30):
        deep = (deep,)
    with pytest.raises(WireError, match="nested more than 24 deep"):
        WIRE.pack(Reduced(deep))


def forged(packed: Packed, change: Any) -> Packed:
    """A message whose sender computed the right hash of something else."""
    body = json.loads(json.loads(packed.header)["body"])
    held = dict(packed.tensors)
    change(body, held)
    text = json.dumps(body)
    return Packed(json.dumps({"sha256": digest(text, held), "body": text}), held)


def the_model(body: Any) -> Any:
    return next(iter(body["models"].values()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b, t: b.update(message=1), "a int came where a message was expected"),
        (lambda b, t: b["message"].update(kind="Popen"), "holds a 'Popen'; this version knows"),
        (lambda b, t: b["message"].update(kind=["x"]), "stands for nothing"),
        (lambda b, t: b["message"]["fields"].update(more=1), "came with the fields"),
        (lambda b, t: b["message"]["fields"].update(fit=3), "field fit of a ScoreTask is a int"),
        (lambda b, t: b["message"]["fields"].update(model={"model": "no"}), "KeyError"),
        (lambda b, t: b["message"]["fields"].update(model=None), "field model of a ScoreTask is a NoneType"),
        (lambda b, t: b["message"]["fields"].update(fit={"tuple": [], "x": 1}), "stands for nothing"),
        (lambda b, t: the_model(b)["network"].update(network="module"), "cannot be rebuilt: unknown network 'module'"),
        (lambda b, t: the_model(b)["network"]["config"].update(num_hidden_layers=10**9), "layers came with"),
        (lambda b, t: the_model(b)["network"]["config"].update(intermediate_size=10**9), "is not as its description"),
        (lambda b, t: the_model(b)["network"]["config"].update(model_type="../x"), "cannot be read"),
        (lambda b, t: the_model(b)["network"]["config"].update(num_attention_heads=0), "cannot be read: ZeroDivision"),
        (lambda b, t: the_model(b)["network"].update(outputs=-1), "cannot be read: RuntimeError"),
        (lambda b, t: the_model(b)["patches"].update(shell=1), "does not know how to build"),
        (lambda b, t: the_model(b)["patches"].update(adapters="x"), "cannot be read"),
        (lambda b, t: the_model(b)["encoder"].__setitem__(0, "x"), "KeyError"),
        (
            lambda b, t: t.update({f"text/{the_model(b)['encoder'][0]}": torch.zeros(2).byte()}),
            "the tokenizer of a message was changed",
        ),
        (
            lambda b, t: the_model(b)["values"]["task"]["fields"].update(labels={"tuple": ["one"]}),
            "values that it refuses",
        ),
        (lambda b, t: t.pop(next(iter(t))), "KeyError"),
        (lambda b, t: b.pop("models"), "KeyError"),
    ],
)
def test_what_pack_would_not_have_made_is_refused(model: Model, change: Any, said: str) -> None:
    packed = WIRE.pack(ScoreTask(model))
    assert same(WIRE.unpack(forged(packed, lambda b, t: None)), ScoreTask(model))
    with pytest.raises(WireError, match=said):
        WIRE.unpack(forged(packed, change))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("gpt2", "n_layer"), ("gpt2", "num_hidden_layers")),
        *(("distilbert", "n_layers"), ("distilbert", "num_hidden_layers")),
        *(("qwen3", "num_hidden_layers"), ("modernbert", "num_hidden_layers")),
    ],
)
def test_more_layers_than_tensors_are_not_built_whatever_a_family_calls_them(family: str, name: str) -> None:
    packed = WIRE.pack(ScoreTask(tiny_model(family=family)))
    assert WIRE.unpack(packed).model.digest
    with pytest.raises(WireError, match="a network of 300 layers came with"):
        WIRE.unpack(forged(packed, lambda b, t: the_model(b)["network"]["config"].update({name: 300})))


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        (Joined(MANIFEST, 10, 2), "rows", 10**400),
        (Joined(MANIFEST, 10, 2), "labels", -(2**63)),
        (Fitted({}, 10, 0.1), "epsilon", 10**400),
        (Fitted({}, 10, 0.1), "loss", 2**53 + 1),
        (Membership(0.5, 0.4, 0.6, 0.0, 10, 10), "auc", 10**400),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(message: Any, field: str, number: int) -> None:
    packed = WIRE.pack(message)
    with pytest.raises(WireError, match=f"field {field} of a {type(message).__name__} is a int; expected: .*64 bits"):
        WIRE.unpack(forged(packed, lambda b, t: b["message"]["fields"].update({field: number})))


def test_an_answer_holds_no_model(model: Model) -> None:
    packed = WIRE.pack(ScoreTask(model))
    with pytest.raises(WireError, match="an answer came with a model; clients send tensors only"):
        WIRE.unpack(packed, answer=True)
    assert WIRE.unpack(WIRE.pack(Scored(0.5, 7)), answer=True) == Scored(0.5, 7)


def test_damage_and_size_are_noticed(model: Model) -> None:
    packed = WIRE.pack(ScoreTask(model))
    name = next(n for n in packed.tensors if n.endswith("head.weight"))
    damaged = {**packed.tensors, name: packed.tensors[name] + 1}
    with pytest.raises(WireError, match="changed on its way"):
        WIRE.unpack(Packed(packed.header, damaged))
    with pytest.raises(WireError, match=r"bytes; 1,000 are allowed"):
        replace(WIRE, most=1000).unpack(packed)
    with pytest.raises(WireError, match="of dtype 'object'"):
        tensor("object", (1,), b"12345678")
    with pytest.raises(WireError, match=r"a tensor \(3,\) of float32 came in 8 bytes; it has 12"):
        tensor("float32", (3,), b"12345678")


NOISE = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda s: (
        st.lists(s, max_size=3)
        | st.dictionaries(st.sampled_from(["body", "sha256", "kind", "fields", "message", "models"]), s)
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | NOISE.map(json.dumps))
def test_noise_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(WireError, match="."):
        WIRE.unpack(Packed(text, {}))
    body = json.dumps({"message": text, "models": {}})
    for held in (text, body):
        with pytest.raises(WireError, match="."):
            WIRE.unpack(Packed(json.dumps({"sha256": digest(held, {}), "body": held}), {}))


@pytest.mark.parametrize(
    ("value", "hint", "fine"),
    [
        (True, int, False),
        (1, float, True),
        (True, float, False),
        ((1, "a"), tuple[int, str], True),
        (2**63 - 1, int, True),
        (2**63, int, False),
        (2**53, float, True),
        (-(2**53) - 1, float, False),
        (1e300, float, True),
        (1.0, int, False),
        ((1,), tuple[int, str], False),
        ([1], tuple[int, ...], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        (None, int | None, True),
        ("x", int | None, False),
    ],
)
def test_types_of_fields(value: Any, hint: Any, fine: bool) -> None:
    assert fits(value, hint) == fine


def test_shared_tensors_of_a_network_are_not_shared_with_the_message(model: Model) -> None:
    """Two models of one message may be trained apart."""
    other = model.copy()
    came = travelled(FitTask("", 0, model, SoftTargets(model.task, (other,)), Plan()))  # type: ignore[arg-type]
    assert isinstance(came.model.network, Transformer)
    with torch.no_grad():
        came.model.network.head.bias += 1
    assert same(tensors(travelled(ScoreTask(model)).model.network), tensors(model.network))
