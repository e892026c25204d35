"""Scorers against public answers and hand-made ones: references score 1, corrupted ones 0, defective rows are named."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import pytest

from rorqual.errors import UserError
from rorqual.evals import browse, choices, contests, mathematics, needles, programs
from rorqual.evals.benchmark import Options
from rorqual.evals.catalogue import BENCHMARKS, benchmark
from rorqual.evals.published import FIGURE_6, MODELS, TABLE_2, TABLE_3, TABLE_3_MODELS, TABLE_4, published_scores
from rorqual.tasks.verdict import Outcome


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(name, data=None, **options):
    chosen = benchmark(name)
    return chosen, chosen.load(chosen, Options(data=data, **options))


def judged(suite, task, text):
    episode = suite.open_episode(task)
    try:
        episode.reset()
        return episode.finish(text)
    finally:
        episode.close()


def assert_reference_passes_and_corrupted_fails(name, data=None, every=1, **options):
    chosen, suite = load(name, data, **options)
    for task in list(suite.tasks.values())[::every]:
        assert judged(suite, task, chosen.reference(task)).passed, task.id
        bad = judged(suite, task, chosen.corrupted(task))
        assert bad.outcome is Outcome.FAILED and bad.score == 0.0, task.id
    return suite


def test_a_sample_of_gsm8k_references_score_one_and_corrupted_ones_zero(shared_data):
    suite = assert_reference_passes_and_corrupted_fails("gsm8k", str(shared_data / "gsm8k" / "train.jsonl"), every=97)
    assert len(suite.tasks) == 7473 and not suite.defects


def test_a_sample_of_humaneval_references_score_one_and_corrupted_ones_zero(shared_data):
    suite = assert_reference_passes_and_corrupted_fails("humaneval", str(shared_data / "humaneval"), every=20)
    assert len(suite.tasks) == 164 and not suite.defects


def test_imo_answers_equal_themselves_and_answers_in_prose_are_left_out_by_name(shared_data):
    suite = assert_reference_passes_and_corrupted_fails("imo_answerbench", str(shared_data / "imo_answerbench"), every=11)
    assert len(suite.tasks) + len(suite.defects) == 200 and all("needs --judge" in defect.what for defect in suite.defects)


@pytest.mark.parametrize("name", ["needles", "ruler"])
def test_generated_sets_are_answered_by_their_references_and_are_the_same_for_a_seed(name):
    first = assert_reference_passes_and_corrupted_fails(name, count=12, length=3000)
    again, other = load(name, count=12, length=3000)[1], load(name, count=12, length=3000, seed=1)[1]
    assert {t.key for t in first.tasks.values()} == {t.key for t in again.tasks.values()}
    assert not {t.key for t in first.tasks.values()} & {t.key for t in other.tasks.values()}
    for task in first.tasks.values():
        text = task.messages[0]["content"]
        assert all(word in text for word in task.payload["gold"]) and 2000 < len(text) < 6000


def test_the_needle_stands_at_its_depth():
    _, suite = load("needles", count=5, length=4000)
    for task in suite.tasks.values():
        text = task.messages[0]["content"]
        where = text.index("The code of") / 4000
        assert abs(where - float(task.tags["depth"])) < 0.1


def test_the_commonest_words_are_really_the_commonest():
    import random
    from collections import Counter

    for length in (300, 3000, 30000):
        text, _, gold = needles.commonest_words(random.Random(1), length)
        ranked = [count for _, count in Counter(text.split()).most_common(4)]
        assert {word for word, _ in Counter(text.split()).most_common(3)} == set(gold) and ranked[2] > ranked[3]


def test_a_name_is_traced_only_along_its_own_chain():
    import random

    text, question, gold = needles.traced_variable(random.Random(3), 2000)
    value = question.split()[-1].rstrip("?")
    known = {
        line.split()[1]: line.split()[3].rstrip(".") for line in text.replace(". ", ".\n").splitlines() if line.startswith("Let")
    }

    def holds(name):
        return known[name] == value or (known[name] in known and holds(known[name]))

    assert {name for name in known if holds(name)} == set(gold) and len(known) == 10


def test_rows_with_missing_fields_are_defects_by_name_and_never_wrong_answers(tmp_path):
    rows = [
        {"question": "1+1?", "answer": "#### 2"},
        {"question": "x"},
        {"answer": "#### 3"},
        {"question": "y", "answer": "no mark"},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    with open(data, "a") as file:
        file.write("{broken\n[1]\n")
    _, suite = load("gsm8k", data)
    assert len(suite.tasks) == 1
    assert [(d.where, d.what.split("(")[0].strip()) for d in suite.defects] == [
        ("rows.jsonl:2", "lacks the field answer"), ("rows.jsonl:3", "lacks the field question"),
        ("rows.jsonl:4", "its answer has no #### line"), ("rows.jsonl:5", "no JSON"),
        ("rows.jsonl:6", "expected an object, found list"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"holds no question; the first of 1 defective rows: rows.jsonl:1: lacks the field"):
        load("math", write(tmp_path / "rows.jsonl", [{"nothing": 1}]))
    with pytest.raises(UserError, match="no such file"):
        load("math", str(tmp_path / "absent.jsonl"))


def test_multiple_choice_rows_in_the_published_forms(tmp_path):
    gpqa = [
        {"Question": f"q{i}", "Correct Answer": "yes", **{f"Incorrect Answer {j}": f"no{j}" for j in (1, 2, 3)}}
        for i in range(12)
    ]
    suite = assert_reference_passes_and_corrupted_fails("gpqa_diamond", write(tmp_path / "g.jsonl", gpqa))
    golds = {task.payload["gold"] for task in suite.tasks.values()}
    assert len(golds) > 2, "the right answer's place is drawn"
    for task in suite.tasks.values():
        assert f"({task.payload['gold']}) yes" in task.messages[0]["content"]
    mmlu = [
        {"question_id": 1, "question": "q", "options": list("pqrst"), "answer": "E"},
        {"question": "q", "options": "x", "answer": "A"},
        {"question_id": 3, "question": "q", "options": ["a"], "answer": "C"},
    ]
    suite = assert_reference_passes_and_corrupted_fails("mmlu_pro", write(tmp_path / "m.jsonl", mmlu))
    assert len(suite.tasks) == 1 and len(suite.defects) == 2
    hle = [
        {"id": "a", "question": "q\nA. x\nB. y", "answer": "B", "answer_type": "multipleChoice"},
        {"id": "b", "question": "q", "answer": r"\frac{1}{2}", "answer_type": "exactMatch"},
        {"id": "c", "question": "q", "answer": "1", "answer_type": "exactMatch", "image": "data:..."},
    ]
    suite = assert_reference_passes_and_corrupted_fails("hle", write(tmp_path / "h.jsonl", hle))
    assert set(suite.tasks) == {"a", "b"} and not suite.defects
    assert judged(suite, suite.tasks["a"], "I can't choose").reasons == ("no_answer",)
    assert judged(suite, suite.tasks["a"], r"\boxed{Z}").reasons == ("no_answer",)
    assert choices.answer_of(r"\boxed{c}") == "C"


def test_an_undecided_equality_is_invalid_not_wrong(monkeypatch):
    from rorqual.evals.equality import EqualityError

    def undecided(gold, answer):
        raise EqualityError("no decision")

    monkeypatch.setattr(mathematics, "equal", undecided)
    task = mathematics.question_task("t", "q", "1", "r", benchmark("math").protocol)
    assert mathematics.score(task, r"\boxed{2}").outcome is Outcome.INVALID
    assert mathematics.score(task, "no box").reasons == ("no_answer",)


PRIVATE = base64.b64encode(
    zlib.compress(pickle.dumps(json.dumps([{"input": "5\n", "output": "10\n", "testtype": "stdin"}])))
).decode()
DOUBLE = "```python\nprint(2 * int(input()))\n```"


def test_livecodebench_rows_run_on_input_and_output_and_on_functions(tmp_path):
    public = json.dumps([{"input": "3\n", "output": "6", "testtype": "stdin"}])
    calls = json.dumps([{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}])
    data = write(tmp_path / "l.jsonl", [
        {"question_id": "std", "question_content": "double", "public_test_cases": public, "private_test_cases": PRIVATE},
        {"question_id": "fun", "question_content": "add", "public_test_cases": calls, "metadata": '{"func_name": "add"}',
         "starter_code": "class Solution:"},
        {"question_id": "bad", "question_content": "x", "public_test_cases": "[{}]"},
        {"question_id": "evil", "question_content": "x", "public_test_cases": public,
         "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
    ])  # fmt: skip
    _, suite = load("livecodebench", data)
    assert set(suite.tasks) == {"std", "fun"} and ["pickle" in d.what or "KeyError" in d.what for d in suite.defects] == [
        True,
        True,
    ]
    std, fun = suite.tasks["std"], suite.tasks["fun"]
    assert std.payload["cases"] == [["3\n", "6"], ["5\n", "10\n"]]
    assert judged(suite, std, DOUBLE).passed
    wrong = judged(suite, std, "```python\nprint(6)\n```")
    assert wrong.reasons == ("case 1", "wrong output") and wrong.measures["cases_passed"] == 1
    assert judged(suite, std, "```python\nraise SystemExit(3)\n```").reasons[1].startswith("exit 3")
    assert judged(suite, std, "```python\nunclosed").reasons == ("no_program",)
    right = "```python\nclass Solution:\n    def add(self, values, n):\n        return [v + n for v in values]\n```"
    assert judged(suite, fun, right).passed and not judged(suite, fun, right.replace("+", "-")).passed


def test_a_program_that_never_ends_or_ends_early_fails_by_name(shared_data):
    _, suite = load("humaneval", str(shared_data / "humaneval"), limit=1, timeout_s=1.0)
    task = next(iter(suite.tasks.values()))
    assert judged(suite, task, "```python\nwhile True: pass\n```").reasons == ("tests_failed", "timeout")
    early = "```python\nimport os\nos._exit(0)\n```"
    assert judged(suite, task, early).reasons == ("tests_failed", "ended before the tests did")
    body = task.payload["reference"].partition(task.payload["prompt"])[2].removesuffix("```")
    assert judged(suite, task, f"```python\n{body}```").passed, "the body alone is taken too"


def test_a_sandbox_that_cannot_be_had_is_no_wrong_answer(shared_data, monkeypatch):
    from rorqual.sandbox import SandboxError

    def gone(*args, **named):
        raise SandboxError("no sandbox here", "unavailable")

    _, suite = load("humaneval", str(shared_data / "humaneval"), limit=1)
    monkeypatch.setattr(programs, "create", gone)
    task = next(iter(suite.tasks.values()))
    assert judged(suite, task, task.payload["reference"]).outcome is Outcome.INVALID


def test_contests_score_by_subtask(tmp_path):
    problem = {"id": "p", "statement": "double", "subtasks": [
        {"points": 30, "cases": [["1\n", "2"], ["2\n", "4"]]}, {"points": 70, "cases": [["1000\n", "2000"]]}]}  # fmt: skip
    _, suite = load("contest", write(tmp_path / "c.jsonl", [problem, {"id": "q", "statement": "s", "subtasks": [{"points": 1}]}]))
    task = suite.tasks["p"]
    assert judged(suite, task, DOUBLE).passed and len(suite.defects) == 1
    half = judged(suite, task, "```python\nn = int(input())\nprint(2 * n if n < 10 else 0)\n```")
    assert half.score == pytest.approx(0.3) and half.measures == {
        "samples_passed": 1.0,
        "subtask_1": 30.0,
        "subtask_2": 0.0,
        "points": 30.0,
    }


def test_ioi_takes_the_best_of_each_subtask_and_icpc_counts_submissions():
    first, second = [[True, True], [False], [True, False]], [[True, False], [True], [False, True]]
    assert contests.contest_score(first, (10, 30, 60)) == 10
    assert contests.ioi_score([first, second], (10, 30, 60)) == 40, "subtask 3 is passed by none whole"
    solved, tries = contests.icpc_score({"A": [False, False, True], "B": [False], "C": [True], "D": []})
    assert (solved, tries) == (2, {"A": 3, "C": 1})


@pytest.mark.parametrize(
    "found, wanted, same",
    [("1 2\n3\n", "1 2 \n3", True), ("1\n2", "1 2", False), ("0.3333333", "0.33333334", True), ("0.33", "0.34", False),
     ("3.0", "3", False), ("yes", "Yes", False), ("", "", True), ("1", "", False), ("nan", "0.5", False)],
)  # fmt: skip
def test_outputs_are_compared_by_line_and_token(found, wanted, same):
    assert programs.same_output(found, wanted) is same


def test_a_made_corpus_answers_its_questions_by_its_own_documents(tmp_path):
    browse.made(tmp_path, people=40, questions=15, seed=2)
    _, suite = load("browse", str(tmp_path))
    people = {row["title"]: row["text"] for row in map(json.loads, (tmp_path / "corpus.jsonl").read_text().splitlines())}
    for task in suite.tasks.values():
        question = task.messages[0]["content"].partition("Who was ")[2].partition("?")[0]
        *relations, at = question.split(" of ")
        for relation in reversed(relations):
            fact = f"The {relation.removeprefix('the ')} of {at} was "
            at = next(line for line in people[at].splitlines() if line.startswith(fact)).removeprefix(fact).rstrip(".")
        assert at == task.payload["gold"]
        assert judged(suite, task, f"\\boxed{{{at}}}").passed and not judged(suite, task, r"\boxed{nobody}").passed


def test_the_corpus_tools_search_open_and_find_and_refuse_in_words(tmp_path):
    write(tmp_path / "corpus.jsonl", [{"id": "a", "title": "Whales", "text": "Rorquals sing.\nThey swim."},
                                      {"id": "b", "title": "Ships", "text": "Sails."}, {"id": "c"}])  # fmt: skip
    write(tmp_path / "questions.jsonl", [{"id": "q", "question": "who sings", "answer": "rorquals"}])
    _, suite = load("browse", str(tmp_path))
    episode = suite.open_episode(suite.tasks["q"])
    assert episode.call("search", '{"query": "rorqual \\"song* sings"}').startswith("【a†Whales】")
    assert episode.call("open", {"id": "a"}) == "Whales\nRorquals sing.\nThey swim." and episode.call("search", {"query": "()"})
    assert episode.call("find", {"id": "a", "pattern": "SWIM"}) == "They swim."
    for bad in (("open", {"id": "z"}), ("open", {}), ("fly", {}), ("open", "no json"), ("search", "[]")):
        assert episode.call(*bad).startswith("error:"), bad
    assert len(suite.defects) == 1 and episode.finish("rorquals \\boxed{Rorquals}").passed


def test_tau2_retail_is_passed_by_the_gold_actions_and_by_nothing_less(shared_data, tmp_path):
    import asyncio

    from rorqual.evals import runner
    from rorqual.evals.policies import PolicyOptions, open_policy
    from rorqual.evals.results import table

    chosen, suite = load("tau2_retail", str(shared_data / "tau2_retail"), limit=6, isolation="inline")

    async def play(program):
        config = runner.Config(concurrency=2)
        async with open_policy(f"program:{program}", chosen, True, PolicyOptions()) as player:
            store = runner.cache(tmp_path, chosen, suite, config, player.identity)
            return table(chosen, suite, await runner.run(chosen, suite, player, config, store), config)

    gold, silent = asyncio.run(play("gold")), asyncio.run(play("silent"))
    changes = [name for name, task in suite.tasks.items() if "EXPECTED = {}" not in task.payload["verifier"]]
    assert gold["score"]["value"] == 1.0 and len(changes) >= 4
    assert all(silent["by_task"][name] == [0.0] for name in changes)


def repository(root):
    folder = root / "one"
    for name, text in {
        "repository/sums.py": "def add(a, b):\n    return a - b\n",
        "tests/test_sums.py": "from sums import add\ndef test_add():\n    assert add(2, 3) == 5\n"
        "def test_zero():\n    assert add(4, 0) == 4\n",
        "solution/sums.py": "def add(a, b):\n    return a + b\n",
        "task.json": json.dumps(
            {
                "id": "one",
                "problem": "add subtracts",
                "fail_to_pass": ["test_sums.py::test_add"],
                "pass_to_pass": ["test_sums.py::test_zero"],
            }
        ),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (root / "two").mkdir()
    return str(root)


def test_a_repository_is_judged_by_hidden_tests_that_the_agent_can_not_steer(tmp_path):
    _, suite = load("repositories", repository(tmp_path), timeout_s=60.0)
    assert [defect.where for defect in suite.defects] == ["two"]
    task = suite.tasks["one"]
    cheat = "import pytest\n\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n    return True\n"
    ways = {
        "gold": (task.payload["gold_calls"][0][1]["command"], True),
        "nothing": ("ls; test ! -e test_sums.py", False),
        "steer": (f"printf '{cheat}' > conftest.py", False),
        "own tests": ("echo 'def test_add(): pass\ndef test_zero(): pass' > test_sums.py", False),
        "deleted": ("rm sums.py", False),
    }
    for name, (command, is_right) in ways.items():
        episode = suite.open_episode(task)
        try:
            episode.reset()
            assert episode.call("bash", {"command": command}).startswith("exit code 0"), name
            verdict = episode.finish("done")
        finally:
            episode.close()
        assert verdict.is_valid and verdict.passed is is_right, (name, verdict)
    assert verdict.reasons == ("test_sums.py::test_add", "test_sums.py::test_zero")


def test_each_benchmark_names_its_source_licence_and_protocol():
    for each in BENCHMARKS.values():
        assert each.source and each.licence and each.title and "{question}" in each.protocol.template
        if each.published:
            assert each.published in TABLE_2
    assert BENCHMARKS["math"].protocol.temperature == 1.0 and BENCHMARKS["math"].protocol.thinking
    asked = BENCHMARKS["aime_2025"].protocol.messages("What is {1}?")[0]["content"]
    assert asked == "What is {1}?\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_the_published_tables_are_whole():
    assert all(len(row) == len(MODELS) for row in TABLE_2.values()) and len(TABLE_2) == 19
    assert all(len(row) == len(TABLE_3_MODELS) for row in TABLE_3.values())
    for name, row in TABLE_3.items():  # tables 2 and 3 agree where both speak
        for model, cost in zip(TABLE_3_MODELS, row, strict=True):
            if cost is not None and model in MODELS:
                assert TABLE_2[name][MODELS.index(model)] == cost.score, (name, model)
    assert {name: sum(points) for name, (points, _, _) in TABLE_4.items()} == {"IMO 2025": 35, "CMO 2025": 102, "IOI 2025": 492}
    assert all(list(points) == sorted(points) for points in FIGURE_6.values())
    assert published_scores("HMMT Nov 2025") == {
        "Claude-4.5-Sonnet": 81.7, "GPT-5 High": 89.2, "Gemini-3.0-Pro": 93.3, "Kimi-K2-Thinking": 89.2,
        "DeepSeek-V3.2 Thinking": 90.2,
    }  # fmt: skip
    assert published_scores("nothing") == {}
