"""A long-lived program in a sandbox, spoken to in lines."""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Protocol

from rorqual.sandbox.job import is_ready
from rorqual.sandbox.protocol import Limits, Result, SandboxError

CHUNK = 1 << 16
SEND_S = 30.0
"""How long a program may leave a line unread."""


class Running(Protocol):
    """A command that was launched: what a back end gives to whoever waits for it."""

    process: subprocess.Popen

    def wait(self, stdin: bytes | None = b"", read_stdout: bool = True) -> Result: ...

    def kill(self) -> None: ...


class PipedHandle:
    """A Handle over a launched command. Not for use by two threads at once.

    A thread of its own launches and watches the command: the kernel kills a sandbox when the *thread* that started it ends,
    and that must not be one that the caller's pool retires.
    """

    def __init__(self, launch: Callable[[], Running], limits: Limits):
        self._limits = limits
        self._buffer = bytearray()
        self._running: Running | None = None
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._is_launched = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(launch,), daemon=True, name="sandbox-handle")
        self._thread.start()
        self._is_launched.wait()
        if self._error:
            raise self._error
        for stream in (self._process.stdin, self._process.stdout):
            os.set_blocking(stream.fileno(), False)  # type: ignore[union-attr]

    def _watch(self, launch: Callable[[], Running]) -> None:
        try:
            self._running = launch()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._is_launched.set()
        self._result = self._running.wait(stdin=None, read_stdout=False)

    @property
    def _process(self) -> subprocess.Popen:
        assert self._running is not None
        return self._running.process

    @property
    def is_running(self) -> bool:
        return self._result is None and self._thread.is_alive()

    def send(self, line: str) -> None:
        if "\n" in line:
            raise SandboxError("sandbox: a line to send holds a newline")
        data, deadline = memoryview(line.encode() + b"\n"), time.monotonic() + SEND_S
        fd = self._process.stdin.fileno()  # type: ignore[union-attr]
        while data:
            if not is_ready(fd, select.POLLOUT, deadline - time.monotonic()):
                raise SandboxError(f"sandbox: the program read no input for {SEND_S:g} s", "timeout")
            try:
                data = data[os.write(fd, data[:CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._gone() from None

    def receive(self, timeout_s: float | None = None) -> str:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._limits.output_bytes:
                raise SandboxError(f"sandbox: the program wrote a line of more than {self._limits.output_bytes} bytes", "output")
            self._buffer += self._read(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line.decode("utf-8", "replace")

    def _read(self, deadline: float | None) -> bytes:
        fd = self._process.stdout.fileno()  # type: ignore[union-attr]
        if not is_ready(fd, select.POLLIN, None if deadline is None else deadline - time.monotonic()):
            raise SandboxError("sandbox: the program did not answer in time", "timeout")
        data = os.read(fd, CHUNK)
        if not data:
            raise self._gone()
        return data

    def _gone(self) -> SandboxError:
        self._thread.join(10)
        result = self._result
        why = (
            f"{result.ended}, exit code {result.exit_code}: {result.stderr[-500:].strip()}" if result else "it closed its output"
        )
        return SandboxError(f"sandbox: the program is gone ({why})", "closed")

    def ask(self, line: str, timeout_s: float | None = None) -> str:
        self.send(line)
        return self.receive(timeout_s)

    def close(self) -> Result:
        """Kill all its processes and say what came of it."""
        if self._running and self.is_running:
            self._running.kill()
        self._thread.join()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()  # type: ignore[union-attr]
        assert self._result is not None
        return self._result

    def __enter__(self) -> PipedHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
