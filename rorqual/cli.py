"""The `rorqual` command: each sub-command is a file of rorqual/commands, imported only when it is called.

A command module has a docstring (its first line says what the command is for; it holds an example), a function
`add_arguments(parser)`, and a function `run(args) -> int | None` (the exit status; None is 0). Where it says
TAKES_OVERRIDES = True, arguments that the parser does not know reach it as `args.overrides`, for rorqual.config.load.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from pathlib import Path

from rorqual import __version__
from rorqual.errors import UsageError, UserError

COMMANDS = Path(__file__).parent / "commands"


def command_names() -> list[str]:
    """The sub-commands: the files of rorqual/commands, with dashes for underscores."""
    return sorted(path.stem.replace("_", "-") for path in COMMANDS.glob("*.py") if path.stem != "__init__")


def purpose(name: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    tree = ast.parse((COMMANDS / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def overview() -> str:
    """What `rorqual --help` prints."""
    width = max(map(len, command_names()), default=0)
    lines = [f"  {name:<{width}}  {purpose(name)}" for name in command_names()]
    return "\n".join(
        [
            "Rorqual: the whole DeepSeek-V3.2 system. Example: rorqual run tiny",
            "",
            "usage: rorqual COMMAND ...",
            "",
            *lines,
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command. Exit status: 0, 1 (a failure, one line on standard error), 2 (wrong use)."""
    # Read when torch is first imported. Threads that spin while they wait slow a run ten times beside a busy neighbour;
    # threads that sleep at once halve a run of many small operations. These spin for some microseconds, then sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in command_names():
        print(f"rorqual: no command {argv[0]!r}; rorqual --help lists them", file=sys.stderr)
        return 2
    return _run(argv[0], argv[1:])


def _run(name: str, argv: list[str]) -> int:
    try:
        command = importlib.import_module(f"rorqual.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(
            prog=f"rorqual {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(parser)
        options, rest = parser.parse_known_args(argv)
        if rest and not getattr(command, "TAKES_OVERRIDES", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = rest
        return command.run(options) or 0
    except UserError as error:
        print(f"rorqual {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rorqual"):
            raise
        print(f"rorqual {name}: needs {error.name}, which is not installed; pip install 'rorqual[all]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rorqual {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, say) has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
