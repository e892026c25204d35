"""Confines and supervises one command of the process back end. Run by path, in an interpreter without packages.

The supervisor adopts every orphan among its descendants, so that none escapes it by a double fork, and ends when the command
ends or when the pipe from its owner closes; before it ends it kills all that is left. As root it stays root, out of the
command's reach; the command gets a uid of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 22, 38, 36
SECCOMP_MODE_FILTER = 2
REAP_S = 5.0


def main() -> int:
    with os.fdopen(int(sys.argv[1])) as file:
        plan = json.load(file)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        become(plan, libc)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    status = supervise(pid, plan)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def become(plan: dict, libc: ctypes.CDLL) -> None:
    """In the child: give up what can be given up, then become the command. Never returns."""
    status = plan["status"]
    try:
        os.setsid()
        os.chdir(plan["directory"])
        for kind, soft, hard in plan["rlimits"]:
            resource.setrlimit(kind, (soft, hard))
        if plan["uid"] is not None:
            os.setgroups([])
            os.setresgid(plan["uid"], plan["uid"], plan["uid"])
            os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        load_landlock(plan["landlock"]).restrict(plan["readable"], plan["writable"])
        if plan["filter"]:
            filter_calls(bytes.fromhex(plan["filter"]), libc)
    except OSError as error:
        os.write(2, f"launcher: {error}\n".encode())
        os._exit(1)
    os.write(status, b"started")
    os.set_inheritable(status, False)
    name = plan["command"][0]
    for path in [name] if "/" in name else [f"{directory}/{name}" for directory in plan["env"]["PATH"].split(":")]:
        with contextlib.suppress(OSError):
            os.execve(path, plan["command"], plan["env"])
    os.write(status, b"missing")
    os._exit(127)


def load_landlock(path: str) -> types.ModuleType:
    module = types.ModuleType("landlock")
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), module.__dict__)
    return module


def filter_calls(program: bytes, libc: ctypes.CDLL) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    descriptor = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, descriptor, 0, 0):
        raise OSError(ctypes.get_errno(), "the system call filter was refused")


def supervise(pid: int, plan: dict) -> int:
    """Wait for the command or for the owner's end; then kill the rest. Returns the command's wait status."""
    poll = select.poll()
    for fd in (plan["lifeline"], os.pidfd_open(pid)):
        poll.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll(1000)]
        if plan["lifeline"] in ready:
            os.kill(pid, signal.SIGKILL)
            break
        if ready:
            break
        reap_orphans(pid)
    status = os.waitpid(pid, 0)[1]
    kill_rest(plan["uid"])
    return status


def reap_orphans(pid: int) -> None:
    """Collect adopted zombies, but never the command itself."""
    for child in children(os.getpid()):
        if child != pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)


def kill_rest(uid: int | None) -> None:
    """Kill until none is left: all at once by uid where the uid is the sandbox's own, else by descent, again and again."""
    deadline = time.monotonic() + REAP_S
    while time.monotonic() < deadline:
        if uid is not None:
            kill_by_uid(uid)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def kill_by_uid(uid: int) -> None:
    """Signal every process of a uid in one step of the kernel, which no fork outruns."""
    killer = os.fork()
    if killer == 0:
        os.setresuid(uid, uid, uid)
        with contextlib.suppress(OSError):
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(killer, 0)


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    found = children(pid)
    for child in found:
        found += children(child)
    return found


if __name__ == "__main__":
    sys.exit(main())
