"""What is around a process: libraries that would tell their makers that they are used, imported so that they do not,
and the cores that it may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from netweight.errors import MissingExtra

_CGROUP = Path("/sys/fs/cgroup")  # in a container, its own
# Of CPU, microseconds in each period: version 2 in one file ("max" for no limit), version 1 in two (-1).
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


@contextmanager
def _told(*kept: str, **variables: str) -> Iterator[None]:
    """Variables of the environment during an import; afterwards these, and those `kept`, are what they were before."""
    before = {name: os.environ.get(name) for name in (*variables, *kept)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def onnxruntime() -> Any:
    """ONNX Runtime. As soon as it is imported (1.32, Linux) it looks for mobile.events.data.microsoft.com, from C++ and
    therefore unseen by Python's audit hooks. Its own `disable_telemetry_events` comes too late; this variable does not,
    and is read during the import alone."""
    with _told(ORT_DISABLE_TELEMETRY="1"):
        import onnxruntime as found
    return found


def openvino() -> Any:
    """OpenVINO. As soon as it is imported (2026.4) it makes an id in ~/intel and sends it to Google Analytics, for whom
    no answer is consent; not on a machine of continuous integration, which is asked for once."""
    with _told(CI="true"):
        import openvino as found
    return found


def nncf() -> Any:
    """NNCF, which would do the same (3.4) and tell of every quantization; not where NNCF_CI is set, or pytest is there,
    so that few tests could see it."""
    with _told(CI="true", NNCF_CI="1"):
        import nncf as found
    return found


def flower() -> Any:
    """Flower, whose telemetry (on by default) is off, and which keeps no identity in the home directory for it."""
    # It sets the other two itself.
    with _told("GRPC_VERBOSITY", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", FLWR_TELEMETRY_ENABLED="0"):
        try:
            import flwr
            from flwr.supercore import telemetry
        except ImportError:
            raise MissingExtra("a federated run over Flower", "federated") from None
    # Whoever imported it before us may not have thought of it.
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    telemetry.state["source"] = telemetry.state["source"] or "unavailable"
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what matters comes back as an error
    return flwr


def cores() -> int:
    """Cores that this process may use: those it may run on, and no more than a container's quota of CPU needs."""
    found = len(os.sched_getaffinity(0))
    for files in _QUOTAS:
        with suppress(OSError, ValueError):
            quota, period = (int(word) for file in files for word in (_CGROUP / file).read_text("ascii").split())
            if quota > 0:
                found = min(found, -(-quota // period))
    return found
