"""A directory of safetensors shards: read lazily, one tensor at a time; written whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
REMAP_BYTES = 32_000_000
"""A shard is mapped anew after so many bytes read, so that pages already copied do not count as this process's memory."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype is safetensors' name for it: F32, BF16, F8_E4M3, ..."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class ShardReader:
    """The tensors of a checkpoint directory. Only headers are read until `read` is called.

    Raises UserError that names the file (and the tensor) for a missing, truncated or corrupt shard, an index that does not
    fit the shards, and a tensor that stands in two shards.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.stored = _stored_tensors(self.directory)
        self._open_file: Path | None = None
        self._handle: Any = None
        self._bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str, part: int | None = None) -> Tensor:
        """A tensor, or row `part` of its first dim, on the CPU in its stored dtype. It may be the mapped file itself."""
        stored = self.stored[name]
        handle = self._open(stored.file)
        try:
            tensor = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise UserError(f"{stored.file}: {name}: not readable ({error}); fetch the shard again") from None
        self._bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._handle = self._open_file = None

    def _open(self, file: Path) -> Any:
        if file != self._open_file or self._bytes_read > REMAP_BYTES:
            self._handle = None  # unmap before mapping again
            self._handle, self._open_file, self._bytes_read = _open_shard(file), file, 0
        return self._handle


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); fetch the shard again") from None


def _stored_tensors(directory: Path) -> dict[str, Stored]:
    index = directory / INDEX
    if index.is_file():
        placed = _read_index(index)
    elif (directory / SINGLE).is_file():
        return dict(_header(directory / SINGLE))
    else:
        raise UserError(f"{directory}: no weights: expected {INDEX} or {SINGLE}")
    found: dict[str, Stored] = {}
    for file in sorted(set(placed.values())):
        if not (directory / file).is_file():
            lost = next(name for name, place in placed.items() if place == file)
            raise UserError(f"{index}: names the shard {file} (of {lost}), which is not in {directory}")
        for name, stored in _header(directory / file):
            if placed.get(name) != file:
                raise UserError(f"{directory / file}: {name}: {INDEX} says it is in {placed.get(name, 'no shard')}")
            found[name] = stored
    if lost_names := [name for name in placed if name not in found]:
        raise UserError(f"{directory / placed[lost_names[0]]}: {lost_names[0]}: missing, though {INDEX} says it is here")
    return found


def _read_index(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index: expected JSON with a weight_map ({error!r})") from None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{index}: weight_map: expected tensor names with file names")
    if outside := [file for file in placed.values() if Path(file).name != file]:
        raise UserError(f"{index}: weight_map: expected files beside the index, found {outside[0]!r}")
    return placed


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    handle = _open_shard(file)
    for name in handle.keys():  # noqa: SIM118 - not a mapping
        tensor = handle.get_slice(name)
        yield name, Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())


@dataclass
class ShardWriter:
    """Writes tensors, in the order they are added, into shards of at most shard_bytes (a larger tensor stands alone)."""

    directory: Path
    shard_bytes: int = SHARD_BYTES
    total_bytes: int = 0
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _shards: list[list[str]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        """The tensor must not change until `finish`: it is written when its shard is full."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes

    def finish(self) -> list[str]:
        """Write the last shard, name all of them, and write the index where there are several; the files' names."""
        self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            os.rename(self._part(i), self.directory / name)
        if count > 1:
            placed = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            text = json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": placed}, indent=2)
            (self.directory / INDEX).write_text(text + "\n", encoding="utf-8")
        return names

    def _flush(self) -> None:
        if self._pending:
            part = self._part(len(self._shards))
            save_tensors(_unaliased(self._pending), part)
            self._shards.append(list(self._pending))
            self.total_bytes += self._pending_bytes
            self._pending, self._pending_bytes = {}, 0

    def _part(self, i: int) -> Path:
        return self.directory / f"part-{i:05d}"


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file, as readable to others as its directory (safetensors alone makes it private)."""
    save_file(tensors, str(file), metadata={"format": "pt"})
    os.chmod(file, file.parent.stat().st_mode & 0o666)


def _unaliased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that are the same memory (an embedding and its copy in the MTP layer); those are copied."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen and tensor.numel() else tensor
        seen.add(tensor.data_ptr())
    return own


@contextmanager
def whole_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, that becomes `path` when the block ends well, and vanishes when it raises or is terminated.

    What stood at `path` (an empty directory, or with overwrite a checkpoint) stands there until then. Where the process is
    killed outright, `path` is untouched, and the next writer to it removes what the dead one left.
    """
    path = Path(os.path.abspath(path))
    require_free(path, overwrite)
    _remove_leftovers(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        with _termination_raises():
            yield partial
            _sync(partial)
            _put(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(path: Path, overwrite: bool) -> None:
    """Raises UserError where writing to `path` would replace something it should not."""
    if path.is_dir() and (not any(path.iterdir()) or (overwrite and (path / "config.json").is_file())):
        return
    if path.exists():
        kind = "is not a checkpoint; choose another path" if overwrite else "exists; choose another path, or overwrite it"
        raise UserError(f"{path}: {kind}")


def _remove_leftovers(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM as an exception, so that it cleans up as an interrupt does; where nobody handles it otherwise."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _sync(directory: Path) -> None:
    for file in [*directory.iterdir(), directory]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _put(partial: Path, path: Path) -> None:
    if path.exists() and any(path.iterdir()):
        _exchange(partial, path)  # what was replaced now has the name of the partial, and goes with it
    else:
        os.rename(partial, path)


def _exchange(a: Path, b: Path) -> None:
    """Swap two paths in one step (Linux's renameat2), so that at no moment there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) != 0:
        code = ctypes.get_errno()
        raise UserError(f"{b}: can't be replaced in one step here ({os.strerror(code)}); write to another path, then move it")


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a floating safetensors dtype; None for others."""
    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
    }.get(name)
