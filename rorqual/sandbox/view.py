"""What a confined program sees of the machine: the system and an interpreter, read-only; no home, no /etc, no one's files."""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rorqual.errors import UserError

HOME = "/box"
PYTHON_HOME = "/opt/python"
PACKAGES = "/opt/packages"
SYSTEM_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
"""Of /etc only what the loader, Debian's choice of programs and the clock need."""
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs us, as shown inside a sandbox. An interpreter outside /usr is shown at a place of its own."""

    source: str | None
    """The directory to show at PYTHON_HOME; None where the interpreter is part of /usr."""
    path: str
    """The interpreter's path inside."""
    outside: str
    """The interpreter's path on the machine, links resolved."""
    libraries: str | None = None
    """The directory inside of its shared library, where it has one outside the system's."""


@functools.cache
def interpreter() -> Interpreter:
    prefix, program = os.path.realpath(sys.base_prefix), os.path.realpath(sys.executable)
    if not program.startswith(prefix + "/"):
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        program = os.path.realpath(os.path.join(prefix, "bin", name))
    if not os.access(program, os.X_OK):
        raise UserError(f"sandbox: this interpreter's own program is not at {program}; run rorqual with another Python")
    if prefix == "/usr" or prefix.startswith("/usr/"):
        return Interpreter(None, program, program)
    is_shared = any(Path(prefix, "lib").glob("libpython*.so*"))
    return Interpreter(prefix, PYTHON_HOME + program.removeprefix(prefix), program, f"{PYTHON_HOME}/lib" if is_shared else None)


def site_packages() -> str:
    """The directory of this interpreter's installed packages, for SandboxConfig.packages."""
    return sysconfig.get_path("purelib")


def environment(home: str, python_home: str | None, packages: Sequence[str], extra: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of a confined program: nothing of ours, and one thread per numeric library, as limits are small.

    packages: the directories as seen inside.
    """
    own = [f"{python_home}/bin"] if python_home else []
    values = {
        "PATH": ":".join([*own, "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": home,
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # Each thread's heap otherwise reserves 64 MB of the address space.
        "MALLOC_ARENA_MAX": "2",
    }
    if python_home and (libraries := interpreter().libraries):
        values["LD_LIBRARY_PATH"] = libraries
    if packages:
        values["PYTHONPATH"] = ":".join(packages)
    values |= extra or {}
    for name, value in values.items():
        if not ENVIRONMENT_NAME.match(name) or "\0" in value:
            raise UserError(f"sandbox: {name!r} is not a name for an environment variable, or its value holds a zero byte")
    return values


@functools.cache
def system_arguments() -> tuple[str, ...]:
    """bubblewrap's arguments that show the system and the interpreter, read-only."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in SYSTEM_DIRECTORIES:
        path = f"/{name}"
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for path in SYSTEM_FILES:
        arguments += ["--ro-bind-try", path, path]
    if interpreter().source:
        arguments += ["--ro-bind", str(interpreter().source), PYTHON_HOME]
    return tuple(arguments)


def directory_arguments(targets: Sequence[str]) -> list[str]:
    """bubblewrap's arguments that make the parents of these paths, readable by all; it would make them private to root."""
    parents = {str(parent) for target in targets for parent in PurePosixPath(target).parents}
    arguments = []
    for path in sorted(parents - {"/"} - {parent for parent in parents if parent.split("/")[1] in ("usr", *SYSTEM_DIRECTORIES)}):
        arguments += ["--perms", "0755", "--dir", path]
    return arguments
