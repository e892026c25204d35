"""Each escape attempt of the panel is held by bubblewrap; unconfined, the same programs do reach what they are after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import Ended, Limits, Result, SandboxConfig, SandboxError, open_sandbox
from rorqual.sandbox import panel as panels
from rorqual.sandbox.attempts import ATTEMPTS, Attempt
from rorqual.sandbox.panel import Stage, make_attempt

CONTROL = [
    "TCP to the machine's loopback", "UDP to the machine's loopback", "abstract unix socket", "unix socket on a path",
    "read a file that all may read", "write where all may write", "delete outside", "rename outside",
    "list a directory outside", "read /etc/passwd", "archive with a path that climbs out",
    "archive with a link, then a file through it", "kill a process outside", "kill a process group outside",
    "signal by process descriptor", "read other processes' environments", "read other processes' command lines",
    "a grandchild that stays behind", "children that ignore every signal", "shared memory that outlives its maker",
    "gain privileges from a set-uid program", "thread bomb", "memory in one process", "disk: the working directory",
    "one huge file", "open files", "wall time by sleeping", "flood of standard output",
]  # fmt: skip
"""Attempts that are harmless where nothing confines them."""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as made:
        yield made


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_bubblewrap_holds(confinement: None, stage: Stage, attempt: Attempt) -> None:
    finding = make_attempt(attempt, stage, SandboxConfig(limits=panels.LIMITS))
    assert finding.holds, finding


def test_the_panel_is_large_and_its_names_are_distinct() -> None:
    assert len(ATTEMPTS) >= 40 and len({attempt.name for attempt in ATTEMPTS}) == len(ATTEMPTS)
    assert {attempt.barrier for attempt in ATTEMPTS} == {"network", "files", "processes", "privileges", "kernel", "resources"}


PATIENCE_S = 5.0
"""Longer than the panel's own limit and its slack."""


class Unconfined:
    """A 'sandbox' without a barrier, to show that an attempt and its witness see success."""

    python, directory = sys.executable, "unused"

    def __init__(self, root: Path):
        self.root = root

    def __enter__(self) -> Unconfined:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def upload(self, path: str, data: bytes | str) -> None:
        (self.root / path).write_text(str(data))

    def download(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def run(self, command: list[str]) -> Result:
        # Files rather than pipes: what stays behind would hold a pipe open.
        with (self.root / "out").open("wb") as out, (self.root / "err").open("wb") as err:
            process = subprocess.Popen(command, cwd=self.root, stdout=out, stderr=err, start_new_session=True)
            try:
                process.wait(timeout=PATIENCE_S)
                ended = Ended.EXITED
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended = Ended.TIMEOUT
        wall_s = PATIENCE_S if ended is Ended.TIMEOUT else 0.1
        out, err = (self.root / "out").read_bytes(), (self.root / "err").read_bytes()
        return Result(ended, process.returncode, out, err, wall_s)


@pytest.mark.parametrize("attempt", [a for a in ATTEMPTS if a.name in CONTROL], ids=lambda attempt: attempt.name)
def test_unconfined_the_attempt_succeeds(stage: Stage, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if attempt.name == "flood of standard output":
        attempt = Attempt(attempt.name, attempt.barrier, "os.write(1, b'x' * (1 << 17))", attempt.witness)
    monkeypatch.setattr(panels, "open_sandbox", lambda config: Unconfined(tmp_path))
    assert not make_attempt(attempt, stage, SandboxConfig(limits=panels.LIMITS)).holds


def test_every_control_is_in_the_panel() -> None:
    assert set(CONTROL) <= {attempt.name for attempt in ATTEMPTS}


WEAK_SPOTS = {"disk: the working directory"}
"""What the process back end does not promise to hold; docs/sandbox.md shows the table."""


def test_the_process_back_end_holds_what_its_table_says(stage: Stage) -> None:
    config = SandboxConfig(backend="process", limits=panels.LIMITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            open_sandbox(config).close()
        except SandboxError as error:
            pytest.skip(str(error))
        if os.geteuid() != 0:
            pytest.skip("the table is root's: under another uid the program shares its owner's")
        chosen = [a for a in ATTEMPTS if a.barrier != "resources" and a.name not in WEAK_SPOTS][::2]
        broken = [finding for finding in (make_attempt(a, stage, config) for a in chosen) if not finding.holds]
    assert not broken


def test_the_check_command_prints_a_table_and_fails_where_a_barrier_does(
    confinement: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from rorqual import cli
    from rorqual.commands import sandbox as command

    few = [a for a in ATTEMPTS if a.name in ("read a file that all may read", "UDP to the machine's loopback")]
    monkeypatch.setattr(command, "run_panel", lambda config: panels.run_panel(config, few))
    assert cli.main(["sandbox", "check", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["holds"] and len(table["attempts"]) == 2
    monkeypatch.setattr(panels, "open_sandbox", lambda config: Unconfined(tmp_path))
    assert cli.main(["sandbox", "check"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_limits_of_the_panel_are_the_ones_in_force(confinement: None) -> None:
    with open_sandbox(SandboxConfig(limits=Limits(open_files=77))) as sandbox:
        code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
        assert sandbox.run([sandbox.python, "-c", code]).stdout == "(77, 77)\n"
