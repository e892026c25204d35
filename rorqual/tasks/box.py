"""Where a host or a judge runs, and how it is spoken to: a request in, a reply out, failures by name.

`isolation` names the place: `inline` is this very process (for programs that this package itself generated, and for tests);
any other word is a back end of `rorqual.sandbox`, which runs the script confined, with no network and bounded memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rorqual.errors import FieldErrors, UserError
from rorqual.tasks import host, judge

Call = Callable[[str, Any], Any]
HERE = Path(__file__).parent
MAX_LINE_BYTES = 32 << 20


class BoxError(UserError):
    """A host or a judge did not answer. `reason`: timeout, closed, output, failure (it refused the request), unavailable."""

    def __init__(self, message: str, reason: str):
        self.reason = reason
        super().__init__(message)


class Box(Protocol):
    """A host (holds the database) or a judge (holds none)."""

    def ask(self, request: dict[str, Any], timeout_s: float = 10.0, call: Call | None = None) -> dict[str, Any]:
        """The reply to one request; `call` answers the calls that a solution makes meanwhile. Raises BoxError."""
        ...

    def close(self) -> None: ...


class InlineHost:
    """A host in this process. Fast, and no boundary at all."""

    def __init__(self) -> None:
        self._host = host.Host()

    def ask(self, request: dict[str, Any], timeout_s: float = 10.0, call: Call | None = None) -> dict[str, Any]:
        return _answer(self._host, request)

    def close(self) -> None:
        if hasattr(self._host, "db"):
            self._host.db.close()


class InlineJudge:
    """A judge in this process. Fast, and no boundary at all."""

    def __init__(self) -> None:
        self._judge = judge.Judge(self._forward)
        self._call: Call | None = None

    def _forward(self, name: str, arguments: Any) -> Any:
        assert self._call is not None
        return self._call(name, arguments)

    def ask(self, request: dict[str, Any], timeout_s: float = 10.0, call: Call | None = None) -> dict[str, Any]:
        self._call = call
        return _answer(self._judge, request)

    def close(self) -> None:
        pass


def _answer(handler: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return handler.handle(request)
    except Exception as error:
        raise BoxError(f"{request['op']}: {type(error).__name__}: {error}", "failure") from error


class ConfinedBox:
    """A host or judge script in a sandbox of its own, spoken to over its standard streams."""

    def __init__(self, script: str, isolation: str, memory_mb: int = 256, packages: tuple[str, ...] = ()):
        from rorqual.sandbox import Limits, SandboxError, create

        limits = Limits(timeout_s=None, cpu_s=3600.0, memory_mb=memory_mb, processes=8, file_mb=8, disk_mb=16)
        try:
            self._sandbox = create(isolation, limits=limits.but(output_bytes=MAX_LINE_BYTES), packages=packages)
            self._sandbox.upload(script, (HERE / script).read_bytes())
            self._handle = self._sandbox.start([self._sandbox.python, *(() if packages else ("-I", "-S")), script])
        except (SandboxError, FieldErrors) as error:
            raise BoxError(f"sandbox {isolation}: {error}", "unavailable") from error

    def ask(self, request: dict[str, Any], timeout_s: float = 10.0, call: Call | None = None) -> dict[str, Any]:
        reply = self._exchange(request, timeout_s)
        while "call" in reply:
            if call is None:
                raise BoxError("a call where none is allowed", "failure")
            reply = self._exchange(call(reply["call"], reply["arguments"]), timeout_s)
        if "failure" in reply and len(reply) == 1 and request["op"] != "solve":
            raise BoxError(f"{request['op']}: {reply['failure']}", "failure")
        return reply

    def _exchange(self, message: Any, timeout_s: float) -> dict[str, Any]:
        from rorqual.sandbox import SandboxError

        try:
            line = self._handle.ask(json.dumps(message, ensure_ascii=False), timeout_s)
        except SandboxError as error:
            reason = error.reason if error.reason in ("timeout", "output") else "closed"
            raise BoxError(f"no answer: {error}", reason) from error
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, dict):
            raise BoxError("an answer that is no JSON object", "closed")
        return reply

    def close(self) -> None:
        self._handle.close()
        self._sandbox.close()


def open_host(isolation: str) -> Box:
    """A process (or, inline, an object) that can hold one world's database."""
    return InlineHost() if isolation == "inline" else ConfinedBox("host.py", isolation)


def open_judge(isolation: str) -> Box:
    """A process (or, inline, an object) that runs verifiers, or solutions."""
    return InlineJudge() if isolation == "inline" else ConfinedBox("judge.py", isolation)
