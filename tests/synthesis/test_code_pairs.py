"""Pairs of states become tasks where execution proves them, and are refused with the reason where it does not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rorqual.synthesis.code import CodeConfig
from rorqual.synthesis.code.agent import agent_of, read_set_up
from rorqual.synthesis.code.candidates import make, pair_refusal, plan
from rorqual.synthesis.code.filters import heuristic, read_judgement
from rorqual.synthesis.code.ladder import back_end, requirements, set_up
from rorqual.synthesis.code.mutations_javascript import mutations as mutations_javascript
from rorqual.synthesis.code.pairs import Pair, apply_patches, change_log, commits, instance_pair
from rorqual.synthesis.code.parts import parts
from rorqual.synthesis.code.projects import project_of
from rorqual.tasks import Provenance, TaskError, open_episode
from rorqual.tasks.grading import gold_of, grade
from rorqual.tasks.language import language

from .scripted_model import Step, call, scripted_model
from .test_code import FAULTY, SOURCE, TESTS

NEW_TESTS = TESTS + "\n\ndef test_bound():\n    assert total([2], 2) == 2\n"
OLD_TESTS = TESTS.replace("def test_least():\n    assert total([1, 2, 3], 2) == 5\n\n", "")
BUILD = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
ISSUE = "The function total leaves out values that equal the bound, though it should count them as well."
OLD = {"sums/__init__.py": FAULTY, "tests/test_sums.py": OLD_TESTS, "pyproject.toml": "", "CHANGES.md": "# Changes\n"}
NEW = {"sums/__init__.py": SOURCE, "tests/test_sums.py": NEW_TESTS, "pyproject.toml": "",
       "CHANGES.md": "# Changes\n\n- Values at the bound count.\n"}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """A git repository: a first commit, one that mends issue 7, one that mends nothing."""
    folder = tmp_path / "sums"
    folder.mkdir()

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    for files, message in ((OLD, "Begin"), (NEW, f"{ISSUE}\n\nFixes #7"), ({"CHANGES.md": "x"}, "Tidy")):
        write(folder, files)
        git("add", ".")
        git("commit", "-qm", message)
    return folder


def pair(old: dict[str, str] = OLD, new: dict[str, str] = NEW, source: str = "release") -> Pair:
    return Pair("sums", source, "1", "2", old, new, ISSUE if source != "release" else "")


def test_commits_that_mend_a_numbered_issue_are_found_with_their_text(history: Path) -> None:
    ((_, _, message),) = commits(str(history))
    assert "#7" in message
    config = CodeConfig(histories=(str(history),), releases=(), projects=())
    job = plan(config).job(0)
    assert job and job.kind == "history" and plan(config).job(1).change.name == "total"  # type: ignore[union-attr]


def test_a_commit_becomes_a_task_whose_agent_sees_the_old_tree_and_no_history(history: Path) -> None:
    made = make(CodeConfig(histories=(str(history),), releases=(), projects=()), 0)
    assert made.row and made.world and made.row.is_accepted, made
    task = made.row.task
    assert task.payload["fail_to_pass"] == [
        "tests/test_sums.py::test_sums::test_bound",
        "tests/test_sums.py::test_sums::test_least",
    ]
    assert task.tags["source"] == "history" and ISSUE in task.prompt and "Fixes #7" not in task.prompt
    assert "test_bound" not in task.prompt
    episode = open_episode(task, made.world)
    try:
        episode.reset()
        seen = episode.call("bash", {"command": "git log 2>&1; cat tests/*.py CHANGES.md sums/*.py; pip list 2>&1"})
        assert (
            "test_bound" not in seen and ">= least" not in seen and "Fixes" not in seen and "pytest" not in seen.split("pip")[-1]
        )
        assert not episode.finish().passed
        episode.call("bash", {"command": "sed -i 's/> least/>= least/' sums/__init__.py"})
        assert episode.finish().passed
    finally:
        episode.close()


@pytest.mark.parametrize(
    ("old", "new", "gate", "reason"),
    [
        ({**OLD, "pyproject.toml": BUILD}, NEW, "same_build", "setuptools.build_meta -> none"),
        (OLD, {"sums/__init__.py": SOURCE}, "set_up", "no tests"),
        (OLD, {**NEW, "tests/test_sums.py": OLD_TESTS}, "tests_changed", "no test differs"),
        ({**NEW, "tests/test_sums.py": OLD_TESTS}, NEW, "source_changed", "no source"),
        ({"src/sums/__init__.py": FAULTY, "tests/test_sums.py": OLD_TESTS}, NEW, "same_build", "packages moved"),
    ],
)
def test_known_bad_pairs_are_refused_with_the_reason(old: Any, new: Any, gate: str, reason: str) -> None:
    try:
        made = pair_refusal(CodeConfig(), pair(old, new))
        assert made and made.refusal and (made.refusal.name, reason in made.refusal.detail) == (gate, True), made
    except TaskError as error:
        assert gate == "set_up" and reason in str(error)


FLAKY = 'import os\n\ndef test_flaky():\n    open("n", "a").write("x")\n    assert os.path.getsize("n") % 2 == 0\n'


@pytest.mark.slow
def test_a_flaky_pair_and_one_that_breaks_a_test_are_refused(tmp_path: Path) -> None:
    from rorqual.synthesis.code.acceptance import Attempt, made

    files = {"sums/__init__.py": SOURCE, "tests/test_flaky.py": FLAKY, "tests/test_sums.py": TESTS}
    found = project_of(files, "sums", "", Provenance("planted"))
    assert found.flaky == ("tests/test_flaky.py::test_flaky::test_flaky",) and len(found.passing) == 4
    same = made(Attempt(0, found, {"sums/__init__.py": SOURCE + "# same\n"}, "", {}), found.world.payload["tests"], None)
    assert same.refusal and same.refusal.name == "flaky"
    broken = {"sums/__init__.py": SOURCE.replace("max(values)", "1 + max(values)"), "tests/test_sums.py": NEW_TESTS}
    wrong = project_of(broken, "sums", "", Provenance("planted"))
    assert wrong.failing == ("tests/test_sums.py::test_sums::test_spread",)
    lost = made(Attempt(0, wrong, {"sums/__init__.py": FAULTY}, "", {}), wrong.world.payload["tests"], None)
    assert lost.refusal and lost.refusal.name == "pass_to_fail" and "test_spread" in lost.refusal.detail


def test_the_change_log_speaks_for_a_release_and_parts_are_single_definitions() -> None:
    assert change_log(pair()) == "- Values at the bound count."
    (part,) = parts(OLD, NEW, ["sums/__init__.py"])
    assert part.name == "total" and part.apply(SOURCE) == FAULTY
    added = {
        **NEW,
        "sums/__init__.py": SOURCE + "\n\ndef mean(values):\n    'The mean.'\n    return total(values) / len(values)\n",
    }
    (new,) = (p for p in parts(NEW, added, ["sums/__init__.py"]))
    assert new.name == "mean" and not new.old and "def mean" not in (new.apply(added["sums/__init__.py"]) or "def mean")
    assert new.head == "def mean(values)\nThe mean."


def test_heuristics_and_an_endpoints_words_refuse_poor_issues() -> None:
    assert heuristic(pair(source="history")) == ""
    assert "words" in heuristic(Pair("s", "history", "", "", OLD, NEW, "Fix https://x.org/1"))
    leaking = Pair("s", "history", "", "", OLD, NEW, f"{ISSUE} Write\n    if value >= least:\n        found += value")
    assert heuristic(leaking) == "" or "line of the patch" in heuristic(leaking)
    assert "line of the patch" in heuristic(
        Pair("s", "history", "", "", OLD, {**NEW, "sums/__init__.py": SOURCE + "A_RATHER_LONG_NAME = 'of a constant'\n"},
             f"{ISSUE} Put A_RATHER_LONG_NAME = 'of a constant' there."))  # fmt: skip
    assert "no test changes" in heuristic(Pair("s", "history", "", "", OLD, {**NEW, "tests/test_sums.py": OLD_TESTS}, ISSUE))
    assert read_judgement('{"issue_is_clear": true, "patch_is_related": true, "tests_are_fair": true}') == ""
    unfair = '{"issue_is_clear": true, "patch_is_related": true, "tests_are_fair": false, "reason": "r"}'
    assert "tests_are_fair" in read_judgement(unfair)
    assert read_judgement("yes") == "the endpoint gave no judgement"


def test_issue_and_patch_rows_are_read_from_local_clones(history: Path, tmp_path: Path) -> None:
    commit, parent, _ = commits(str(history))[0]

    def diff(*paths: str) -> str:
        return subprocess.run(
            ["git", "-C", str(history), "diff", parent, commit, "--", *paths], capture_output=True, text=True
        ).stdout

    row = {"instance_id": "o__sums-7", "repo": "o/sums", "base_commit": parent, "patch": diff("sums"),
           "test_patch": diff("tests"), "problem_statement": ISSUE}  # fmt: skip
    found = instance_pair(row, str(tmp_path))
    assert found.old["sums/__init__.py"] == FAULTY and found.new["sums/__init__.py"] == SOURCE and found.issue == ISSUE
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = CodeConfig(instances=str(tmp_path / "rows.jsonl"), clones=str(tmp_path), releases=(), projects=(), parts=False)
    made = make(config, 0)
    assert made.row and made.row.is_accepted and made.row.task.tags["source"] == "instance", made
    with pytest.raises(TaskError, match="no clone of o/other"):
        instance_pair({**row, "repo": "o/other"}, str(tmp_path))
    with pytest.raises(TaskError, match="does not apply"):
        apply_patches(OLD, [row["patch"].replace("> least", "< least")], "x")
    outside = "--- a/x\n+++ b/../../x\n@@ -0,0 +1 @@\n+1\n"
    with pytest.raises(TaskError, match="does not apply"):
        apply_patches(OLD, [outside], "x")


def test_metadata_names_requirements_and_the_build_back_end() -> None:
    files = {"PKG-INFO": "Name: a\nRequires-Dist: b>=1\nRequires-Dist: c; extra == 'test'\n\nText", "setup.py": "",
             "requirements-test.txt": "d==2\n# no\n-r x\n"}  # fmt: skip
    assert [r.name for r in requirements(files)] == ["b", "c", "d"]
    assert back_end(files) == "setuptools.build_meta:__legacy__"
    assert back_end({"pyproject.toml": '[build-system]\nbuild-backend = "flit_core.buildapi"\n'}) == "flit_core.buildapi"


MESON = {
    "pyproject.toml": '[build-system]\nrequires = ["meson-python"]\nbuild-backend = "mesonpy"\n\n'
    '[project]\nname = "sums"\nversion = "1.0"\n',
    "meson.build": "project('sums', version: '1.0')\npy = import('python').find_installation(pure: true)\n"
    "py.install_sources('sums/__init__.py', subdir: 'sums')\n"
    "configure_file(input: 'edition.py.in', output: 'edition.py', configuration: {'edition': meson.project_version()},\n"
    "  install: true, install_dir: py.get_install_dir() / 'sums')\n",
    "edition.py.in": "EDITION = '@edition@'\n",
    "sums/__init__.py": SOURCE,
    "tests/test_sums.py": TESTS + "\ndef test_edition():\n    from sums.edition import EDITION\n\n    assert EDITION == '1.0'\n",
}


@pytest.mark.slow
def test_a_project_that_meson_builds_is_set_up_and_gets_the_module_that_the_build_writes() -> None:
    found = set_up(MESON, "sums", "1.0")  # meson and ninja come as wheels; ninja, because the back end asks for it
    assert found.rungs["build"] == "mesonpy" and set(found.first.values()) == {"passed"} and len(found.first) == 5
    assert found.payload["files"]["sums/edition.py"] == "EDITION = '1.0'\n" and found.payload["requires"] == []


JS_SOURCE = """'use strict';
// total >= least
function total(values, least = 0) {
  let found = 0;
  for (const value of values) { if (value >= least) found += value; }
  return found;
}
module.exports = { total };
"""
JS_TEST = """const test = require('node:test');
const assert = require('node:assert');
const { total } = require('../sum.js');
test('adds', () => { assert.strictEqual(total([1, 2, 3]), 6); });
test('bound', () => { assert.strictEqual(total([1, 2, 3], 2), 5); });
"""
JS = {"package.json": '{"name": "sum", "scripts": {"test": "node --test"}}', "sum.js": JS_SOURCE, "test/sum.test.js": JS_TEST}
JS_CHEATS = {
    "tests edited": {"test/sum.test.js": ""},
    "exits": {"sum.js": JS_SOURCE.replace(">=", ">") + "process.exit(0);\n"},
    "patches assert": {"sum.js": JS_SOURCE.replace(">=", ">") + "require('assert').strictEqual = () => {};\n"},
    "package script": {"package.json": '{"scripts": {"test": "true"}}'},
}


def test_javascript_projects_are_set_up_graded_and_guarded() -> None:
    found = project_of(JS, "sum", "", Provenance("planted"))
    payload = found.world.payload
    assert found.passing == ("test/sum.test.js::::adds", "test/sum.test.js::::bound") and payload["sources"] == ["sum.js"]
    made = {m.apply(JS_SOURCE) for m in mutations_javascript("sum.js", JS_SOURCE)}
    faulty = JS_SOURCE.replace("value >= least", "value > least")
    assert faulty in made and not any("total > least" in (text or "") for text in made)
    task = {"changes": {"sum.js": faulty}, "fail_to_pass": [found.passing[1]], "pass_to_pass": [found.passing[0]]}
    assert grade(payload, task, gold_of(payload, task)).passed and not grade(payload, task, {}).passed
    for name, files in JS_CHEATS.items():
        verdict = grade(payload, task, {"sum.js": faulty, **files})
        assert verdict.is_valid and not verdict.passed, name
    with pytest.raises(TaskError, match="no language"):
        language("cobol")


SET_UP = {"path": "lib", "sources": ["lib/sums"], "tests": ["checks/check_sums.py"]}
TURNS = (
    call("bash", command="ls"),
    call("finish", path=".", sources=["lib"], tests=["absent.py"]),
    call("finish", **SET_UP, options=["-o", "python_files=check_*.py"]),
)


def agent(body: dict[str, Any]) -> Step:
    """Looks around with bash, says something wrong, then how the tests run."""
    return [TURNS[min(sum(m["role"] == "assistant" for m in body["messages"]), len(TURNS) - 1)]]


@pytest.fixture
def endpoint() -> Iterator[str]:
    with scripted_model(agent) as address:
        yield address


def test_an_agent_sets_up_what_the_rules_cannot(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = {"lib/sums/__init__.py": SOURCE, "checks/check_sums.py": TESTS}
    with pytest.raises(TaskError, match="no tests"):
        project_of(files, "sums", "", Provenance("planted"))
    found = project_of(files, "sums", "", Provenance("planted"), agent_of(endpoint, "scripted"))
    assert len(found.passing) == 4 and found.rungs["runner"] == "agent"
    assert read_set_up({"path": "..", "sources": ["a"], "tests": ["checks/check_sums.py"]}, files) is None
