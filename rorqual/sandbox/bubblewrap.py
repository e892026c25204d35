"""The default back end: bubblewrap, under a uid of its own, with no network, no capabilities and a system call filter.

As root: the mounts are made by root, and the first program inside drops to the sandbox's own uid, which nothing else on the
machine has, before anything untrusted runs. So a process limit binds (it does not bind root), signals and /proc reach no
one, and an interpreter below a private home can still be shown. As another user: a user namespace does the same, with
that user's uid behind it.

Life of a run: pipes are made; bubblewrap starts in the workspace's mount namespace and waits; the limits and the control
group are set on its child from outside, where the child can't refuse them; it is released. The child is pid 1 of its own
pid namespace, so when it is gone, all are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox import cgroup, seccomp, view
from rorqual.sandbox.job import Job, Outcome, end, is_ready, judge, memory_of_tree, rlimits
from rorqual.sandbox.local import LocalSandbox
from rorqual.sandbox.protocol import MEBIBYTE, Ended, Limits, Result, SandboxConfig, SandboxError, require_programs
from rorqual.sandbox.uids import UidLease
from rorqual.sandbox.workspace import Workspace

PROGRAMS = ("bwrap", "setpriv", "nsenter", "unshare")
LOWEST_FD = 10
SET_UP_S = 20.0
"""How long bubblewrap may take to be ready; only a machine out of memory or processes comes near."""
USER_UID = "1000"

# Pid 1 of a sandbox, run by /bin/sh: takes the status pipe, which comes as its standard input, out of the program's reach;
# says on it that the set-up held; runs the rest and ends with its exit code, and the whole sandbox with it. As root it still
# is root, without the rights that make root matter but those that the drop needs: so bubblewrap may kill it when our own
# process dies, and the program can't touch it. Its own remarks ("Killed") are dropped. $1: the descriptor of the program's
# standard input.
FIRST = """
exec 9>&0 0<"/proc/self/fd/$1" 8>&2 2>/dev/null; shift
echo started >&9
("$@" 2>&8 8>&-); exit $?
"""
# Under the sandbox's own uid: the environment is taken over only here, so that it reaches no program with rights left.
# $1: the working directory, $2: how many variables follow.
SECOND = """
cd "$1" || exit 1; n=$2; shift 2
while [ "$n" -gt 0 ]; do export "$1"; shift; n=$((n-1)); done
command -v "$1" >/dev/null 2>&1 || echo missing >&9
exec "$@" 9>&-
"""
DROP = ["--inh-caps", "-all", "--ambient-caps", "-all", "--bounding-set", "-all", "--clear-groups", "--no-new-privs"]


@dataclass(frozen=True)
class Plan:
    """A command line in two parts: bubblewrap's arguments, and what pid 1 inside is to run."""

    outer: list[str]
    inner: list[str]
    is_filtered: bool


class BubblewrapSandbox(LocalSandbox):
    """A Sandbox held by bubblewrap. Raises SandboxError("unavailable") where this machine can make none."""

    directory = view.HOME

    def __init__(self, config: SandboxConfig):
        require_programs(PROGRAMS)
        super().__init__(config)
        self._workspace: Workspace | None = None
        self.python = view.interpreter().path
        self._is_root = os.geteuid() == 0
        self._lease = UidLease(*config.uids) if self._is_root else None
        try:
            self._workspace = Workspace(config.limits.disk_mb, self.uid)
        except BaseException:
            self._release()
            raise

    @property
    def uid(self) -> int | None:
        """The sandbox's own uid on the machine; None where it runs under the caller's, in a user namespace."""
        return self._lease.uid if self._lease else None

    def outside(self) -> str:
        """The working directory's path as this process sees it. What lies there is not trusted: it may hold links."""
        return self._open_workspace().outside()

    def _write(self, path: str, data: bytes | str | Path) -> None:
        self._open_workspace().write(path, data)

    def _read(self, path: str, max_bytes: int) -> bytes:
        return self._open_workspace().read(path, max_bytes)

    def _dispose(self) -> None:
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None
        self._release()

    def _release(self) -> None:
        if self._lease:
            self._lease.close()

    def _open_workspace(self) -> Workspace:
        if self._workspace is None:
            raise SandboxError("sandbox: it is closed", "closed")
        return self._workspace

    def _launch(
        self, command: Sequence[str], env: Mapping[str, str] | None, limits: Limits, cancel: threading.Event | None
    ) -> _Launched:
        if not command or any("\0" in part for part in command):
            raise SandboxError("sandbox: the command is empty, or holds a zero byte")
        values = view.environment(self.directory, self._python_home(), self._packages(), env)
        second = ["/bin/sh", "-c", SECOND, "sh", self.directory, str(len(values))]
        inner = [*self._drop(), *second, *(f"{name}={value}" for name, value in values.items()), *command]
        return _Launched(Plan(self._outer(), inner, self.config.seccomp), limits, cancel)

    def _python_home(self) -> str | None:
        return view.PYTHON_HOME if view.interpreter().source else None

    def _packages(self) -> list[str]:
        return [f"{view.PACKAGES}/{i}" for i in range(len(self.config.packages))]

    def _drop(self) -> list[str]:
        """The step from root to the sandbox's uid."""
        if not self._is_root:
            return []
        return ["/usr/bin/setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), *DROP, "--"]

    def _outer(self) -> list[str]:
        """The command line up to bubblewrap's own arguments for a single run."""
        workspace = self._open_workspace()
        arguments = [*workspace.enter, "bwrap", "--as-pid-1", "--new-session", "--die-with-parent", "--clearenv"]
        arguments += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        arguments += ["--hostname", "sandbox", "--cap-drop", "ALL"]
        if self._is_root:
            arguments += [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
        else:
            arguments += ["--unshare-user", "--uid", USER_UID, "--gid", USER_UID]
        targets = [
            view.PYTHON_HOME,
            *self._packages(),
            *view.SYSTEM_FILES,
            "/var/tmp",
            *(bind.target for bind in self.config.binds),
        ]
        arguments += [*view.directory_arguments(targets), *view.system_arguments(), "--proc", "/proc", "--dev", "/dev"]
        for name, target in (("box", self.directory), ("tmp", "/tmp"), ("shm", "/dev/shm")):
            arguments += ["--bind", workspace.source(name), target]
        arguments += ["--ro-bind", workspace.source("hosts"), "/etc/hosts", "--symlink", "/tmp", "/var/tmp"]
        for source, target in zip(self.config.packages, self._packages(), strict=True):
            arguments += ["--ro-bind", os.path.realpath(source), target]
        for bind in self.config.binds:
            arguments += ["--bind" if bind.is_writable else "--ro-bind", os.path.realpath(bind.source), bind.target]
        # In a user namespace the owner could else fill these two, which are file systems in memory without a size.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
        return arguments


class _Launched:
    """One command in bubblewrap, running. Raises SandboxError where bubblewrap could not be started."""

    def __init__(self, plan: Plan, limits: Limits, cancel: threading.Event | None):
        began = time.monotonic()
        self._limits = limits
        self._ending, self._is_over = threading.Lock(), False
        self._init: int | None = None
        self._status: int | None = None
        self._init_pid = 0
        self._sampled_bytes = 0
        self._group = cgroup.open_group(limits)
        try:
            self._status = self._spawn(plan)
            is_counted = self._group is not None and self._group.peak_bytes() is not None
            self._job = Job(self.process, limits, self.kill, None if is_counted else self._sample, cancel, began)
        except OSError as error:
            self._abandon()
            raise SandboxError(f"sandbox: no more descriptors or processes to start one with: {error.strerror}", "busy") from None
        except BaseException:
            self._abandon()
            raise

    def _spawn(self, plan: Plan) -> int:
        """Start bubblewrap, set the limits while it waits, release it. Returns the read end of the status pipe."""
        with contextlib.ExitStack() as stack:
            status, status_in = _pipe(stack)
            stdin, feed = _pipe(stack)
            info, info_in = _pipe(stack)
            held, release = _pipe(stack)
            passed = [stdin, info_in, held]
            extra = ["--info-fd", str(info_in), "--block-fd", str(held)]
            if plan.is_filtered:
                passed.append(_filled_pipe(stack, seccomp.program()))
                extra += ["--seccomp", str(passed[-1])]
            group = self._group.enter if self._group else []
            argv = [*group, *plan.outer, *extra, "--", "/bin/sh", "-c", FIRST, "sh", str(stdin), *plan.inner]
            self.process = _popen(argv, status_in, passed)
            self.process.stdin = os.fdopen(os.dup(feed), "wb", buffering=0)
            os.set_blocking(info, False)
            pid = _child_pid(info, self.process)
            if pid is not None:
                self._confine(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(release, b"x")
            return os.dup(status)

    def _abandon(self) -> None:
        """After a start that failed half-way: what was started is killed, what was opened is closed."""
        if process := getattr(self, "process", None):
            self.kill()
            end(process)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        for fd in (self._init, self._status):
            if fd is not None:
                os.close(fd)
        self._close_group()

    def _confine(self, pid: int) -> None:
        """Set the limits on bubblewrap's child, the later pid 1 of the sandbox, which waits for us."""
        self._init_pid, self._init = pid, os.pidfd_open(pid)
        try:
            for kind, soft, hard in rlimits(self._limits):
                resource.prlimit(pid, kind, (soft, hard))
            if self._group:
                self._group.add(pid)
        except OSError:
            # Never released, it is killed; the wait then finds that nothing was started.
            self.kill()

    def kill(self) -> None:
        """Kill pid 1 of the sandbox: the kernel kills all others with it, and bubblewrap reports that it is gone."""
        with self._ending:
            if self._is_over:
                return
            if self._init is None:
                end(self.process)
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)

    def wait(self, stdin: bytes | None = b"", read_stdout: bool = True) -> Result:
        status = self._status
        assert status is not None
        try:
            outcome = self._job.wait(stdin, read_stdout)
            os.set_blocking(status, False)
            return self._result(outcome, _read_available(status))
        finally:
            with self._ending:
                self._is_over = True
                os.close(status)
                if self._init is not None:
                    os.close(self._init)
            if read_stdout:
                self._job.close_streams()
            self._close_group()

    def _result(self, outcome: Outcome, status: bytes) -> Result:
        oom_kills = self._group.oom_kills() if self._group else 0
        peak = (self._group.peak_bytes() if self._group else None) or self._sampled_bytes or None
        return judge(outcome, b"started" in status, b"missing" in status, oom_kills, peak)

    def _sample(self) -> Ended | None:
        """Where no control group counts: the largest process so far, and the verdict where all together are too large."""
        resident, peak = memory_of_tree(self._init_pid)
        self._sampled_bytes = max(self._sampled_bytes, peak)
        return Ended.MEMORY if resident > self._limits.memory_mb * MEBIBYTE else None

    def _close_group(self) -> None:
        if self._group:
            self._group.close()
            self._group = None


def _popen(argv: list[str], stdin: int, passed: list[int]) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=passed,
            # bubblewrap itself runs with our rights: nothing that was given for the program may reach it.
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"sandbox: can't start bubblewrap: {error.strerror} (is the command very long?)") from None


def _child_pid(info: int, process: subprocess.Popen) -> int | None:
    """The pid of bubblewrap's child, from its own report; None where it failed before."""
    text, deadline = b"", time.monotonic() + SET_UP_S
    while b"}" not in text and time.monotonic() < deadline:
        is_ready(info, select.POLLIN, 0.02)
        text += _read_available(info)
        if b"}" not in text and process_is_gone(process.pid):
            return None
    return json.loads(text)["child-pid"] if b"}" in text else None


def process_is_gone(pid: int) -> bool:
    """Whether a child of ours has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Both ends at descriptors above 9: FIRST takes 8 and 9 for itself, and what stood there would be lost."""
    low = os.pipe()
    try:
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LOWEST_FD) for fd in low)
    finally:
        for fd in low:
            os.close(fd)
    for fd in (read, write):
        stack.callback(os.close, fd)
    return read, write


def _filled_pipe(stack: contextlib.ExitStack, data: bytes) -> int:
    """The read end of a pipe that holds the data; a pipe takes 64 KB at least."""
    read, write = _pipe(stack)
    os.write(write, data)
    return read


def _read_available(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""
