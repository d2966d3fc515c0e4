"""An artifact behind LitServe: run.py ARTIFACT PORT BATCH MILLISECONDS."""

from __future__ import annotations

import sys
from typing import Any

import litserve

from netweight.engine import load


class Api(litserve.LitAPI):
    """Lists of texts in, lists of labels out; what waits together is answered together."""

    def setup(self, device: Any) -> None:
        self.engine = load(sys.argv[1], 1)
        self.engine.warm()

    def decode_request(self, request: dict[str, list[str]]) -> list[str]:
        return request["texts"]

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, inputs: Any) -> Any:
        many = isinstance(inputs[0], list)
        found = iter(self.engine.predict([text for texts in inputs for text in texts] if many else inputs))
        said = [[next(found) for _ in texts] for texts in inputs] if many else [list(found)]
        rows = [[{"label": p.label, "confidence": p.confidence, "tier": p.tier} for p in row] for row in said]
        return rows if many else rows[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"predictions": output}


if __name__ == "__main__":
    api = Api(max_batch_size=int(sys.argv[3]), batch_timeout=float(sys.argv[4]) / 1000)
    litserve.LitServer(api, accelerator="cpu").run(host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
