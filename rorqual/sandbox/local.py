"""What the back ends on this machine share: how a command is run, started, awaited, and files passed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from rorqual.sandbox.handle import PipedHandle, Running
from rorqual.sandbox.job import in_own_thread
from rorqual.sandbox.protocol import MEBIBYTE, Ended, Limits, Result, SandboxConfig, SandboxError


class LocalSandbox:
    """A Sandbox whose programs are children of this process. A back end adds how one is launched and where files lie."""

    directory: str
    python: str

    def __init__(self, config: SandboxConfig):
        self.config = config
        self._handles: list[PipedHandle] = []

    def _launch(
        self, command: Sequence[str], env: Mapping[str, str] | None, limits: Limits, cancel: threading.Event | None
    ) -> Running:
        """Start a command confined. Raises SandboxError where that fails."""
        raise NotImplementedError

    def _write(self, path: str, data: bytes | str | Path) -> None:
        raise NotImplementedError

    def _read(self, path: str, max_bytes: int) -> bytes:
        raise NotImplementedError

    def _dispose(self) -> None:
        """Give back what the sandbox holds; called at close, after everything in it was killed. May be called again."""
        raise NotImplementedError

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        try:
            running = self._launch(command, env, limits or self.config.limits, cancel)
        except (SandboxError, OSError) as error:
            return Result(Ended.SPAWN_FAILED, None, detail=str(error))
        return running.wait(data)

    async def run_async(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> Result:
        return await in_own_thread(lambda cancel: self.run(command, stdin=stdin, env=env, limits=limits, cancel=cancel))

    def start(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, limits: Limits | None = None) -> PipedHandle:
        limits = limits or self.config.limits.but(timeout_s=None)
        self._handles = [handle for handle in self._handles if handle.is_running]
        handle = PipedHandle(lambda: self._launch(command, env, limits, None), limits)
        self._handles.append(handle)
        return handle

    def upload(self, path: str, data: bytes | str | Path) -> None:
        self._write(path.removeprefix(self.directory + "/"), data)

    def download(self, path: str, max_bytes: int = 64 * MEBIBYTE) -> bytes:
        return self._read(path.removeprefix(self.directory + "/"), max_bytes)

    def close(self) -> None:
        for handle in self._handles:
            handle.close()
        self._handles = []
        self._dispose()

    def __enter__(self) -> LocalSandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
