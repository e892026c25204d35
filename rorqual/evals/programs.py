"""Benchmarks whose answer is a program, run in the sandbox: HumanEval and LiveCodeBench's formats (contests: contests.py).

The tests run in the same process as the program they test, so a program may end early with exit code 0. So a run counts only
where it also printed a token that the tests' last line prints, drawn anew for every run. (A program that sets out to read its
own file finds the token: this check is against accident and laziness, not against fraud.)
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import secrets
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.evals.answers import code_block
from rorqual.evals.benchmark import Benchmark, Options, Protocol, Suite, row_suite
from rorqual.evals.source import RowError, need
from rorqual.evals.text import TextEpisode
from rorqual.sandbox import Ended, Limits, Result, Sandbox, SandboxError, create
from rorqual.tasks import Task
from rorqual.tasks.verdict import Verdict, failed, invalid, passed

COMPLETE = (
    "Complete the following Python function. Answer with the whole function, with its imports, in one block of code.\n"
    "```python\n{question}```"
)
SOLVE = "{question}\n\nAnswer with a Python program in one block of code."
MEMORY_MB = 1024


class Undecided(Exception):
    """The sandbox, not the program, is at fault."""


def run_program(sandbox: Sandbox, program: str, timeout_s: float, stdin: str = "") -> Result:
    """One run. Raises Undecided where no run could be made."""
    try:
        sandbox.upload("program.py", program)
    except SandboxError as error:
        raise Undecided(str(error)) from None
    limits = Limits(timeout_s=timeout_s, memory_mb=MEMORY_MB, output_bytes=16 << 20)
    result = sandbox.run([sandbox.python, "-I", "program.py"], stdin=stdin, limits=limits)
    if result.ended in (Ended.SPAWN_FAILED, Ended.UNAVAILABLE, Ended.CANCELLED):
        raise Undecided(result.detail or str(result.ended))
    return result


def why_not(result: Result) -> str:
    """The name of what a run died of; its last line of standard error where it raised."""
    if result.ended is not Ended.EXITED:
        return str(result.ended)
    last = result.stderr.strip().rpartition("\n")[2]
    return f"exit {result.exit_code}: {last[:200]}"


def in_sandbox(options: Options, judge: Callable[[Sandbox], Verdict]) -> Verdict:
    """A verdict had in a fresh sandbox; where none can be had it is invalid."""
    try:
        with create(options.isolation, limits=Limits(memory_mb=MEMORY_MB)) as sandbox:
            return judge(sandbox)
    except (SandboxError, Undecided) as error:
        return invalid(f"no verdict from the sandbox: {error}")


# --- HumanEval: a function and asserts


def score_function(task: Task, text: str, options: Options) -> Verdict:
    code = code_block(text)
    if code is None or not code.strip():
        return failed("no_program")
    mark = secrets.token_hex(16)
    entry = task.payload["entry_point"]
    program = "\n".join(
        [task.payload["prompt"], complete(task.payload, code), task.payload["test"], f"check({entry})", f"print({mark!r})"]
    )

    def judge(sandbox: Sandbox) -> Verdict:
        result = run_program(sandbox, program, options.timeout_s)
        if result.is_ok and result.stdout.rstrip().endswith(mark):
            return passed()
        return failed("tests_failed", why_not(result) if not result.is_ok else "ended before the tests did")

    return in_sandbox(options, judge)


def complete(payload: Mapping[str, Any], code: str) -> str:
    """The answer as definitions to stand after the prompt: it may be the whole function or its body alone."""
    try:
        tree = ast.parse(code)
        if any(isinstance(node, ast.FunctionDef) and node.name == payload["entry_point"] for node in tree.body):
            return code
    except (SyntaxError, ValueError):
        pass
    # The prompt ends inside the function, so a body goes on there; repeated so that what follows stands alone.
    return payload["prompt"] + code


def read_humaneval(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    prompt, solution = str(need(row, "prompt")), str(need(row, "canonical_solution"))
    entry = str(need(row, "entry_point"))
    payload = {
        "prompt": prompt,
        "entry_point": entry,
        "test": str(need(row, "test")),
        "reference": f"```python\n{prompt}{solution}```",
        "corrupted": f"```python\n{prompt}    return object()\n```",
    }
    return Task(str(need(row, "task_id")), "text", protocol.messages(prompt), payload=payload)


# --- tests of input and output: LiveCodeBench and contests


@dataclass(frozen=True)
class Case:
    """One run: what goes in and what must come out; for a function, JSON arguments by line and the JSON result."""

    input: str
    output: str


def passes(sandbox: Sandbox, code: str, case: Case, function: str, timeout_s: float) -> str:
    """Empty where the program gives the wanted output, else why not."""
    if function:
        mark = secrets.token_hex(16)
        result = run_program(sandbox, f"{code}\n{_CALL.format(function=function, case=case.input, mark=mark)}", timeout_s)
        found = result.stdout.rpartition(mark)[2].strip() if mark in result.stdout else ""
        right = bool(found) and _same_json(found, case.output)
    else:
        result = run_program(sandbox, code, timeout_s, case.input)
        right = same_output(result.stdout, case.output)
    if not result.is_ok:
        return why_not(result)
    return "" if right else "wrong output"


_CALL = """
import json as _json
_arguments = [_json.loads(line) for line in {case!r}.splitlines() if line.strip()]
_target = Solution().{function} if "Solution" in globals() else {function}
print("\\n{mark}" + _json.dumps(_target(*_arguments)))
"""


def _same_json(found: str, wanted: str) -> bool:
    try:
        return json.loads(found) == json.loads(wanted)
    except json.JSONDecodeError:
        return False


def same_output(found: str, wanted: str) -> bool:
    """Equal line by line, whatever spaces end a line or lines end the text; numbers of a line may differ by 1e-6, relative."""
    left, right = ([line.split() for line in text.strip().splitlines()] for text in (found, wanted))
    return len(left) == len(right) and all(
        len(a) == len(b) and all(map(_same_token, a, b)) for a, b in zip(left, right, strict=True)
    )


def _same_token(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    if "." not in wanted:
        return False
    try:
        a, b = float(found), float(wanted)
    except ValueError:
        return False
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))


def score_cases(task: Task, text: str, options: Options) -> Verdict:
    """All cases pass, or the first that does not names why."""
    code = code_block(text)
    if code is None or not code.strip():
        return failed("no_program")
    payload = task.payload
    cases = [Case(*pair) for pair in payload["cases"]]

    def judge(sandbox: Sandbox) -> Verdict:
        for number, case in enumerate(cases):
            reason = passes(sandbox, code, case, payload.get("function", ""), options.timeout_s)
            if reason:
                return failed(f"case {number}", reason, measures={"cases_passed": number, "cases": len(cases)})
        return passed({"cases_passed": len(cases), "cases": len(cases)})

    return in_sandbox(options, judge)


def read_livecodebench(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    """Rows of the published files: public cases as JSON text, private ones packed; a function's name in the metadata."""
    cases = [*_cases(need(row, "public_test_cases")), *_cases(row.get("private_test_cases") or "[]")]
    if not cases:
        raise RowError("it has no test case")
    metadata = row.get("metadata") or "{}"
    function = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name", "")
    starter = str(row.get("starter_code") or "")
    question = str(need(row, "question_content"))
    shown = f"{question}\n\nStart from this:\n```python\n{starter}\n```" if starter else question
    payload = {"cases": [[case.input, case.output] for case in cases], "function": function}
    payload |= {"reference": str(row.get("reference") or ""), "corrupted": "```python\npass\n```"}
    return Task(str(need(row, "question_id")), "text", protocol.messages(shown), payload=payload)


def _cases(value: Any) -> list[Case]:
    try:
        found = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
        if isinstance(found, str):
            found = json.loads(_only_text(zlib.decompress(base64.b64decode(found))))
        return [Case(str(case["input"]), str(case["output"])) for case in found]
    except (ValueError, KeyError, TypeError, zlib.error, pickle.UnpicklingError) as error:
        raise RowError(f"its test cases can't be read ({type(error).__name__}: {error})") from None


class _OnlyText(pickle.Unpickler):
    """LiveCodeBench packs its private cases as a pickled string; nothing else is let out of a pickle."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle with {module_name}.{global_name}")


def _only_text(data: bytes) -> str:
    found = _OnlyText(io.BytesIO(data)).load()
    if not isinstance(found, str):
        raise RowError("its packed test cases are no text")
    return found


def loader(read: Any, score: Callable[[Task, str, Options], Verdict]) -> Any:
    def load(benchmark: Benchmark, options: Options) -> Suite:
        def opened(task: Task) -> TextEpisode:
            return TextEpisode(task, lambda task, text: score(task, text, options))

        return row_suite(benchmark, options, read, opened)

    return load
