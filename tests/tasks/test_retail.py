"""tau2 retail as a foreign environment: every gold action replays through our tools, and a played user leads to the same end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rorqual.policy import ChatReply, Message, SamplingParams, StopReason
from rorqual.tasks import Task, TaskError, World, WorldSession
from rorqual.tasks.retail import STOP, TALK, RetailEpisode, load_retail

LOOK_UPS = ("find_", "get_")


class ScriptedUser:
    """A program in the user's place, a state machine: the reason for the call, what it knows, yes to what is asked, farewell."""

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        part = str(messages[0]["content"])
        asked = str(messages[-1]["content"]).lower()
        said = sum(message["role"] == "assistant" for message in messages)
        lines = dict(line.partition(": ")[::2] for line in part.splitlines())
        if "anything else" in asked:
            text = f"No, thank you. {STOP}"
        elif "(yes/no)" in asked:
            text = "yes"
        else:
            text = lines.get("reason for call" if said == 0 else "known info", "I have told you all I know.")
        return ChatReply({"role": "assistant", "content": text}, StopReason.STOP)


@pytest.fixture(scope="module")
def retail() -> tuple[World, list[Task]]:
    directory = Path(__file__).parents[3] / "shared" / "data" / "tau2_retail"
    if not directory.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return load_retail(directory)


def say(episode: RetailEpisode, text: str) -> str:
    return json.loads(episode.call(TALK, {"message": text}))["user"]


def play_gold(episode: RetailEpisode, skip: str = "") -> list[str]:
    """An agent that knows the gold actions: greets, asks who it speaks to, has each write confirmed, tells the facts."""
    episode.reset()
    heard = [say(episode, "How can I help you?"), say(episode, "Who are you, please?")]
    for name, arguments in episode.task.payload["gold_calls"]:
        if name == skip:
            continue
        if not name.startswith((*LOOK_UPS, "calculate")):
            heard.append(say(episode, f"I will do {name}: {json.dumps(arguments)}. Is that right? (yes/no)"))
        episode.call(name, arguments)
    say(episode, f"Done. {' '.join(episode.task.payload['facts'])}")
    heard.append(say(episode, "Is there anything else?"))
    return heard


def test_all_gold_actions_replay_and_only_those_that_the_policy_forbids_are_refused(retail: tuple[World, list[Task]]) -> None:
    world, tasks = retail
    assert len(tasks) == 114
    names, refused = set(), []
    with WorldSession(world, "inline") as session:
        for task in tasks:
            replay = session.replay(task.payload["gold_calls"])
            assert [call.pair for call in replay.calls if call.is_error] == [r[:2] for r in task.payload["gold_refused"]]
            names |= {call.name for call in replay.calls}
            refused += [(task.id, name, error) for name, _, error in task.payload["gold_refused"]]
    assert len(names) == 15
    assert [error for _, name, error in refused if name.startswith(LOOK_UPS)] == ["not_found"] * 16  # the user had it wrong
    assert [r for r in refused if not r[1].startswith(LOOK_UPS)] == [
        ("tau2-retail-64", "exchange_delivered_order_items", "wrong_status"),
        ("tau2-retail-105", "exchange_delivered_order_items", "balance_too_low"),
    ]


def test_an_agent_that_does_the_gold_actions_passes_every_task_with_a_played_user(retail: tuple[World, list[Task]]) -> None:
    world, tasks = retail
    with WorldSession(world, "inline") as session:
        for task in tasks:
            episode = RetailEpisode(task, world, ScriptedUser(), session=session)
            heard = play_gold(episode)
            assert STOP in heard[-1] and episode.is_over
            verdict = episode.finish()
            assert verdict.passed, (task.id, verdict.reasons)


def test_a_write_left_out_or_a_fact_not_told_fails(retail: tuple[World, list[Task]]) -> None:
    world, tasks = retail
    with WorldSession(world, "inline") as session:
        writing = [
            t for t in tasks if any(n.startswith(("cancel", "return", "exchange", "modify")) for n, _ in t.payload["gold_calls"])
        ]
        assert len(writing) > 80
        for task in writing[:20]:
            name = next(n for n, _ in task.payload["gold_calls"] if n.startswith(("cancel", "return", "exchange", "modify")))
            episode = RetailEpisode(task, world, ScriptedUser(), session=session)
            play_gold(episode, skip=name)
            assert not episode.finish().passed
        telling = next(
            t for t in tasks if t.payload["facts"] and not any(n.startswith("modify") for n, _ in t.payload["gold_calls"])
        )
        episode = RetailEpisode(telling, world, ScriptedUser(), session=session)
        episode.reset()
        session.replay(telling.payload["gold_calls"])
        assert any("was not told" in reason for reason in episode.finish().reasons)


@pytest.mark.parametrize(
    "name, arguments, error",
    [
        ("cancel_pending_order", {"order_id": "#W2611340", "reason": "no longer needed"}, "wrong_status"),
        ("cancel_pending_order", {"order_id": "#W2611340", "reason": "bored"}, "invalid_arguments"),
        ("get_user_details", {"user_id": "nobody"}, "not_found"),
        ("calculate", {"expression": "__import__('os').getpid()"}, "not_an_expression"),
        ("calculate", {"expression": "2 ** 9"}, "not_an_expression"),
    ],
)
def test_what_the_policy_forbids_is_refused_by_name(
    retail: tuple[World, list[Task]], name: str, arguments: dict, error: str
) -> None:
    with WorldSession(retail[0], "inline") as session:
        session.reset()
        before = session.digest()
        assert json.loads(session.call(name, arguments).observation)["error"] == error
        assert session.digest() == before


def test_the_retail_world_plays_confined(retail: tuple[World, list[Task]]) -> None:
    world, tasks = retail
    episode = RetailEpisode(tasks[0], world, ScriptedUser(), "bwrap")
    play_gold(episode)
    assert episode.finish().passed
    episode.close()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"db\.json"):
        load_retail(tmp_path)
