"""Say what this machine can do, and how to mend what it can't.

    rorqual doctor
    rorqual doctor --json

Ends with 1 only where something that Rorqual can't do without is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIGABYTE = 1 << 30
DISK_GB, MEMORY_GB = 5, 4
EXTRAS = {
    "model": ("torch", "safetensors"),
    "serve": ("fastapi", "uvicorn", "httpx", "llguidance", "jinja2"),
    "synthesis": ("httpx", "ipykernel", "jupyter_client", "mcp", "pyarrow", "reasoning_gym", "tantivy"),
    "evals": ("math_verify", "pyarrow"),
    "report": ("plotly",),
}
REQUIRED_MODULES = ("numpy", "pydantic", "rich", "tokenizers", "tomli_w")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `serves`: what it is for. `mend`: what to do where it is missing."""

    name: str
    is_there: bool
    found: str
    serves: str
    mend: str = ""
    is_required: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    checks = [look() for look in LOOKS + (LINUX_LOOKS if sys.platform == "linux" else [])]
    is_fit = all(check.is_there for check in checks if check.is_required)
    if args.json:
        print(json.dumps({"fit": is_fit, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
    else:
        _print(checks, is_fit)
    return 0 if is_fit else 1


def _print(checks: list[Check], is_fit: bool) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok     " if check.is_there else "MISSING" if check.is_required else "absent "
        print(f"{mark}  {check.name:<{width}}  {check.found}")
        if not check.is_there:
            print(f"{'':9}{'':<{width}}  for {check.serves}: {check.mend}")
    print("This machine can run Rorqual." if is_fit else "Something required is missing; see MISSING above.")


def _python() -> Check:
    return Check(
        "python",
        sys.version_info >= (3, 11),
        f"{platform.python_version()} at {sys.executable}",
        "everything",
        "install Python 3.11 or newer and run make setup PYTHON=python3.12",
        is_required=True,
    )


def _system() -> Check:
    is_linux = sys.platform == "linux"
    text = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    return Check("system", is_linux, text, "the sandbox and all that runs untrusted programs", "use Linux, or WSL2 on Windows")


def _modules() -> Check:
    missing = [name for name in REQUIRED_MODULES if importlib.util.find_spec(name) is None]
    found = f"without {', '.join(missing)}" if missing else "all there"
    return Check("base packages", not missing, found, "everything", "pip install rorqual, or make setup", is_required=True)


def _extra(name: str) -> Callable[[], Check]:
    def look() -> Check:
        missing = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
        found = f"without {', '.join(missing)}" if missing else "all there"
        return Check(f"extra [{name}]", not missing, found, f"the {name} commands", f"pip install 'rorqual[{name}]'")

    return look


def _torch() -> Check:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Check("torch", False, "not installed", "training and running models", "pip install 'rorqual[model]'")
    return Check("torch", True, version, "training and running models")


def _gpu() -> Check:
    serves, mend = "the small recipe and the fast kernels", "any NVIDIA GPU with a current driver; the tiny recipe needs none"
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", False, "no nvidia-smi", serves, mend)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("gpu", False, str(error), serves, mend)
    names = answer.stdout.strip().replace("\n", "; ")
    return Check("gpu", answer.returncode == 0 and bool(names), names or answer.stderr.strip()[:200], serves, mend)


def _program(name: str, package: str, serves: str) -> Callable[[], Check]:
    def look() -> Check:
        path = shutil.which(name)
        return Check(name, path is not None, path or "not found", serves, f"install it (Debian: sudo apt-get install {package})")

    return look


def _sandbox() -> Check:
    """The one look that matters: a confined program really runs."""
    from rorqual.errors import UserError
    from rorqual.sandbox import Limits, create

    mend = "see the lines below on bwrap and user namespaces; --backend process is weaker and needs only Landlock"
    try:
        with create(limits=Limits(timeout_s=20)) as sandbox:
            result = sandbox.run([sandbox.python, "-I", "-S", "-c", "print(6 * 7)"])
    except (UserError, OSError) as error:
        return Check("sandbox", False, _reason(error), "untrusted programs", mend)
    found = (
        f"a confined program ran in {result.wall_s * 1000:.0f} ms" if result.stdout == "42\n" else result.detail or result.stderr
    )
    return Check("sandbox", result.stdout == "42\n", found, "untrusted programs", mend)


def _reason(error: Exception) -> str:
    return str(error).removeprefix("sandbox: ")


def _user_namespaces() -> Check:
    serves = "the sandbox where rorqual is not run by root"
    mend = (
        "sudo sysctl user.max_user_namespaces=10000, on older Debian kernel.unprivileged_userns_clone=1, "
        "on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0"
    )
    if shutil.which("unshare") is None:
        return Check("user namespaces", False, "no unshare to try with", serves, "sudo apt-get install util-linux")
    answer = subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True, text=True)
    return Check("user namespaces", answer.returncode == 0, answer.stderr.strip() or "allowed", serves, mend)


def _cgroups() -> Check:
    from rorqual.sandbox import cgroup

    try:
        hierarchy = cgroup.find()
    except OSError as error:
        return Check(
            "control groups", False, str(error), "a memory limit over all processes of a sandbox", "mount /sys/fs/cgroup"
        )
    kinds = [name for name in ("memory", "pids") if getattr(hierarchy, name)]
    return Check(
        "control groups",
        "memory" in kinds,
        f"version {hierarchy.version}, writable: {', '.join(kinds)}" if kinds else "none is writable",
        "a memory limit over all processes of a sandbox (without: each process, and by sampling)",
        "run as root, or by systemd-run --user --scope -p Delegate=yes",
    )


def _landlock() -> Check:
    from rorqual.sandbox import landlock

    version = landlock.abi()
    return Check(
        "landlock",
        version > 0,
        f"ABI {version}" if version else "not in this kernel, or off",
        "the process back end of the sandbox",
        "Linux 5.13 or newer, with landlock in its lsm= list",
    )


def _seccomp() -> Check:
    from rorqual.sandbox import seccomp

    is_known = platform.machine() in seccomp.ARCHITECTURES
    is_built = ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) >= 0  # PR_GET_SECCOMP
    found = (
        f"{'in' if is_built else 'not in'} this kernel; {platform.machine()} {'known' if is_known else 'not known'} to the filter"
    )
    return Check(
        "seccomp", is_built and is_known, found, "the sandbox's system call filter", "an x86_64 or aarch64 kernel with seccomp"
    )


def _browser() -> Check:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return Check(
        "chromium", path is not None, path or "not found", "the page tests", "sudo apt-get install chromium chromium-driver"
    )


def _containers() -> Check:
    from rorqual.errors import UserError
    from rorqual.sandbox.oci import find_engine

    try:
        engine = find_engine(None)
    except UserError as error:
        return Check(
            "containers", False, _reason(error), "sandboxes with an image of their own", "start docker, or install podman"
        )
    return Check("containers", True, engine, "sandboxes with an image of their own")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GIGABYTE
    scratch = shutil.disk_usage(tempfile.gettempdir()).free / GIGABYTE
    found = f"{free:.0f} GB free here, {scratch:.0f} GB in {tempfile.gettempdir()}"
    return Check("disk", free >= DISK_GB, found, "checkpoints and corpora", f"free at least {DISK_GB} GB")


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIGABYTE
    return Check(
        "memory", total >= MEMORY_GB, f"{total:.0f} GB", "the tiny recipe", f"use a machine with at least {MEMORY_GB} GB"
    )


LOOKS: list[Callable[[], Check]] = [
    _python, _system, _modules, _memory, _disk, _torch, _gpu, *map(_extra, EXTRAS), _containers, _browser,
    _program("chromedriver", "chromium-driver", "the page tests"), _program("git", "git", "the commit in a run's record"),
]  # fmt: skip
LINUX_LOOKS: list[Callable[[], Check]] = [
    _sandbox, _program("bwrap", "bubblewrap", "the sandbox"), _program("setpriv", "util-linux", "the sandbox"),
    _program("nsenter", "util-linux", "the sandbox"), _user_namespaces, _cgroups, _landlock, _seccomp,
]  # fmt: skip
