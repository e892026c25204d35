"""Rooms form floors: imports go down only, lazy ones included; light rooms import no torch; no file has a junk name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rorqual"

FLOOR = {
    "__init__": 0, "errors": 0, "config": 1, "policy": 1, "runlog": 2, "workers": 2,
    "kernels": 10, "chat": 10, "sandbox": 10,
    "model": 11, "data": 11, "tasks": 11,
    "parallel": 12, "engine": 12, "rollout": 12,
    "rewards": 13, "train": 13, "serve": 13,
    "synthesis": 14, "evals": 14,
    "stages": 15,
    "recipes": 0, "report": 3,
    "launch": 19, "bench": 19, "commands": 20, "cli": 21, "__main__": 22,
}  # fmt: skip
FORBIDDEN = {
    "rollout": {"engine"},
    "engine": {"chat", "parallel"},
    "train": {"rewards", "engine"},
    "model": {"parallel"},
}
TORCHLESS = ("errors", "config", "policy", "runlog", "workers", "chat", "tasks", "sandbox")
JUNK = {"utils", "common", "helpers", "misc", "base"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every imported module name of a file, wherever the import stands, relative ones made absolute."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (origin + (node.module or "")).rstrip(".")
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "rorqual" else [module]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{path}: room {room} is not in the table of floors"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "rorqual":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target in ("__version__", room):
            continue
        assert target in FLOOR, f"{path} imports {name}: {target} is not in the table of floors"
        assert FLOOR[target] < FLOOR[room], f"{path} imports {name}, which is not on a floor below {room}"
        assert target not in FORBIDDEN.get(room, ()), f"{path} imports {name}: {room} may not see {target}"


@pytest.mark.parametrize("room", TORCHLESS)
def test_light_rooms_never_name_torch(room: str) -> None:
    for path in modules():
        if room_of(path) == room:
            assert not [n for n in imports(path) if n.split(".")[0] in ("torch", "safetensors", "triton")], path


def test_light_rooms_import_without_torch_in_a_fresh_interpreter() -> None:
    code = "import sys\n" + "\n".join(
        f"import rorqual.{room}"
        for room in (*TORCHLESS, "rollout.context")
        if (PACKAGE / f"{room.replace('.', '/')}.py").exists() or (PACKAGE / room).is_dir()
    )
    code += "\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_has_a_junk_name() -> None:
    assert not [path for path in modules() if path.stem in JUNK]
