"""Memory and process counts of a whole sandbox, by control groups of version 1 or 2, where they are writable."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.protocol import MEBIBYTE, Limits

PREFIX = "rorqual."
REMOVAL_S = 1.0
"""How long the kernel may take to let go of a group whose processes are gone."""
_numbers = itertools.count()
# A process that moves itself as a single thread takes no lock over all forks of the machine; moving another costs the
# kernel a grace period of 10 ms, measured, for each hierarchy.
ENTER = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo 0 >"$1/tasks" || exit 1; shift; n=$((n-1)); done; exec "$@"'


@dataclass(frozen=True)
class Hierarchy:
    """Directories under which groups can be made: one for all controllers (version 2) or one for each (version 1)."""

    version: int
    memory: Path | None
    pids: Path | None

    @property
    def parents(self) -> list[Path]:
        return sorted({p for p in (self.memory, self.pids) if p is not None})


class Group:
    """A control group for one run. `peak_bytes` and `oom_kills` are read before close."""

    def __init__(self, hierarchy: Hierarchy, limits: Limits):
        self._hierarchy = hierarchy
        name = f"{PREFIX}{os.getpid()}.{next(_numbers)}"
        self._paths = [parent / name for parent in hierarchy.parents]
        self._memory = hierarchy.memory and hierarchy.memory / name
        self._pids = hierarchy.pids and hierarchy.pids / name
        try:
            for path in self._paths:
                path.mkdir()
            self._limit(limits)
        except OSError:
            self.close()
            raise

    def _limit(self, limits: Limits) -> None:
        if self._memory:
            v2 = self._hierarchy.version == 2
            _set(self._memory / ("memory.max" if v2 else "memory.limit_in_bytes"), str(limits.memory_mb * MEBIBYTE))
            # Swap is not always counted; where it isn't, there is nothing to limit.
            swap = self._memory / ("memory.swap.max" if v2 else "memory.memsw.limit_in_bytes")
            with contextlib.suppress(OSError):
                _set(swap, "0" if v2 else str(limits.memory_mb * MEBIBYTE))
        if self._pids:
            _set(self._pids / "pids.max", str(limits.processes))

    @property
    def enter(self) -> list[str]:
        """The start of a command line that runs its rest in the group; empty for version 2, where `add` does it."""
        if self._hierarchy.version == 2:
            return []
        return ["/bin/sh", "-c", ENTER, "sh", str(len(self._paths)), *map(str, self._paths)]

    def add(self, pid: int) -> None:
        """Version 2: move a process in. Nothing for version 1, whose processes have entered by themselves."""
        if self._hierarchy.version == 2:
            for path in self._paths:
                _set(path / "cgroup.procs", str(pid))

    def peak_bytes(self) -> int | None:
        name = "memory.peak" if self._hierarchy.version == 2 else "memory.max_usage_in_bytes"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return int((self._memory / name).read_text())  # type: ignore[operator]
        return None

    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed for memory."""
        name = "memory.events" if self._hierarchy.version == 2 else "memory.oom_control"
        with contextlib.suppress(OSError, ValueError, TypeError):
            lines = (self._memory / name).read_text().splitlines()  # type: ignore[operator]
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
        return 0

    def close(self) -> None:
        """Remove the group. Its processes are gone by then; the kernel's own bookkeeping may lag a moment."""
        deadline = time.monotonic() + REMOVAL_S
        for path in self._paths:
            while path.is_dir():
                try:
                    path.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.001)


def open_group(limits: Limits) -> Group | None:
    """A group with these limits, or None where this process can make none."""
    hierarchy = find()
    if not hierarchy.parents:
        return None
    try:
        return Group(hierarchy, limits)
    except OSError:
        return None


@functools.cache
def find() -> Hierarchy:
    """What can be used here: found by making a group and setting a limit, since permissions alone don't tell."""
    mounts, own = _mounts(), _own_groups()
    unified = mounts.get("")
    if unified and "" in own:
        at = unified / own[""].lstrip("/")
        # A group of version 2 that holds processes can't share out controllers; its parent may.
        for parent in (at, at.parent):
            if _is_usable(parent, "memory.max"):
                return _swept(Hierarchy(2, parent, parent if _is_usable(parent, "pids.max") else None))
    found = {}
    for name, limit in (("memory", "memory.limit_in_bytes"), ("pids", "pids.max")):
        parent = mounts[name] / own.get(name, "/").lstrip("/") if name in mounts else None
        found[name] = parent if parent and _is_usable(parent, limit) else None
    return _swept(Hierarchy(1, found["memory"], found["pids"]))


def _set(path: Path, value: str) -> None:
    """Write a control file that exists: an ordinary open would make one where no controller is."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _is_usable(parent: Path, limit: str) -> bool:
    if not (parent / "cgroup.procs").exists():
        return False
    trial = parent / f"{PREFIX}{os.getpid()}.trial"
    try:
        trial.mkdir()
    except OSError:
        return False
    try:
        _set(trial / limit, "max" if limit == "pids.max" else str(1 << 30))
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            trial.rmdir()


def _swept(hierarchy: Hierarchy) -> Hierarchy:
    """Remove what processes that were killed have left here."""
    for parent in hierarchy.parents:
        for path in parent.glob(f"{PREFIX}*"):
            owner = path.name.removeprefix(PREFIX).partition(".")[0]
            if owner.isdigit() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    path.rmdir()
    return hierarchy


def _mounts() -> dict[str, Path]:
    """Controller -> where its version 1 hierarchy is mounted; "" -> version 2."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            found.setdefault("", Path(left.split()[4]))
        elif kind == "cgroup":
            for name in options.split(","):
                found.setdefault(name, Path(left.split()[4]))
    return found


def _own_groups() -> dict[str, str]:
    """Controller -> the group of this process; "" for version 2."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            found[name] = path
    return found
