"""The container back end keeps its contract with an engine's command line: a stand-in records and acts out what it is told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from rorqual.sandbox import Ended, Limits, SandboxError, create, oci
from rorqual.sandbox.panel import command_lines

ENGINE = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
root = pathlib.Path({root!r})
arguments = sys.argv[1:]
with open(root / "calls", "a") as log: log.write(json.dumps(arguments) + "\\n")
if arguments[0] == "version": sys.exit(0)
if arguments[0] == "run":
    if (root / "refuse").exists(): sys.exit("Error: no such image")
    (root / "box").mkdir(); print("abcdef"); sys.exit(0)
if arguments[0] == "rm": shutil.rmtree(root / "box"); sys.exit(0)
assert arguments[0] == "exec"
if not (root / "box").exists(): sys.exit("Error: no such container")
rest, env = arguments[1:], dict(PATH=os.environ["PATH"])
while rest[0].startswith("--"):
    if rest[0] == "--env": name, _, value = rest[1].partition("="); env[name] = value; rest = rest[2:]
    else: rest = rest[1:]
command = [word.replace("/box", str(root / "box")) for word in rest[1:]]
process = subprocess.Popen(command, cwd=root / "box", env=env, start_new_session=True)
code = process.wait()
sys.exit(128 - code if code < 0 else code)
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that a stand-in for docker, first on PATH, works in."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(ENGINE.format(python=sys.executable, root=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


def calls(engine: Path) -> list[list[str]]:
    return [json.loads(line) for line in (engine / "calls").read_text().splitlines()]


def test_a_container_is_made_confined_and_removed(engine: Path) -> None:
    with create("oci", limits=Limits(memory_mb=99, processes=17, disk_mb=5), image="some:image"):
        pass
    made = next(call for call in calls(engine) if call[0] == "run")
    text = " ".join(made)
    for part in (
        "--network none", "--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--user 1000:1000",
        "--memory 99m", "--memory-swap 99m", "--pids-limit 17", "/box:size=5m", "some:image sleep infinity",
    ):  # fmt: skip
        assert part in text, part
    name = made[made.index("--name") + 1]
    assert calls(engine)[-1] == ["rm", "--force", name]
    assert not (engine / "box").exists()


def test_runs_files_and_ends(engine: Path) -> None:
    with create("oci") as sandbox:
        sandbox.upload("a/in.txt", "abc")
        result = sandbox.run(
            ["/bin/sh", "-c", "cat a/in.txt; cat; echo e >&2; echo $GREETING > out; exit 3"], stdin="x", env={"GREETING": "hi"}
        )
        assert (result.ended, result.exit_code, result.stdout, result.stderr) == (Ended.EXITED, 3, "abcx", "e\n")
        assert sandbox.download("out") == b"hi\n"
        with pytest.raises(SandboxError) as caught:
            sandbox.download("absent")
        assert caught.value.reason == "absent"
        with pytest.raises(SandboxError, match="larger"):
            sandbox.download("out", max_bytes=2)
        with pytest.raises(SandboxError, match="below the working directory"):
            sandbox.download("../x")
        assert sandbox.run(["/bin/sleep", "60"], limits=Limits(timeout_s=0.5)).ended is Ended.TIMEOUT
        assert sandbox.run(["/usr/bin/yes"], limits=Limits(output_bytes=5000)).ended is Ended.OUTPUT
        assert sandbox.run(["/no/such"]).ended is Ended.SPAWN_FAILED
        with sandbox.start(["/bin/cat"]) as handle:
            assert handle.ask("line", 10) == "line"
            assert sandbox.run(["/bin/sh", "-c", "sleep 76 & exit 0"]).is_ok
            assert handle.ask("still", 10) == "still"
        assert not any("sleep\0" + "76" in line for _, line in command_lines())


def test_a_container_that_went_away_is_a_value(engine: Path) -> None:
    with create("oci") as sandbox:
        (engine / "box").rmdir()
        result = sandbox.run(["/bin/true"])
        assert result.ended is Ended.UNAVAILABLE and "no such container" in result.detail
        (engine / "box").mkdir()


def test_an_image_that_can_not_be_had_is_an_error(engine: Path) -> None:
    (engine / "refuse").touch()
    with pytest.raises(SandboxError, match="no such image") as caught:
        create("oci")
    assert caught.value.reason == "unavailable"


def test_no_engine_is_an_error_that_says_what_each_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "docker"
    broken.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"Cannot connect to the Docker daemon.*podman is not installed.*bwrap"):
        oci.find_engine(None)
