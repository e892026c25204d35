"""The container back end: docker or podman, for environments that need an image of their own.

A sandbox is one container without network and capabilities, with a read-only root and tmpfs for what is written; a run is
an exec in it. Only the engine's command line is used, so any engine that takes docker's arguments will do.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rorqual.sandbox import view
from rorqual.sandbox.job import Job, end, judge
from rorqual.sandbox.local import LocalSandbox
from rorqual.sandbox.protocol import MEBIBYTE, Ended, Limits, Result, SandboxConfig, SandboxError

ENGINES = ("docker", "podman")
ANSWER_S = 60.0
"""How long the engine may take to answer; making a container may fetch its image."""
USER = "1000:1000"
# Run by the image's /bin/sh: a line on standard error that only the owner knows says that the command began, and in which
# process group (the engine makes each exec the leader of one).
FIRST = 'printf "%s %s\\n" "$0" "$$" >&2; ulimit -c 0; ulimit -f "$1"; ulimit -n "$2"; shift 2; exec "$@"'


class OciSandbox(LocalSandbox):
    """A Sandbox in a container. Raises SandboxError("unavailable") where no engine answers, with what it said."""

    directory = view.HOME
    python = "python3"

    def __init__(self, config: SandboxConfig):
        super().__init__(config)
        self._engine = find_engine(config.engine)
        self._name = f"rorqual-{secrets.token_hex(8)}"
        answer = self._call("run", "--detach", "--rm", "--name", self._name, *self._options(), config.image, "sleep", "infinity")
        if answer.returncode:
            self._dispose()
            raise SandboxError(f"sandbox: {self._engine} made no container: {_said(answer)}", "unavailable")

    def _options(self) -> list[str]:
        limits, owner = self.config.limits, USER.partition(":")[0]
        options = [
            *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--user", USER, "--workdir", self.directory, "--pids-limit", str(limits.processes), "--init"),
            *("--memory", f"{limits.memory_mb}m", "--memory-swap", f"{limits.memory_mb}m", "--hostname", "sandbox"),
            *("--tmpfs", f"{self.directory}:size={limits.disk_mb}m,uid={owner},gid={owner},mode=0700,exec"),
            *("--tmpfs", f"/tmp:size={limits.disk_mb}m,mode=1777,exec"),
        ]
        for source, target in zip(self.config.packages, self._packages(), strict=True):
            options += ["--volume", f"{os.path.realpath(source)}:{target}:ro"]
        for bind in self.config.binds:
            options += ["--volume", f"{os.path.realpath(bind.source)}:{bind.target}" + ("" if bind.is_writable else ":ro")]
        return options

    def _packages(self) -> list[str]:
        return [f"{view.PACKAGES}/{i}" for i in range(len(self.config.packages))]

    def _launch(
        self, command: Sequence[str], env: Mapping[str, str] | None, limits: Limits, cancel: threading.Event | None
    ) -> _Exec:
        if not self._name:
            raise SandboxError("sandbox: it is closed", "closed")
        values = view.environment(self.directory, None, self._packages(), env)
        # The image knows its own search path.
        values.pop("PATH") if not (env and "PATH" in env) else None
        mark = secrets.token_hex(16)
        argv = [self._engine, "exec", "--interactive"]
        argv += [part for name, value in values.items() for part in ("--env", f"{name}={value}")]
        argv += [
            self._name,
            "/bin/sh",
            "-c",
            FIRST,
            mark,
            str(limits.file_mb * MEBIBYTE // 512),
            str(limits.open_files),
            *command,
        ]
        return _Exec(argv, mark, limits, self._kill_group, cancel)

    def _kill_group(self, group: int) -> None:
        """Kill what a command left in its group. What made a group of its own dies with the container."""
        self._call("exec", self._name, "/bin/sh", "-c", 'kill -s KILL -- "-$1"', "sh", str(group))

    def _write(self, path: str, data: bytes | str | Path) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, content, mode in _files(path, data):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), mode
                tar.addfile(member, io.BytesIO(content))
        self._checked("exec", "--interactive", self._name, "tar", "-x", "-f", "-", "-C", self.directory, stdin=archive.getvalue())

    def _read(self, path: str, max_bytes: int) -> bytes:
        _check_path(path)
        # One byte more than allowed shows that there is more; the test refuses links and what is no plain file.
        script = 'test ! -e "$1" && exit 44; test -f "$1" && test ! -L "$1" || exit 45; exec head -c "$2" "$1"'
        answer = self._call("exec", self._name, "/bin/sh", "-c", script, "sh", path, str(max_bytes + 1))
        if answer.returncode == 44:
            raise SandboxError(f"sandbox: no file {path}", "absent")
        if answer.returncode:
            raise SandboxError(f"sandbox: can't read {path}: not a plain file, or {_said(answer)}")
        if len(answer.stdout) > max_bytes:
            raise SandboxError(f"sandbox: {path} is larger than {max_bytes} bytes", "output")
        return answer.stdout

    def _checked(self, *arguments: str, stdin: bytes = b"") -> None:
        answer = self._call(*arguments, stdin=stdin)
        if answer.returncode:
            raise SandboxError(f"sandbox: {self._engine} {arguments[0]} failed: {_said(answer)}")

    def _call(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        if not self._name:
            raise SandboxError("sandbox: it is closed", "closed")
        try:
            return subprocess.run([self._engine, *arguments], input=stdin, capture_output=True, timeout=ANSWER_S)
        except subprocess.TimeoutExpired:
            raise SandboxError(
                f"sandbox: {self._engine} {arguments[0]} gave no answer in {ANSWER_S:g} s", "unavailable"
            ) from None

    def _dispose(self) -> None:
        if self._name:
            with contextlib.suppress(SandboxError):
                self._call("rm", "--force", self._name)
            self._name = ""


class _Exec:
    """One command in the container, running."""

    def __init__(
        self,
        argv: list[str],
        mark: str,
        limits: Limits,
        kill_group: Callable[[int], None],
        cancel: threading.Event | None,
    ):
        began = time.monotonic()
        self._mark, self._kill_group = re.compile(re.escape(mark.encode()) + rb" (\d+)\n"), kill_group
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._job = Job(self.process, limits, self.kill, None, cancel, began)

    def kill(self) -> None:
        self._kill_rest()
        end(self.process)

    def _kill_rest(self) -> None:
        if found := self._mark.search(self._job.outcome.stderr):
            with contextlib.suppress(SandboxError):
                self._kill_group(int(found[1]))

    def wait(self, stdin: bytes | None = b"", read_stdout: bool = True) -> Result:
        outcome = self._job.wait(stdin, read_stdout)
        self._kill_rest()
        if read_stdout:
            self._job.close_streams()
        is_started = self._mark.search(outcome.stderr) is not None
        outcome.stderr = bytearray(self._mark.sub(b"", bytes(outcome.stderr), count=1))
        result = judge(outcome, is_started, outcome.exit_code in (126, 127), 0, None)
        if result.ended is Ended.SPAWN_FAILED and not is_started:
            return Result(Ended.UNAVAILABLE, None, detail=result.detail, wall_s=result.wall_s)
        # The engine's client tells nothing of what its container used.
        return replace(result, cpu_s=None, peak_memory_bytes=None)


def find_engine(name: str | None) -> str:
    """The engine asked for, or the first that answers. Raises SandboxError with what each said."""
    said = []
    for engine in (name,) if name else ENGINES:
        if shutil.which(engine) is None:
            said.append(f"{engine} is not installed")
            continue
        try:
            answer = subprocess.run([engine, "version"], capture_output=True, timeout=10)
        except subprocess.TimeoutExpired:
            said.append(f"{engine} does not answer")
            continue
        if answer.returncode == 0:
            return engine
        said.append(f"{engine}: {_said(answer)}")
    raise SandboxError(
        f"sandbox: no container engine ({'; '.join(said)}); start its daemon or install podman, or use the bwrap back end",
        "unavailable",
    )


def _said(answer: subprocess.CompletedProcess[bytes]) -> str:
    lines = answer.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {answer.returncode}"


def _files(path: str, data: bytes | str | Path) -> list[tuple[str, bytes, int]]:
    """(name, content, mode) of what an upload consists of."""
    _check_path(path)
    if not isinstance(data, Path):
        return [(path, data.encode() if isinstance(data, str) else data, 0o644)]
    sources = sorted(source for source in data.rglob("*") if not source.is_dir()) if data.is_dir() else [data]
    found = []
    for source in sources:
        if source.is_symlink():
            raise SandboxError(f"sandbox: {source} is a link; upload what it points to")
        name = str(PurePosixPath(path) / source.relative_to(data).as_posix()) if data.is_dir() else path
        found.append((name, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644))
    return found


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise SandboxError(f"sandbox: {path!r} is not a path below the working directory")
