"""Plays a BFCL scenario inside the sandbox: the scenario's own classes, the calls of a policy, and where asked the gold calls.

This file is also a script that stands alone. One request on standard input, one reply on standard output, after the mark:

    {"mark": text, "classes": {name: module}, "config": {name: {}}, "long": bool, "turns": [[call]], "gold": [[call]] or null}
    call: [name, [positional], {named}]      reply: {"results": [[text]], "reasons": [text]}

After each turn that has gold calls the public attributes of every class must equal those that the gold calls leave, and the
results so far must hold each result of this turn's gold calls (as often; in any order).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import sys
from typing import Any

PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
"""The name by which the published classes import each other."""


class Stage:
    """Fresh objects of a scenario's classes, and their public methods by name."""

    def __init__(self, request: dict[str, Any]):
        self.objects: dict[str, Any] = {}
        self.methods: dict[str, Any] = {}
        for name, module in request["classes"].items():
            made = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)()
            if hasattr(made, "_load_scenario"):
                made._load_scenario(copy.deepcopy(request["config"].get(name, {})), long_context=request["long"])
            self.objects[name] = made
            methods = inspect.getmembers(made, predicate=inspect.ismethod)
            self.methods |= {method: bound for method, bound in methods if not method.startswith("_")}

    def call(self, name: str, positional: list[Any], named: dict[str, Any]) -> str:
        try:
            if name not in self.methods:
                raise NameError(f"name '{name}' is not defined")
            result = self.methods[name](*positional, **named)
        except Exception as error:
            return f"Error during execution: {error}"
        if isinstance(result, str):
            return result
        try:
            return json.dumps(result) if isinstance(result, dict) else str(result)
        except (TypeError, ValueError):
            return str(result)

    def unlike(self, gold: Stage) -> list[str]:
        """The public attributes in which these objects differ from the gold ones."""
        return [
            f"{name}.{attribute}"
            for name, wanted in gold.objects.items()
            for attribute, value in vars(wanted).items()
            if not attribute.startswith("_") and getattr(self.objects[name], attribute, None) != value
        ]


def lacking(found: list[str], wanted: list[str]) -> list[str]:
    left = list(found)
    missing = []
    for each in wanted:
        if each in left:
            left.remove(each)
        else:
            missing.append(each)
    return missing


def play(request: dict[str, Any]) -> dict[str, Any]:
    stage = Stage(request)
    if request["gold"] is None:
        return {"results": [[stage.call(*call) for call in turn] for turn in request["turns"]], "reasons": []}
    gold, results = Stage(request), []
    for number, wanted in enumerate(request["gold"], 1):
        made = request["turns"][number - 1] if number <= len(request["turns"]) else []
        results.append([stage.call(*call) for call in made])
        right = [gold.call(*call) for call in wanted]
        if wanted and not made:
            return {"results": results, "reasons": [f"turn {number}: no call was made"]}
        differing = stage.unlike(gold) if wanted else []
        if differing:
            return {"results": results, "reasons": [f"turn {number}: state", *differing]}
        missing = lacking([result for turn in results for result in turn], right)
        if missing:
            return {"results": results, "reasons": [f"turn {number}: response", *missing[:3]]}
    return {"results": results, "reasons": []}


def main() -> None:
    request = json.loads(sys.stdin.read())
    out, sys.stdout = sys.stdout, sys.stderr  # what the classes print is no reply
    sys.path.insert(0, ".")
    out.write(request["mark"] + json.dumps(play(request)))
    out.flush()


if __name__ == "__main__":
    main()
