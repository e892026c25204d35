"""A script that stands alone and runs in a sandbox: collects a project's tests once, then tries each fault in a forked process.

    {"path", "line", "text", "tests", "runs", "cpu_s", "timeout_s"}  ->  {"runs": [{test id: outcome}]} or {"problem": text}

`text` is the whole file with the fault in the function that begins at `line`. The forked process writes it to disk, for modules
that are imported later, and puts the new code objects into the functions that stand in memory. What the import of a module
computes is not done again: the full form of grading, in a fresh sandbox, sees that too.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
import types

requests, replies = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "w")
MAX_REPLY = 1 << 24


def code_objects(code):
    """Every function's code that is no part of another function, by (qualified name, first line)."""
    found = {}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            if part.co_flags & 2:  # CO_NEWLOCALS: a function; class bodies are not
                found[part.co_qualname, part.co_firstlineno] = part
            else:
                found.update(code_objects(part))
    return found


class Zygote:
    """Serves from inside pytest's own loop, after collection."""

    def __init__(self):
        self.items, self.functions, self.here = {}, {}, os.getcwd()
        self.compiled = ("", "", {})

    def pytest_runtestloop(self, session):
        from _pytest.junitxml import mangle_test_address

        for item in session.items:
            item.repr_failure = unsaid
            *owner, name = mangle_test_address(item.nodeid)
            self.items.setdefault(f"{item.nodeid.partition('::')[0]}::{'.'.join(owner).rpartition('.')[2]}::{name}", []).append(
                item
            )
        for value in gc.get_objects():
            if isinstance(value, types.FunctionType):
                code = value.__code__
                self.functions.setdefault((code.co_filename, code.co_qualname, code.co_firstlineno), []).append(value)
        gc.freeze()
        say({"collected": len(self.items)})
        while line := read_line():
            say(self.serve(json.loads(line)))
        return True

    def serve(self, request):
        path = os.path.join(self.here, request["path"])
        with open(path, encoding="utf-8") as file:
            before = file.read()
        try:
            changes = self.changes(path, before, request["text"])
        except (SyntaxError, ValueError, RecursionError) as error:
            return {"problem": f"{type(error).__name__}: {error}"[:300]}
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(request["text"])
            runs = []
            for _ in range(request["runs"]):
                found = self.run_forked(changes, request)
                if isinstance(found, str):
                    return {"problem": found}
                runs.append(found)
                if all(end == "passed" for end in found.values()):
                    break  # nothing noticed the change: no second run is needed to refuse it
            return {"runs": runs}
        finally:
            with open(path, "w", encoding="utf-8") as file:
                file.write(before)

    def run_forked(self, changes, request):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.close(read)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, and no other
            signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
            try:
                found = self.attempt(changes, request)
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"[:300]
            with os.fdopen(write, "w") as file:
                json.dump(found, file)
                file.flush()
            os._exit(0)
        os.close(write)
        try:
            data = drain(read, time.monotonic() + request["timeout_s"])
        finally:
            os.close(read)
            for target in (-child, child):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, signal.SIGKILL)
            os.waitpid(child, 0)
        return json.loads(data) if data else "the run ended: out of time, or killed"

    def attempt(self, changes, request):
        for function, code in changes:
            function.__code__ = code
        order = [(name, item) for name in request["tests"] for item in self.items.get(name, ())]
        following = [item for _, item in order[1:]] + [None]  # what a module or a class sets up stands until its last test
        ends = {name: [] for name in request["tests"]}
        for (name, item), after in zip(order, following, strict=False):
            ends[name].append(self.outcome(item, after))
        return {name: worst(found) for name, found in ends.items()}

    def changes(self, path, before, after):
        """(function, its new code) for every function in memory whose code the new text changes; once for all runs of it."""
        if self.compiled[:2] != (path, before):
            self.compiled = (path, before, self.code_of(path, before))
        old, new = self.compiled[2], self.code_of(path, after)
        changed = [(place, code) for place, code in new.items() if place in old and old[place] != code]
        return [(function, code) for place, code in changed for function in self.functions.get((path, *place), ())]

    @staticmethod
    def code_of(path, text):
        return code_objects(compile(text, path, "exec", dont_inherit=True))

    def outcome(self, item, after):
        """As JUnit says it: failed where anything of it fails, skipped where it was."""
        from _pytest.runner import runtestprotocol

        ends = runtestprotocol(item, log=False, nextitem=after)
        if any(report.failed for report in ends):
            return "failed"
        return "skipped" if any(report.skipped for report in ends) else "passed"


def unsaid(excinfo, style=None):
    """In place of a traceback: nobody reads it, and to write it takes longer than most tests."""
    return "failed"


def worst(ends):
    """Of the items that have one name."""
    return next((end for end in ("failed", "skipped", "passed") if end in ends), "absent")


def drain(fd, deadline):
    """What is written until the pipe closes; nothing where the deadline passes first."""
    data = b""
    while (left := deadline - time.monotonic()) > 0 and len(data) < MAX_REPLY:
        if select.select([fd], [], [], left)[0]:
            part = os.read(fd, 1 << 16)
            if not part:
                return data
            data += part
    return b""


def read_line():
    line = b""
    while not line.endswith(b"\n"):
        part = requests.read(1 << 16)
        if not part:
            return b""
        line += part
    return line


def say(value):
    print(json.dumps(value), file=replies, flush=True)


def main():
    import pytest

    quiet = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(quiet, fd)
    sys.exit(pytest.main(["-s", *json.loads(sys.argv[1])], plugins=[Zygote()]))


if __name__ == "__main__":
    main()
