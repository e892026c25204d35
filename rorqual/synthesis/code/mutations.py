"""Procedural faults: one small change of one expression or statement of a function, the rest of the text untouched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}


@dataclass(frozen=True)
class Mutation:
    """A change: which function, what kind, and how."""

    path: str
    function: str
    line: int
    """The function's first line (of its first decorator), as the interpreter counts it."""
    kind: str
    span: tuple[int, int]
    """The bytes of the file that are replaced."""
    replacement: str

    def apply(self, source: str) -> str | None:
        """The file after the change; None where that does not compile, or means the same."""
        data = source.encode()
        changed = (data[: self.span[0]] + self.replacement.encode() + data[self.span[1] :]).decode()
        try:
            return None if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)) else changed
        except SyntaxError:
            return None


def mutations(path: str, source: str) -> Iterator[Mutation]:
    """All single changes of all functions of a file, in the order of the text."""
    starts = [0]
    for line in source.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            for inner in (n for statement in node.body for n in ast.walk(statement)):
                for kind, replacement in _changes(inner):
                    yield Mutation(path, node.name, first, kind, _span(inner, starts), replacement)


def _span(node: Any, starts: list[int]) -> tuple[int, int]:
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, the node's new text)."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield "comparison", ast.unparse(ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", f"({ast.unparse(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "negation", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "constant", str(node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return", "return None"
    elif isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
        yield "arguments", ast.unparse(ast.Call(node.func, node.args[::-1], []))
    elif isinstance(node, ast.Break):
        yield "loop", "continue"
    elif isinstance(node, ast.Continue):
        yield "loop", "break"
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, ast.AugAssign):
        yield "removal", "pass"
