"""The weaker back end, for machines without namespaces: rlimits, Landlock and a system call filter; as root, a uid too.

What is missing against bubblewrap: the program shares the machine's process list, its clock of pids, its shared memory and
its name; the working directory is a plain directory whose total size only the sandbox's watch bounds; without the memory
cgroup, memory is bounded process by process and by sampling. `rorqual sandbox check --backend process` prints what holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from rorqual.sandbox import cgroup, landlock, seccomp, view
from rorqual.sandbox.job import Job, judge, memory_of_tree, rlimits
from rorqual.sandbox.local import LocalSandbox
from rorqual.sandbox.protocol import MEBIBYTE, Ended, Limits, Result, SandboxConfig, SandboxError
from rorqual.sandbox.uids import UidLease
from rorqual.sandbox.workspace import Tree

LAUNCHER = Path(__file__).with_name("launcher.py")
SYSTEM_PYTHON = "/usr/bin/python3"
READABLE = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/dev/zero", "/dev/urandom", "/dev/random", *view.SYSTEM_FILES)
WRITABLE = ("/dev/null",)
DISK_POLL_S = 0.1


class WeakSandboxWarning(UserWarning):
    """Programs run in a sandbox weaker than the default."""


class ProcessSandbox(LocalSandbox):
    """A Sandbox of rlimits and Landlock. Raises SandboxError("unavailable") on a kernel without Landlock."""

    def __init__(self, config: SandboxConfig):
        super().__init__(config)
        if not landlock.abi():
            raise SandboxError(
                "sandbox: this kernel has no Landlock (Linux 5.13 and later, switched on by lsm=landlock), "
                "without which the process back end confines no files; use bwrap or oci",
                "unavailable",
            )
        if config.binds:
            raise SandboxError("sandbox: the process back end can't show files at other places; use bwrap, or no binds")
        warnings.warn(
            "the process back end is weaker than bwrap: programs see the machine's processes and share its kernel objects; "
            "see rorqual sandbox check --backend process",
            WeakSandboxWarning,
            stacklevel=4,
        )
        self._lease = UidLease(*config.uids) if os.geteuid() == 0 else None
        self._root = Path(tempfile.mkdtemp(prefix="rorqual-sandbox-"))
        try:
            self.python = _reachable_python(private=self._lease is not None)
            self.directory = str(self._root / "box")
            for name in ("box", "tmp"):
                (self._root / name).mkdir(mode=0o700)
                if self.uid is not None:
                    os.chown(self._root / name, self.uid, self.uid)
            # The root itself stays ours: the program can't replace the directories that we open by name.
            self._root.chmod(0o711)
        except BaseException:
            self._dispose()
            raise

    @property
    def uid(self) -> int | None:
        return self._lease.uid if self._lease else None

    def outside(self) -> str:
        return self.directory

    def _tree(self) -> Tree:
        if not self._root.exists():
            raise SandboxError("sandbox: it is closed", "closed")
        return Tree(os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW), self.uid)

    def _write(self, path: str, data: bytes | str | Path) -> None:
        with contextlib.closing(self._tree()) as tree:
            tree.write(path, data)

    def _read(self, path: str, max_bytes: int) -> bytes:
        with contextlib.closing(self._tree()) as tree:
            return tree.read(path, max_bytes)

    def _dispose(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        if self._lease:
            self._lease.close()

    def _launch(
        self, command: Sequence[str], env: Mapping[str, str] | None, limits: Limits, cancel: threading.Event | None
    ) -> _Supervised:
        self._tree().close()
        if not command or any("\0" in part for part in command):
            raise SandboxError("sandbox: the command is empty, or holds a zero byte")
        packages = [os.path.realpath(path) for path in self.config.packages]
        values = view.environment(self.directory, None, packages, {"TMPDIR": str(self._root / "tmp"), **(env or {})})
        values["PATH"] = f"{os.path.dirname(self.python)}:{values['PATH']}"
        prefix = [] if self.python.startswith("/usr/") else [os.path.realpath(view.interpreter().source or "/usr")]
        plan = {
            "command": list(command),
            "env": values,
            "directory": self.directory,
            "uid": self.uid,
            "rlimits": _rlimits(limits, self.uid),
            "readable": [*READABLE, *prefix, *packages],
            "writable": [*WRITABLE, self.directory, str(self._root / "tmp")],
            "landlock": landlock.__file__,
            "filter": seccomp.program(is_alone=False).hex() if self.config.seccomp else "",
        }
        try:
            return _Supervised(plan, limits, self._root, self.config.limits.disk_mb, cancel)
        except OSError as error:
            raise SandboxError(f"sandbox: can't start the launcher: {error.strerror}", "busy") from None


class _Supervised:
    """One command under the launcher, running."""

    def __init__(self, plan: dict, limits: Limits, root: Path, disk_mb: int, cancel: threading.Event | None):
        began = time.monotonic()
        self._limits, self._root, self._disk_bytes = limits, root, disk_mb * MEBIBYTE
        self._group = cgroup.open_group(limits)
        self._sampled_bytes, self._next_look = 0, 0.0
        self._ending = threading.Lock()
        self._status, status_in = os.pipe()
        lifeline, self._lifeline = os.pipe()
        read, write = os.pipe()
        plan |= {"status": status_in, "lifeline": lifeline}
        try:
            self.process = self._start([read, status_in, lifeline])
        finally:
            for fd in (read, status_in, lifeline):
                os.close(fd)
        if self._group:
            with contextlib.suppress(OSError):
                self._group.add(self.process.pid)
        with os.fdopen(write, "w") as file:
            json.dump(plan, file)
        self._job = Job(self.process, limits, self.kill, self._sample, cancel, began)

    def _start(self, passed: list[int]) -> subprocess.Popen:
        return subprocess.Popen(
            [*(self._group.enter if self._group else []), view.interpreter().outside, "-I", "-S", str(LAUNCHER), str(passed[0])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=passed,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            start_new_session=True,
        )

    def kill(self) -> None:
        """Close the lifeline: the supervisor kills the command and all its descendants."""
        with self._ending:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1

    def wait(self, stdin: bytes | None = b"", read_stdout: bool = True) -> Result:
        try:
            outcome = self._job.wait(stdin, read_stdout)
            os.set_blocking(self._status, False)
            status = b""
            with contextlib.suppress(BlockingIOError):
                status = os.read(self._status, 100)
            peak = (self._group.peak_bytes() if self._group else None) or self._sampled_bytes or None
            oom_kills = self._group.oom_kills() if self._group else 0
            return judge(outcome, b"started" in status, b"missing" in status, oom_kills, peak)
        finally:
            self.kill()
            if read_stdout:
                self._job.close_streams()
            os.close(self._status)
            if self._group:
                self._group.close()

    def _sample(self) -> Ended | None:
        resident, peak = memory_of_tree(self.process.pid)
        self._sampled_bytes = max(self._sampled_bytes, peak)
        if resident > self._limits.memory_mb * MEBIBYTE:
            return Ended.MEMORY
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + DISK_POLL_S
            if _size_of(self._root) > self._disk_bytes:
                return Ended.DISK
        return None


def _rlimits(limits: Limits, uid: int | None) -> list[tuple[int, int, int]]:
    """Under our own uid the process limit counts our other processes too, so it is set that much higher."""
    import resource

    others = 0 if uid is not None else _threads_of(os.getuid())
    return [
        (kind, soft + others, hard + others) if kind == resource.RLIMIT_NPROC else (kind, soft, hard)
        for kind, soft, hard in rlimits(limits)
    ]


def _threads_of(uid: int) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == uid:
                count += len(os.listdir(path / "task"))
    return count


def _size_of(root: Path) -> int:
    """Bytes on disk below a directory, links not followed."""
    total, waiting = 0, [str(root)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def _reachable_python(private: bool) -> str:
    """The interpreter that a program inside can run: ours, or the system's where ours lies in a directory private to root."""
    ours = view.interpreter().outside
    if not private or all(parent.stat().st_mode & 0o001 for parent in Path(ours).parents):
        return ours
    if os.access(SYSTEM_PYTHON, os.X_OK):
        return os.path.realpath(SYSTEM_PYTHON)
    raise SandboxError(
        f"sandbox: {ours} lies in a directory that only root may enter, and there is no {SYSTEM_PYTHON}; "
        "install a system Python, or use the bwrap back end",
        "unavailable",
    )
