"""A world's tools run where its database is, solutions and verifiers where it is not; every failure is a value."""

from __future__ import annotations

import json

import pytest

from rorqual.tasks import AsyncEpisode, Outcome, Task, WorldSession, open_episode, validate
from rorqual.tasks.judge import solution_problem

from .worlds import SOLUTION, VERIFIER, task, world

ISOLATIONS = ("inline", "bwrap")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_task_proves_itself_without_a_model(isolation: str) -> None:
    assert [(gate.name, gate.passed) for gate in validate(task(), world(), isolation)] == [
        ("initial_fails", True),
        ("gold_passes", True),
        ("reset_identical", True),
    ]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_reset_gives_the_same_bytes_after_any_calls(isolation: str) -> None:
    with WorldSession(world(), isolation) as session:
        session.reset()
        before = session.digest()
        session.call("book", {"slot": "S-2", "seats": 1})
        assert session.digest() != before
        session.reset()
        assert session.digest() == before


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_refused_call_leaves_no_trace(isolation: str) -> None:
    with WorldSession(world(), isolation) as session:
        session.reset()
        before = session.digest()
        refused = session.call("book", {"slot": "S-1", "seats": 3})  # raises only after both of its writes
        assert json.loads(refused.observation)["error"] == "full"
        assert session.digest() == before
        assert session.delta() == []


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_replay_is_deterministic_and_says_what_each_call_wrote(isolation: str) -> None:
    calls = [["list_slots", {}], ["book", {"slot": "S-2", "seats": 2}], ["book", {"slot": "S-9", "seats": 1}]]
    with WorldSession(world(), isolation) as session:
        first, second = session.replay(calls), session.replay(calls)
    assert first == second
    assert [call.changes for call in first.calls] == [0, 3, 0]  # the booking, the slot, the counter of ids
    assert {change[0] for change in first.delta} == {"slots", "bookings"}


def test_both_isolations_give_the_same_observations_and_states() -> None:
    calls = [["book", {"slot": "S-2", "seats": 2}], ["book", {"slot": 7}], ["nothing", {}], ["crash", {}], ["flood", {}]]
    replays = []
    for isolation in ISOLATIONS:
        with WorldSession(world(), isolation) as session:
            replays.append(session.replay(calls))
    assert replays[0] == replays[1]
    assert [call.is_error for call in replays[0].calls] == [False, True, True, True, True]


@pytest.mark.parametrize("name, error", [("hang", "tool_timeout"), ("die", "tool_closed")])
def test_a_tool_that_hangs_or_dies_is_an_observation_and_the_world_opens_again(name: str, error: str) -> None:
    with WorldSession(world(), "bwrap", timeout_s=1.0) as session:
        session.reset()
        assert json.loads(session.call(name, {}).observation)["error"] == error
        session.reset()
        assert session.call("list_slots", {}).observation.startswith("[{")


@pytest.mark.parametrize(
    "verifier",
    [
        "def verify(initial, final, answer):\n    return 1 // 0\n",
        "def verify(initial, final, answer):\n    return 0.5\n",
        "def check():\n    pass\n",
        "def verify(:\n",
    ],
    ids=["raises", "returns a number", "absent", "does not parse"],
)
def test_a_broken_verifier_is_invalid_and_never_a_zero(verifier: str) -> None:
    with WorldSession(world(), "inline") as session:
        verdict = session.verify(task(verifier=verifier), [], "20")
    assert verdict.outcome is Outcome.INVALID
    assert verdict.score is None


def test_a_verifier_that_hangs_is_invalid() -> None:
    with WorldSession(world(), "bwrap", timeout_s=1.0) as session:
        hangs = task(verifier="def verify(initial, final, answer):\n    while True:\n        pass\n")
        assert session.verify(hangs, [], None).outcome is Outcome.INVALID
        assert session.verify(task(), [], None).outcome is Outcome.FAILED


def test_a_verifier_that_changes_its_input_does_not_change_the_next_verdict() -> None:
    spoils = task(verifier="def verify(initial, final, answer):\n    initial['slots'].clear()\n    return False\n")
    with WorldSession(world(), "inline") as session:
        session.verify(spoils, [], None)
        solved = session.solve(SOLUTION)
        assert session.verify(task(), solved.delta, solved.answer).passed


@pytest.mark.parametrize(
    "body",
    [
        "import sqlite3",
        "return open('/etc/passwd').read()",
        "return tools.list_slots.__globals__",
        "return ().__class__.__bases__[0].__subclasses__()",
        "return '{0.__class__}'.format(tools)",
        "return db.execute('DELETE FROM slots').fetchall()",
        "return eval('1')",
        "global x",
        "return getattr(tools, '_call')",
        "return tools._call",
        "raise ValueError",
        "with tools: pass",
    ],
)
def test_a_solution_may_only_call_tools_and_compute(body: str) -> None:
    source = f"def solution(tools):\n    {body}\n"
    if "db." in body:  # a free name: the filter lets it through where its attributes are ordinary, the process has no such thing
        with WorldSession(world(), "inline") as session:
            assert session.solve(source).failure
    else:
        assert solution_problem(source)


def test_a_solution_runs_in_a_process_that_holds_no_database() -> None:
    with WorldSession(world(), "bwrap") as session:
        solved = session.solve(SOLUTION)
        assert [call.name for call in solved.calls] == ["list_slots", "book"]
        assert solved.answer == "20" and not solved.failure
        assert sum(call.changes for call in solved.calls) == 3


def play(calls: list[tuple[str, object]], text: str | None = None, **changes: object):
    episode = open_episode(task(**changes), world(), "inline")
    opening = episode.reset()
    assert opening.messages == episode.task.messages
    observations = [episode.call(name, arguments) for name, arguments in calls]  # type: ignore[arg-type]
    return episode, observations, episode.finish(text)


def test_an_episode_is_judged_by_its_final_state_and_its_answer() -> None:
    booked = ("book", {"slot": "S-3", "seats": 2})
    assert play([booked], "20")[2].passed
    assert play([booked, ("submit", '{"answer": "20"}')], "anything")[2].passed
    assert play([booked], "21")[2].reasons == ("answer",)
    assert play([], "20")[2].reasons == ("booking",)
    assert play([booked, ("book", {"slot": "S-2", "seats": 1})], "20")[2].reasons == ("booking",)


def test_what_a_policy_does_wrong_is_an_observation() -> None:
    wrong = [("book", "{not json"), ("book", "[1]"), ("nothing", {}), ("book", {"slot": "S-3", "seats": "2"}), ("book", {})]
    _, observations, verdict = play(wrong)
    assert ["error" in json.loads(text) for text in observations] == [True] * 5
    assert not verdict.passed and verdict.is_valid


def test_calls_are_bounded_and_nothing_counts_after_submitting() -> None:
    episode, observations, _ = play([("list_slots", {})] * 7)
    assert json.loads(observations[6])["error"] == "over" and episode.is_over
    late = play([("submit", {"answer": "20"}), ("book", {"slot": "S-3", "seats": 2})], "20")
    assert json.loads(late[1][1])["error"] == "over" and late[2].reasons == ("booking",)


def test_an_attempt_leaves_nothing_for_the_next_one() -> None:
    episode = open_episode(task(), world(), "inline")
    episode.reset()
    episode.call("book", {"slot": "S-3", "seats": 2})
    episode.reset()
    assert episode.finish("20").reasons == ("booking",)


async def _async_play() -> bool:
    episode = AsyncEpisode(open_episode(task(), world(), "bwrap"))
    await episode.reset()
    await episode.call("book", {"slot": "S-3", "seats": 2})
    verdict = await episode.finish("20")
    await episode.close()
    return verdict.passed


def test_an_episode_can_be_played_from_an_event_loop() -> None:
    import asyncio

    assert asyncio.run(_async_play())


def test_a_task_survives_serialisation_unchanged() -> None:
    original = task(verifier=VERIFIER)
    again = Task.from_json(json.loads(json.dumps(original.to_json())))
    assert again == original and again.key == original.key
