"""Procedural faults: one small change of one expression or statement of a function, the rest of the text untouched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
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
        data, (first, last) = source.encode(), self.span
        start, end = next((a, b) for a, b in _statements(source) if a <= first and last <= b)
        head, tail = data[start:first].decode(), data[last:end].decode()
        try:
            if _meaning(head + self.replacement + tail) == _meaning(data[start:end].decode()):
                return None
        except SyntaxError:
            return None
        return data[:start].decode() + head + self.replacement + tail + data[end:].decode()


@lru_cache(maxsize=64)
def _statements(source: str) -> tuple[tuple[int, int], ...]:
    """The bytes of each statement of a module, in whole lines: text that stands for itself. Some share their lines."""
    starts = _starts(source)
    first = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) for node in ast.parse(source).body]
    last = [node.end_lineno or node.lineno for node in ast.parse(source).body]
    return tuple((starts[a - 1], starts[b]) for a, b in zip(first, last, strict=True))


@lru_cache(maxsize=512)
def _meaning(text: str) -> str:
    return ast.dump(ast.parse(text))


def _starts(source: str) -> list[int]:
    """The first byte of each line."""
    starts = [0]
    for line in source.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def mutations(path: str, source: str) -> Iterator[Mutation]:
    """All single changes of all functions of a file, in the order of the text."""
    starts = _starts(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            for inner in _nodes(node):
                for kind, replacement in _changes(inner):
                    yield Mutation(path, node.name, first, kind, _span(inner, starts), replacement)
                if isinstance(inner, ast.If | ast.While):
                    yield Mutation(
                        path, node.name, first, "condition", _span(inner.test, starts), f"not ({ast.unparse(inner.test)})"
                    )


def _nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What stands in a function's body, less documentation, inner functions, and the parts of f-strings, which have no places."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.JoinedStr | ast.FunctionDef) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            continue
        yield node
        waiting[:0] = ast.iter_child_nodes(node)


def _span(node: Any, starts: list[int]) -> tuple[int, int]:
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, the node's new text), several for some nodes."""
    for kind, rule in RULES:
        if isinstance(node, kind):
            yield from rule(node)


def _compare(node: ast.Compare) -> Iterator[tuple[str, str]]:
    if len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield "comparison", ast.unparse(ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators))


def _operation(node: ast.BinOp) -> Iterator[tuple[str, str]]:
    if type(node.op) in ARITHMETIC:
        yield "arithmetic", f"({ast.unparse(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))})"
    if not isinstance(node.left, ast.Constant):
        yield "operand", f"({ast.unparse(node.left)})"


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, str]]:
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "boolean", f"({ast.unparse(ast.BoolOp(other, node.values))})"
    yield "operand", f"({ast.unparse(node.values[0])})"


def _unary(node: ast.UnaryOp) -> Iterator[tuple[str, str]]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield "negation", f"({ast.unparse(node.operand)})"


def _constant(node: ast.Constant) -> Iterator[tuple[str, str]]:
    if isinstance(node.value, bool):
        yield "constant", str(not node.value)
    elif isinstance(node.value, int):
        yield "constant", str(node.value + 1)
    elif isinstance(node.value, str) and node.value:
        yield "text", "''"


def _branch(node: ast.IfExp) -> Iterator[tuple[str, str]]:
    yield "branch", f"({ast.unparse(node.orelse)})"


def _return(node: ast.Return) -> Iterator[tuple[str, str]]:
    if node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return", "return None"


def _call(node: ast.Call) -> Iterator[tuple[str, str]]:
    if len(node.args) == 2 and not node.keywords and not any(isinstance(a, ast.Starred) for a in node.args):
        yield "arguments", ast.unparse(ast.Call(node.func, node.args[::-1], []))
    if (
        len(node.args) == 1
        and not node.keywords
        and isinstance(node.func, ast.Name)
        and not isinstance(node.args[0], ast.Starred)
    ):
        yield "call", f"({ast.unparse(node.args[0])})"
    if node.keywords and node.keywords[-1].arg:
        yield "keyword", ast.unparse(ast.Call(node.func, node.args, node.keywords[:-1]))


def _slice(node: ast.Subscript) -> Iterator[tuple[str, str]]:
    if isinstance(node.slice, ast.Slice) and (node.slice.lower or node.slice.upper):
        shorter = (
            ast.Slice(None, node.slice.upper, node.slice.step) if node.slice.lower else ast.Slice(None, None, node.slice.step)
        )
        yield "slice", ast.unparse(ast.Subscript(node.value, shorter, node.ctx))


def _removal(node: ast.stmt) -> Iterator[tuple[str, str]]:
    is_set = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    if is_set or isinstance(node, ast.AugAssign | ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "removal", "pass"


def _jump(node: ast.Break | ast.Continue) -> Iterator[tuple[str, str]]:
    yield "loop", "continue" if isinstance(node, ast.Break) else "break"


RULES: tuple[tuple[Any, Any], ...] = (
    (ast.Compare, _compare), (ast.BinOp, _operation), (ast.BoolOp, _boolean), (ast.UnaryOp, _unary), (ast.Constant, _constant),
    (ast.IfExp, _branch), (ast.Return, _return), (ast.Call, _call), (ast.Subscript, _slice),
    (ast.Assign | ast.AugAssign | ast.Raise | ast.Expr, _removal), (ast.Break | ast.Continue, _jump),
)  # fmt: skip
