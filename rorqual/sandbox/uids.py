"""A user id of its own for each sandbox, safe across processes, with nothing to clean up.

Each uid of the range is one byte of a lock file; an open-file-description lock on that byte is the lease. The kernel drops
the lock when its holder closes the file or dies, however it dies, so no lease outlives its sandbox's owner.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from rorqual.sandbox.protocol import SandboxError

DIRECTORIES = (Path("/run"), Path("/var/tmp"))
"""Where the lock file may live: the first that is writable. Fixed, so that all processes of the machine agree."""
LOCK_NAME = "rorqual-sandbox-uids"


class UidLease:
    """One uid of a range, held until close. Needs root, since only root can take another uid."""

    def __init__(self, first: int, last: int):
        self._fd = os.open(_lock_path(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self.uid = self._take(first, last)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, first: int, last: int) -> int:
        # Each process begins elsewhere, so that a uid just released is not at once another sandbox's.
        count = last - first + 1
        start = int.from_bytes(os.urandom(4), "little") % count
        for i in range(count):
            uid = first + (start + i) % count
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, uid, 1, 0))
                return uid
            except OSError:
                continue
        raise SandboxError(f"sandbox: all {count} uids from {first} to {last} are in use; close sandboxes or widen uids", "busy")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock_path() -> Path:
    for directory in DIRECTORIES:
        if os.access(directory, os.W_OK):
            return directory / LOCK_NAME
    raise SandboxError(f"sandbox: can write to none of {', '.join(map(str, DIRECTORIES))}, to keep track of uids in use")
