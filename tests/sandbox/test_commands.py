"""`rorqual sandbox run` and `rorqual doctor` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rorqual import cli
from rorqual.commands import doctor


def call(*words: str) -> int:
    return cli.main(list(words))


@pytest.fixture
def program(tmp_path: Path, confinement: None):
    def write(source: str, name: str = "program.py") -> str:
        path = tmp_path / name
        path.write_text(source)
        return str(path)

    return write


def test_output_and_exit_code_pass_through(program, capfdbinary) -> None:
    path = program(
        "import sys; sys.stdout.buffer.write(bytes([0, 255])); print('e', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    )
    assert call("sandbox", "run", path, "--", "5") == 5
    out, err = capfdbinary.readouterr()
    assert (out, err) == (b"\x00\xff", b"e\n")


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("import time; print('begun', flush=True); time.sleep(60)", ("--timeout", "0.5"), "--timeout allows more"),
        ("print('begun', flush=True); x = bytearray(1 << 30)", ("--memory-mb", "64"), "--memory-mb allows more"),
        ("print('begun', flush=True)\nwhile True: print('x' * 9999)", ("--output-mb", "0.01"), "--output-mb allows more"),
    ],
)
def test_a_stopped_program_ends_with_1_and_one_line(program, capfd, source: str, options: tuple[str, ...], said: str) -> None:
    assert call("sandbox", "run", program(source), *options) == 1
    out, err = capfd.readouterr()
    assert out.startswith("begun\n") and said in err.splitlines()[-1]


def test_scripts_run_by_their_first_line(program, capfd) -> None:
    assert call("sandbox", "run", program("echo $((6 * 7))", "a.sh")) == 0
    assert call("sandbox", "run", program("#!/usr/bin/env python3\nprint(6 * 7)", "b")) == 0
    assert capfd.readouterr().out == "42\n42\n"


def test_json_holds_the_whole_result(program, capfd) -> None:
    assert call("sandbox", "run", program("import os; print('x', flush=True); os.abort()"), "--json") == 1
    result = json.loads(capfd.readouterr().out)
    assert (result["ended"], result["signal"], result["stdout"]) == ("killed", "SIGABRT", "x\n")


def test_wrong_use_and_absent_files_are_told(capfd, confinement: None) -> None:
    assert call("sandbox", "run", "/no/such.py") == 1
    assert "can't read /no/such.py" in capfd.readouterr().err
    assert call("sandbox", "run", __file__, "--timeout", "-1") == 2
    assert "timeout_s" in capfd.readouterr().err


def test_doctor_finds_what_is_here_and_says_how_to_mend(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["fit"]
    assert {"python", "torch", "gpu", "bwrap", "user namespaces", "control groups", "landlock", "seccomp", "chromium",
            "disk", "memory", "extra [synthesis]", "sandbox"} <= set(checks)  # fmt: skip
    assert all(check["mend"] for check in checks.values() if not check["is_there"])
    monkeypatch.setattr(doctor, "REQUIRED_MODULES", ("no_such_module",))
    assert call("doctor") == 1
    assert "MISSING  base packages" in capsys.readouterr().out
