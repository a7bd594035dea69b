"""The JSON of requests. The server refuses a field that it does not know, because the field would do nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from grpo.config.section import MANY
from grpo.errors import did_you_mean
from grpo.serving.refusals import Refusal, wrong

MOST_CHOICES, MOST_PROMPTS, MOST_TOOLS, MOST_STOPS, LONGEST_STOP = 128, 64, 128, 16, 256
SLIP = 0.75
"""How similar an unknown field must be to a known field to count as a typo: OpenAI has other fields that look alike."""

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, le=10 * MANY)]
Nothing = Annotated[float | None, Field(ge=0, le=0)]
Asked = TypeVar("Asked", bound="Wire")


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SamplingFields(Wire):
    """How to sample. The server's defaults apply to fields that a request leaves out."""

    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MANY)] = None
    min_p: Annotated[float | None, Field(ge=0, lt=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=10 * MANY)] | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=1024)] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None

    @field_validator("temperature")
    @classmethod
    def _not_almost_greedy(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < 0.01:
            raise ValueError("must be 0 (greedy) or at least 0.01")
        return value

    @property
    def length(self) -> int | None:
        """The requested limit on tokens, or None."""
        return self.max_tokens


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class OpenAIFields(SamplingFields):
    """The fields that both OpenAI requests share. From `user` on, they are for OpenAI's own service, and do nothing."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=0)] = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ToolFunction(BaseModel):
    """The fields of a tool that are checked. All others go to the chat template unchanged, in the client's order."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The function as the client sent it, with empty parameters if it has none, because templates expect them."""
    try:
        ToolFunction.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {MEANT.get(str(first['loc'][0]), first['msg'])}") from None
    kept = {key: value for key, value in given.items() if key != "strict" and value is not None}
    return kept if "parameters" in kept else {**kept, "parameters": {"type": "object", "properties": {}}}


class ToolShown(Wire):
    type: Literal["function"]
    function: Annotated[dict[str, Any], AfterValidator(_checked)]


class TextFormat(Wire):
    type: Literal["text"]


class ChatRequest(OpenAIFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=0)] = None
    tools: Annotated[tuple[ToolShown, ...] | None, Field(max_length=MOST_TOOLS)] = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(OpenAIFields):
    """`POST /v1/completions`. A prompt is text or token ids; a request may have several prompts."""

    prompt: (
        str
        | Annotated[tuple[TokenId, ...], Field(min_length=1)]
        | Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[tuple[tuple[TokenId, ...], ...], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int | None, Field(ge=0, le=1)] = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Each prompt, text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return (self.prompt,)
        return self.prompt


class SamplingParams(SamplingFields):
    """`sampling_params`. The last three fields do nothing: the first two are about text, but the response has only
    tokens; the last is about reporting an engine's experts."""

    logprobs: Annotated[int | None, Field(ge=0, le=1)] = None
    skip_special_tokens: bool | None = None
    detokenize: bool | None = None
    routed_experts_prompt_start: int | None = None


class GenerateRequest(Wire):
    """`POST /inference/v1/generate`: tokens in, tokens out. `cache_salt` is for engines with a prompt cache, and does
    nothing here."""

    token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    sampling_params: SamplingParams = SamplingParams()
    model: str | None = None
    stream: Literal[False] | None = None
    cache_salt: str | None = None


def read(kind: type[Asked], body: bytes) -> Asked:
    """Parse a request from JSON. Raises a Refusal that names the wrong field and says what is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(kind, error) from None


MEANT: dict[str, str] = {
    "tool_choice": "the model decides whether to call a tool: use auto or none",
    "top_logprobs": "the server computes only the logprob of the sampled token: use 0, or leave it out",
    "presence_penalty": "not supported: use 0, or leave it out; repetition_penalty is similar",
    "frequency_penalty": "not supported: use 0, or leave it out; repetition_penalty is similar",
    "logit_bias": "not supported: leave it out",
    "response_format": "the server cannot force answers into JSON or a schema: leave it out, and prompt for JSON",
    "parallel_tool_calls": "the model decides how many tools to call: leave it out",
    "echo": "the server does not return the prompt or its logprobs: leave it out",
    "best_of": "the server returns all completions: leave it out, and use n",
    "strict": "the server cannot force arguments into the schema: leave it out",
}
"""What to do about an unsupported value, by field."""


def _refusal(kind: type[Wire], error: ValidationError) -> Refusal:
    found = error.errors(include_url=False, include_input=False)
    # An unknown field first: it may be a typo, and explain which field is missing.
    first = next((detail for detail in found if detail["type"] == "extra_forbidden"), found[0])
    place = [str(part) for part in first["loc"] if not _names_a_type(part)]
    where = ".".join(place) or None
    if first["type"] == "json_invalid":
        return wrong(None, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if len(place) > 1 and place[0] in MEANT:  # unsupported whatever its content
        return wrong(where, MEANT[place[0]], "unsupported_value")
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(place[-1], kind.model_fields, SLIP) if len(place) == 1 else ""
        return wrong(where, f"this server does not support this field: leave it out.{hint}", "unknown_field")
    if place and place[-1] in MEANT:
        return wrong(where, MEANT[place[-1]], "unsupported_value")
    why = _in_words(first).removeprefix("Value error, ")
    return wrong(where, f"{why[:1].lower()}{why[1:]}", "invalid_value")


def _in_words(error: ErrorDetails) -> str:
    """What is wrong, in a client's terms: pydantic speaks of tuples, but clients send arrays."""
    if error["type"] not in ("too_short", "too_long"):
        return str(error["msg"])
    about = error["ctx"]
    bound, many = ("least", about["min_length"]) if error["type"] == "too_short" else ("most", about["max_length"])
    return f"expected at {bound} {many} item{'s' * (many != 1)}, got {about['actual_length'] or 'none'}"


def _names_a_type(part: int | str) -> bool:
    """Whether a part of a location is pydantic's name for one type of a union, not the name of a field."""
    return isinstance(part, str) and (not part.replace("_", "").isalnum() or part in ("str", "tuple", "int"))
