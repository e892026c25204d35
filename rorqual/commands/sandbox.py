"""Run a program confined, or try to break each barrier and print which hold.

    rorqual sandbox run program.py --timeout 5 --memory-mb 256
    rorqual sandbox check

`run` prints the program's output on standard output and ends with its exit code; a program that was stopped (time, memory,
output) ends with 1 and one line on standard error. A file that is neither Python nor has a `#!` line runs by /bin/sh.
`check` exits with 1 where a barrier of the back end does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rorqual.errors import FieldErrors, UsageError, UserError
from rorqual.sandbox import Ended, Limits, Result, Sandbox, SandboxConfig, open_sandbox, site_packages
from rorqual.sandbox.panel import Finding, run_panel

PROGRAM = "program"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="run|check")
    run_parser = commands.add_parser("run", help="run a program confined, its output on standard output")
    run_parser.add_argument("file", help="a Python program, or a script with a #! line; - reads standard input")
    run_parser.add_argument("arguments", nargs="*", help="arguments of the program, after --")
    run_parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="wall-clock seconds (default 10)")
    run_parser.add_argument("--memory-mb", type=int, default=512, metavar="M", help="memory in megabytes (default 512)")
    run_parser.add_argument("--output-mb", type=float, default=1.0, metavar="M", help="of each output stream (default 1)")
    run_parser.add_argument("--backend", choices=("bwrap", "process", "oci"), default="bwrap")
    run_parser.add_argument("--packages", action="store_true", help="show this interpreter's installed packages, read-only")
    run_parser.add_argument("--json", action="store_true", help="print the whole result as JSON instead")
    check_parser = commands.add_parser("check", help="try to break each barrier and print which hold")
    check_parser.add_argument("--backend", choices=("bwrap", "process", "oci"), default="bwrap")
    check_parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int:
    return _run_file(args) if args.action == "run" else _check(args)


def _run_file(args: argparse.Namespace) -> int:
    program = _read(args.file)
    try:
        limits = Limits(timeout_s=args.timeout, memory_mb=args.memory_mb, output_bytes=int(args.output_mb * (1 << 20)))
    except FieldErrors as error:
        raise UsageError(f"limits out of range: {error}") from None
    packages = (site_packages(),) if args.packages else ()
    with open_sandbox(SandboxConfig(backend=args.backend, limits=limits, packages=packages)) as sandbox:
        if args.backend == "process":
            print("rorqual sandbox: the process back end is weaker than bwrap; see rorqual sandbox check", file=sys.stderr)
        sandbox.upload(PROGRAM, program)
        result = sandbox.run([*_interpreter(args.file, program, sandbox), PROGRAM, *args.arguments])
    if args.json:
        print(json.dumps(as_mapping(result), indent=1))
    else:
        sys.stdout.buffer.write(result.stdout_bytes)
        sys.stdout.flush()
        sys.stderr.buffer.write(result.stderr_bytes)
        sys.stderr.flush()
    if result.ended is Ended.EXITED:
        return result.exit_code or 0
    if not args.json:
        print(f"rorqual sandbox: {explanation(result, limits)}", file=sys.stderr)
    return 1


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"can't read {name}: {error.strerror}; give the path of a program") from None


def _interpreter(name: str, program: bytes, sandbox: Sandbox) -> list[str]:
    """What runs the program: Python for *.py and standard input, else what its first line says, else the shell."""
    if name == "-" or name.endswith(".py"):
        return [sandbox.python]
    first = program.partition(b"\n")[0].decode("utf-8", "replace")
    if not first.startswith("#!"):
        return ["/bin/sh"]
    words = first[2:].split()
    return [sandbox.python, *words[2:]] if words and "python" in words[-1] else words or ["/bin/sh"]


def explanation(result: Result, limits: Limits) -> str:
    """Why a program did not simply exit, and what to do, in one line."""
    text = {
        Ended.TIMEOUT: f"stopped after {limits.timeout_s:g} s; --timeout allows more",
        Ended.MEMORY: f"out of memory at {limits.memory_mb} MB; --memory-mb allows more",
        Ended.OUTPUT: f"stopped for writing more than {limits.output_bytes} bytes; --output-mb allows more",
        Ended.CPU: f"stopped after {limits.cpu_seconds} s of processor time; --timeout allows more",
        Ended.KILLED: f"killed by {result.signal}",
    }.get(result.ended, str(result.ended))
    return f"{text} ({result.detail})" if result.detail else text


def as_mapping(result: Result) -> dict[str, object]:
    return {
        "ended": str(result.ended),
        "exit_code": result.exit_code,
        "signal": result.signal,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "wall_s": round(result.wall_s, 4),
        "cpu_s": result.cpu_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "detail": result.detail,
    }


def _check(args: argparse.Namespace) -> int:
    findings = []
    for finding in run_panel(SandboxConfig(backend=args.backend)):
        findings.append(finding)
        if not args.json:
            print(_line(finding), flush=True)
    broken = [finding for finding in findings if not finding.holds]
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"backend": args.backend, "holds": not broken, "attempts": rows}, indent=1))
    else:
        print(f"{args.backend}: {len(findings) - len(broken)} of {len(findings)} attempts held")
    return 1 if broken else 0


def _line(finding: Finding) -> str:
    verdict = "holds " if finding.holds else "BROKEN"
    return f"{verdict}  {finding.barrier:<10}  {finding.name}" + (f"  ({finding.why})" if finding.why else "")
