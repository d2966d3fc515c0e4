"""What may travel between a server and its clients: the statistics of all techniques."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, cast

from netweight.layers import put
from netweight.model import Range, Weights
from netweight.network import Network, Transformer
from netweight.run.federated.wire import Patch, Wire
from netweight.techniques.factor import SecondMoments
from netweight.techniques.finetune import LabelCounts, Moments
from netweight.techniques.lora import adapt
from netweight.techniques.mixed import Sensitivity
from netweight.techniques.prune import Gradients
from netweight.techniques.qat import FakeLinear
from netweight.techniques.quantize import Extremes, Histogram
from netweight.techniques.selftrain import Sure
from netweight.techniques.shrink import GateGradients
from netweight.techniques.static import SecondText, TokenCounts

STATISTICS = (
    *(Extremes, GateGradients, Gradients, Histogram, LabelCounts, Moments),
    *(SecondMoments, SecondText, Sensitivity, Sure, TokenCounts),
)


def adapters(network: Network) -> list[float] | None:
    """Rank and alpha of the adapters beside a network's layers."""
    given = getattr(network, "peft_config", {}).get("default")
    return None if given is None else [given.r, given.lora_alpha]


def put_adapters(network: Network, given: Any) -> None:
    """Inverse of `adapters`."""
    rank, alpha = given
    adapt(cast(Transformer, network), int(rank), float(alpha))


def roundings(network: Network) -> dict[str, Any] | None:
    """How each layer rounds that does so while it is trained."""
    found: dict[str, Any] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, FakeLinear):
            points = {"given": layer.given and layer.given.bits, "out": layer.out and layer.out.bits}
            points["scaled"] = layer.scale is not None
            learn = layer.given.learn if layer.given else layer.steps is not None and layer.steps.ratio.requires_grad
            found[name] = {"spec": asdict(layer.spec), "learn": learn, **points}
    return found or None


def put_roundings(network: Network, given: Any) -> None:
    """Inverse of `roundings`; scales and zero points are tensors of the network and come with its state."""
    for name, how in given.items():
        spec = Weights(**{**how["spec"], "steps": tuple(how["spec"]["steps"])})
        linear = cast(Any, network.get_submodule(name))
        scale = (1.0,) * linear.in_features if how["scaled"] else ()
        given_range = Range(-1.0, 1.0, how["given"], scale) if how["given"] else None
        out = Range(-1.0, 1.0, how["out"]) if how["out"] else None
        # Where weights are best clipped is not searched in weights that are not there yet.
        layer = FakeLinear(linear, given_range, out, replace(spec, clip="minmax"), how["learn"])
        layer.spec = spec
        put(network, name, layer)


WIRE = Wire(STATISTICS, (Patch("adapters", adapters, put_adapters), Patch("roundings", roundings, put_roundings)))
