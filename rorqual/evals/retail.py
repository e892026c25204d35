"""tau2 retail: its policy, database and tasks from its files, the user played by a policy of its own (rorqual.tasks.retail)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.evals.benchmark import Benchmark, Options, Suite, given_suite
from rorqual.policy import ChatPolicy, ChatReply, Message, SamplingParams, StopReason
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy
from rorqual.tasks import Task
from rorqual.tasks.retail import STOP, TALK, RetailEpisode, load_retail


class UserEndpoint:
    """The user behind an endpoint. Each answer is asked for by a client of its own, since each comes on a loop of its own.

    Raises where the endpoint gives none: the attempt's world has failed then, and it has no score.
    """

    def __init__(self, url: str, model: str = ""):
        self.config = EndpointConfig(url, model)

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        async with EndpointPolicy(self.config) as policy:
            reply = await policy.reply(messages, tools, params)
        if reply.stop_reason is StopReason.UNAVAILABLE:
            raise UserError(f"the user's endpoint: {reply.message.get('failure')}")
        return reply


class LeavingUser:
    """A user who hears one message and leaves: for the gold program, which knows what to do without asking."""

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        return ChatReply({"role": "assistant", "content": STOP}, StopReason.STOP)


def load(benchmark: Benchmark, options: Options) -> Suite:
    """--data: the directory with db.json, policy.md, tasks.json. --split: a name of split_tasks.json, or all."""
    if options.data is None:
        raise UserError(f"{benchmark.name}: --data names the directory with db.json, policy.md and tasks.json")
    world, tasks = load_retail(Path(options.data))
    user: ChatPolicy = UserEndpoint(options.user, options.user_model) if options.user else LeavingUser()
    chosen = [_with_gold(task) for task in tasks if task.id in _wanted(options, tasks)][: options.limit]
    return given_suite(benchmark.name, chosen, lambda task: RetailEpisode(task, world, user, options.isolation))


def _with_gold(task: Task) -> Task:
    """The gold program's calls: the gold actions, then one message to the user with all that must be told."""
    told = [TALK, {"message": "; ".join(task.payload["facts"]) or "done"}]
    payload = {**task.payload, "gold_calls": [*task.payload["gold_calls"], told], "reference": "", "corrupted": ""}
    return Task(**{**vars(task), "payload": payload})


def _wanted(options: Options, tasks: Sequence[Task]) -> set[str]:
    path = Path(options.data or "") / "split_tasks.json"
    if options.split == "all" or not path.is_file():
        return {task.id for task in tasks}
    named = json.loads(path.read_text(encoding="utf-8"))
    if options.split not in named:
        raise UserError(f"{path}: there is no split {options.split!r}; there are {', '.join(sorted(named))} and all")
    return {f"tau2-retail-{identity}" for identity in named[options.split]}
