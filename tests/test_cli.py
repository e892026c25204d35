"""The command line: help that says what each command is for, and the three exit statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rorqual import cli
from rorqual.errors import UsageError, UserError


def test_overview_lists_every_command_with_its_purpose(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in cli.command_names():
        assert name in out
        assert cli.purpose(name), f"{name} has no docstring"


def test_no_command_and_an_unknown_command_are_wrong_use(capsys):
    assert cli.main([]) == 2
    assert cli.main(["nonsense"]) == 2
    assert "rorqual --help" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.command_names())
def test_every_command_has_help_that_begins_with_its_purpose_and_an_example(name):
    run = subprocess.run([sys.executable, "-m", "rorqual", name, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert cli.purpose(name) in run.stdout
    assert f"rorqual {name}" in run.stdout.split("options:")[0].partition("\n\n")[2], "the help holds no example"


@pytest.mark.parametrize(("error", "status"), [(UserError("broken"), 1), (UsageError("misused"), 2)])
def test_failures_speak_in_one_line_on_standard_error(error, status, monkeypatch, capsys):
    class Command:
        __doc__ = "x"
        add_arguments = staticmethod(lambda parser: None)

        @staticmethod
        def run(args):
            raise error

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Command)
    assert cli._run("x", []) == status
    assert capsys.readouterr().err == f"rorqual x: {error}\n"
