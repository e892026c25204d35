"""One benchmark, one model, one seed: embedded, over HTTP, and through the openai client, the scores are the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rorqual.chat import SPECIAL_TOKENS, encode_tokens
from rorqual.evals import choices, runner
from rorqual.evals.benchmark import Benchmark, Protocol, given_suite
from rorqual.evals.policies import Player, PolicyOptions, open_policy
from rorqual.evals.results import table
from rorqual.evals.runner import Config
from rorqual.evals.text import text_opener
from rorqual.policy import ChatReply, StopReason
from rorqual.rollout.agent import speaker_of
from rorqual.rollout.speaker import ChatMode, ChatOfTokens
from rorqual.tasks.verdict import failed, passed
from tests.serve.conftest import TOKENIZER, LiveServer, forced_backend

PROTOCOL = Protocol(thinking=False, max_tokens=24)


def parity(task, text):
    """A score that a random model gets right about as often as not."""
    return passed() if len(text) % 2 else failed("wrong")


def suite():
    tasks = [choices.choice_task(f"q/{i}", f"{i}?", ["a", "b"], 0, PROTOCOL) for i in range(6)]
    return given_suite("parity", tasks, text_opener(parity))


BENCHMARK = Benchmark("parity", "Parity", "here", "none", PROTOCOL, lambda benchmark, options: suite())
CONFIG = Config(samples=3, seed=5, concurrency=4)


BIAS = dict.fromkeys(map(TOKENIZER.special_id, SPECIAL_TOKENS), -100.0) | {TOKENIZER.eos_id: 2.0}
"""A random model writes special tokens anywhere, which is no message; this one ends its messages and writes none else."""


@pytest.fixture(scope="module")
def server():
    live = LiveServer(forced_backend)
    add = live.engine.add
    live.engine.add = lambda prompt, params, constraint=None: add(prompt, replace(params, logit_bias=BIAS), constraint)
    yield live
    live.stop()


class OpenAIClient:
    """A ChatPolicy by the openai package."""

    def __init__(self, url):
        import openai

        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def reply(self, messages, tools, params):
        done = await self.client.chat.completions.create(
            model="small", messages=list(messages), max_tokens=params.max_tokens, temperature=params.temperature,
            top_p=params.top_p, seed=params.seed, extra_body={"thinking": False},
        )  # fmt: skip
        choice = done.choices[0]
        reason = StopReason.LENGTH if choice.finish_reason == "length" else StopReason.STOP
        return ChatReply({"role": "assistant", "content": choice.message.content or ""}, reason)


async def played(directory, player):
    tasks = suite()
    store = runner.cache(directory, BENCHMARK, tasks, CONFIG, player.identity)
    attempts = await runner.run(BENCHMARK, tasks, player, CONFIG, store)
    said = {name: [each.turns[-1].message["content"] for each in group] for name, group in attempts.items()}
    return said, table(BENCHMARK, tasks, attempts, CONFIG, (1, 3))


async def embedded(directory, server):
    service, mode = server.backend.service, ChatMode(thinking=False)
    chat = ChatOfTokens(service, TOKENIZER, mode)
    return await played(directory, Player("embedded", speaker_of(service, TOKENIZER, mode), chat))


async def over_http(directory, server):
    async with open_policy(server.url, BENCHMARK, False, PolicyOptions()) as player:
        return await played(directory, player)


async def by_client(directory, server):
    policy = OpenAIClient(server.url)
    return await played(directory, Player("openai", speaker_of(policy), policy))


def test_the_embedded_engine_the_endpoint_and_the_openai_client_give_the_same_scores(tmp_path, server):
    said, first = asyncio.run(embedded(tmp_path / "a", server))
    assert first["outcomes"]["verdicts"].keys() >= {"passed", "wrong"}, "the comparison is not of zeros"
    assert len({text for group in said.values() for text in group}) > 12, "the seeds differ by task and sample"
    for name, way in (("http", over_http), ("client", by_client)):
        other_said, other = asyncio.run(way(tmp_path / name, server))
        assert other_said == said
        for key in ("by_task", "score", "pass_at_k", "passed_attempts", "outcomes"):
            assert other[key] == first[key], (name, key)


def test_a_dead_endpoint_is_no_wrong_answer(tmp_path):
    async def run():
        async with open_policy("http://127.0.0.1:9", BENCHMARK, False, PolicyOptions(max_tries=1)) as player:
            return await played(tmp_path, player)

    _, found = asyncio.run(run())
    assert found["unscored_attempts"] == 18 and found["score"]["value"] is None


def test_written_answers_end_and_score(tmp_path, server):
    """The random model rarely ends a message; forced to, its answers are judged, so that the comparison is not of zeros."""
    ends = [encode_tokens([{"role": "assistant", "content": "x" * (1 + i % 3)}], TOKENIZER, False,
                          context=[{"role": "user", "content": "q"}], add_bos=False) for i in range(18)]  # fmt: skip
    server.backend.script = list(ends)
    _, found = asyncio.run(over_http(tmp_path, server))
    assert found["outcomes"]["ends"] == {"answered": 18} and found["passed_attempts"]["passed"] == 12
