"""What a sandbox is asked for and what it gives back, whatever confines it."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rorqual.errors import UserError, require

MEBIBYTE = 1 << 20


class Ended(StrEnum):
    """Why a run ended. Only EXITED says that the program itself chose its exit code."""

    EXITED = "exited"
    TIMEOUT = "timeout"  # the wall clock passed timeout_s
    CPU = "cpu"  # a process used more processor time than cpu_s
    MEMORY = "memory"  # killed by the kernel for memory, or ended on Python's MemoryError
    DISK = "disk"  # the watch found more written than disk_mb (process back end; elsewhere the write itself fails)
    OUTPUT = "output"  # standard output or error passed output_bytes
    KILLED = "killed"  # a signal; Result.signal names it
    CANCELLED = "cancelled"  # the caller withdrew it
    SPAWN_FAILED = "spawn_failed"  # the sandbox could not be made, or the command not found; Result.detail says which
    UNAVAILABLE = "unavailable"  # the back end went away (a container that was removed, a daemon that stopped)


@dataclass(frozen=True)
class Limits:
    """What a program may use. Megabytes are 2**20 bytes."""

    timeout_s: float | None = 10.0
    """Wall-clock seconds until everything is killed. None: no limit, for servers that are closed by their owner."""
    cpu_s: float | None = None
    """Processor seconds of each process. None: timeout_s and one more."""
    memory_mb: int = 512
    """All processes together where the memory cgroup is writable; and each one's address space, see the next field."""
    address_space_mb: int | None = None
    """Each process's address space. None: memory_mb. 0: no limit, for runtimes that reserve more than they use."""
    processes: int = 64
    """Processes and threads at one time. As root all runs of a sandbox that go on at once share this count: their uid is one."""
    open_files: int = 256
    file_mb: int = 64
    """The largest single file."""
    disk_mb: int = 256
    """All that can be written: the working directory, /tmp and /dev/shm together. Lives as long as the sandbox, in memory."""
    output_bytes: int = MEBIBYTE
    """Of standard output and of standard error, each. A program that writes more is killed."""

    def __post_init__(self) -> None:
        require(
            self,
            timeout_s=(self.timeout_s is None or self.timeout_s > 0, "above 0, or none"),
            cpu_s=(self.cpu_s is None or self.cpu_s > 0, "above 0, or none"),
            memory_mb=(self.memory_mb >= 16, "at least 16"),
            address_space_mb=(
                self.address_space_mb is None or self.address_space_mb == 0 or self.address_space_mb >= 16,
                "0, or at least 16, or none",
            ),
            processes=(self.processes >= 4, "at least 4 (the sandbox's own shell is one)"),
            open_files=(self.open_files >= 16, "at least 16"),
            file_mb=(self.file_mb >= 1, "at least 1"),
            disk_mb=(self.disk_mb >= 1, "at least 1"),
            output_bytes=(self.output_bytes >= 1, "at least 1"),
        )

    def but(self, **changes: Any) -> Limits:
        """The same limits with some changed."""
        return replace(self, **changes)

    @property
    def address_space_bytes(self) -> int | None:
        megabytes = self.memory_mb if self.address_space_mb is None else self.address_space_mb
        return megabytes * MEBIBYTE or None

    @property
    def cpu_seconds(self) -> int | None:
        """Whole seconds, as the kernel counts them; at least one."""
        if self.cpu_s is not None:
            return max(1, round(self.cpu_s))
        return None if self.timeout_s is None else int(self.timeout_s) + 2


@dataclass(frozen=True)
class Bind:
    """A directory or file of the machine shown inside the sandbox.

    A writable one is a hole that the caller makes knowingly: no size limit covers it but file_mb.
    """

    source: str
    target: str
    is_writable: bool = False


@dataclass(frozen=True)
class SandboxConfig:
    """How programs are confined."""

    backend: str = "bwrap"
    """bwrap (bubblewrap), process (rlimits and Landlock: weaker), or oci (docker or podman)."""
    limits: Limits = field(default_factory=Limits)
    binds: tuple[Bind, ...] = ()
    packages: tuple[str, ...] = ()
    """Directories of Python packages, shown read-only and put on PYTHONPATH; `site_packages()` is this interpreter's."""
    seccomp: bool = True
    uids: tuple[int, int] = (60578, 61183)
    """As root: each sandbox runs under a uid of its own from this range (inclusive). systemd and Debian give out none of it."""
    image: str = "python:3.12-slim"
    """oci: the image to run in."""
    engine: str | None = None
    """oci: docker or podman; None takes the first that answers."""

    def __post_init__(self) -> None:
        require(
            self,
            backend=(self.backend in ("bwrap", "process", "oci"), "bwrap, process or oci"),
            uids=(0 < self.uids[0] <= self.uids[1] < 2**32 - 1, "two uids above 0, in order"),
        )


@dataclass(frozen=True)
class Result:
    """What came of one run."""

    ended: Ended
    exit_code: int | None
    """As a shell says it: 128 + n after signal n. None where nothing ran or the back end killed it."""
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    wall_s: float = 0.0
    cpu_s: float | None = None
    """User and system time of all processes; None where the back end can't tell."""
    peak_memory_bytes: int | None = None
    """Of all processes together from the cgroup, else the largest single process seen (sampled); None where neither was had."""
    detail: str = ""
    """What a person should read where the run did not simply exit."""

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def is_ok(self) -> bool:
        """The program ended by itself with exit code 0."""
        return self.ended is Ended.EXITED and self.exit_code == 0

    @property
    def signal(self) -> str | None:
        """The name of the signal that ended the program, such as SIGSEGV."""
        if self.ended is not Ended.KILLED or self.exit_code is None:
            return None
        return signal.Signals(self.exit_code - 128).name


@runtime_checkable
class Handle(Protocol):
    """A program running inside a sandbox, spoken to in lines: a toolset's server, a shell. Closing it kills all its processes."""

    def send(self, line: str) -> None:
        """Write one line; the newline is added. Raises SandboxError where the program is gone or does not read."""
        ...

    def receive(self, timeout_s: float | None = None) -> str:
        """The next line without its newline. Raises SandboxError by name: timeout, output (a line too long), closed."""
        ...

    def ask(self, line: str, timeout_s: float | None = None) -> str:
        """send, then receive."""
        ...

    @property
    def is_running(self) -> bool: ...

    def close(self) -> Result: ...


class Sandbox(Protocol):
    """A confined place with a working directory that lives from creation to close. A context manager."""

    directory: str
    """The working directory as programs inside see it."""
    python: str
    """The interpreter as programs inside see it."""

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Run a command to its end; every process it leaves behind is killed. Failures are in the result, never raised.

        limits: instead of the sandbox's own (disk_mb is fixed at creation). cancel: set it to have everything killed.
        """
        ...

    async def run_async(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> Result:
        """`run` without blocking the event loop; cancelling the task kills the command."""
        ...

    def start(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, limits: Limits | None = None) -> Handle:
        """Start a long-lived command. Its lifetime is unlimited unless `limits` says otherwise. Raises SandboxError."""
        ...

    def upload(self, path: str, data: bytes | str | Path) -> None:
        """Write a file of the working directory (a Path is copied), making its directories. Never follows a link."""
        ...

    def download(self, path: str, max_bytes: int = 64 * MEBIBYTE) -> bytes:
        """Read a file of the working directory. Raises SandboxError where absent, not a plain file, too large, or a link."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Sandbox: ...

    def __exit__(self, *exc: object) -> None: ...


class SandboxError(UserError):
    """An operation on a sandbox failed. `reason` is a word to act on: timeout, output, closed, absent, refused, unavailable."""

    def __init__(self, message: str, reason: str = "refused"):
        self.reason = reason
        super().__init__(message)


def require_programs(names: Sequence[str]) -> None:
    """Raises SandboxError("unavailable") that names the programs of the system that are missing."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise SandboxError(
            f"sandbox: {', '.join(missing)} not found; install bubblewrap and util-linux "
            "(Debian: apt-get install bubblewrap util-linux), or use the weaker process back end",
            "unavailable",
        )
