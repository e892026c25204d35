"""Where a benchmark's rows come from: a local file or directory, or the Hugging Face hub. Every format gives dictionaries."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub and the files of it that hold the rows."""

    repository: str
    pattern: str
    """A glob over the repository's file names, such as main/test-*.parquet."""


@dataclass(frozen=True)
class Defect:
    """A row that is no question. It is counted and named; it is never a wrong answer."""

    where: str
    what: str


class RowError(UserError):
    """A row lacks what its benchmark needs; the text says what."""


def find(data: str | None, hub: Hub | None, name: str) -> list[Path]:
    """The files of a benchmark. Raises UserError that says where to get them."""
    if data is not None:
        return _local(Path(data), name)
    if hub is None:
        raise UserError(f"{name}: has no public address; give its file or directory with --data PATH")
    return _downloaded(hub, name)


def _local(path: Path, name: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; --data names where the rows of {name} are")
    found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    if not found:
        raise UserError(f"{path}: holds none of {', '.join('*' + suffix for suffix in SUFFIXES)}")
    return found


def _downloaded(hub: Hub, name: str) -> list[Path]:
    advice = f"give a local copy with --data PATH (the data set is {hub.repository}, {hub.pattern})"
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise UserError(f"{name}: huggingface_hub is not installed; {advice}") from None
    try:
        root = Path(snapshot_download(hub.repository, repo_type="dataset", allow_patterns=[hub.pattern], etag_timeout=10))
    except Exception as error:  # the hub's client raises many kinds, of the network and of access
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{name}: the Hugging Face hub gave nothing ({type(error).__name__}: {reason}); {advice}") from None
    found = sorted(root.glob(hub.pattern))
    if not found:
        raise UserError(f"{name}: {hub.repository} has no file {hub.pattern}; {advice}")
    return found


def rows(files: Sequence[Path]) -> Iterator[tuple[str, Row | Defect]]:
    """(where, row) of every row; a line that can't be read is a Defect in its place."""
    for file in files:
        for number, row in enumerate(_of_file(file), 1):
            where = f"{file.name}:{number}"
            if isinstance(row, str):
                yield where, Defect(where, row)
            elif isinstance(row, dict):
                yield where, row
            else:
                yield where, Defect(where, f"expected an object, found {type(row).__name__}")


def _of_file(file: Path) -> Iterator[Any]:
    if file.name.endswith(".parquet"):
        import pyarrow.parquet as parquet

        yield from parquet.read_table(file).to_pylist()
        return
    text = _text(file)
    if file.name.endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text))
    elif file.name.endswith(".json"):
        yield from _json_rows(text, file)
    elif file.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (_json_or_reason(line) for line in text.splitlines() if line.strip())
    else:
        raise UserError(f"{file}: expected one of {', '.join(SUFFIXES)}")


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read ({error})") from None


def _json_rows(text: str, file: Path) -> Iterator[Any]:
    """A list of rows, one row, or (some data sets name them so) a row a line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines or not isinstance(_json_or_reason(lines[0]), dict):
            raise UserError(f"{file}: no JSON ({error})") from None
        yield from map(_json_or_reason, lines)
        return
    yield from value if isinstance(value, list) else [value]


def _json_or_reason(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return f"no JSON ({error})"


def need(row: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of `names` that the row has (data sets spell one field in several ways), else RowError."""
    for name in names:
        value = row.get(name)
        if value is not None and value != "":
            return value
    raise RowError(f"lacks the field {' or '.join(names)}")
