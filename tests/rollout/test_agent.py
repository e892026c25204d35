"""The agent loop: token in and token out, budgets that end it by name, context strategies, and worlds that misbehave."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from rorqual.chat import encode_tokens, with_tools
from rorqual.policy import ChatReply, Completion, SamplingParams, StopReason
from rorqual.rollout.agent import AgentConfig, play, speaker_of, turn_seed
from rorqual.rollout.context import SUMMARY_HEADING
from rorqual.rollout.speaker import ChatMode, ChatOfTokens, TokenSpeaker
from rorqual.rollout.trajectory import End, samples
from rorqual.tasks.verdict import failed, passed
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
OPENING = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


def call(value="a", name="look"):
    arguments = json.dumps({"x": value})
    return {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
        {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}]}  # fmt: skip


def answer(text="42"):
    return {"role": "assistant", "content": text, "reasoning_content": "so"}


@dataclass
class Task:
    id: str = "t"


@dataclass
class World:
    """Answers each call by its number; is right when the answer is 42."""

    results: object = None
    is_over: bool = False
    task: Task = field(default_factory=Task)
    calls: list = field(default_factory=list)
    finished: object = None

    async def reset(self):
        return self

    messages = tuple(OPENING)
    tools = tuple(TOOLS)

    async def call(self, name, arguments):
        self.calls.append((name, arguments))
        return self.results(len(self.calls)) if callable(self.results) else f"result {len(self.calls)}"

    async def finish(self, text=None):
        self.finished = text
        return passed() if text == "42" else failed("wrong")


class Scripted:
    """A TokenPolicy that says given messages, as the format writes them; records the prompts it was given."""

    def __init__(self, *messages, thinking=True):
        self.messages, self.thinking, self.prompts, self.params = list(messages), thinking, [], []

    async def complete(self, prompt_tokens, params):
        self.prompts.append(tuple(prompt_tokens))
        self.params.append(params)
        said = self.messages.pop(0)
        if isinstance(said, StopReason):
            return Completion(tuple(prompt_tokens), (), np.zeros(0, np.float32), said)
        tokens = said if isinstance(said, list) else self.write(said)
        reason = StopReason.STOP
        if len(tokens) > params.max_tokens:
            tokens, reason = tokens[: params.max_tokens], StopReason.LENGTH
        return Completion(tuple(prompt_tokens), tuple(tokens), np.full(len(tokens), -1, np.float32), reason)

    def write(self, message):
        return encode_tokens([message], TOKENIZER, self.thinking, context=[{"role": "user", "content": "q"}], add_bos=False)


def run(policy, world=None, config=None, mode=None, **options):
    world = world or World()
    maker = speaker_of(policy, TOKENIZER, mode)
    return asyncio.run(play(world, maker, config or AgentConfig(), SamplingParams(max_tokens=4000), **options)), world


def test_each_prompt_is_the_ids_so_far_and_what_was_said_since_and_equals_the_encoding():
    policy = Scripted(call("a"), call("b"), answer())
    trajectory, world = run(policy)
    assert trajectory.end is End.ANSWERED and trajectory.verdict.passed and world.finished == "42"
    assert world.calls == [("look", '{"x": "a"}'), ("look", '{"x": "b"}')]
    whole = with_tools([*OPENING, *trajectory.messages[2:]], TOOLS)
    for turn, prompt in enumerate(policy.prompts):
        assert prompt == tuple(encode_tokens(whole[: 2 + 2 * turn], TOKENIZER))
        if turn:
            before = trajectory.turns[turn - 1].completion
            assert prompt[: len(before.prompt_tokens) + len(before.tokens)] == (*before.prompt_tokens, *before.tokens)
    (sample,) = samples(trajectory)
    trained = [int(t) for t in sample.tokens[sample.mask]]
    assert trained == [t for turn in trajectory.turns for t in turn.completion.tokens], "loss on what was sampled, nothing else"


def test_sampled_ids_are_never_tokenised_again():
    policy = Scripted(call(), answer())
    odd = policy.write(call())
    swapped = [*TOKENIZER.encode("hm"), *odd[2:]]  # the same text; another tokenizer would merge it otherwise
    policy.messages[0] = swapped
    trajectory, _ = run(policy)
    assert policy.prompts[1][len(policy.prompts[0]) :][: len(swapped)] == tuple(swapped)
    assert trajectory.turns[0].completion.tokens == tuple(swapped)


def test_a_new_user_message_rewrites_the_context_and_begins_a_new_sample():
    speaker = TokenSpeaker(Scripted(call(), answer("first"), answer("second")), TOKENIZER, TOOLS, ChatMode())
    said = list(OPENING)

    async def main():
        spoken = []
        for reply in ({"role": "tool", "content": "r"}, {"role": "user", "content": "and?"}, None):
            spoken.append(await speaker.speak(said, SamplingParams(max_tokens=500)))
            said.extend([spoken[-1].message, reply])
        return spoken

    spoken = asyncio.run(main())
    prompts = [s.completion.prompt_tokens for s in spoken]
    assert prompts[1][: len(prompts[0])] == prompts[0]
    assert prompts[2] == tuple(encode_tokens(with_tools(said[:6], TOOLS), TOKENIZER)), "earlier reasoning is gone"
    assert b"hm" not in TOKENIZER.decode(prompts[2]).encode()


@pytest.mark.parametrize(
    ("script", "config", "end"),
    [
        ([call()] * 3, AgentConfig(max_turns=3), End.MAX_TURNS),
        ([call()] * 9, AgentConfig(max_tokens=300), End.MAX_TOKENS),
        ([call()] * 9, AgentConfig(max_calls=2), End.MAX_CALLS),
        ([call()] * 9, AgentConfig(time_s=0.0), End.TIME),
        ([call()] * 9, AgentConfig(window=1200), End.CONTEXT),
        ([answer("x" * 50)], AgentConfig(max_turn_tokens=20), End.CUT),
        ([StopReason.OUT_OF_MEMORY], AgentConfig(), End.POLICY_FAILED),
        ([StopReason.TOO_LONG], AgentConfig(), End.CONTEXT),
    ],
)
def test_budgets_and_failures_end_a_trajectory_by_name(script, config, end):
    trajectory, _ = run(Scripted(*script), config=config)
    assert trajectory.end is end
    assert trajectory.verdict is not None and not trajectory.verdict.passed
    assert trajectory.sampled_tokens <= config.max_tokens


def test_a_message_that_breaks_the_format_is_kept_as_text_and_named():
    broken = [*Scripted().write(answer("x"))[:-1], TOKENIZER.special_id("｜DSML｜"), TOKENIZER.eos_id]
    trajectory, world = run(Scripted(broken))
    assert trajectory.end is End.MALFORMED and "DSML" in trajectory.detail and world.finished is None


def test_a_tool_that_takes_the_answer_ends_the_task():
    world = World()
    world.results = lambda n: setattr(world, "is_over", True) or "done"
    trajectory, _ = run(Scripted(call()), world)
    assert trajectory.end is End.SUBMITTED and trajectory.num_calls == 1


class Crash(World):
    async def call(self, name, arguments):
        raise RuntimeError("the world broke")


class Hang(World):
    async def call(self, name, arguments):
        await asyncio.sleep(60)


class Unopenable(World):
    async def reset(self):
        raise OSError("no room")


class Unjudged(World):
    async def finish(self, text=None):
        raise RuntimeError("verifier gone")


@pytest.mark.parametrize("world", [Crash, Hang, Unopenable, Unjudged])
def test_worlds_that_misbehave_give_no_verdict_and_no_zero(world):
    began = time.monotonic()
    trajectory, _ = run(Scripted(call(), answer()), world(), AgentConfig(tool_timeout_s=0.2))
    assert trajectory.end is End.WORLD_FAILED and trajectory.verdict is None and trajectory.detail
    assert time.monotonic() - began < 10


def test_a_long_observation_is_cut_and_says_so():
    trajectory, _ = run(Scripted(call(), answer()), World(results=lambda n: "y" * 900), AgentConfig(max_observation_chars=100))
    (observation,) = trajectory.turns[0].observations
    assert observation.failure == "too_long" and observation.content.endswith("[cut: 800 more characters]")


def test_discard_all_makes_room_and_the_budgets_count_on():
    config = AgentConfig(window=1700, strategy="discard_all", max_turns=9)
    policy = Scripted(*[call(str(i)) for i in range(8)], answer())
    trajectory, _ = run(policy, config=config)
    resets = [i for i, turn in enumerate(trajectory.turns) if turn.is_reset]
    assert trajectory.end is End.ANSWERED and trajectory.steps == 9 and len(resets) >= 1
    first = tuple(encode_tokens(with_tools(OPENING, TOOLS), TOKENIZER))
    assert all(policy.prompts[i] == first for i in resets), "after a reset only the question and its tools are left"
    assert len(samples(trajectory)) == len(resets) + 1
    assert len(trajectory.messages) == 2 + 2 * 8 + 1, "the whole conversation is kept for the record"


def test_summary_asks_a_policy_and_goes_on_with_what_it_said():
    class Summariser:
        async def reply(self, messages, tools, params):
            return ChatReply({"role": "assistant", "content": "found a"}, StopReason.STOP)

    policy = Scripted(*[call(str(i)) for i in range(4)], answer())
    trajectory, _ = run(policy, config=AgentConfig(window=1900, strategy="summary"), summariser=Summariser())
    assert trajectory.end is End.ANSWERED and any(turn.is_reset for turn in trajectory.turns)
    assert SUMMARY_HEADING in TOKENIZER.decode(policy.prompts[-1])


def test_noise_belongs_to_run_task_sample_and_turn():
    policy = Scripted(call(), answer())
    run(policy, sample=3, run_seed=9)
    assert [p.seed for p in policy.params] == [turn_seed(9, "t", 3, 0), turn_seed(9, "t", 3, 1)]
    assert len({turn_seed(a, "t", b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27


def test_a_token_policy_is_a_chat_policy_too_and_plays_the_same_game():
    policy = Scripted(call(), answer(), thinking=False)
    adapted = ChatOfTokens(policy, TOKENIZER, ChatMode(thinking=False))
    world = World()
    trajectory = asyncio.run(play(world, speaker_of(adapted), AgentConfig(), SamplingParams(max_tokens=4000)))
    assert trajectory.verdict.passed and trajectory.turns[0].context_tokens == len(policy.prompts[0])
