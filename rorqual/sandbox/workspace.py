"""The writable part of a sandbox: a size-limited file system in memory that vanishes with its owner.

A holder process has a mount namespace of its own, with a tmpfs in it; each run enters that namespace before it is confined.
Nothing is mounted in the machine's own namespace and no directory is made there, so even a killed owner leaves nothing: the
holder reads a pipe from its owner, ends at its end, and the kernel drops namespace and files.

Files are reached from outside through /proc/HOLDER/root by directory descriptors, one name at a time, never through a
link: what a program planted cannot lead the reader elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path, PurePosixPath

from rorqual.sandbox.protocol import MEBIBYTE, SandboxError

MOUNT_POINT = "/sys"
"""Covered in the holder's namespace only. It exists on every Linux machine, and nothing confined needs what it covers."""
INODES_PER_MB = 256
HOSTS = "127.0.0.1 localhost sandbox\n::1 localhost\n"
"""Programs that serve themselves on localhost find it."""
DIRECTORY_MODE, FILE_MODE = 0o755, 0o644


class Workspace:
    """A tmpfs with box (the working directory), tmp, shm, and the file hosts. uid: its owner; None leaves it to the caller."""

    def __init__(self, size_mb: int, uid: int | None):
        self._uid = uid
        self._holder = _start_holder(size_mb, is_root=uid is not None)
        self.pid = self._holder.pid
        try:
            self._root = os.open(f"/proc/{self.pid}/root{MOUNT_POINT}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self._end_holder()
            raise SandboxError(f"sandbox: its file system can't be reached: {error}") from None
        for name, mode in (("box", 0o700), ("tmp", 0o1777), ("shm", 0o1777)):
            os.mkdir(name, dir_fd=self._root)
            os.chmod(name, mode, dir_fd=self._root)
            self._own(name)
        with open(os.open("hosts", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=self._root), "w") as file:
            file.write(HOSTS)

    @property
    def enter(self) -> list[str]:
        """The start of a command line that runs its rest in the holder's namespaces."""
        flags = [] if self._uid is not None else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.pid), *flags, "--mount"]

    def outside(self, name: str = "box") -> str:
        """The path of a part of it as this process sees it."""
        return f"/proc/{self.pid}/root{MOUNT_POINT}/{name}"

    @staticmethod
    def source(name: str) -> str:
        """The path of a part of it in the holder's namespace."""
        return f"{MOUNT_POINT}/{name}"

    def write(self, path: str, data: bytes | str | Path) -> None:
        with contextlib.closing(Tree(os.open("box", os.O_PATH | os.O_DIRECTORY, dir_fd=self._root), self._uid)) as tree:
            tree.write(path, data)

    def read(self, path: str, max_bytes: int) -> bytes:
        with contextlib.closing(Tree(os.open("box", os.O_PATH | os.O_DIRECTORY, dir_fd=self._root), self._uid)) as tree:
            return tree.read(path, max_bytes)

    def _own(self, name: str) -> None:
        if self._uid is not None:
            os.chown(name, self._uid, self._uid, dir_fd=self._root, follow_symlinks=False)

    def _end_holder(self) -> None:
        self._holder.kill()
        self._holder.wait()
        for stream in (self._holder.stdin, self._holder.stdout):
            stream.close()  # type: ignore[union-attr]

    def close(self) -> None:
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
            self._end_holder()


def _start_holder(size_mb: int, is_root: bool) -> subprocess.Popen:
    options = f"size={size_mb * MEBIBYTE},nr_inodes={size_mb * INODES_PER_MB + 16},mode=755,nosuid,nodev"
    namespaces = ["--mount"] if is_root else ["--user", "--map-root-user", "--mount"]
    script = f"mount -t tmpfs -o {options} none {MOUNT_POINT} && echo ok && exec cat"
    command = ["unshare", *namespaces, "--propagation", "private", "/bin/sh", "-c", script]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, bufsize=0
    )
    answer = holder.stdout.read(1000)  # type: ignore[union-attr]
    if answer != b"ok\n":
        holder.kill()
        holder.wait()
        why = answer.decode(errors="replace").strip() or f"exit status {holder.returncode}"
        raise SandboxError(
            f"sandbox: no mount namespace can be had ({why}); run as root, or allow unprivileged user namespaces; "
            "rorqual doctor says how. The process back end works without, and is weaker",
            "unavailable",
        )
    return holder


class Tree:
    """A directory whose content is not trusted, by descriptor. Takes the descriptor over."""

    def __init__(self, descriptor: int, uid: int | None):
        self._fd, self._uid = descriptor, uid

    def close(self) -> None:
        os.close(self._fd)

    def write(self, path: str, data: bytes | str | Path) -> None:
        """Write a file, or copy a file or a directory's plain files and directories (links are refused)."""
        parts = _parts(path)
        if isinstance(data, Path) and data.is_dir():
            for source in sorted(data.rglob("*")):
                if source.is_symlink():
                    raise SandboxError(f"sandbox: {source} is a link; upload what it points to")
                if source.is_file():
                    self.write(str(PurePosixPath(*parts, *source.relative_to(data).parts)), source)
            return
        parent = self._descend(parts[:-1], is_made=True, path=path)
        try:
            self._write_file(parent, parts[-1], data)
        except OSError as error:
            raise SandboxError(f"sandbox: can't write {path}: {error.strerror}") from None
        finally:
            os.close(parent)

    def _write_file(self, parent: int, name: str, data: bytes | str | Path) -> None:
        # A fresh file: what stands there may be a link, a pipe, or open in a running program.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE, dir_fd=parent)
        with os.fdopen(fd, "wb") as target:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, target)
                os.fchmod(fd, FILE_MODE | (0o111 if os.access(data, os.X_OK) else 0))
            else:
                target.write(data.encode() if isinstance(data, str) else data)
                os.fchmod(fd, FILE_MODE)
            if self._uid is not None:
                os.fchown(fd, self._uid, self._uid)

    def read(self, path: str, max_bytes: int) -> bytes:
        parts = _parts(path)
        parent = self._descend(parts[:-1], is_made=False, path=path)
        try:
            # Non-blocking: a pipe that nobody writes must not hang the reader.
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            raise SandboxError(f"sandbox: no file {path}", "absent") from None
        except OSError as error:
            raise SandboxError(f"sandbox: can't read {path}: {error.strerror} (a link is not followed)") from None
        finally:
            os.close(parent)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SandboxError(f"sandbox: {path} is not a plain file")
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise SandboxError(f"sandbox: {path} is larger than {max_bytes} bytes", "output")
        return data

    def _descend(self, parts: tuple[str, ...], is_made: bool, path: str) -> int:
        at = os.dup(self._fd)
        for part in parts:
            try:
                if is_made:
                    self._make_directory(part, at)
                inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            except FileNotFoundError:
                raise SandboxError(f"sandbox: no file {path}", "absent") from None
            except OSError as error:
                raise SandboxError(f"sandbox: {part} in {path} is no directory: {error.strerror}") from None
            finally:
                os.close(at)
            at = inner
        return at

    def _make_directory(self, name: str, parent: int) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, DIRECTORY_MODE, dir_fd=parent)
            if self._uid is not None:
                os.chown(name, self._uid, self._uid, dir_fd=parent, follow_symlinks=False)


def _parts(path: str) -> tuple[str, ...]:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise SandboxError(f"sandbox: {path!r} is not a path below the working directory")
    return parts
