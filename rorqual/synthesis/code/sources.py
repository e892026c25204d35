"""Where projects come from: directories, source archives, releases on a package index, commits of local git repositories."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from rorqual.tasks import TaskError
from rorqual.tasks.language_python import cache_of

TEXT = (".py", ".pyi", ".toml", ".cfg", ".ini", ".txt", ".md", ".rst", ".json", ".lark", ".in", ".yaml", ".yml", ".js", ".mjs",
        ".cjs", ".html", ".j2", ".css", ".xml", ".csv", ".typed")  # fmt: skip
BARE = (
    "PKG-INFO",
    "meson.build",
    "meson.options",
    "LICENSE",
    "COPYING",
    "NOTICE",
    "Makefile",
    "CHANGELOG",
    "CHANGES",
    "HISTORY",
    "NEWS",
)
MAX_FILE_BYTES, MAX_FILES, MAX_BYTES = 400_000, 3000, 24_000_000
SKIPPED = {".git", ".hg", "node_modules", "__pycache__", ".venv", ".tox"}


def fetch(wish: str) -> dict[str, str]:
    """path -> text of a project's files. wish: a directory, a source archive, or name==version. Raises TaskError."""
    place = Path(wish)
    if place.is_dir():
        found = {str(p.relative_to(place)): p for p in sorted(place.rglob("*")) if p.is_file()}
        return texts({name: p.read_bytes() for name, p in found.items() if is_wanted(name, p.stat().st_size)})
    return archive(place.read_bytes() if place.is_file() else download(wish).read_bytes(), wish, strip=True)


def archive(data: bytes, name: str, strip: bool) -> dict[str, str]:
    """The texts of a tar archive. strip: without the first part of each path."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            read = {}
            for member in tar.getmembers():
                path = member.name.partition("/")[2] if strip else member.name
                if member.isfile() and is_wanted(path, member.size):
                    read[path] = tar.extractfile(member).read()  # type: ignore[union-attr]
            return texts(read)
    except (OSError, tarfile.TarError) as error:
        raise TaskError(f"project {name}: {type(error).__name__}: {error}") from None


def is_wanted(path: str, size: int) -> bool:
    """A text of bearable size, outside caches and history."""
    pure = PurePosixPath(path)
    if not pure.parts or SKIPPED & set(pure.parts) or ".." in pure.parts or size > MAX_FILE_BYTES:
        return False
    return pure.suffix in TEXT or pure.name in BARE


def texts(found: Mapping[str, bytes]) -> dict[str, str]:
    """Those that are UTF-8, by path. Raises TaskError where they are too many or too large."""
    if len(found) > MAX_FILES or sum(map(len, found.values())) > MAX_BYTES:
        raise TaskError(f"larger than {MAX_FILES} files or {MAX_BYTES // 10**6} megabytes")
    read = {}
    for name, data in sorted(found.items()):
        try:
            read[name] = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
    return read


def download(wish: str) -> Path:
    """The source archive of name==version by pip, kept in the cache. pip asks the archive's own build code for its metadata."""
    name, equals, version = wish.partition("==")
    if not equals or not version or not name or name.startswith("-"):
        raise TaskError(f"project {wish}: no such file; a package is written name==version")
    folder = cache_of("sources") / wish
    if not list(folder.glob("*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", str(folder), "--", wish]
        done = subprocess.run(command, capture_output=True, text=True)
        if not list(folder.glob("*.tar.gz")):
            last = (done.stderr.strip().split("\n") or [""])[-1]
            raise TaskError(f"project {wish}: pip gave no source archive ({last[:200]})")
    return sorted(folder.glob("*.tar.gz"))[0]


def git(repository: str, *arguments: str) -> bytes:
    """What a git command prints, hooks and file watchers off. Raises TaskError."""
    command = ["git", "--no-pager", "-C", repository, "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True)
    except OSError as error:
        raise TaskError(f"git: {error.strerror}") from None
    if done.returncode:
        raise TaskError(f"{repository}: git {arguments[0]}: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return done.stdout


@lru_cache(maxsize=4)
def tree(repository: str, commit: str) -> dict[str, str]:
    """The texts of a commit. Raises TaskError."""
    if commit.startswith("-"):
        raise TaskError(f"{repository}: no commit {commit}")
    return archive(git(repository, "archive", "--format=tar", commit), f"{repository}@{commit}", strip=False)
