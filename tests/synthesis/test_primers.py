"""Primers: the smallest tasks pass the gates of their families, are short, and held out by structure."""

from __future__ import annotations

import contextlib

import pytest

from rorqual.chat import encode, with_tools
from rorqual.errors import FieldErrors
from rorqual.synthesis.primers import DOMAINS, PrimerConfig, gates, gold_messages, primer
from rorqual.tasks import open_episode, splits

MADE = [primer(PrimerConfig(seed=3), number) for number in range(240)]


def test_every_primer_proves_itself_confined_too():
    for made in MADE:
        assert made.row is not None and made.row.is_accepted, made.row
    made = next(made for made in MADE if made.world is not None)
    assert all(gate.passed for gate in gates(made.row.task, made.world, "bwrap"))


def test_a_candidate_is_a_pure_function_of_seed_and_number():
    again = [primer(PrimerConfig(seed=3), number) for number in range(12)]
    assert [made.row.to_json() for made in again] == [made.row.to_json() for made in MADE[:12]]
    assert primer(PrimerConfig(seed=4), 0).row.to_json() != MADE[0].row.to_json()


def test_sums_and_truth_values_are_right():
    for made in MADE:
        task = made.row.task
        if task.family == "maths":
            assert sum(map(int, task.prompt.rstrip("?").split(" + "))) == int(task.payload["gold"])
        elif task.family == "logic":
            words = task.prompt.rstrip("?").split()
            value = words[0] == "true"
            for join, word in zip(words[1::2], words[2::2], strict=True):
                value = (value and word == "true") if join == "and" else (value or word == "true")
            assert task.payload["gold"] == ("true" if value else "false")


def test_the_wrong_deed_fails_where_the_right_one_passes():
    for made in MADE:
        task, world = made.row.task, made.world
        if task.tags.get("kind") != "set":
            continue
        kind, field = task.prompt.split()[:2]
        name, value = task.prompt.split(" of ")[1].split(" to ")
        known = next(c for c in world.payload["rows"]["things"] if c[0] != name)[0]
        for target, passes in ((name, True), (known, False)):
            episode = open_episode(task, world, "inline")
            episode.reset()
            typed = int(value) if value.isdigit() else value
            assert episode.call(f"{kind}_{field}", {"name": target, field: typed}) == '"done"'
            assert episode.finish("Done.").passed is passes
            episode.close()
        return
    raise AssertionError("no task that changes a value")


def test_a_tool_surface_is_short_and_worlds_are_held_out_by_structure():
    for made in MADE:
        if made.world is None:
            continue
        task = made.row.task
        shown = encode(with_tools([dict(m) for m in task.messages], list(task.tools)))
        bare = encode(with_tools([dict(m) for m in task.messages], []))
        assert len(task.tools) == 2 and sum(len(str(tool)) for tool in task.tools) < 600 and len(shown) > len(bare)
    worlds = {made.world.id: made.world for made in MADE if made.world}
    found = splits([made.row.task for made in MADE], worlds)
    structures = {name: {worlds[t.world].fingerprint for m in MADE if (t := m.row.task).id in ids and t.world}
                  for name, ids in found.items()}  # fmt: skip
    assert structures["test"] and not structures["test"] & structures["train"]


def test_gold_conversations_end_with_the_right_answer():
    for made in MADE[:12]:
        messages = gold_messages(made.row.task, made.world)
        assert messages[-1]["role"] == "assistant" and messages[-1]["reasoning_content"]
        if made.row.task.family != "general":
            assert messages[-1]["content"] == made.row.task.payload["gold"]
        else:
            assert [m["role"] for m in messages[-3:]] == ["assistant", "tool", "assistant"]


def test_a_search_finds_the_number_that_its_page_alone_tells():
    for number in range(60):
        made = primer(PrimerConfig(seed=3, domains="search"), number)
        assert made.row is not None and made.row.is_accepted, made.row
        task, asked = made.row.task, made.row.task.prompt.rstrip("?")
        value = task.payload["check"]["value"]
        assert [tool["function"]["name"] for tool in task.tools] == ["search"] and value not in str([task.messages, task.tools])
        with contextlib.closing(open_episode(task, made.world, "inline")) as episode:
            episode.reset()
            page = episode.call("search", {"query": asked, "topn": 1})
            assert f"†{asked}; " in page and page.rpartition("】")[2].strip() == value, page
            assert episode.finish(f"Answer: {value}").passed and not episode.finish(f"Answer: {int(value) % 90 + 10}").passed
    assert len({primer(PrimerConfig(seed=3, domains="search"), n).world.id for n in range(3)}) == 1


def test_a_program_is_judged_by_what_it_gives():
    made = primer(PrimerConfig(seed=3, domains="programming"), 0)
    assert made.row is not None and made.row.is_accepted, made.row
    task = made.row.task
    value = 5
    for step in task.prompt.removeprefix("f(x): x ").split(", "):
        verb, number = step.split()
        value = {"plus": value + int(number), "minus": value - int(number), "times": value * int(number)}[verb]
    found: dict = {}
    exec(task.payload["gold"].removeprefix("```python\n").removesuffix("```"), found)
    assert found["f"](5) == value
    with contextlib.closing(open_episode(task, None, "inline")) as episode:
        assert episode.finish(task.payload["gold"]).passed
        assert not episode.finish(task.payload["gold"].replace("return", "return 1 +")).passed


def test_an_unknown_domain_is_named():
    assert {made.row.task.family for made in MADE} == set(DOMAINS)
    with pytest.raises(FieldErrors, match="maths, logic, general, search, programming"):
        PrimerConfig(domains="maths,poetry")
