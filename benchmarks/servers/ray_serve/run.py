"""An artifact behind plain Ray Serve: run.py ARTIFACT PORT BATCH MILLISECONDS."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from netweight.engine import load

BATCH, MILLISECONDS = int(sys.argv[3]), float(sys.argv[4])


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5})
class Api:
    """Lists of texts in, lists of labels out; what waits together is answered together."""

    def __init__(self, folder: str) -> None:
        self.engine = load(folder, 1)
        self.engine.warm()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=MILLISECONDS / 1000)
    async def many(self, inputs: list[list[str]]) -> list[Any]:
        """Requests that wait together."""
        found = iter(self.engine.predict([text for texts in inputs for text in texts]))
        said = [[next(found) for _ in texts] for texts in inputs]
        return [[{"label": p.label, "confidence": p.confidence, "tier": p.tier} for p in row] for row in said]

    async def __call__(self, request: Request) -> JSONResponse:
        """One request. (A dict would come back in chunks, which `load.py` does not read.)"""
        return JSONResponse({"predictions": await self.many((await request.json())["texts"])})


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Api.bind(sys.argv[1]), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
