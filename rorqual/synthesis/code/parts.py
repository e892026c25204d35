"""The single functions and methods that a pair of states changes, each as a change of its own to the new state."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One definition of the new state, put back to the old text, or taken out where the old state has none."""

    path: str
    name: str
    """Qualified, such as Table.insert."""
    lines: tuple[int, int]
    """First line (of the first decorator) and last line in the new file, counted from 1."""
    old: str
    """The old text; empty where it is new."""
    head: str
    """Its signature and documentation in the new state."""

    def apply(self, source: str) -> str | None:
        """The new file with this part as it was; None where that does not compile."""
        lines = source.splitlines(keepends=True)
        text = "".join([*lines[: self.lines[0] - 1], self.old, *lines[self.lines[1] :]])
        try:
            return text if ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)) else None
        except (SyntaxError, ValueError):
            return None


Definitions = dict[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]


def definitions(source: str) -> Definitions:
    """Functions and classes of a module, and methods of its classes, by qualified name; names defined twice are left out."""
    found: Definitions = {}
    twice = set()
    tree = ast.parse(source)
    for owner, body in [("", tree.body), *((f"{n.name}.", n.body) for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                twice |= {owner + node.name} & set(found)
                found[owner + node.name] = node
    return {name: node for name, node in found.items() if name not in twice}


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> tuple[int, int]:
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return first, node.end_lineno or node.lineno


def parts(old: Mapping[str, str], new: Mapping[str, str], paths: list[str]) -> Iterator[Part]:
    """Every changed or added definition of these files. A class in both states gives its methods; a new one gives itself."""
    for path in sorted(paths):
        if path in old and path in new:
            yield from _parts(path, old[path], new[path])


def _parts(path: str, old: str, new: str) -> Iterator[Part]:
    try:
        before, after = definitions(old), definitions(new)
    except (SyntaxError, ValueError):
        return
    old_lines = old.splitlines(keepends=True)
    for name, node in after.items():
        owner, known = name.rpartition(".")[0], before.get(name)
        if (owner and owner not in before) or (isinstance(node, ast.ClassDef) and known is not None):
            continue
        if known is not None and ast.dump(known) == ast.dump(node):
            continue
        span = _lines(known) if known is not None else (1, 0)
        yield Part(path, name, _lines(node), "".join(old_lines[span[0] - 1 : span[1]]), _head(node))


def _head(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The definition without its body."""
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}\n{text}".strip()
    return f"def {node.name}({ast.unparse(node.args)})\n{text}".strip()
