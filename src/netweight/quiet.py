"""Libraries that would tell their makers that they are used, imported so that they do not."""

from __future__ import annotations

import os
from typing import Any

_TELEMETRY = "ORT_DISABLE_TELEMETRY"


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
