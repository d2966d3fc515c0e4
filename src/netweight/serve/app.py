"""The HTTP interface: requests in, answers of `Models` out."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from netweight.serve.body import Bodies
from netweight.serve.direct import Direct
from netweight.serve.explain import explanations
from netweight.serve.guard import Guard
from netweight.serve.hosted import Hosted, Models
from netweight.serve.keys import OPEN, Gate
from netweight.serve.metrics import Metrics
from netweight.serve.pages import playground
from netweight.serve.problems import Problem, gone, late
from netweight.serve.recorder import Recorder
from netweight.serve.schema import Fault, Question, Reply, question, responses
from netweight.serve.steady import Said
from netweight.task import Classify, softmax

log = logging.getLogger("netweight.serve")
# A client that has gone is noticed once its request has waited for so long; looking earlier would cost every request.
_PATIENT = 0.05


def application(
    models: Models, metrics: Metrics, keys: Path | None = None, recorder: Recorder | None = None
) -> FastAPI:
    """An ASGI application; with a file of keys, only for those who have one. `recorder` is told every answer."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(models.close)

    app = FastAPI(
        title="Netweight",
        version=importlib.metadata.version("netweight"),
        description="Predictions of certified models. Problems are application/problem+json with a code.",
        lifespan=life,
        redoc_url=None,
        docs_url=None,
        redirect_slashes=False,  # a redirect would go to whichever host the client named
    )
    bodies = Bodies()
    metrics.watch(models)
    _problems(app)
    _described(app, keys is not None)

    @app.post(
        "/v1/models/{name}/predict",
        response_model=Reply,
        responses=responses(400, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}},
    )
    async def predict(name: str, request: Request) -> Response:
        """Predictions for texts, or for pairs of texts."""
        # `Direct` comes here without a route; the route says in OpenAPI what there is.
        began, status = time.perf_counter(), 500
        try:
            models.require(name)  # before the body is read
            asked = question(await bodies.read(request))
            rows = recorder.drawn(len(asked.first)) if recorder is not None else []
            hosted, said = await _answered(models, name, asked, request)
            metrics.said(hosted, said)
            if recorder is not None:
                recorder.offer(hosted, asked.first, asked.second, said, rows)
            status = 200
            return Response(reply(hosted, said, asked.scores), media_type="application/json")
        except Problem as problem:
            status = problem.status
            raise
        except asyncio.CancelledError:  # of Ray Serve, whose client has gone
            status = 499
            raise
        finally:
            # Names that do not exist are not counted one by one: anybody can invent them.
            metrics.requests.labels(name if status != 404 else "", status).inc()
            if status == 200:  # how soon others were refused says nothing of how soon one is answered
                metrics.latency.labels(name).observe(time.perf_counter() - began)

    explanations(app, models, bodies.read, partial(_answered, tried=False))
    _beside(app, models, metrics)
    playground(app)
    app.add_middleware(Direct, predict=predict)
    if keys is not None:
        app.add_middleware(Gate, path=keys, refused=lambda status: metrics.requests.labels("", status).inc())
    door = metrics.requests.labels("", 429).inc  # which model was asked for is not known there yet
    app.add_middleware(Guard, patience=models.patience, refused=door)  # added last, so it is the outermost
    return app


def _beside(app: FastAPI, models: Models, metrics: Metrics) -> None:
    """What stands beside predictions: models, probes, numbers."""

    @app.get("/v1/models")
    async def all_models() -> Any:
        """Every model with its certificate and measurements."""
        return {"models": models.known}

    @app.get("/healthz")
    async def health() -> Any:
        """Whether the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses=responses(503))
    async def ready() -> Any:
        """Whether a model answers, if need be once it is woken."""
        if not models.known:
            raise Problem(503, "not-ready", "no model is loaded yet; try again.", {"Retry-After": "1"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _schema() -> dict[str, Any]:
    return Question.model_json_schema(ref_template="#/components/schemas/{model}")


def _problems(app: FastAPI) -> None:
    """Everything that is not an answer is problem+json."""

    @app.exception_handler(Problem)
    async def ours(request: Request, problem: Problem) -> Response:
        return problem.response(request.scope.get("request_id", ""))

    @app.exception_handler(HTTPException)
    async def http(request: Request, problem: HTTPException) -> Response:
        codes = {404: "not-found", 405: "method-not-allowed"}
        found = Problem(problem.status_code, codes.get(problem.status_code, "refused"), str(problem.detail))
        found.headers.update(problem.headers or {})
        return found.response(request.scope.get("request_id", ""))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        return Problem(422, "invalid-request", str(problem.errors()[0]["msg"])).response(
            request.scope.get("request_id", "")
        )


def _described(app: FastAPI, keyed: bool) -> None:
    """OpenAPI also says what stands before all routes: the form of problems and, where there are keys, the gate."""
    usual: Callable[[], dict[str, Any]] = app.openapi

    def described() -> dict[str, Any]:
        schema = usual()
        schema["components"].setdefault("schemas", {})["Fault"] = Fault.model_json_schema()
        if keyed:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for operation in (o for path in schema["paths"].keys() - OPEN for o in schema["paths"][path].values()):
                operation["security"] = [{"key": []}]
                operation["responses"] |= {str(status): said for status, said in responses(401, 429).items()}
        return schema

    app.openapi = described  # type: ignore[method-assign]


async def _answered(
    models: Models, name: str, asked: Question, request: Request, tried: bool = True
) -> tuple[Hosted, Said]:
    """The engine's answer; a client that goes away takes its request out of the queue. There, deadlines are looked at
    when a turn begins; here they hold within one too, and while a model wakes."""
    seconds = asked.deadline_ms / 1000
    answer = asyncio.ensure_future(models.answer(name, asked.first, asked.second, seconds, tried))
    waited: list[asyncio.Future[Any]] = [answer]
    try:
        done, _ = await asyncio.wait(waited, timeout=min(_PATIENT, seconds))
        if not done and seconds > _PATIENT:
            waited.append(asyncio.ensure_future(_gone(request.receive)))
            done, _ = await asyncio.wait(waited, timeout=seconds - _PATIENT, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise gone() if done else late()
        return answer.result()
    finally:  # also where this is cancelled, as Ray Serve does when a client goes
        for one in waited:
            one.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def reply(hosted: Hosted, said: Said, scores: bool = False) -> bytes:
    """The body of an answer."""
    task, outputs = hosted.engine.task, said.outputs
    tiers = [tier.name for tier in hosted.engine.tiers]
    where = outputs.tier.tolist()
    if isinstance(task, Classify):
        best, sure = outputs.logits.argmax(axis=1).tolist(), outputs.confidence.round(6).tolist()
        rows: list[dict[str, Any]] = [
            {"label": task.labels[b], "confidence": c, "tier": tiers[t]}
            for b, c, t in zip(best, sure, where, strict=True)
        ]
        if scores:
            heat = [tier.temperature for tier in hosted.engine.tiers]
            for row, logits, t in zip(rows, outputs.logits, where, strict=True):
                shares = softmax(logits[None] / heat[t])[0].round(6).tolist()
                row["scores"] = dict(zip(task.labels, shares, strict=True))
    else:
        values = task.values(outputs.logits).tolist()
        rows = [{"value": v, "tier": tiers[t]} for v, t in zip(values, where, strict=True)]
    body = {"model": hosted.name, "version": hosted.engine.version, "predictions": rows, "degraded": list(said.failed)}
    return json.dumps(body, separators=(",", ":")).encode()
