"""Landlock by plain system calls: a process gives up, for itself and its descendants, all files but those named.

What it does not cover: UDP, reading a file's metadata (stat, readlink, chdir), files already open, and on kernels before
the ABI named in brackets: TCP (4), device ioctls (5), signals and abstract unix sockets of others (6).
Self-contained: the launcher of the process back end loads this file by path, in an interpreter without packages.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
VERSION_FLAG = 1
RULE_PATH_BENEATH = 1
NO_NEW_PRIVS = 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READING = EXECUTE | READ_FILE | READ_DIR
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
FILE_SYSTEM = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""ABI -> the file rights it knows; later ones know as many as 5."""
TCP = 3
SCOPES = 3
"""Abstract unix sockets and signals."""


def abi() -> int:
    """The kernel's Landlock version; 0 where it has none or it is switched off."""
    return max(0, _libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION_FLAG))


def restrict(readable: list[str], writable: list[str]) -> int:
    """Confine this thread and what it starts. Paths that are absent are passed over. Returns the ABI. Raises OSError."""
    version = abi()
    if not version:
        raise OSError("the kernel has no Landlock")
    rights = FILE_SYSTEM[min(version, 5)]
    attributes = struct.pack("<QQQ", rights, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _check(_libc().syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    for paths, allowed in ((readable, READING), (writable, rights & ~IOCTL_DEV & ~EXECUTE | READING)):
        for path in paths:
            _allow(ruleset, path, allowed & rights)
    _check(_libc().prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc().syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= FILE_RIGHTS
    _check(_libc().syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("<Qi", rights, fd), 0))
    os.close(fd)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(value: int) -> int:
    if value < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return value
