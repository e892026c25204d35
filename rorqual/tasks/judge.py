"""The process that runs solution and verification functions. It has no handle on any database.

This file is also a script that stands alone, like host.py. A verifier sees the rows before and after, as
`verify(initial, final, answer)`: table -> list of rows (dictionaries), the answer a string or None. It returns the list of
reasons why the attempt fails (empty: it passes), or a bool. Whatever it raises makes the verdict invalid.

    {"op": "load", "rows": {table: [row]}, "keys": {table: column}}                -> {}
    {"op": "verify", "source": python, "delta": [...], "answer": text or null}    -> {"reasons": []} or {"invalid": text}
    {"op": "solve", "source": python}   -> {"call": name, "arguments": {}} (answer with the observation as a JSON text), ...,
                                           and at last {"returned": value} or {"failure": text}
"""

from __future__ import annotations

import ast
import builtins
import json
import marshal
import sys
from collections.abc import Callable
from typing import Any


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PURE = words(
    """abs all any bool dict divmod enumerate filter float frozenset int isinstance len list map max min next pow range
    reversed round set sorted str sum tuple zip True False None"""
)
METHODS = words(
    """add append casefold copy count difference endswith extend find get index insert intersection isdigit issubset issuperset
    items join keys lower lstrip partition pop remove replace reverse rpartition rsplit rstrip setdefault sort split splitlines
    startswith strip title union update upper values zfill"""
)
STATEMENTS = words(
    """Module FunctionDef arguments arg Return Assign AugAssign AnnAssign For While If Break Continue Pass Expr Assert
    BoolOp BinOp UnaryOp Lambda IfExp Dict Set ListComp SetComp DictComp GeneratorExp comprehension Compare Call keyword
    FormattedValue JoinedStr Constant Attribute Subscript Slice Starred Name List Tuple NamedExpr Load Store Del Delete
    And Or Add Sub Mult Div FloorDiv Mod Pow BitAnd BitOr BitXor LShift RShift Invert Not UAdd USub Eq NotEq Lt LtE Gt GtE
    Is IsNot In NotIn"""
)
ALLOWED = tuple(getattr(ast, name) for name in STATEMENTS)


def solution_problem(source):
    """Why a solution is refused, or None: it may call tools and compute, and nothing else (paper 3.2.3).

    A language filter, not a boundary: the boundary is that this process holds no database.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return f"does not parse: {error}"
    if [getattr(node, "name", None) for node in tree.body] != ["solution"]:
        return "must be one function, solution(tools)"
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if problem := node_problem(node, defined):
            return f"line {getattr(node, 'lineno', '?')}: {problem}"
    return None


def node_problem(node, defined):
    if not isinstance(node, ALLOWED):
        return f"{type(node).__name__} is not allowed"
    if isinstance(node, ast.FunctionDef) and node.decorator_list:
        return "decorators are not allowed"
    if isinstance(node, ast.Name) and (node.id.startswith("_") or (node.id not in PURE and hasattr(builtins, node.id))):
        return f"the name {node.id} is not allowed"
    if isinstance(node, ast.Attribute):
        is_tool = isinstance(node.value, ast.Name) and node.value.id == "tools"
        if node.attr.startswith("_") or (not is_tool and node.attr not in METHODS):
            return f"the attribute {node.attr} is not allowed"
    return None


class Tools:
    """The stub that a solution sees: each attribute is a function that asks for a call and gives back its parsed result."""

    def __init__(self, call):
        self._call = call

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda **arguments: self._call(name, arguments)


class Judge:
    """Runs verifiers over rows, and solutions over a stub. `call` carries a solution's calls to whoever holds the tools."""

    def __init__(self, call):
        self.call = call
        self.allowed: dict[str, str | None] = {}
        self.compiled: dict[str, Callable[..., Any]] = {}

    def handle(self, request):
        return getattr(self, "op_" + request["op"])(**{k: v for k, v in request.items() if k != "op"})

    def op_load(self, rows, keys):
        self.keys = keys
        self.rows = marshal.dumps(rows)
        return {}

    def function(self, name: str, source: str) -> Callable[..., Any]:
        if source not in self.compiled:
            space: dict[str, Any] = {"__name__": name}
            exec(compile(source, f"<{name}>", "exec"), space)
            self.compiled = {source: space[name]}
        return self.compiled[source]

    def op_verify(self, source, delta, answer):
        try:
            # Fresh copies each time: a verifier that changes what it is given must not change the next verdict.
            initial = marshal.loads(self.rows)
            result = self.function("verify", source)(initial, self.final(initial, delta), answer)
        except BaseException as error:
            return {"invalid": f"{type(error).__name__}: {error}"[:500]}
        if isinstance(result, bool):
            return {"reasons": [] if result else ["the verifier says no"]}
        if isinstance(result, list) and all(isinstance(reason, str) for reason in result):
            return {"reasons": result}
        return {"invalid": f"verify returned {type(result).__name__}, expected a bool or a list of reasons"}

    def final(self, initial, delta):
        """The rows after; tables that did not change are those of `initial` themselves."""
        rows = dict(initial)
        for table in {change[0] for change in delta}:
            key = self.keys[table]
            by_key = {row[key]: row for row in rows[table]}
            for _, value, row in (change for change in delta if change[0] == table):
                by_key[value] = row
            rows[table] = [row for row in by_key.values() if row is not None]
        return rows

    def op_solve(self, source):
        if source not in self.allowed:
            self.allowed = {source: solution_problem(source)}
        if problem := self.allowed[source]:
            return {"failure": f"refused: {problem}"}
        pure = {name: getattr(builtins, name) for name in PURE if name not in ("True", "False", "None")}
        space: dict[str, Any] = {"__builtins__": pure}
        try:
            exec(compile(source, "<solution>", "exec"), space)
            return {"returned": space["solution"](Tools(self.call))}
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {error}"[:500]}


def call_by_lines(name, arguments):
    OUT.write(json.dumps({"call": name, "arguments": arguments}, ensure_ascii=False) + "\n")
    OUT.flush()
    return json.loads(sys.stdin.readline())


def main():
    judge = Judge(call_by_lines)
    for line in iter(sys.stdin.readline, ""):
        try:
            reply = judge.handle(json.loads(line))
            text = json.dumps(reply, ensure_ascii=False)
        except Exception as error:
            text = json.dumps({"failure": f"{type(error).__name__}: {error}"[:2000]})
        OUT.write(text + "\n")
        OUT.flush()


if __name__ == "__main__":
    OUT, sys.stdout = sys.stdout, sys.stderr
    main()
