"""A program that holds another program's function, or the asserts over one; it runs confined and is spoken to line by line.

Values cross as `repr`, read back as literals: an object of the program's own never reaches who compares.
"""

from __future__ import annotations

import ast
import json
import sys

MAX_CHARS = 1_000_000


def load(request):
    spaces = {"__name__": "program"}
    try:
        exec(compile(request["source"], "program.py", "exec"), spaces)
    except BaseException as error:
        return None, {"problem": f"{type(error).__name__}: {error}"[:300]}
    function = spaces.get(request["entry"])
    return (function, {"loaded": True}) if callable(function) else (None, {"problem": f"no function {request['entry']}"})


def call(function, request):
    try:
        text = repr(function(*ast.literal_eval(request["arguments"])))
    except BaseException as error:
        return {"problem": f"{type(error).__name__}: {error}"[:300]}
    return {"value": text} if len(text) <= MAX_CHARS else {"problem": "result too large"}


class RemoteError(Exception):
    """The candidate failed."""


def test(request, ask):
    """Run asserts over a `candidate` that answers through `ask`."""

    def candidate(*arguments):
        reply = ask({"call": "candidate", "arguments": repr(arguments)})
        if "value" not in reply:
            raise RemoteError(reply.get("problem", "no result"))
        return ast.literal_eval(reply["value"])

    spaces = {"__name__": "tests", "candidate": candidate}
    try:
        exec(compile(request["source"], "tests.py", "exec"), spaces)
        if callable(spaces.get("check")):
            spaces["check"](candidate)
    except BaseException as error:
        return {"passed": False, "problem": f"{type(error).__name__}: {error}"[:300]}
    return {"passed": True}


def main():
    replies, sys.stdout, sys.stdin, requests = sys.stdout, sys.stderr, None, sys.stdin

    def say(value):
        print(json.dumps(value), file=replies, flush=True)

    def ask(value):
        say(value)
        return json.loads(requests.readline())

    function = None
    while line := requests.readline():
        request = json.loads(line)
        if request["op"] == "load":
            function, reply = load(request)
            say(reply)
        elif request["op"] == "call":
            say(call(function, request))
        else:
            say(test(request, ask))


if __name__ == "__main__":
    main()
