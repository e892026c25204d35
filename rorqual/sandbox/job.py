"""One child process watched to its end: its output bounded, its deadline kept, its usage told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.sandbox.protocol import MEBIBYTE, Ended, Limits, Result

CHUNK = 1 << 16
POLL_S = 0.05
"""How often a wait looks up: for cancellation, and to sample memory where there is no cgroup."""
GRACE_S = 5.0
"""How long a killed process may take to be gone before its outermost process is killed itself."""


@dataclass
class Outcome:
    """What the watch saw; the back end makes a Result of it."""

    stopped: Ended | None = None
    """Why the watch killed it; None where it ended by itself."""
    exit_code: int = 0
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Job:
    """Watches a process: `wait` pumps its pipes until it is gone. One thread calls wait; any may set cancel.

    kill: ends all that belongs to the process. sample: called while waiting, every POLL_S at least; where it
    gives a verdict, that is why everything is killed.
    Streams that are None were not piped (a Handle reads standard output itself).
    """

    def __init__(
        self,
        process: subprocess.Popen,
        limits: Limits,
        kill: Callable[[], None],
        sample: Callable[[], Ended | None] | None = None,
        cancel: threading.Event | None = None,
        began: float | None = None,
    ):
        self.process, self.limits, self.kill, self.sample = process, limits, kill, sample
        self.cancel = cancel or threading.Event()
        self.began = time.monotonic() if began is None else began
        self.outcome = Outcome()
        self._killed_at: float | None = None
        self._is_rolling = False
        # Taken now, so that a machine out of descriptors fails the start and not the wait.
        self._selector = selectors.DefaultSelector()
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError:
            self._selector.close()
            raise

    def wait(self, stdin: bytes | None = b"", read_stdout: bool = True) -> Outcome:
        """Pump until the process is gone. stdin None leaves that pipe to another.

        read_stdout False does so too, for a server; its standard error may then be of any length, and the end of it is kept.
        """
        self._is_rolling = not read_stdout
        try:
            self._selector.register(self._pidfd, selectors.EVENT_READ)
            self._register(self._selector, stdin, read_stdout)
            while not self._step(self._selector, self._pidfd):
                pass
        finally:
            self._selector.close()
            os.close(self._pidfd)
        self._reap()
        return self.outcome

    def _register(self, selector: selectors.BaseSelector, stdin: bytes | None, read_stdout: bool) -> None:
        sinks = [(self.process.stderr, self.outcome.stderr)]
        if read_stdout:
            sinks.append((self.process.stdout, self.outcome.stdout))
        for stream, sink in sinks:
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, sink)
        if stdin is None or self.process.stdin is None:
            return
        if stdin:
            os.set_blocking(self.process.stdin.fileno(), False)
            selector.register(self.process.stdin, selectors.EVENT_WRITE, [memoryview(stdin)])
        else:
            self.process.stdin.close()

    def _step(self, selector: selectors.BaseSelector, pidfd: int) -> bool:
        """One round of waiting. True when the process is gone and what it wrote is read."""
        self._look_up()
        is_gone = False
        for key, _ in selector.select(self._patience()):
            if key.fd == pidfd:
                is_gone = True
            elif isinstance(key.data, list):
                self._feed(selector, key)
            else:
                self._drain(selector, key)
        if is_gone:
            self._drain_rest(selector)
        return is_gone

    def _patience(self) -> float:
        if self._killed_at is not None or self.limits.timeout_s is None:
            return POLL_S
        return max(0.0, min(POLL_S, self.began + self.limits.timeout_s - time.monotonic()))

    def _look_up(self) -> None:
        now = time.monotonic()
        if self._killed_at is not None:
            if now - self._killed_at > GRACE_S:
                end(self.process)
            return
        if self.sample and (verdict := self.sample()):
            self._stop(verdict)
        elif self.cancel.is_set():
            self._stop(Ended.CANCELLED)
        elif self.limits.timeout_s is not None and now - self.began >= self.limits.timeout_s:
            self._stop(Ended.TIMEOUT)

    def _stop(self, why: Ended) -> None:
        if self._killed_at is None:
            self.outcome.stopped, self._killed_at = why, time.monotonic()
            self.kill()

    def _feed(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        """Write to standard input what it takes now; close it at the end, or where nobody reads."""
        try:
            key.data[0] = key.data[0][os.write(key.fd, key.data[0][:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            key.data[0] = memoryview(b"")
        if not key.data[0]:
            selector.unregister(key.fileobj)
            with contextlib.suppress(OSError):
                self.process.stdin.close()  # type: ignore[union-attr]

    def _drain(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> bool:
        """Read once into the bounded sink. False at the end of the stream, or where nothing is there now."""
        try:
            data = os.read(key.fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            selector.unregister(key.fileobj)
            return False
        sink: bytearray = key.data
        if self._is_rolling:
            sink += data
            del sink[: max(0, len(sink) - self.limits.output_bytes)]
            return True
        room = self.limits.output_bytes - len(sink)
        sink += data[:room]
        if len(data) > room:
            self._stop(Ended.OUTPUT)
            return False
        return True

    def _drain_rest(self, selector: selectors.BaseSelector) -> None:
        """What stands in the pipes when the process is gone; a survivor that still holds one is not waited for."""
        for key in list(selector.get_map().values()):
            if isinstance(key.data, bytearray):
                while self._drain(selector, key):
                    pass

    def _reap(self) -> None:
        _, status, usage = os.wait4(self.process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code
        self.outcome.exit_code = 128 - code if code < 0 else code
        self.outcome.wall_s = time.monotonic() - self.began
        self.outcome.cpu_s = usage.ru_utime + usage.ru_stime

    def close_streams(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def is_ready(fd: int, event: int, timeout_s: float | None) -> bool:
    """Wait for select.POLLIN or POLLOUT of a descriptor, however high its number; an end or an error counts as ready."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(None if timeout_s is None else 1000 * max(0.0, timeout_s)))


def end(process: subprocess.Popen) -> None:
    """Kill a process that is not reaped yet. Popen's own kill may reap it, and its usage would be lost."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def rlimits(limits: Limits) -> list[tuple[int, int, int]]:
    """The kernel's limits on each process: (which, soft, hard). The process count binds for others than root only."""
    plain = {
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.file_mb * MEBIBYTE,
        resource.RLIMIT_AS: limits.address_space_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    found = [(kind, value, value) for kind, value in plain.items() if value is not None]
    if limits.cpu_seconds is not None:
        # At the soft limit comes SIGXCPU, whose name tells why; who catches it is killed a second later.
        found.append((resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1))
    return found


def judge(outcome: Outcome, is_started: bool, is_missing: bool, oom_kills: int, peak_bytes: int | None) -> Result:
    """Name why a run ended, from what was seen of it."""
    code, stderr = outcome.exit_code, bytes(outcome.stderr)
    ended, detail = Ended.EXITED, ""
    if outcome.stopped:
        ended = outcome.stopped
    elif not is_started:
        ended, detail = Ended.SPAWN_FAILED, stderr.decode(errors="replace").strip() or f"exit code {code} before it began"
    elif is_missing:
        ended, detail = Ended.SPAWN_FAILED, "the command was not found in the sandbox, or is not executable"
    elif code and oom_kills:
        ended, detail = Ended.MEMORY, "the kernel killed a process for memory"
    elif code == 128 + signal.SIGXCPU:
        ended = Ended.CPU
    elif code > 128 and code - 128 in list(signal.Signals):
        ended = Ended.KILLED
    elif code and stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
        ended, detail = Ended.MEMORY, "Python could allocate no more"
    return Result(
        ended,
        None if ended is Ended.SPAWN_FAILED or outcome.stopped else code,
        bytes(outcome.stdout),
        stderr,
        outcome.wall_s,
        outcome.cpu_s,
        peak_bytes,
        detail,
    )


def memory_of_tree(pid: int) -> tuple[int, int]:
    """Of a process and its descendants, in bytes: the sum of resident sizes, and the largest peak of a single one."""
    resident, peak, waiting = 0, 0, [pid]
    while waiting:
        at = waiting.pop()
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{at}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
                elif line.startswith("VmRSS:"):
                    resident += int(line.split()[1]) * 1024
            waiting += map(int, Path(f"/proc/{at}/task/{at}/children").read_text().split())
    return resident, peak


async def in_own_thread(run: Callable[[threading.Event], Result]) -> Result:
    """A blocking run without blocking the event loop: in a thread of its own, so that any number can wait at once.

    Cancelling the waiting task sets the event that the run was given, and waits until everything is killed.
    """
    loop, cancel = asyncio.get_running_loop(), threading.Event()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result = error = None
        try:
            result = run(cancel)
        except BaseException as caught:
            error = caught
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=body, daemon=True, name="sandbox-run").start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel.set()
        await future
        raise
