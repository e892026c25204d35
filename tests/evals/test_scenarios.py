"""BFCL's multi-turn format: judged by executing the scenario's classes; what the classes themselves do wrong has no score."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from rorqual.errors import UserError
from rorqual.evals import runner, scenario_host
from rorqual.evals.benchmark import Options
from rorqual.evals.catalogue import benchmark
from rorqual.evals.policies import Player, PolicyOptions, Scripted, calls, open_policy, says
from rorqual.evals.results import table
from rorqual.rollout.agent import speaker_of
from rorqual.rollout.trajectory import End

SOURCE = '''
import random
import time
from bfcl_eval.eval_checker.multi_turn_eval.func_source_code.words import SHOUT


class Lamp:
    """A lamp with a log that nobody compares."""
    def __init__(self):
        self.level, self.names, self._log = 0, [], []

    def _load_scenario(self, scenario, long_context=False):
        self.level = scenario.get("level", 0)
        self.names = ["long"] if long_context else []

    def turn_to(self, level: int) -> dict:
        if level > 10:
            raise ValueError("too bright")
        self.level = level
        self._log.append(level)
        return {"level": self.level}

    def read(self) -> int:
        print("this is noise on standard output")
        return self.level

    def rename(self, name: str):
        self.names.append(name + SHOUT)


class Clock:
    def now(self):
        return str(time.monotonic_ns())


class Broken:
    def __init__(self):
        raise RuntimeError("no such lamp")
'''


def doc(name, /, **properties):
    return {"name": name, "description": name, "parameters": {"type": "dict", "properties": properties}, "response": {}}


LAMP = [doc("turn_to", level={"type": "integer"}), doc("read"), doc("rename", name={"type": "string"})]
QUESTIONS = [
    {"id": "multi_turn_base_0", "question": [[{"role": "user", "content": "To 3."}], [{"role": "user", "content": "Name it."}]],
     "initial_config": {"Lamp": {"level": 1}}, "involved_classes": ["Lamp"]},
    {"id": "multi_turn_base_1", "question": [[{"role": "user", "content": "Read."}], []], "initial_config": {},
     "involved_classes": ["Lamp"], "missed_function": {"1": ["turn_to"]}},
    {"id": "multi_turn_long_context_2", "question": [[{"role": "user", "content": "Up."}]], "initial_config": {},
     "involved_classes": ["Lamp"], "excluded_function": ["read"]},
]  # fmt: skip
TRUTHS = [
    [["turn_to(3)"], ["read()", "rename(name='a')"]],
    [[], ["turn_to(level=5)"]],
    [["turn_to(level=-2)"]],
]


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "bfcl"

    def lines(path, rows):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(questions=QUESTIONS, truths=TRUTHS):
        lines("data/BFCL_v3_multi_turn_base.json", questions)
        answers = [{"id": q["id"], "ground_truth": t} for q, t in zip(questions, truths, strict=False)]
        lines("data/possible_answer/BFCL_v3_multi_turn_base.json", answers)
        lines("data/multi_turn_func_doc/things.json", [*LAMP, doc("now")])
        (root / "checker/func_source_code").mkdir(parents=True, exist_ok=True)
        (root / "checker/func_source_code/things.py").write_text(SOURCE)
        (root / "checker/func_source_code/words.py").write_text("SHOUT = '!'\n")
        return str(root)

    return write


def load(data, isolation="bwrap", **options):
    chosen = benchmark("bfcl_multi_turn")
    return chosen, chosen.load(chosen, Options(data=data, isolation=isolation, **options))


def played(data, tmp_path, player=None, program="gold", isolation="bwrap", **settings):
    chosen, suite = load(data, isolation)
    config = runner.Config(concurrency=2, **settings)

    async def run():
        if player is not None:
            return await go(player)
        async with open_policy(f"program:{program}", chosen, True, PolicyOptions()) as found:
            return await go(found)

    async def go(found):
        store = runner.cache(tmp_path / "out", chosen, suite, config, found.identity)
        return await runner.run(chosen, suite, found, config, store)

    attempts = asyncio.run(run())
    return {name: group[0] for name, group in attempts.items()}, table(chosen, suite, attempts, config), suite


def scripted(*turns):
    """A policy that makes these calls in each of the user's turns."""

    def answer(task, messages, params):
        said = [i for i, m in enumerate(messages) if m["role"] == "user"]
        wanted, done = turns[len(said) - 1], sum(m["role"] == "tool" for m in messages[said[-1] :])
        return says("done") if done == len(wanted) else calls(*wanted[done], done)

    policy = Scripted(answer)
    return Player("scripted", speaker_of(policy), policy)


def test_the_ground_truth_scores_one_and_words_alone_score_zero(data, tmp_path):
    attempts, found, _ = played(data(), tmp_path)
    assert found["score"]["value"] == 1.0 and found["unscored_attempts"] == 0, found["outcomes"]
    first = attempts["multi_turn_base_0"]
    assert [m["role"] for m in first.messages] == [
        "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert [m["content"] for m in first.messages if m["role"] == "tool"] == ['{"level": 3}', "3", "None"]
    assert played(data(), tmp_path, program="corrupted")[1]["score"]["value"] == 0.0


def test_stored_dialogues_are_judged_anew_to_the_same_verdicts(data, tmp_path):
    attempts, _, suite = played(data(QUESTIONS[:1]), tmp_path)
    judged = asyncio.run(runner.rescore(suite, {name: [each] for name, each in attempts.items()}))
    assert all(group[0].verdict == attempts[name].verdict for name, group in judged.items())
    assert [d.what for d in suite.defects] == []


ONE = ([("turn_to", {"level": 3})], [("read", {}), ("rename", {"name": "a"})])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The classes where the host looks for them, in this process."""
    root = tmp_path_factory.mktemp("host")
    folder = root / scenario_host.PACKAGE.replace(".", "/")
    folder.mkdir(parents=True)
    (folder / "things.py").write_text(SOURCE)
    (folder / "words.py").write_text("SHOUT = '!'\n")
    sys.path.insert(0, str(root))
    yield
    sys.path.remove(str(root))


@pytest.mark.parametrize(
    "turns, reasons",
    [
        (ONE, []),
        (([("turn_to", {"level": 9}), ("read", {}), ("turn_to", {"level": 3})], [("rename", {"name": "a"}), ("read", {})]), []),
        (([("turn_to", {"level": 11}), ("turn_to", {"level": 3})], ONE[1]), []),
        (([("turn_to", {"level": 3}), ("read", {})], [("rename", {"name": "a"})]), []),  # read before: its result was had
        (([], ONE[1]), ["turn 1: no call was made"]),
        (([("turn_to", {"level": 4})], ONE[1]), ["turn 1: state", "Lamp.level"]),
        ((ONE[0], [("read", {}), ("rename", {"name": "b"})]), ["turn 2: state", "Lamp.names"]),
        ((ONE[0], [("rename", {"name": "a"})]), ["turn 2: response", "3"]),
        (([("turn_to", {"lumen": 3})], ONE[1]), ["turn 1: state", "Lamp.level"]),
        ((ONE[0],), ["turn 2: no call was made"]),
    ],
)
def test_turns_are_judged_by_state_and_by_responses(package, turns, reasons):
    gold = [[["turn_to", [3], {}]], [["read", [], {}], ["rename", [], {"name": "a"}]]]
    made = [[[name, [], given] for name, given in turn] for turn in turns]
    request = {"classes": {"Lamp": "things"}, "config": {"Lamp": {"level": 1}}, "long": False, "turns": made, "gold": gold}
    assert scenario_host.play(request)["reasons"] == reasons


def test_an_unknown_function_is_refused_and_no_call(data, tmp_path):
    attempts, _, _ = played(data(QUESTIONS[:1]), tmp_path, scripted([("fly", {})], ONE[1]))
    attempt = attempts["multi_turn_base_0"]
    assert attempt.verdict.reasons == ("turn 1: no call was made",)
    assert "there is no tool fly" in attempt.turns[0].observations[0].content


def test_a_withheld_function_comes_with_its_turn_and_an_excluded_one_never(data, tmp_path):
    _, suite = load(data())
    task = suite.tasks["multi_turn_base_1"]
    assert [tool["function"]["name"] for tool in task.tools] == ["read", "rename", "now"]
    assert "turn_to" in task.payload["questions"][0] and "turn_to" not in task.messages[0]["content"]
    excluded = suite.tasks["multi_turn_long_context_2"].tools
    assert [tool["function"]["name"] for tool in excluded] == ["turn_to", "rename", "now"]
    early, late = scripted([("turn_to", {"level": 5})], []), scripted([], [("turn_to", {"level": 5})])
    verdicts = []
    for number, player in enumerate((early, late)):
        attempts, _, _ = played(data(QUESTIONS[1:2], TRUTHS[1:2]), tmp_path / str(number), player)
        verdicts.append(attempts["multi_turn_base_1"].verdict)
    assert not verdicts[0].passed and verdicts[1].passed


def test_classes_that_fail_or_are_not_deterministic_give_no_score(data, tmp_path):
    asked = [[{"role": "user", "content": "x"}]]
    questions = [{"id": "a", "question": asked, "involved_classes": ["Broken"]},
                 {"id": "b", "question": asked, "involved_classes": ["Clock"]}]  # fmt: skip
    attempts, found, _ = played(data(questions, [[["now()"]], [["now()"]]]), tmp_path)
    assert attempts["a"].end is End.WORLD_FAILED and "no such lamp" in attempts["a"].detail
    assert not attempts["b"].verdict.is_valid and "not deterministic" in attempts["b"].verdict.reasons[0]
    assert found["unscored_attempts"] == 2 and found["score"]["value"] is None


def test_a_policy_that_calls_for_ever_is_unfinished_by_name(data, tmp_path):
    player = scripted([("read", {})] * 10_000)
    attempts, found, _ = played(data(QUESTIONS[:1]), tmp_path, player, max_turns=3)
    assert attempts["multi_turn_base_0"].end is End.MAX_TURNS and found["outcomes"]["verdicts"] == {"unfinished": 1}


def test_rows_that_lack_something_are_defects_by_name(data, tmp_path):
    asked = [[{"role": "user", "content": "x"}]]
    questions = [
        QUESTIONS[0], {"id": "a", "question": asked, "involved_classes": ["Tower"]}, {"id": "b", "question": asked},
        {"id": "c", "question": asked, "involved_classes": ["Lamp"]},
        {"id": "d", "question": asked, "involved_classes": ["Lamp"]},
    ]  # fmt: skip
    _, suite = load(data(questions, [TRUTHS[0], [["f()"]], [["f()"]], [["turn_to(level=open('x'))"]]]))
    assert [defect.what.partition(" (")[0] for defect in suite.defects] == [
        "its class Tower has no source or no function documents", "lacks the field involved_classes",
        "its ground truth \"turn_to(level=open('x'))\" is no call with literal arguments",
        "has no ground truth for each of its turns in possible_answer/",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no file .* of the split miss_func"):
        load(data(), split="miss_func")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="func_source_code"):
        load(str(tmp_path / "empty"))


def test_the_types_of_its_own_dialect_become_json_schema(data):
    from rorqual.evals.scenarios import _schema

    given = {"type": "dict", "properties": {"a": {"type": "float"}, "b": {"type": "tuple", "items": {"type": "any"}}}}
    assert _schema(given) == {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "array", "items": {}}}}
