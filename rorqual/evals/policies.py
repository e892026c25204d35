"""What can be measured: a checkpoint directory, an OpenAI-compatible address, or a program (`program:gold` and others).

Programs are for tests and for proving a benchmark: `gold` gives each reference solution, `corrupted` each one made wrong,
`silent` answers nothing, `endless` never ends a message, `failing` is an endpoint that fails for a tenth of the calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.evals.benchmark import LAST_RESULT, Benchmark, GoldCalls, Suite, stored_calls
from rorqual.policy import ChatPolicy, ChatReply, Message, SamplingParams, StopReason
from rorqual.rollout.agent import speaker_of
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy
from rorqual.rollout.speaker import ChatMode, ChatOfTokens
from rorqual.tasks import Task

PROGRAM = "program:"


@dataclass(frozen=True)
class Player:
    """A policy that is ready to play."""

    identity: str
    """What a stored attempt belongs to: two policies with one identity are taken for the same."""
    make_speaker: Callable[..., Any]
    summariser: ChatPolicy


@dataclass(frozen=True)
class PolicyOptions:
    """How to run a policy."""

    model: str = ""
    """The model's name at an endpoint; empty takes the first that it lists."""
    dtype: str = "float32"
    device: str = "cpu"
    cache_tokens: int = 65536
    max_tries: int = 4
    timeout_s: float = 600.0
    concurrency: int = 16
    says_thinking: bool = True
    """Send `chat_template_kwargs: {thinking}` to an endpoint; False for one that refuses fields it does not know."""


@asynccontextmanager
async def open_policy(spec: str, benchmark: Benchmark, thinking: bool, options: PolicyOptions) -> AsyncIterator[Player]:
    """Raises UserError where `spec` is none of the three kinds."""
    mode = ChatMode(thinking=thinking)
    if spec.startswith(PROGRAM):
        program = _program(spec.removeprefix(PROGRAM), benchmark)
        yield Player(spec, speaker_of(program), program)
    elif spec.startswith(("http://", "https://")):
        config = EndpointConfig(
            spec, options.model, timeout_s=options.timeout_s, max_tries=options.max_tries, max_concurrent=options.concurrency,
            extra_body={"chat_template_kwargs": {"thinking": thinking}} if options.says_thinking else {},
        )  # fmt: skip
        async with EndpointPolicy(config) as policy:
            yield Player(f"{config.base}#{options.model}", speaker_of(policy), policy)
    elif Path(spec).is_dir():
        from rorqual.engine import EngineConfig
        from rorqual.serve.opening import open_engine

        engine = EngineConfig(cache_tokens=options.cache_tokens)
        service, tokenizer = open_engine(spec, engine, options.dtype, options.device, 1 << 16)
        async with service:
            chat = ChatOfTokens(service, tokenizer, mode)
            yield Player(f"{fingerprint(Path(spec))}#{options.dtype}", speaker_of(service, tokenizer, mode), chat)
    else:
        raise UserError(f"{spec}: no checkpoint directory, no http(s) address, and no {PROGRAM}NAME")


def fingerprint(checkpoint: Path) -> str:
    """A digest of a checkpoint's files: name, size, first and last mebibyte of each. Another training gives another one."""
    digest = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")) + sorted(checkpoint.glob("*.json")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(size - (1 << 20), 0))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


Answer = Callable[[Any, Sequence[Message], SamplingParams], ChatReply]
"""(the task, the messages so far, the parameters) -> what a program says."""


@dataclass
class Played:
    """What the attempt under way is at."""

    task: Task
    suite: Suite
    calls: GoldCalls | None = None
    """The reference solution's, once they were asked for."""


PLAYED: ContextVar[Played | None] = ContextVar("PLAYED", default=None)
"""Only programs look, since two tasks may open with the same words."""


class Scripted:
    """A ChatPolicy that says what `answer` gives for the task that is being played."""

    def __init__(self, answer: Answer):
        self.answer = answer

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        played = PLAYED.get()
        return self.answer(played and played.task, messages, params)


def says(text: str) -> ChatReply:
    return ChatReply({"role": "assistant", "content": text}, StopReason.STOP)


def calls(name: str, arguments: Mapping[str, Any], number: int = 0) -> ChatReply:
    call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return ChatReply({"role": "assistant", "content": "", "tool_calls": [call]}, StopReason.STOP)


def gold(benchmark: Benchmark) -> Answer:
    """The reference solution: its calls one by one where the task has them, then its text."""

    def answer(task: Any, messages: Sequence[Message], params: SamplingParams) -> ChatReply:
        said = [index for index, message in enumerate(messages) if message.get("role") == "user"]
        turns = task.payload.get("gold_turns")
        wanted = turns[len(said) - 1] if turns else _gold_calls(task)
        done = sum(message.get("role") == "tool" for message in messages[said[-1] if said else 0 :])
        if done == len(wanted):
            text = benchmark.reference(task)
            return says(str(messages[-1]["content"]) if text == LAST_RESULT else text)
        name, arguments = wanted[done]
        return calls(name, arguments, done)

    return answer


def _gold_calls(task: Task) -> GoldCalls:
    played = PLAYED.get()
    if played is None:
        return stored_calls(task)
    if played.calls is None:
        played.calls = played.suite.gold_calls(task)
    return played.calls


def failing(benchmark: Benchmark) -> Answer:
    def answer(task: Any, messages: Sequence[Message], params: SamplingParams) -> ChatReply:
        drawn = hashlib.sha256(f"{task.id}/{params.seed}".encode()).digest()[0]
        if drawn < 26:  # of 256: a tenth
            lost: Message = {"role": "assistant", "content": "", "failure": "status 503, as scripted"}
            return ChatReply(lost, StopReason.UNAVAILABLE)
        return gold(benchmark)(task, messages, params)

    return answer


def endless(task: Any, messages: Sequence[Message], params: SamplingParams) -> ChatReply:
    """All the tokens there are, and no end."""
    usage = {"completion_tokens": params.max_tokens}
    return ChatReply({"role": "assistant", "content": "and so on " * 8}, StopReason.LENGTH, usage=usage)


def _program(name: str, benchmark: Benchmark) -> Scripted:
    programs: dict[str, Answer] = {
        "gold": gold(benchmark),
        "corrupted": lambda task, messages, params: says(benchmark.corrupted(task)),
        "silent": lambda task, messages, params: says(""),
        "endless": endless,
        "failing": failing(benchmark),
    }
    if name not in programs:
        raise UserError(f"{PROGRAM}{name}: there are {', '.join(PROGRAM + each for each in programs)}")
    return Scripted(programs[name])
