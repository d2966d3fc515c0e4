"""`POST /v1/models/{name}/explain`: a prediction, and which words moved it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from netweight.serve.hosted import Hosted, Models
from netweight.serve.occlusion import Piece, occluded, pieces, weights
from netweight.serve.schema import Question, WordsQuestion, WordsReply, responses, words_question
from netweight.serve.steady import Said
from netweight.task import Classify

Body = Callable[[Request], Awaitable[bytes]]
Ask = Callable[[Models, str, Question, Request], Awaitable[tuple[Hosted, Said]]]


def explanations(app: FastAPI, models: Models, body: Body, ask: Ask) -> None:
    """Add the endpoint. `body` reads a request, `ask` answers rows: as for predictions, but without a candidate.

    The rows without a word are nobody's texts, so they count neither as requests nor in tiers and confidences, which
    tell how customers' texts fare, nor for a candidate; the time that the engine works on them does count.
    """

    @app.post(
        "/v1/models/{name}/explain",
        response_model=WordsReply,
        responses=responses(400, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}},
    )
    async def explain(name: str, request: Request) -> Response:
        """What the label's probability (or the value) loses when each word is left out; one request to the engine."""
        models.require(name)  # before the body is read
        asked = words_question(await body(request))
        texts = [asked.text] if asked.text is not None else list(asked.pair or ())
        left_out = pieces(texts)
        first, *second = occluded(texts, left_out)
        rows = Question.model_construct(
            texts=None if second else first,
            pairs=list(zip(first, *second, strict=True)) if second else None,
            deadline_ms=asked.deadline_ms,
        )
        hosted, said = await ask(models, name, rows, request)
        return Response(explained(hosted, said, texts, left_out), media_type="application/json")


def _schema() -> dict[str, Any]:
    return WordsQuestion.model_json_schema(ref_template="#/components/schemas/{model}")


def explained(hosted: Hosted, said: Said, texts: list[str], left_out: tuple[Piece, ...]) -> bytes:
    """The body of an answer. The first row said is the whole, the others lack one piece each."""
    engine, outputs = hosted.engine, said.outputs
    task, tiers = engine.task, engine.tiers
    moved = weights(task, [tier.temperature for tier in tiers], outputs).round(6).tolist()
    words: list[dict[str, Any]] = [
        {"text": texts[p.side][p.start : p.end], **asdict(p), "weight": weight}
        for p, weight in zip(left_out, moved, strict=True)
    ]
    whole: dict[str, Any] = {"tier": tiers[outputs.tier[0]].name}
    if isinstance(task, Classify):
        best, *others = outputs.logits.argmax(axis=1).tolist()
        whole |= {"label": task.labels[best], "confidence": round(float(outputs.confidence[0]), 6)}
        for word, other in zip(words, others, strict=True):
            word["label"] = task.labels[other]
    else:
        whole["value"] = float(task.values(outputs.logits[:1])[0])
    reply = {"model": hosted.name, "version": engine.version, "prediction": whole, "words": words}
    return json.dumps(reply | {"degraded": list(said.failed)}, separators=(",", ":")).encode()
