# ruff: noqa: E501
"""Code tasks: the gold change passes, the given state fails, and cheating patches earn nothing."""

# ruff: noqa: E501 - the planted patches are whole lines of source
from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from rorqual.synthesis import Request, maker
from rorqual.synthesis.code.mutations import mutations
from rorqual.synthesis.code.projects import project
from rorqual.tasks import Store, TaskError, open_episode
from rorqual.tasks.grading import grade, read_report
from rorqual.tasks.language_python import LANGUAGE

SOURCE = '''"""Sums."""

def total(values, least=0):
    """The sum of values of at least `least`."""
    found = 0
    for value in values:
        if value >= least:
            found += value
    return found

def spread(values):
    return max(values) - min(values)
'''
TESTS = """from sums import spread, total

def test_total():
    assert total([1, 2, 3]) == 6

def test_least():
    assert total([1, 2, 3], 2) == 5

def test_spread():
    assert spread([4, 9]) == 5

def test_type():
    assert isinstance(total([]), int)
"""
FAULTY = SOURCE.replace(">= least", "> least")
PROJECT = {"files": {"sums/__init__.py": SOURCE, "tests/test_sums.py": TESTS}, "path": ".", "sources": ["sums"],
           "tests": ["tests/test_sums.py"], "name": "sums", "version": ""}  # fmt: skip
NAMES = [f"tests/test_sums.py::test_sums::{name}" for name in ("test_least", "test_spread", "test_total", "test_type")]
PAYLOAD = {"changes": {"sums/__init__.py": FAULTY}, "fail_to_pass": NAMES[:1], "pass_to_pass": NAMES[1:]}
FORGED = '<testsuites><testsuite><testcase classname="tests.test_sums" name="test_least" file="tests/test_sums.py"/></testsuite></testsuites>'
CHEATS = {
    "tests edited": {"tests/test_sums.py": "def test_least(): pass"},
    "test beside the package": {"sums/test_sums.py": "def test_least(): pass"},
    "conftest": {"conftest.py": "collect_ignore = ['tests']"},
    "conftest in the package": {"sums/conftest.py": "import pytest"},
    "sitecustomize": {"sitecustomize.py": "import os; os._exit(0)"},
    "usercustomize in the package": {"sums/usercustomize.py": "import os"},
    "pytest.ini": {"pytest.ini": "[pytest]\naddopts = --co"},
    "pyproject options": {"pyproject.toml": "[tool.pytest.ini_options]\naddopts='-k none'"},
    "a module named pytest": {"pytest.py": "def main(): return 0"},
    "path file": {"sums.pth": "import os; os._exit(0)"},
    "exit at import": {"sums/__init__.py": FAULTY + "\nimport os\nos._exit(0)\n"},
    "system exit": {"sums/__init__.py": FAULTY + "\nraise SystemExit(0)\n"},
    "exit hook forges the report": {"sums/__init__.py": FAULTY + f"\nimport atexit\natexit.register(lambda: open('junit.xml','w').write({FORGED!r}))\n"},
    "monkeypatched runner": {"sums/__init__.py": FAULTY + "\nimport _pytest.runner as r\nr.check_interactive_exception = None\n"},
    "runner through sys.modules": {"sums/__init__.py": FAULTY + "\nimport sys\nsys.modules['_pytest.python'].Function.runtest = lambda s: None\n"},
    "runner by getattr": {"sums/__init__.py": FAULTY + "\nimport sys\nm = getattr(sys, 'mod' + 'ules')['_pyt' + 'est.python']\nm.Function.runtest = lambda s: None\n"},
    "skips": {"sums/__init__.py": "import unittest\nraise unittest.SkipTest('no')\n"},
    "equal to everything": {"sums/__init__.py": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef total(*a): return E()\ndef spread(v): return 5\n"},
    "tracing": {"sums/__init__.py": FAULTY + "\nimport sys\nsys.settrace(lambda *a: None)\n"},
    "package deleted": {"sums/__init__.py": ""},
    "no Python": {"sums/__init__.py": "def ("},
    "climbs out": {"sums/../tests/test_sums.py": "def test_least(): pass"},
}  # fmt: skip


def test_the_gold_change_passes_and_the_given_state_fails() -> None:
    assert grade(PROJECT, PAYLOAD, {"sums/__init__.py": SOURCE}).passed
    assert grade(PROJECT, PAYLOAD, {"sums/__init__.py": SOURCE.replace("value >= least", "not value < least")}).passed
    verdict = grade(PROJECT, PAYLOAD, {})
    assert verdict.is_valid and verdict.reasons == (NAMES[0],)


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheating_patch_earns_nothing(name: str) -> None:
    verdict = grade(PROJECT, PAYLOAD, {"sums/__init__.py": FAULTY, **CHEATS[name]})
    assert verdict.is_valid and not verdict.passed and verdict.score == 0, verdict


def test_reports_are_read_strictly() -> None:
    assert read_report(b"<a") != {} and isinstance(read_report(b"<a"), str)
    assert isinstance(read_report(b'<!DOCTYPE x [<!ENTITY a "b">]><x/>'), str)
    case = '<testsuite><testcase classname="m" name="t" file="f"/><testcase classname="m" name="t" file="f"><failure/></testcase></testsuite>'
    assert read_report(case.encode()) == {"f::m::t": "failed"}
    inherited = b'<testsuite><testcase classname="tests.test_a.TestA" name="t" file="tests/__init__.py"/></testsuite>'
    assert read_report(inherited, files=["tests/test_a.py"]) == {"tests/test_a.py::TestA::t": "passed"}


def test_a_project_without_tests_or_with_broken_ones_says_so(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no tests"):
        LANGUAGE.layout({"sums/__init__.py": SOURCE})
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums/__init__.py").write_text(SOURCE)
    (tmp_path / "test_sums.py").write_text("def test_never():\n    assert False\n")
    with pytest.raises(TaskError, match="no test passes"):
        project(str(tmp_path))


def test_every_change_alters_the_meaning_of_one_function() -> None:
    made = list(mutations("sums/__init__.py", SOURCE))
    texts = [m.apply(SOURCE) for m in made]
    assert len({t for t in texts if t}) >= 8 and {m.function for m in made} == {"total", "spread"}
    assert all(t is None or t != SOURCE for t in texts) and FAULTY in texts


def test_a_change_is_kept_exactly_where_the_whole_module_still_parses_and_means_something_else() -> None:
    source = inspect.getsource(textwrap) + "\nclass Empty: pass; x = 1\n"
    for mutation in mutations("textwrap.py", source):
        first, last = mutation.span
        data = source.encode()
        whole = (data[:first] + mutation.replacement.encode() + data[last:]).decode()
        try:
            differs = ast.dump(ast.parse(whole)) != ast.dump(ast.parse(source))
        except SyntaxError:
            differs = False
        assert mutation.apply(source) == (whole if differs else None), mutation


@pytest.mark.slow
def test_tasks_of_a_directory_are_kept_by_execution_and_played(tmp_path: Path) -> None:
    for path, text in PROJECT["files"].items():
        (tmp_path / "p" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / path).write_text(text)
    store = Store(tmp_path / "s")
    report = maker("code").synthesize(Request(1, store, 1, overrides=[f'projects=["{tmp_path}/p"]', "releases=[]"]))
    assert report["tasks"] == 1
    task, world = store.tasks()[0], next(iter(store.worlds().values()))
    assert all(g.passed for g in maker("code").regate(task, world, "bwrap"))
    episode = open_episode(task, world)
    try:
        episode.reset()
        assert "sums" in episode.call("bash", {"command": "ls; git log"}) and not episode.finish().passed
        ((path, gold),) = ((p, world.payload["files"][p]) for p in task.payload["changes"])
        episode.call("bash", {"command": f"cat > {path} <<'END'\n{gold}END"})
        assert episode.finish().passed
    finally:
        episode.close()
