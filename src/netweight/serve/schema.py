"""What requests and answers look like, for validation and for OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from netweight.serve.problems import Problem

MOST_ROWS = 1024
MOST_BYTES = 4 * 2**20
MOST_CHARACTERS = 10_000  # of a text that is explained: it is answered some sixty times
_SHOWN = 200  # characters of a faulty place that are said again
_FAULTS = 4 * MOST_ROWS  # more than known fields can have: hundreds of thousands of others would hold up the event loop
Text = Annotated[str, Field(max_length=100_000)]
_Asked = TypeVar("_Asked", bound=BaseModel)


def _either(one: str, other: str) -> list[JsonValue]:
    """In JSON Schema: one of two lists, or texts, is given, and the other one is not."""
    return [
        {"required": [a], "properties": {a: {"not": {"type": "null"}}, b: {"type": "null"}}}
        for a, b in ((one, other), (other, one))
    ]


def _whole(value: Any) -> Any:
    """For JSON Schema 1000.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Deadline = Annotated[int, Field(ge=1, le=600_000), BeforeValidator(_whole)]  # milliseconds


class Question(BaseModel):
    """Texts, or pairs of texts."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"texts": ["zip broke after a week"]}, {"texts": ["fits well"], "scores": True}],
            "oneOf": _either("texts", "pairs"),
        },
    )

    texts: Annotated[list[Text], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    pairs: Annotated[list[tuple[Text, Text]], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    scores: bool = Field(False, description="Also the probability of every label.")
    deadline_ms: Deadline = Field(30_000, description="The request is dropped when it was not answered by then.")

    @property
    def first(self) -> list[str]:
        """The texts, or the first of each pair."""
        return self.texts if self.texts is not None else [one for one, _ in self.pairs or ()]

    @property
    def second(self) -> list[str] | None:
        """The second text of each pair."""
        return None if self.pairs is None else [other for _, other in self.pairs]

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


Explained = Annotated[str, Field(max_length=MOST_CHARACTERS)]


class WordsQuestion(BaseModel):
    """One text, or one pair of texts."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"text": "zip broke after a week"}], "oneOf": _either("text", "pair")},
    )

    text: Explained | None = None
    pair: tuple[Explained, Explained] | None = None
    deadline_ms: Deadline = Field(30_000, description="The request is dropped when it was not answered by then.")

    @model_validator(mode="after")
    def _one_of_them(self) -> WordsQuestion:
        if (self.text is None) == (self.pair is None):
            raise ValueError("give text or pair, and not both")
        return self


class Word(BaseModel):
    """What one word, or one run of words, does to the answer."""

    text: str
    side: int = Field(description="0, or 1 in the second text of a pair.")
    start: int = Field(description="Where it begins, in Unicode code points.")
    end: int = Field(description="Where it ends: the first code point after it.")
    count: int = Field(description="How many words it is: more than one where the text has many.")
    weight: float = Field(
        description="How far the label's probability (or the value) falls when the word is left out; "
        "below 0, the word spoke against it."
    )
    label: str | None = Field(None, description="The label without the word.")


class WordsReply(BaseModel):
    """A prediction, and what each word did to it."""

    model: str
    version: str = Field(description="Changes whenever predictions may.")
    prediction: Prediction
    words: list[Word] = Field(description="In the order of the text; runs of words where the text has many.")
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
    """A validated request for predictions. Raises Problem."""
    return _valid(Question, body)


def words_question(body: bytes) -> WordsQuestion:
    """A validated request for an explanation. Raises Problem."""
    return _valid(WordsQuestion, body)


def _valid(kind: type[_Asked], body: bytes) -> _Asked:
    try:
        return kind.model_validate_json(body)
    except ValidationError as problem:
        if (count := problem.error_count()) > _FAULTS:
            fields = ", ".join(kind.model_fields)
            raise Problem(
                422, "invalid-request", f"the body has {count:,} faults; send only {fields}, as /openapi.json says."
            ) from None
        first = problem.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:_SHOWN] or "the body"
        if first["type"] == "json_invalid":
            raise Problem(400, "bad-json", f"the body is not JSON: {first['msg']}.") from None
        raise Problem(422, "invalid-request", f"{where}: {first['msg']}.") from None


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of problems."""
    media = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Fault"}}}
    return {status: {"description": "A problem", "content": media} for status in statuses}
