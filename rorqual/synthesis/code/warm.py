"""Trying many faults of one project quickly: one sandbox whose interpreter has collected the tests, a forked process per run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rorqual.synthesis.code.ladder import SET_UP_S
from rorqual.synthesis.code.projects import RUNS, Project
from rorqual.tasks import TaskError
from rorqual.tasks.language import language_of

SCRIPT = "rorqual_zygote.py"
LOOP_S, WAIT_S = 1.0, 20.0
"""How long the covering tests of a fault may compute before it counts as an endless loop; and how long they may wait, which a
busy machine makes them do: what is refused must not depend on who else computes."""


class Warm:
    """A project opened for trials; close it. Raises TaskError where its tests can't be collected this way."""

    def __init__(self, project: Project):
        from rorqual.sandbox import SandboxError

        self.project, payload = project, project.world.payload
        speaks = language_of(payload)
        self._box = speaks.open_box(payload["files"], payload, "bwrap", None)
        try:
            self._box.upload(SCRIPT, (Path(__file__).parent / "zygote.py").read_bytes())
            arguments = [*speaks.command(payload), *payload["tests"]]  # type: ignore[attr-defined]
            command = [self._box.python, "-B", SCRIPT, json.dumps(arguments)]
            self._handle = self._box.start(command, env=speaks.environment(self._box, payload))
            self._handle.receive(SET_UP_S)
        except SandboxError as error:
            self.close()
            raise TaskError(f"warm runs of {payload['name']}: {error}") from error

    def runs(self, path: str, line: int, text: str, tests: Sequence[str], runs: int = RUNS) -> list[dict[str, str]] | str:
        """The outcomes of the tests with a fault in place, in so many runs; or why there are none."""
        from rorqual.sandbox import SandboxError

        bounds = {"runs": runs, "cpu_s": LOOP_S, "timeout_s": WAIT_S}
        request = {"path": path, "line": line, "text": text, "tests": list(tests), **bounds}
        try:
            reply: dict[str, Any] = json.loads(self._handle.ask(json.dumps(request), WAIT_S * runs + 20))
        except SandboxError as error:
            raise TaskError(f"warm runs of {self.project.world.payload['name']}: {error}") from error
        return reply["problem"] if "problem" in reply else reply["runs"]

    def close(self) -> None:
        if hasattr(self, "_handle"):
            self._handle.close()
        self._box.close()


_open: dict[str, Warm] = {}
MOST_OPEN = 3


def warm(project: Project) -> Warm:
    """The project's trials in this process; the least recently used of more than a few is closed."""
    key = project.world.id
    if key not in _open:
        while len(_open) >= MOST_OPEN:
            _open.pop(next(iter(_open))).close()
        _open[key] = Warm(project)
    _open[key] = _open.pop(key)
    return _open[key]


def forget(project: Project) -> None:
    """Close a project's trials after a failure; the next use opens them anew."""
    if found := _open.pop(project.world.id, None):
        found.close()
