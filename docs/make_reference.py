"""Write docs/reference from the package's docstrings, by its syntax trees alone: `make reference`.

commands.md: every command with its options. python.md: every name that a room exports, and the root modules. settings.md: every
config with its fields, their defaults and doc lines. Nothing is imported, so it runs without torch and in a second.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rorqual"
ALONE = ("policy", "config", "errors", "runlog", "workers", "rollout/context", "rollout/agent", "rewards/advantages")
"""Modules whose own public names belong to the reference although no room exports them."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def documentation(node: ast.Module | Definition) -> str:
    return (ast.get_docstring(node) or "").strip()


# --- commands


def commands() -> str:
    parts = ["# Commands\n\nExit status 0, 1 (a failure, one line on standard error), 2 (wrong use). From `rorqual/commands`.\n"]
    for path in sorted((PACKAGE / "commands").glob("*.py")):
        if path.stem != "__init__":
            tree = tree_of(path)
            purpose, _, rest = documentation(tree).partition("\n")
            parts.append(f"\n## rorqual {path.stem.replace('_', '-')}\n\n{purpose}\n")
            if rest.strip():
                parts.append(f"\n```text\n{rest.strip(chr(10))}\n```\n")
            parts += [f"\n{line}" for line in options(tree)]
            parts.append("\n")
    return "".join(parts)


def options(tree: ast.Module) -> Iterator[str]:
    """A list item for each argument that the command adds."""
    for call in ast.walk(tree):
        name = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
        short = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "add"
        if (name == "add_argument" or short) and isinstance(call, ast.Call) and call.args:
            names = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            given = {word.arg: word.value for word in call.keywords}
            said = given["help"].value if isinstance(given.get("help"), ast.Constant) else ""  # type: ignore[union-attr]
            default = f" (default `{ast.unparse(given['default'])}`)" if "default" in given else ""
            if names:
                yield f"- `{' '.join(map(str, names))}`{default}{': ' if said else ''}{said}"


# --- names


def python() -> str:
    parts = ["# Python names\n\nWhat each room exports, with its contract. A room imports only from floors below it.\n"]
    for init in sorted(PACKAGE.glob("*/__init__.py")):
        found = list(exports(init))
        if found:
            parts.append(f"\n## rorqual.{init.parent.name}\n\n{documentation(tree_of(init))}\n")
            parts += [entry(f"rorqual.{init.parent.name}", node) for node in found]
    for name in ALONE:
        path = PACKAGE / f"{name}.py"
        if path.exists():
            tree = tree_of(path)
            parts.append(f"\n## rorqual.{name.replace('/', '.')}\n\n{documentation(tree)}\n")
            parts += [entry(f"rorqual.{name.replace('/', '.')}", node) for node in public(tree)]
    return "".join(parts)


def public(tree: ast.Module) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_") and documentation(node):
            yield node


def exports(init: Path) -> Iterator[Definition]:
    """The definitions behind the names that a room's __init__ imports from its own modules."""
    origin = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree_of(init))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"rorqual.{init.parent.name}.")
        for alias in node.names
    }
    for name, module in sorted(origin.items()):
        path = ROOT / f"{(module or '').replace('.', '/')}.py"
        tree = tree_of(path) if path.exists() else ast.Module([], [])
        yield from (node for node in tree.body if isinstance(node, Definition) and node.name == name)


def entry(where: str, node: Definition) -> str:
    text = documentation(node) or "(no contract of its own)"
    methods = ""
    if isinstance(node, ast.ClassDef):
        own = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef) and not m.name.startswith("_")]
        methods = "".join(f"\n- `{signature(m)}`{': ' if documentation(m) else ''}{first_line(m)}" for m in own)
        methods = f"\n{methods}\n" if methods else ""
    return f"\n### {node.name}\n\n```text\n{where}.{signature(node)}\n```\n\n{text}\n{methods}"


def first_line(node: Definition) -> str:
    return " ".join(documentation(node).partition("\n\n")[0].split())


def signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"{node.name}({bases})" if bases else node.name
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    return f"{node.name}({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


# --- settings


def settings() -> str:
    parts = [
        "# Settings\n\nA recipe is a TOML file whose tables are these configs; any field can be set on the command line as"
        " `--stage.field=value`.\n"
    ]
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Recipe")):
                where = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                parts.append(f"\n## {where}.{node.name}\n\n{documentation(node)}\n\n" + "".join(fields(node)))
    return "".join(parts)


def fields(node: ast.ClassDef) -> Iterator[str]:
    following = [*node.body[1:], None]
    for item, after in zip(node.body, following, strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            default = f" = {ast.unparse(item.value)}" if item.value is not None else ""
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            said = " ".join(str(text).split())
            yield f"- `{item.target.id}: {ast.unparse(item.annotation)}{default}`{': ' if said else ''}{said}\n"


INDEX = """# Reference

Made from the package's docstrings by `make reference`; a test fails where it is out of date. Do not edit it by hand.

- [Commands](commands.md): what each does, and its options
- [Python names](python.md): what each room exports
- [Settings](settings.md): every field of every config, its default and its meaning
"""


def pages() -> dict[str, str]:
    """File name -> text, as docs/reference should hold it."""
    return {"index.md": INDEX, "commands.md": commands(), "python.md": python(), "settings.md": settings()}


def main() -> None:
    directory = ROOT / "docs" / "reference"
    directory.mkdir(exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
        print(f"docs/reference/{name}: {len(text.splitlines())} lines", file=sys.stderr)


if __name__ == "__main__":
    main()
