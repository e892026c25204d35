"""What a client may ask: OpenAI's request bodies, checked field by field. A field that is unknown is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rorqual.policy import SamplingParams

Count = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """What chat and plain completions have in common. OpenAI's own defaults, but for those a server sets."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted, and without effect."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    frequency_penalty: Literal[0] | None = None
    """Only 0: the engine has no penalties, and says so rather than ignore one."""
    presence_penalty: Literal[0] | None = None

    # For RL clients: token ids out, and what a trainer replays.
    return_token_ids: bool = False
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """Ids that end the completion beside the end of sentence; the id is part of the completion."""
    return_kept_tokens: bool = False
    return_routed_experts: bool = False
    return_selected_indices: bool = False

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    def params(self, max_tokens: int, temperature: float, top_p: float, top_logprobs: int, choice: int) -> SamplingParams:
        """The engine's parameters of one of the n choices; with a seed each choice has its own."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=top_p if self.top_p is None else self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed is None else (self.seed + choice * 0x9E3779B97F4A7C15) % 2**63,
            stop_tokens=tuple(self.stop_token_ids),
            logit_bias=self.logit_bias,
            top_logprobs=top_logprobs,
            record_kept_tokens=self.return_kept_tokens,
            record_routed_experts=self.return_routed_experts,
            record_selected_indices=self.return_selected_indices,
        )


class JsonSchema(BaseModel):
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class NamedTool(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"] = "function"
    function: NamedTool


class Thinking(BaseModel):
    type: Literal["enabled", "disabled"]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    thinking: bool | Thinking | None = None
    """True or {"type": "enabled"}; None takes the server's default."""
    chat_template_kwargs: dict[str, Any] = {}
    """Only `thinking`, as other engines take it."""
    drop_thinking: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    """none switches thinking off; the format knows no degrees."""

    @model_validator(mode="after")
    def _checks(self) -> ChatRequest:
        unknown = set(self.chat_template_kwargs) - {"thinking", "enable_thinking"}
        if unknown:
            raise ValueError(f"chat_template_kwargs: knows thinking only, found {', '.join(sorted(unknown))}")
        names = [str((tool.get("function") or {}).get("name")) for tool in self.tools]
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name} is none of the tools ({', '.join(names) or 'none'})")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required, but there are no tools")
        return self

    def thinks(self, default: bool) -> bool:
        """Whether the model shall reason."""
        if isinstance(self.thinking, Thinking):
            return self.thinking.type == "enabled"
        if self.thinking is not None:
            return self.thinking
        for name in ("thinking", "enable_thinking"):
            if name in self.chat_template_kwargs:
                return bool(self.chat_template_kwargs[name])
        return default if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions. A prompt of ids is taken as it is: token in, token out."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Literal[False] = False
    skip_special_tokens: bool = False
    """True leaves special tokens out of the text; a parser behind this endpoint needs them in."""
    spaces_between_special_tokens: Literal[False] = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: None = None
    best_of: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
