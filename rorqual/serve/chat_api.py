"""POST /v1/chat/completions: thinking, tools, schemas, log-probs, n, streams, over any backend."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rorqual.chat import to_openai, with_tools
from rorqual.engine.sampler import Sampled
from rorqual.policy import Completion
from rorqual.serve.backend import Backend, EngineBackend, Job
from rorqual.serve.choices import ChatChoice
from rorqual.serve.constraints import Constraint, Grammars
from rorqual.serve.failures import Refusal, error_body
from rorqual.serve.requests import ChatRequest, ToolChoice


@dataclass(frozen=True)
class Defaults:
    """Of requests that do not say. temperature and top_p are those the released weights were evaluated with."""

    thinking: bool = True
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int | None = None
    """None: as many as fit."""


def open_choices(request: ChatRequest, backend: Backend, grammars: Grammars | None, defaults: Defaults) -> list[ChatChoice]:
    """Queue all n choices. Raises Refusal or ChatError for what can't be asked, before anything is generated."""
    thinking = request.thinks(defaults.thinking)
    schema = _schema_field(request)
    messages = with_tools(request.messages, request.tools, schema)
    prompt = backend.chat_prompt(messages, thinking, request.drop_thinking)
    max_tokens = _max_tokens(request.tokens_asked, prompt, backend, defaults)
    top_logprobs = request.top_logprobs if request.logprobs else 0
    choices = []
    for number in range(request.n):
        params = request.params(max_tokens, defaults.temperature, defaults.top_p, top_logprobs, number)
        params = _ending_the_message(params, backend)
        job = Job(prompt, params, _constraint(request, grammars, thinking))
        tools = request.tools or _tools_on(request.messages)
        choices.append(
            ChatChoice(backend.start(job), request.stops, thinking, tools, single_call=not request.parallel_tool_calls)
        )
    return choices


def _tools_on(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [tool for message in messages for tool in message.get("tools") or ()]


def _schema_field(request: ChatRequest) -> dict[str, Any] | None:
    """What the format writes into the prompt for a response format."""
    wanted = request.response_format
    if wanted is None or wanted.type != "json_schema" or wanted.json_schema is None:
        return None
    return wanted.json_schema.schema_ or None


def _constraint(request: ChatRequest, grammars: Grammars | None, thinking: bool) -> Constraint | None:
    wanted, choice = request.response_format, request.tool_choice
    binds = (wanted is not None and wanted.type != "text") or choice == "required" or isinstance(choice, ToolChoice)
    if grammars is None:
        if binds or (choice == "none" and request.tools):
            raise Refusal(400, "response_format, tool_choice: this server can't constrain its upstream", "response_format")
        return None
    if isinstance(choice, ToolChoice):
        return grammars.for_call([choice.function.name], thinking)
    if choice == "required":
        return grammars.for_call([str(tool["function"]["name"]) for tool in request.tools], thinking)
    if wanted is not None and wanted.type != "text":
        return grammars.for_schema(_schema_field(request), thinking)
    return grammars.without_calls() if choice == "none" and _tools_on(request.messages) + request.tools else None


def _max_tokens(asked: int | None, prompt: list[int] | str, backend: Backend, defaults: Defaults) -> int:
    room = backend.room(prompt)
    if room is not None and room <= 0:
        raise Refusal(
            400, f"the prompt has {len(prompt)} tokens; this context takes {len(prompt) + room - 1} and an answer",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    wanted = asked if asked is not None else defaults.max_tokens
    if wanted is None:
        return room if room is not None else 4096
    if room is not None and asked is not None and asked > room:
        raise Refusal(
            400, f"max_tokens: {asked} asked, but only {room} fit after the prompt's {len(prompt)}",
            "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    return wanted if room is None else min(wanted, room)


def _ending_the_message(params: Any, backend: Backend) -> Any:
    from dataclasses import replace

    if not isinstance(backend, EngineBackend):
        return params
    return replace(params, stop_tokens=(*params.stop_tokens, backend.tokenizer.eos_id))


async def whole(request: ChatRequest, choices: list[ChatChoice], backend: Backend) -> dict[str, Any]:
    """The answer in one piece."""

    async def drain(choice: ChatChoice) -> None:
        async for _ in choice.deltas():
            pass

    try:
        await asyncio.gather(*(drain(choice) for choice in choices))
    finally:
        abort(choices)
    bodies = [_choice_body(number, choice, request, backend) for number, choice in enumerate(choices)]
    return _frame("chat.completion", backend) | {"choices": bodies, "usage": usage(choices)}


def _choice_body(number: int, choice: ChatChoice, request: ChatRequest, backend: Backend) -> dict[str, Any]:
    body = {"index": number, "message": choice.builder.message(), "finish_reason": choice.finish_reason, "logprobs": None}
    if request.logprobs:
        body["logprobs"] = {"content": [token_logprob(token, backend) for token in choice.tokens]}
    return body | recorded(choice.ending.completion if choice.ending else None, request)


async def stream(request: ChatRequest, choices: list[ChatChoice], backend: Backend) -> AsyncIterator[str]:
    """Server-sent events: a chunk for every delta, the finish of each choice, usage if asked, [DONE]."""
    frame = _frame("chat.completion.chunk", backend)
    usage_field = {"usage": None} if request.stream_options and request.stream_options.include_usage else {}

    def event(number: int, delta: dict[str, Any], more: dict[str, Any] | None = None) -> str:
        body = {"index": number, "delta": delta, "finish_reason": None, "logprobs": None} | (more or {})
        return sse(frame | {"choices": [body]} | usage_field)

    try:
        for number in range(len(choices)):
            yield event(number, {"role": "assistant", "content": ""})
        async for number, choice, deltas, tokens in _merged(choices):
            shown = [delta for delta in map(to_openai, deltas) if delta]
            more = {"logprobs": {"content": [token_logprob(t, backend) for t in tokens]}} if request.logprobs and tokens else {}
            for at, delta in enumerate(shown or ([{}] if more else [])):
                yield event(number, delta, more if at == 0 else None)
            if choice.ending is not None:
                finish = {"finish_reason": choice.finish_reason}
                yield event(number, {}, finish | recorded(choice.ending.completion, request))
        if usage_field:
            yield sse(frame | {"choices": [], "usage": usage(choices)})
    except Refusal as error:
        yield sse(error_body(error.status, error.message, error.param, error.code))
    finally:
        abort(choices)
    yield "data: [DONE]\n\n"


async def _merged(choices: Sequence[ChatChoice]) -> AsyncIterator[tuple[int, ChatChoice, list, list]]:
    """The deltas of all choices as they come."""
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(number: int, choice: ChatChoice) -> None:
        try:
            async for deltas, tokens in choice.deltas():
                await queue.put((number, choice, deltas, tokens))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(number, choice)) for number, choice in enumerate(choices)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


def abort(choices: Sequence[ChatChoice]) -> None:
    for choice in choices:
        if choice.ending is None:
            choice.generation.abort()


def usage(choices: Sequence[ChatChoice]) -> dict[str, Any]:
    endings = [choice.ending for choice in choices if choice.ending]
    prompt = max((ending.prompt_tokens for ending in endings), default=0)
    completion = sum(ending.completion_tokens for ending in endings)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": max((ending.cached_tokens for ending in endings), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }


def token_logprob(sampled: Sampled, backend: Backend) -> dict[str, Any]:
    """OpenAI's form, of the raw model's distribution."""
    assert isinstance(backend, EngineBackend)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        special = backend.tokenizer.special_tokens.get(token)
        data = special.encode() if special else backend.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}

    top = [entry(*pair) for pair in sampled.top_logprobs]
    return entry(sampled.token, sampled.model_logprob) | {"top_logprobs": top}


def recorded(completion: Completion | None, request: Any) -> dict[str, Any]:
    """Token ids and what a trainer replays, where asked: arrays as {"shape", "dtype", "data": base64}."""
    if completion is None or not (
        request.return_token_ids or request.return_kept_tokens or request.return_routed_experts or request.return_selected_indices
    ):
        return {}
    found: dict[str, Any] = {
        "prompt_token_ids": list(completion.prompt_tokens),
        "token_ids": list(completion.tokens),
        "sampled_logprobs": completion.logprobs.tolist(),
        "policy_versions": completion.policy_versions.tolist() if completion.policy_versions is not None else None,
    }
    if completion.kept_tokens is not None:
        found["kept_tokens"] = {
            "tokens": packed(completion.kept_tokens.tokens),
            "offsets": packed(completion.kept_tokens.offsets),
        }
    if completion.routed_experts is not None:
        found["routed_experts"] = packed(completion.routed_experts)
    if completion.selected_indices is not None:
        found["selected_indices"] = [packed(layer) for layer in completion.selected_indices]
    return {"rollout": found}


def packed(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": data}


def sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _frame(kind: str, backend: Backend) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": backend.model_name}
