"""Runs the panel of escape attempts against a back end, and looks from outside whether each barrier held."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import secrets
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox import open_sandbox, seccomp
from rorqual.sandbox.attempts import ATTEMPTS, END, PRELUDE, Attempt
from rorqual.sandbox.protocol import Ended, Limits, Result, Sandbox, SandboxConfig, SandboxError

LIMITS = Limits(timeout_s=2, memory_mb=96, processes=24, open_files=64, file_mb=8, disk_mb=16, output_bytes=1 << 16, cpu_s=4)
SLACK_S = 2.5
"""How much later than its limit a run may end on a busy machine."""


@dataclass(frozen=True)
class Finding:
    """What came of one attempt. `why`: what was seen where the barrier did not hold."""

    name: str
    barrier: str
    holds: bool
    ended: str
    wall_s: float
    why: str = ""


class Stage:
    """What lies outside for the attempts to reach: a secret, a writable directory, listening sockets, a process."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.secret = secrets.token_hex(16)
        self.mark = "rorqual" + secrets.token_hex(4)
        self.shm_key = secrets.randbelow(1 << 30) + 1
        self.hostname = socket.gethostname()
        # In the machine's own /tmp, wherever TMPDIR points: the sandbox has another.
        self.directory = Path(tempfile.mkdtemp(prefix="rorqual-stage-", dir="/tmp"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.open_directory = self.directory / "open"
        self.open_directory.mkdir()
        self.directory.chmod(0o755)
        self.open_directory.chmod(0o777)
        self._reset_files()
        self.listeners = self._listen()
        self._start_victim()

    def _reset_files(self) -> None:
        (self.directory / "secret").write_text(self.secret)
        for path in self.open_directory.iterdir():
            path.unlink()
        (self.open_directory / "bystander").write_text("here")

    def _listen(self) -> dict[str, socket.socket]:
        kinds = {
            "TCP4": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "TCP6": (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
            "UDP4": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "UDP6": (socket.AF_INET6, socket.SOCK_DGRAM, ("::1", 0)),
            "ABSTRACT": (socket.AF_UNIX, socket.SOCK_STREAM, b"\0" + self.mark.encode()),
            "UNIX_PATH": (socket.AF_UNIX, socket.SOCK_STREAM, str(self.directory / "socket")),
        }
        found = {}
        for name, (family, kind, address) in kinds.items():
            with contextlib.suppress(OSError):  # a machine without IPv6
                listener = self._stack.enter_context(socket.socket(family, kind))
                listener.bind(address)
                if kind == socket.SOCK_STREAM:
                    listener.listen(64)
                found[name] = listener
        (self.directory / "socket").chmod(0o777)
        return found

    def _start_victim(self) -> None:
        self._victim = subprocess.Popen(
            ["sleep", "3600"], env={**os.environ, "SECRET": self.secret}, start_new_session=True, stdin=subprocess.DEVNULL
        )

    def facts(self, limits: Limits) -> dict[str, object]:
        ports = {name: s.getsockname()[1] if s.family != socket.AF_UNIX else 0 for name, s in self.listeners.items()}
        return {
            **{name: ports.get(name, 9) for name in ("TCP4", "TCP6", "UDP4", "UDP6")},
            "ABSTRACT": self.mark.encode(),
            "UNIX_PATH": str(self.directory / "socket"),
            "SECRET_FILE": str(self.directory / "secret"),
            "OPEN_DIRECTORY": str(self.open_directory),
            "OWNER_HOME": str(Path.home()),
            "VICTIM": self._victim.pid,
            "MARK": self.mark,
            "SHM_KEY": self.shm_key,
            "LIMITS": dataclasses.asdict(limits),
            "NUMBERS": system_call_numbers(),
        }

    def close(self) -> None:
        self._victim.kill()
        self._victim.wait()
        self._stack.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Looks. Each says what it saw where the barrier did not hold, and puts things back; "" where it held.

    def received(self, result: Result, sandbox: Sandbox) -> str:
        ready, _, _ = select.select(list(self.listeners.values()), [], [], 0)
        for listener in ready:
            listener.accept()[0].close() if listener.type == socket.SOCK_STREAM else listener.recv(100)
        return "a socket outside was reached" if ready else ""

    def secret_out(self, result: Result, sandbox: Sandbox) -> str:
        return "the secret came out" if self.secret in result.stdout + result.stderr else ""

    def planted(self, result: Result, sandbox: Sandbox) -> str:
        names = sorted(path.name for path in self.open_directory.iterdir())
        self._reset_files()
        return "" if names == ["bystander"] else f"the directory outside holds {names}"

    def downloaded(self, result: Result, sandbox: Sandbox) -> str:
        began = time.monotonic()
        try:
            data = sandbox.download("loot")
        except SandboxError:
            data = b""
        if time.monotonic() - began > 1:
            return "the owner hung on reading"
        return "the owner read the secret" if self.secret.encode() in data else ""

    def uploaded(self, result: Result, sandbox: Sandbox) -> str:
        with contextlib.suppress(SandboxError):
            sandbox.upload("drop/planted", b"x")
        return self.planted(result, sandbox)

    def victim(self, result: Result, sandbox: Sandbox) -> str:
        if self._victim.poll() is None:
            return ""
        self._start_victim()
        return "the process outside was killed"

    def stragglers(self, result: Result, sandbox: Sandbox) -> str:
        left = [pid for pid, line in command_lines() if f"sleep-{self.mark}" in line]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        return f"{len(left)} processes stayed behind" if left else ""

    def shared_memory(self, result: Result, sandbox: Sandbox) -> str:
        libc = ctypes.CDLL(None)
        segment = libc.shmget(self.shm_key, 0, 0)
        if segment < 0:
            return ""
        libc.shmctl(segment, 0, None)
        return "a shared memory segment stayed behind"

    def machine_name(self, result: Result, sandbox: Sandbox) -> str:
        return "" if socket.gethostname() == self.hostname else "the machine has another name"

    def ended_in_time(self, result: Result, sandbox: Sandbox) -> str:
        return "" if result.wall_s < (LIMITS.timeout_s or 0) + SLACK_S else f"it ended only after {result.wall_s:.1f} s"

    def output_bounded(self, result: Result, sandbox: Sandbox) -> str:
        if max(len(result.stdout_bytes), len(result.stderr_bytes)) > LIMITS.output_bytes:
            return "more output than allowed came out"
        return "" if result.ended is Ended.OUTPUT else f"it ended as {result.ended}"


def system_call_numbers() -> dict[str, int | None]:
    column = seccomp.ARCHITECTURES[os.uname().machine][1]
    return {name: pair[column] for name, pair in {**seccomp.REFUSED, **seccomp.JUDGED}.items()}


def command_lines() -> Iterator[tuple[int, str]]:
    """The processes of the machine: (pid, command line)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_text(errors="replace")


def run_panel(config: SandboxConfig, attempts: Iterable[Attempt] = ATTEMPTS) -> Iterator[Finding]:
    """Make each attempt in a fresh sandbox of this configuration, whose limits are replaced by the panel's small ones."""
    config = dataclasses.replace(config, limits=LIMITS)
    with Stage() as stage:
        for attempt in attempts:
            yield make_attempt(attempt, stage, config)


def make_attempt(attempt: Attempt, stage: Stage, config: SandboxConfig) -> Finding:
    facts = "".join(f"{name} = {value!r}\n" for name, value in stage.facts(config.limits).items())
    with open_sandbox(config) as sandbox:
        sandbox.upload("attempt.py", facts + PRELUDE + attempt.program + END)
        result = sandbox.run([sandbox.python, "-I", "attempt.py"])
        seen = getattr(stage, attempt.witness)(result, sandbox) if attempt.witness else ""
    why = seen or ("the program says so" if "BROKEN" in result.stdout else "") or stage.secret_out(result, sandbox)
    if result.ended in (Ended.SPAWN_FAILED, Ended.UNAVAILABLE):
        why = f"the attempt could not be made: {result.detail}"
    return Finding(attempt.name, attempt.barrier, not why, str(result.ended), round(result.wall_s, 3), why)
