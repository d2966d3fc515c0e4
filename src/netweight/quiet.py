"""Libraries that would tell their makers that they are used, imported so that they do not."""

from __future__ import annotations

import logging
import os
from typing import Any

from netweight.errors import MissingExtra

_TELEMETRY = "ORT_DISABLE_TELEMETRY"
# What Flower reads, and what it sets, while it is imported.
_FLOWER = ("FLWR_TELEMETRY_ENABLED", "GRPC_VERBOSITY", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")


def onnxruntime() -> Any:
    """ONNX Runtime. As soon as it is imported (1.32, Linux) it looks for mobile.events.data.microsoft.com, from C++ and
    therefore unseen by Python's audit hooks. Its own `disable_telemetry_events` comes too late; this variable does not,
    and is read during the import alone."""
    before = os.environ.get(_TELEMETRY)
    os.environ[_TELEMETRY] = "1"
    try:
        import onnxruntime as found
    finally:
        if before is None:
            del os.environ[_TELEMETRY]
        else:
            os.environ[_TELEMETRY] = before
    return found


def flower() -> Any:
    """Flower, whose telemetry (on by default) is off, and which keeps no identity in the home directory for it."""
    before = {name: os.environ.get(name) for name in _FLOWER}
    os.environ[_FLOWER[0]] = "0"
    try:
        import flwr
        from flwr.supercore import telemetry
    except ImportError:
        raise MissingExtra("a federated run over Flower", "federated") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    # Whoever imported it before us may not have thought of it.
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    telemetry.state["source"] = telemetry.state["source"] or "unavailable"
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what matters comes back as an error
    return flwr
