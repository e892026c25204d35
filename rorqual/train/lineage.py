"""A lineage record: every checkpoint knows the stages, data, configs, seeds and parents that made it.

    MODEL/lineage.json    {"id": of this one, "records": {id: record}}, this record and those of all its ancestors

A record names what was made by hashes of its content (tensors one by one, so that shards and file order do not matter), and
its parents by id and content. Ids depend on stage, config, parents and content, never on when or where it ran; that stands
beside them as code and environment. What no stage made (a downloaded checkpoint, a file of conversations, a store of tasks)
is a record of the stage `given`. `rorqual lineage --rebuild` runs the stages again from such a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import rorqual
from rorqual.config import to_mapping
from rorqual.errors import UserError
from rorqual.runlog import environment, write_atomically
from rorqual.tasks.task import digest

FILE = "lineage.json"
GIVEN = "given"
NOT_CONTENT = (
    FILE, "model.safetensors.index.json", "events.jsonl", "environment.json", "config.toml", "manifest.json", "init.txt",
    "quality.json", "quality.html",
)  # fmt: skip
"""Files that say how something was made or found, not what it is. (A store of tasks has its manifest rewritten with counts.)"""

Content = dict[str, str]
"""name -> SHA-256 of each file; all tensors of a checkpoint together are `weights`."""


@dataclass(frozen=True)
class Making:
    """What a stage says of itself: enough to run it again. parents: role -> the file or directory that it took."""

    stage: str
    config: Any
    parents: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments beside the config, such as the shape of a model to be."""
    ranks: int = 1


def publish(part: Path, final: Path, making: Making) -> Path:
    """Give the finished directory `part` its record and its name: both appear together, or neither."""
    write_record(part, making)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    return final


def write_record(path: Path, making: Making) -> str:
    """Write the record of the directory `path`, whose content is complete; its id."""
    records: dict[str, Any] = {}
    parents = []
    for role, source in making.parents.items():
        own, theirs = lineage_of(source)
        records |= theirs
        parents.append({"role": role, "id": own, "content": theirs[own]["content"]})
    config = to_mapping(making.config)
    record = {
        "stage": making.stage, "config": config, "seeds": _seeds(config), "settings": dict(making.settings),
        "parents": parents, "content": content(path), "code": _code(),
        "environment": environment() | {"ranks": making.ranks, "threads": torch.get_num_threads()},
    }  # fmt: skip
    own = identity(record)
    write_atomically(path / FILE, json.dumps({"id": own, "records": {**records, own: record}}, indent=1) + "\n")
    return own


def identity(record: Mapping[str, Any]) -> str:
    return digest([record["stage"], record["config"], record["settings"], record["parents"], record["content"]])


def lineage_of(source: Path) -> tuple[str, dict[str, Any]]:
    """The id of a file or directory, and the records of it and its ancestors.

    A directory without a record is `given`; one that was changed since its record was written is `given` too, with what it
    was before as its parent. A file belongs to the directory that holds it where that has a record of it.
    """
    found = content(source)
    home = source if source.is_dir() else source.parent
    known = read_lineage(home) if (home / FILE).is_file() else None
    if known is not None:
        own, records = known
        recorded = records[own]["content"]
        if recorded == found or (source.is_file() and recorded.get(source.name) == next(iter(found.values()))):
            return own, records
        if source.is_dir():
            before = [{"role": "before a change outside any stage", "id": own, "content": recorded}]
            return _given(found, before, records)
    return _given(found, [], {})


def _given(found: Content, parents: list[Any], records: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    record = {"stage": GIVEN, "config": {}, "seeds": {}, "settings": {}, "parents": parents, "content": found}
    own = identity(record)
    return own, {**records, own: record}


def read_lineage(path: Path) -> tuple[str, dict[str, Any]]:
    """The id and all records of a directory's (or a file's) lineage. Raises UserError where there is none, or it is damaged."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; checkpoints that a stage of rorqual wrote have one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        own, records = value["id"], value["records"]
        wrong = [name for name, record in records.items() if identity(record) != name]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a lineage record: {type(error).__name__}: {error}") from None
    if wrong or own not in records:
        raise UserError(f"{path}: records {', '.join(wrong or [own])} do not have the content that their ids name")
    return own, records


def content(source: Path) -> Content:
    """What a file, a checkpoint or another directory holds, by hashes; logs and records of runs are left out."""
    if source.is_file():
        return {"file": _file_hash(source)}
    if not source.is_dir():
        raise UserError(f"{source}: no such file or directory")
    shards = sorted(source.glob("*.safetensors"))
    if shards:
        others = {p.name: _file_hash(p) for p in sorted(source.glob("*.json*")) if p.name not in NOT_CONTENT}
        return {"weights": weights_hash(shards), **others}
    files = sorted(p for p in source.iterdir() if p.is_file() and p.name not in NOT_CONTENT and not p.name.startswith("."))
    return {p.name: _file_hash(p) for p in files}


def weights_hash(shards: list[Path]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of names."""
    where = {name: shard for shard in shards for name in _names(shard)}
    total = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], "pt") as file:
            tensor = file.get_tensor(name)
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tree(own: str, records: Mapping[str, Any]) -> list[str]:
    """The lineage as lines of text, the newest first; what was shown before is not shown again."""
    seen: set[str] = set()

    def lines(at: str, role: str, indent: str) -> Iterator[str]:
        record = records[at]
        again = "  (above)" if at in seen and record["parents"] else ""
        yield f"{indent}{role}{record['stage']} {at}  {_shown(record)}{again}"
        if not again:
            seen.add(at)
            for parent in record["parents"]:
                yield from lines(parent["id"], f"{parent['role']}: ", indent + "  ")

    return list(lines(own, "", ""))


def _shown(record: Mapping[str, Any]) -> str:
    hashes = record["content"]
    first = "weights" if "weights" in hashes else next(iter(sorted(hashes)), "")
    parts = [f"{first} {hashes[first][:12]}" if first else "empty"]
    parts += [f"{name}={seed}" for name, seed in record["seeds"].items()]
    if "code" in record:
        parts.append(f"code {record['code']['source'][:12]}")
    return "  ".join(parts)


def _seeds(config: Any, at: str = "") -> dict[str, Any]:
    """Every field of a config that is called seed, by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _seeds(value, f"{at}{name}.")
        elif name == "seed":
            found[at + name] = value
    return found


@cache
def _code() -> dict[str, Any]:
    """The version, and a hash of the package's sources: the same for the same code, committed or not."""
    root, total = Path(rorqual.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {"version": rorqual.__version__, "source": total.hexdigest()}


def _names(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
