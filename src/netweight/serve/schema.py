"""What requests and answers look like, for validation and for OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from netweight.serve.problems import Problem

MOST_ROWS = 1024
MOST_BYTES = 4 * 2**20
_SHOWN = 200  # characters of a faulty place that are said again
Text = Annotated[str, Field(max_length=100_000)]


def _whole(value: Any) -> Any:
    """For JSON Schema 1000.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Question(BaseModel):
    """Texts, or pairs of texts."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"texts": ["zip broke after a week"]}, {"texts": ["fits well"], "scores": True}],
            "oneOf": [
                {"required": [name], "properties": {name: {"type": "array"}, other: {"type": "null"}}}
                for name, other in (("texts", "pairs"), ("pairs", "texts"))
            ],
        },
    )

    texts: Annotated[list[Text], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    pairs: Annotated[list[tuple[Text, Text]], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    scores: bool = Field(False, description="Also the probability of every label.")
    deadline_ms: Annotated[int, Field(ge=1, le=600_000), BeforeValidator(_whole)] = Field(
        30_000, description="The request is dropped when it was not answered by then."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Question:
        if (self.texts is None) == (self.pairs is None):
            raise ValueError("give texts or pairs, and not both")
        return self


class Prediction(BaseModel):
    """Of one row: a label with its confidence, or a value."""

    label: str | None = None
    confidence: float | None = None
    value: float | None = None
    tier: str = Field(description="Which tier of the cascade answered.")
    scores: dict[str, float] | None = None


class Reply(BaseModel):
    """Predictions in the order of the rows."""

    model: str
    version: str = Field(description="Changes whenever predictions may.")
    predictions: list[Prediction]
    degraded: list[str] = Field(description="Tiers that failed; others answered in their place.")


class Fault(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None


def question(body: bytes) -> Question:
    """A validated request. Raises Problem."""
    try:
        return Question.model_validate_json(body)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:_SHOWN] or "the body"
        if first["type"] == "json_invalid":
            raise Problem(400, "bad-json", f"the body is not JSON: {first['msg']}.") from None
        raise Problem(422, "invalid-request", f"{where}: {first['msg']}.") from None


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of problems."""
    media = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Fault"}}}
    return {status: {"description": "A problem", "content": media} for status in statuses}
