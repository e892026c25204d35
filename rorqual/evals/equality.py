"""Whether two answers of mathematics are the same: math-verify over a little normalisation, in a process of its own.

Symbolic algebra can run for ever on an answer that a model wrote, and math-verify guards itself by signals, which only a main
thread has. So the comparison runs in a child process that is killed where it does not answer: then the equality is undecided
(EqualityError), and the attempt's verdict is invalid, not wrong.

What counts as equal, where conventions differ: a unit or currency may be left out, but two different units differ; 30\\% equals
both 30 and 0.3; `x = 5` equals 5; a list without brackets is a set, in any order; an ordered tuple is not; words are compared
as words, whatever their case; a decimal equals another number that rounds to it at six places, so 0.33 is not 1/3.

The child is this file, run as a program: it reads [gold, answer] as a line of JSON and writes {"equal": ...} or {"failure": ...}.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import select
import subprocess
import sys
import threading
from typing import Any

from rorqual.errors import UserError

PATIENCE_S = 30.0
"""Wall-clock seconds until a comparison is given up; starting the child is part of the first one."""


class EqualityError(UserError):
    """The comparison could not be decided."""


class Judge:
    """Compares answers in one child process, which is started on demand and replaced when it hangs or dies. Thread-safe."""

    def __init__(self, patience_s: float = PATIENCE_S):
        self.patience_s = patience_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """Raises EqualityError where no decision comes in time, or the gold answer can't be read."""
        if tidy(gold) == tidy(answer):
            return True
        with self._lock:
            reply = self._ask([gold, answer])
        if "failure" in reply:
            raise EqualityError(reply["failure"])
        return bool(reply["equal"])

    def _ask(self, request: Any) -> dict[str, Any]:
        child = self._running()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            if select.select([child.stdout], [], [], self.patience_s)[0]:
                line = child.stdout.readline()
                if line:
                    return json.loads(line)
                return self._lost("the comparing process died")
            return self._lost(f"no decision within {self.patience_s} s")
        except (OSError, ValueError) as error:
            return self._lost(f"the comparing process failed: {error}")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "rorqual.evals.equality"]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            atexit.register(self.close)
        return self._child

    def _lost(self, reason: str) -> dict[str, Any]:
        self.close()
        return {"failure": reason}

    def close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        child.wait()


JUDGE = Judge()


def equal(gold: str, answer: str) -> bool:
    """Whether an answer is the gold one, by the shared judge."""
    return JUDGE.equal(gold, answer)


_DROPPED = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[bB]igg?[lr]?)(?![a-zA-Z])|\\[,;!:]|~")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,|\\,)\d{3})+(?![\d])")
_UNIT = re.compile(r"\d\s*\\?[,;]?\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*([a-zA-Z][a-zA-Z/ ]*)\}|(?<=\s)([a-zA-Z]{2,}))\s*$")
_WORDS = re.compile(r"[a-zA-Z][a-zA-Z'-]+(?: [a-zA-Z'-]+)*")


def tidy(text: str) -> str:
    """The answer without dollar signs, spacing and sizing commands, thousands separators, an outer \\text, a last full stop."""
    text = text.strip().strip("$").strip().rstrip(".").strip().strip("$").strip()
    text = re.sub(r"\\\$|\\pounds|€|£", "", text)
    text = _THOUSANDS.sub(lambda found: re.sub(r"[^\d]", "", found.group()), text)
    text = _DROPPED.sub("", re.sub(r"\\[dt]frac", r"\\frac", text))
    whole = re.fullmatch(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", text)
    return re.sub(r"\s+", " ", whole.group(1) if whole else text).strip()


def _words(text: str) -> str | None:
    """An answer that is words and no mathematics, in lower case; None for any other."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace("$", "").strip(" .()")
    return " ".join(bare.lower().split()) if _WORDS.fullmatch(bare) or re.fullmatch("[A-Z]", bare) else None


def _unit(text: str) -> str:
    found = _UNIT.search(text)
    unit = (found.group(1) or found.group(2) or "").strip().lower() if found else ""
    return unit if unit not in ("and", "or") else ""


def same(gold: str, answer: str) -> bool:
    """The comparison itself. Only where it may be killed: symbolic algebra can run for ever."""
    gold, answer = tidy(gold), tidy(answer)
    words = (_words(gold), _words(answer))
    if None not in words:
        return words[0] == words[1]
    units = (_unit(gold), _unit(answer))
    if all(units) and _singular(units[0]) != _singular(units[1]):
        return False
    from math_verify import parse

    read = [parse(f"${text}$", parsing_timeout=10) for text in (gold, answer)]
    if not read[0]:
        raise EqualityError(f"the gold answer {gold!r} can't be read")
    return _verified(*read) or _verified(*map(_imaginary, read))


def _verified(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return verify(gold, answer, timeout_seconds=10, allow_set_relation_comp=True)


def _singular(unit: str) -> str:
    return unit.removesuffix("s")


def _imaginary(read: list[Any]) -> list[Any]:
    """The same with i as the imaginary unit, where it is the only symbol."""
    import sympy

    def alone(each: Any) -> bool:
        return isinstance(each, sympy.Expr) and {symbol.name for symbol in each.free_symbols} <= {"i"}  # type: ignore[attr-defined]

    return [sympy.simplify(each.subs(dict.fromkeys(each.free_symbols, sympy.I))) for each in read if alone(each)]


def _serve() -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"equal": same(*json.loads(line))}
        except Exception as error:
            reply = {"failure": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    _serve()
