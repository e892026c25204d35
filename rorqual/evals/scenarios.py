"""BFCL multi-turn: a user who asks for several things in turn, and classes with state whose methods are the tools.

A directory holds, wherever below it (so that the published package itself will do):

    *multi_turn*.json         rows {id, question: [[message]], initial_config, involved_classes, missed_function?}, one a line
    possible_answer/          files of the same names: rows {id, ground_truth: [["cd(folder='x')"]]}
    multi_turn_func_doc/      MODULE.json: rows {name, description, parameters} of the functions of a class
    func_source_code/         MODULE.py: the classes themselves, which run in the sandbox (scenario_host.py)

As the original does, a turn is judged by execution: the state that the calls leave, and the results that they gave. Calls are
played from the start each time, which is sound since the classes are deterministic; where they are not, the verdict is invalid.
Functions that a row withholds until a later turn come as text in that turn's message, since an agent's tools are fixed at the
start; they can be called from then on.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.evals import scenario_host
from rorqual.evals.benchmark import Benchmark, Options, Protocol, Suite, row_suite
from rorqual.evals.source import Defect, Row, RowError, need, rows
from rorqual.sandbox import Limits, Sandbox, SandboxConfig, SandboxError, open_sandbox, site_packages
from rorqual.tasks import Task
from rorqual.tasks.episode import Opening, as_object, error_text
from rorqual.tasks.task import digest
from rorqual.tasks.verdict import Verdict, failed, invalid, passed

FOLDER = scenario_host.PACKAGE.replace(".", "/")
MORE = "I have updated some more functions you can choose from. What about now?"
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
MEMORY_MB = 1024

Call = tuple[str, list[Any], dict[str, Any]]


class Dead(Exception):
    """The scenario could not be played; the policy is not at fault."""


class Scenario:
    """The classes of one directory, and how a list of calls is played with them."""

    def __init__(self, root: Path):
        sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))}
        self.sources = sources
        self.version = digest(sources)
        self.modules = {name: stem for stem, text in sources.items() for name in re.findall(r"(?m)^class (\w+)", text)}

    def install(self, sandbox: Sandbox) -> None:
        sandbox.upload("host.py", Path(scenario_host.__file__).read_text(encoding="utf-8"))
        for stem, text in self.sources.items():
            sandbox.upload(f"{FOLDER}/{stem}.py", text)

    def play(
        self, sandbox: Sandbox, payload: Mapping[str, Any], turns: Sequence[Sequence[Call]], gold: Any = None
    ) -> dict[str, Any]:
        """The host's reply. Raises Dead where there is none."""
        mark = secrets.token_hex(16)
        classes = {name: self.modules[name] for name in payload["classes"]}
        request = {"mark": mark, "classes": classes, "config": payload["config"], "long": payload["long"]}
        result = sandbox.run([sandbox.python, "host.py"], stdin=json.dumps({**request, "turns": turns, "gold": gold}))
        if mark not in result.stdout:
            last = result.stderr.strip().rpartition("\n")[2]
            raise Dead(f"the scenario's classes could not be run ({result.ended}): {last[:300]}")
        return json.loads(result.stdout.partition(mark)[2])


class ScenarioEpisode:
    """One attempt: what was called in each of the user's turns."""

    is_over = False

    def __init__(self, task: Task, scenario: Scenario, options: Options):
        self.task, self.scenario, self.options = task, scenario, options
        self.turns: list[list[Call]] = [[]]
        self.seen: list[list[str]] = [[]]
        self._sandbox: Sandbox | None = None

    def reset(self) -> Opening:
        self.close()
        limits = Limits(timeout_s=max(self.options.timeout_s, 10.0), memory_mb=MEMORY_MB, output_bytes=16 << 20)
        self._sandbox = open_sandbox(SandboxConfig(self.options.isolation, limits, packages=(site_packages(),)))
        self.scenario.install(self._sandbox)
        self.turns, self.seen = [[]], [[]]
        self._play()
        return Opening(self.task.messages, self.task.tools)

    def _play(self, gold: Any = None) -> dict[str, Any]:
        assert self._sandbox is not None
        return self.scenario.play(self._sandbox, self.task.payload, self.turns, gold)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        """The method's result as text. Raises where the scenario itself fails."""
        given = as_object(arguments)
        if given is None:
            return error_text("invalid_arguments", "arguments must be a JSON object")
        if name not in self._known():
            return error_text("unknown_tool", f"there is no tool {name}")
        self.turns[-1].append((name, [], given))
        result = self._play()["results"][-1][-1]
        self.seen[-1].append(result)
        return result

    def _known(self) -> set[str]:
        """The functions of the start, and those that this turn or one before has brought."""
        withheld = self.task.payload["withheld"]
        brought = {name for turn, names in withheld.items() if int(turn) < len(self.turns) for name in names}
        return {tool["function"]["name"] for tool in self.task.tools} | brought

    def follow_up(self, text: str) -> str | None:
        later = self.task.payload["questions"]
        if len(self.turns) > len(later):
            return None
        self.turns.append([])
        self.seen.append([])
        return later[len(self.turns) - 2]

    def finish(self, text: str | None = None) -> Verdict:
        if text is None:
            return failed("unfinished")
        try:
            reply = self._play(self.task.payload["ground_truth"])
        except (Dead, SandboxError) as error:
            return invalid(str(error))
        if reply["results"] != self.seen[: len(reply["results"])]:
            return invalid("the scenario is not deterministic: played again, a call gives another result")
        return failed(*reply["reasons"]) if reply["reasons"] else passed()

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


# --- from the files


def load(benchmark: Benchmark, options: Options) -> Suite:
    """--data: the directory; --split: one category (base, miss_func, miss_param, long_context), else all that there are."""
    if options.data is None or not Path(options.data).is_dir():
        raise UserError(f"{benchmark.name}: --data names BFCL's directory (docs/evaluation.md says what it holds)")
    root = Path(options.data)
    scenario = Scenario(_below(root, "func_source_code"))
    questions = [path for path in sorted(root.rglob("*multi_turn*.json*")) if path.parent.name not in ("possible_answer",)]
    questions = [path for path in questions if path.is_file() and options.split in ("test", "all", _category(path))]
    if not questions:
        raise UserError(f"{root}: has no file *multi_turn*.json of the split {options.split}")
    gold = {row["id"]: row for row in _lines(_below(root, "possible_answer"), {path.name for path in questions})}
    docs_of = _documents(_below(root, "multi_turn_func_doc"))

    def read(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
        return scenario_task(row, gold.get(str(row.get("id"))), docs_of, scenario, protocol)

    return row_suite(benchmark, options, read, lambda task: ScenarioEpisode(task, scenario, options), questions)


def _below(root: Path, name: str) -> Path:
    found = [path for path in sorted(root.rglob(name)) if path.is_dir()]
    if not found:
        raise UserError(f"{root}: has no directory {name}/ below it; docs/evaluation.md says what BFCL's data are")
    return found[0]


def _category(path: Path) -> str:
    return path.name.partition("multi_turn_")[2].partition(".")[0]


def _lines(folder: Path, names: set[str]) -> list[Row]:
    files = [path for path in sorted(folder.iterdir()) if path.name in names]
    return [row for _, row in rows(files) if not isinstance(row, Defect) and row.get("id")]


def _documents(folder: Path) -> dict[str, list[Row]]:
    return {path.stem: [row for _, row in rows([path]) if not isinstance(row, Defect)] for path in sorted(folder.glob("*.json"))}


def scenario_task(
    row: Mapping[str, Any], gold: Row | None, docs_of: Mapping[str, list[Row]], scenario: Scenario, protocol: Protocol
) -> Task:
    """One row and its answer as a task."""
    classes, turns = list(need(row, "involved_classes")), list(need(row, "question"))
    if gold is None or len(gold.get("ground_truth") or ()) != len(turns):
        raise RowError("has no ground truth for each of its turns in possible_answer/")
    absent = [name for name in classes if name not in scenario.modules or scenario.modules[name] not in docs_of]
    if absent:
        raise RowError(f"its class {absent[0]} has no source or no function documents")
    docs = [doc for name in classes for doc in docs_of[scenario.modules[name]]]
    withheld = {turn: _named(docs, names) for turn, names in (row.get("missed_function") or {}).items()}
    hidden = {doc["name"] for found in withheld.values() for doc in found}
    hidden |= {_name(each) for each in row.get("excluded_function") or ()}
    asked = [_asked(turn, withheld.get(str(number), [])) for number, turn in enumerate(turns)]
    identity, calls = str(need(row, "id")), [[_parsed(call) for call in turn] for turn in gold["ground_truth"]]
    payload = {
        "classes": classes,
        "config": row.get("initial_config") or {},
        "long": "long_context" in identity or "composite" in identity,
        "questions": asked[1:],
        "ground_truth": calls,
        "gold_turns": [[_by_name(call, docs) for call in turn] for turn in calls],
        "withheld": {turn: [doc["name"] for doc in found] for turn, found in withheld.items()},
        "scenario": scenario.version,
        "reference": "Done.",
        "corrupted": "Done.",
    }
    tools = tuple(_tool(doc) for doc in docs if doc["name"] not in hidden)
    tags = {"category": re.sub(r"_\d+$", "", identity.removeprefix("multi_turn_"))}
    return Task(identity, "scenario", protocol.messages(asked[0]), tools, payload=payload, tags=tags)


def _by_name(call: Call, docs: Sequence[Row]) -> tuple[str, dict[str, Any]]:
    """A call as an agent makes it: every argument by its name."""
    name, positional, named = call
    doc = next((doc for doc in docs if doc["name"] == name), {})
    names = list((doc.get("parameters") or {}).get("properties") or {})
    return name, dict(zip(names, positional, strict=False)) | named


def _name(each: Any) -> str:
    return str(each["name"] if isinstance(each, dict) else each)


def _named(docs: Sequence[Row], names: Sequence[Any]) -> list[Row]:
    wanted = {_name(each) for each in names}
    return [doc for doc in docs if doc["name"] in wanted]


def _asked(turn: Sequence[Mapping[str, Any]], brought: Sequence[Row]) -> str:
    text = "\n".join(str(message["content"]) for message in turn)
    if not brought:
        return text
    return "\n".join(filter(None, [text or MORE, json.dumps([_tool(doc)["function"] for doc in brought])]))


def _tool(doc: Row) -> dict[str, Any]:
    parameters = _schema(doc.get("parameters") or {"type": "object", "properties": {}})
    return {
        "type": "function",
        "function": {"name": doc["name"], "description": str(doc.get("description", "")), "parameters": parameters},
    }


def _schema(value: Any) -> Any:
    """JSON Schema of BFCL's own dialect: dict, float and tuple are type names there, and any is no constraint."""
    if isinstance(value, list):
        return [_schema(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {key: _schema(each) for key, each in value.items()}
    kind = made.get("type")
    if kind == "any":
        del made["type"]
    elif isinstance(kind, str):
        made["type"] = TYPES.get(kind, kind)
    return made


def _parsed(text: str) -> Call:
    """A call as Python writes it, with literal arguments."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("no call of a function by its name")
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        return call.func.id, [ast.literal_eval(each) for each in call.args], named
    except (SyntaxError, ValueError, TypeError) as error:
        raise RowError(f"its ground truth {text!r} is no call with literal arguments ({error})") from None
