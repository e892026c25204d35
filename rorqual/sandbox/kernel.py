"""A stateful Python interpreter in a sandbox: a Jupyter kernel, spoken to over unix sockets, with no network at all.

The sockets lie in the sandbox's own file system; the client reaches them through the workspace's path from outside.
"""

from __future__ import annotations

import json
import queue
import secrets
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rorqual.sandbox.bubblewrap import BubblewrapSandbox
from rorqual.sandbox.protocol import MEBIBYTE, Limits, SandboxConfig, SandboxError
from rorqual.sandbox.view import HOME, site_packages

FOLDER = ".kernel"
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
LARGEST_MESSAGE = 64 * MEBIBYTE
FLUSH_OFTEN = "import sys; sys.stdout.flush_interval = sys.stderr.flush_interval = 0.01"
"""A kernel gathers output for 0.2 s; a flood would then come as one message too large to take."""
INTERRUPT_S = 2.0
"""How long interrupted code may take to end before the kernel is started anew."""
KERNEL_LIMITS = Limits(timeout_s=None, memory_mb=1024, disk_mb=256)


class CellEnded(StrEnum):
    """Why a cell ended. After RESTARTED and DIED the interpreter is fresh: names defined before are gone."""

    DONE = "done"
    ERROR = "error"  # an exception
    TIMEOUT = "timeout"  # interrupted; the state is kept
    OUTPUT = "output"  # more output than allowed; interrupted, the state is kept
    RESTARTED = "restarted"  # it did not heed the interrupt
    DIED = "died"  # the kernel's process ended: memory, an exit call, a crash


@dataclass
class Cell:
    """What came of one cell. Output beyond the limit is cut."""

    ended: CellEnded = CellEnded.DONE
    output: str = ""
    """Standard output and error, in the order in which they came."""
    value: str | None = None
    """The last expression's representation."""
    error: str | None = None
    """The traceback, without colours."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """Rich outputs by MIME type, such as an image; bounded together with the output."""
    wall_s: float = 0.0


class Kernel:
    """A kernel and its sandbox. Not for use by two threads at once. Raises SandboxError where no sandbox can be had.

    packages: directories of Python packages to show inside; this interpreter's own by default, which must hold ipykernel.
    """

    def __init__(
        self,
        limits: Limits = KERNEL_LIMITS,
        packages: tuple[str, ...] | None = None,
        start_s: float = 60.0,
        sandbox: BubblewrapSandbox | None = None,
    ):
        self._owns_sandbox = sandbox is None
        packages = (site_packages(),) if packages is None else packages
        self.sandbox = sandbox or BubblewrapSandbox(SandboxConfig(limits=limits, packages=packages))
        self._limits, self._start_s = limits, start_s
        self.restarts = 0
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        from jupyter_client.blocking.client import BlockingKernelClient

        key, name = secrets.token_hex(16), f"{FOLDER}/{secrets.token_hex(4)}"
        ports = {port: number for number, port in enumerate(PORTS, 1)}
        common = {"transport": "ipc", "key": key, "signature_scheme": "hmac-sha256", **ports}
        self.sandbox.upload(f"{name}.json", json.dumps({**common, "ip": f"{HOME}/{name}"}))
        command = [self.sandbox.python, "-m", "ipykernel_launcher", "-f", f"{HOME}/{name}.json"]
        command += ["--HistoryManager.enabled=False", f"--IPKernelApp.exec_lines={FLUSH_OFTEN}"]
        env = {"IPYTHONDIR": f"{HOME}/.ipython", "JUPYTER_PLATFORM_DIRS": "0"}
        self._handle = self.sandbox.start(command, env=env, limits=self._limits.but(timeout_s=None))
        self._client = BlockingKernelClient()
        self._client.context.maxmsgsize = LARGEST_MESSAGE  # default of its sockets: what is larger drops the connection
        self._client.load_connection_info({**common, "ip": f"{self.sandbox.outside()}/{name}"})  # type: ignore[typeddict-item]
        self._await_sockets(Path(f"{self.sandbox.outside()}/{name}-{len(PORTS)}"))
        self._client.start_channels(hb=False, stdin=False)
        self._await_ready()

    def _await_sockets(self, last: Path) -> None:
        deadline = time.monotonic() + self._start_s
        while not last.exists():
            if not self._handle.is_running or time.monotonic() > deadline:
                result = self._handle.close()
                raise SandboxError(f"kernel: it did not start ({result.ended}): {result.stderr[-800:].strip()}", "closed")
            time.sleep(0.01)

    def _await_ready(self) -> None:
        try:
            self._client.wait_for_ready(timeout=self._start_s)
        except RuntimeError as error:
            raise SandboxError(f"kernel: it did not answer: {error}", "timeout") from None

    def run(self, code: str, timeout_s: float = 30.0) -> Cell:
        """Run a cell. A cell that overruns its time or output is interrupted; one that ignores that costs the state."""
        began = time.monotonic()
        cell = Cell()
        request = self._client.execute(code, store_history=False, allow_stdin=False)
        self._follow(cell, request, began + timeout_s)
        if cell.ended in (CellEnded.TIMEOUT, CellEnded.OUTPUT) and not self._interrupt(request):
            cell.ended = CellEnded.RESTARTED
            self.restart()
        elif cell.ended is CellEnded.DIED:
            self.restart()
        cell.wall_s = time.monotonic() - began
        return cell

    def _follow(self, cell: Cell, request: str, deadline: float) -> None:
        """Collect the messages of a request until the kernel is idle again, or something ends the patience."""
        room = self._limits.output_bytes
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=min(0.2, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                if not self._handle.is_running:
                    cell.ended = CellEnded.DIED
                    return
                if time.monotonic() >= deadline:
                    cell.ended = CellEnded.TIMEOUT
                    return
                continue
            except ValueError:
                continue  # a message with a wrong signature: not from the kernel's own library
            if message["parent_header"].get("msg_id") != request:
                continue
            if _is_idle(message):
                return
            room -= _add(cell, message, room)
            if room <= 0:
                cell.ended = CellEnded.OUTPUT
                return
            if time.monotonic() >= deadline:
                cell.ended = CellEnded.TIMEOUT
                return

    def _interrupt(self, request: str) -> bool:
        """Ask the kernel to interrupt itself (its control thread does). Whether the request then ended."""
        self._client.control_channel.send(self._client.session.msg("interrupt_request", {}))
        deadline = time.monotonic() + INTERRUPT_S
        while time.monotonic() < deadline and self._handle.is_running:
            try:
                message = self._client.get_iopub_msg(timeout=0.1)
            except (queue.Empty, ValueError):
                continue
            if message["parent_header"].get("msg_id") == request and _is_idle(message):
                return True
        return False

    def restart(self) -> None:
        """A fresh interpreter; files stay."""
        self._end()
        self.restarts += 1
        self._begin()

    def _end(self) -> None:
        if hasattr(self, "_client"):
            self._client.stop_channels()
            self._client.context.destroy(linger=0)
        if hasattr(self, "_handle"):
            self._handle.close()

    def close(self) -> None:
        self._end()
        if self._owns_sandbox:
            self.sandbox.close()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _is_idle(message: dict[str, Any]) -> bool:
    return message["msg_type"] == "status" and message["content"].get("execution_state") == "idle"


def _add(cell: Cell, message: dict[str, Any], room: int) -> int:
    """Put one message's content in the cell, cut to the room that is left. Returns the bytes used."""
    content = message["content"]
    kind = message["msg_type"]
    if kind == "stream":
        cell.output += str(content.get("text", ""))[:room]
        return len(content.get("text", ""))
    if kind == "error":
        cell.ended = CellEnded.ERROR
        cell.error = plain("\n".join(map(str, content.get("traceback", []))))[:room]
        return len(cell.error)
    if kind in ("execute_result", "display_data"):
        data = content.get("data", {})
        size = len(json.dumps(data))
        if size > room:
            return size
        if kind == "execute_result":
            cell.value = str(data.get("text/plain", ""))
        if set(data) - {"text/plain"} or kind == "display_data":
            cell.data.append(data)
        return size
    return 0


def plain(text: str) -> str:
    """Text without terminal colours."""
    import re

    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
