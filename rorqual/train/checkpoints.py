"""Training checkpoints: everything a stage needs to go on bit for bit, written so that a crash or a full disk loses nothing.

    checkpoints/step-00000100/    tensors (torch.distributed.checkpoint), facts.json, files.json (SHA-256 of each file)

A checkpoint is written under another name, read back and checked, and only then gets its name; only after that the oldest
ones go. The tensors are stored by name and global shape, so what any number of ranks wrote, any other number reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rorqual.errors import UserError
from rorqual.parallel.world import World
from rorqual.runlog import RunLog

FILES, FACTS = "files.json", "facts.json"


class Checkpoints:
    """The checkpoints of one stage; `keep` of them stay."""

    def __init__(self, directory: str | os.PathLike, world: World, log: RunLog, keep: int = 2):
        self.directory, self.world, self.log, self.keep = Path(directory), world, log, keep

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save under the number of steps done. Raises UserError where the disk refuses; earlier checkpoints then still stand."""
        part = self.directory / f".step-{step:08d}.part"
        final = self.directory / f"step-{step:08d}"
        if self.world.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.world.barrier()
        try:
            with warnings.catch_warnings(action="ignore"):  # that one process saves alone is what is meant
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part), no_dist=self.world.size == 1)  # pyright: ignore
            if self.world.is_main:
                (part / FACTS).write_text(json.dumps({**facts, "step": step}), encoding="utf-8")
                digests = {path.name: _digest(path) for path in sorted(part.iterdir())}
                (part / FILES).write_text(json.dumps(digests), encoding="utf-8")
                _flush(part)
                _check(part)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(part, final)
                _flush_directory(self.directory)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.directory / f"step-{old:08d}")
        except (OSError, dcp.api.CheckpointException) as error:
            shutil.rmtree(part, ignore_errors=True)
            reason, good = _first_reason(error), self.steps() or "none"
            raise UserError(
                f"{final}: could not be saved ({reason}); earlier checkpoints: {good}; start again to go on"
            ) from None
        self.world.barrier()

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill the tensors from the newest checkpoint that is whole; its facts, or None where there is none.

        A damaged one is passed over, with an event in the log. Raises UserError where names or shapes differ.
        """
        for step in reversed(self.steps()):
            path = self.directory / f"step-{step:08d}"
            try:
                _check(path)
            except (OSError, ValueError) as error:
                self.log.event("damaged checkpoint passed over", path=path.name, reason=str(error))
                continue
            try:
                with warnings.catch_warnings(action="ignore"):
                    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=self.world.size == 1)  # pyright: ignore
            except dcp.api.CheckpointException as error:
                raise UserError(f"{path}: does not fit this model: {_first_reason(error)}") from None
            return json.loads((path / FACTS).read_text(encoding="utf-8"))
        return None

    def steps(self) -> list[int]:
        """The steps at which a checkpoint stands, ascending."""
        found = (re.fullmatch(r"step-(\d{8})", path.name) for path in self.directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)


def random_state() -> dict[str, Tensor]:
    """The state of torch's random generators. Training draws from none (batches are functions of seed and step); kept for
    whoever adds something that does."""
    return {"random.cpu": torch.get_rng_state()}


def restore_random(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])


def _check(path: Path) -> None:
    """Raises ValueError or OSError where a file of the checkpoint is missing or other than what was written."""
    digests = json.loads((path / FILES).read_text(encoding="utf-8"))
    for name, digest in digests.items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is damaged")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(directory: Path) -> None:
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error)
