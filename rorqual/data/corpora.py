"""Corpora by name: text found on any machine, plain files, JSONL, Parquet, and Hugging Face datasets.

| name | what it reads |
| --- | --- |
| `python` | sources of Python's standard library |
| `packages` | sources and docs of the installed packages |
| `man` | manual pages, roff requests dropped |
| `doc` | /usr/share/doc |
| `files:PATH` | one file, a directory (all text below it) or a glob; a document for each file |
| `jsonl:PATH` | a document for each line: its field `text`, or `jsonl:PATH#field` |
| `parquet:PATH` | a document for each row: its column `text`, or `parquet:PATH#column` |
| `hf:NAME` | a Hugging Face dataset (needs `datasets`): `hf:NAME#column`, `hf:NAME@split#column` |

Order is by path, so that a corpus is the same on every run. What cannot be used is counted, never silent: see `Tally`.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.errors import UserError

TEXT_SUFFIXES = frozenset((".py", ".pyi", ".md", ".rst", ".txt", ".html", ".c", ".h", ".toml", ".tex", ".org", ""))
MAX_FILE_BYTES = 4 << 20
"""A larger file is a table or a dump more often than prose; it is skipped and counted."""
REPLACED_SHARE = 0.01
"""A file whose undecodable bytes make more than this share of its characters is skipped; below it they become U+FFFD."""


@dataclass(frozen=True)
class Document:
    text: str
    origin: str
    """Where it came from: a path, or path:line."""


@dataclass
class Tally:
    """What became of each document that was met: the numbers that `prepare` logs."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def documents(name: str, tally: Tally) -> Iterator[Document]:
    """The non-empty documents of a corpus, in order.

    Raises UserError for an unknown name, a path that isn't there, a missing field, or a corpus with no document in it.
    """
    kind, _, rest = name.partition(":")
    if kind not in READERS:
        raise UserError(f"corpus {name!r}: unknown kind {kind!r}; accepted: {', '.join(READERS)}")
    if kind in NAMED and rest:
        raise UserError(f"corpus {name!r}: {kind} takes no path")
    if kind not in NAMED and not rest:
        raise UserError(f"corpus {name!r}: needs a path, as in {kind}:PATH")
    found = False
    for document in READERS[kind](rest, tally):
        if document.text.strip():
            found = True
            tally.add("read")
            yield document
        else:
            tally.add("empty")
    if not found:
        raise UserError(f"corpus {name!r}: holds no readable text ({tally.counts or 'nothing found'})")


def decode(data: bytes, tally: Tally) -> str | None:
    """UTF-8 text; few undecodable bytes become U+FFFD, many (or a NUL) mean that this is no text: None. Both are counted."""
    if b"\0" in data:
        return tally.add("binary")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
    if text.count("�") > REPLACED_SHARE * len(text):
        return tally.add("undecodable")
    tally.add("bytes replaced")
    return text


def plain_from_roff(text: str) -> str:
    """The words of a manual page: requests become headings or nothing, font changes and escapes go."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".SH", ".Sh", ".SS", ".Ss")):
            lines.append("\n" + line[3:].strip().strip('"'))
        elif line.startswith((".B ", ".I ", ".BR ", ".BI ", ".IR ", ".IP ", ".Nm ", ".Nd ")):
            lines.append(line.split(" ", 1)[1].replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|.)|\\[&|^%/,]", "", "\n".join(lines))
    return re.sub(r"\\\((..)", " ", text).replace("\\-", "-").replace("\\e", "\\").replace("\\(aq", "'")


def _python(_: str, tally: Tally) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    yield from _tree(root, tally, lambda p: p.suffix == ".py" and "site-packages" not in p.parts and "test" not in p.parts)


def _packages(_: str, tally: Tally) -> Iterator[Document]:
    for root in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        yield from _tree(Path(root), tally, lambda p: p.suffix in (".py", ".md", ".rst"))


def _man(_: str, tally: Tally) -> Iterator[Document]:
    for document in _tree(
        Path("/usr/share/man"),
        tally,
        lambda p: re.fullmatch(r"man\d", p.parent.name) is not None and p.parent.parent.name == "man",
    ):
        yield Document(plain_from_roff(document.text), document.origin)


def _doc(_: str, tally: Tally) -> Iterator[Document]:
    yield from _tree(Path("/usr/share/doc"), tally, lambda p: Path(p.name.removesuffix(".gz")).suffix in TEXT_SUFFIXES)


def _files(pattern: str, tally: Tally) -> Iterator[Document]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        yield from _tree(path, tally, lambda p: Path(p.name.removesuffix(".gz")).suffix in TEXT_SUFFIXES)
        return
    for found in _paths(pattern):
        yield from _file(found, tally)


def _jsonl(rest: str, tally: Tally) -> Iterator[Document]:
    pattern, _, name = rest.partition("#")
    for path in _paths(pattern):
        for number, line in enumerate(_read(path).splitlines(), 1):
            if not line.strip():
                continue
            text = decode(line, tally)
            try:
                value = json.loads(text or "")
            except json.JSONDecodeError:
                tally.add("not JSON")
                continue
            yield Document(_field(value, name or "text", f"{path}:{number}"), f"{path}:{number}")


def _parquet(rest: str, tally: Tally) -> Iterator[Document]:
    import pyarrow.parquet

    pattern, _, name = rest.partition("#")
    column = name or "text"
    for path in _paths(pattern):
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Parquet file: {error}") from None
        if column not in file.schema_arrow.names:
            raise UserError(f"{path}: has no column {column!r}; it has: {', '.join(file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield Document(str(value or ""), f"{path}:{row}")
                row += 1


def _hf(rest: str, tally: Tally) -> Iterator[Document]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise UserError(f"corpus hf:{rest}: needs the library of Hugging Face datasets; pip install datasets") from None
    name, _, column = rest.partition("#")
    name, _, split = name.partition("@")
    for row, value in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True)):
        yield Document(_field(value, column or "text", f"{name}:{row}"), f"{name}:{row}")


def _field(value: object, name: str, origin: str) -> str:
    if not isinstance(value, dict) or name not in value:
        keys = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise UserError(f"{origin}: has no field {name!r}; found: {keys}")
    return str(value[name])


def _tree(root: Path, tally: Tally, wanted: Callable[[Path], bool]) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and wanted(path):
            yield from _file(path, tally)


def _file(path: Path, tally: Tally) -> Iterator[Document]:
    if path.stat().st_size > MAX_FILE_BYTES:
        tally.add("too large")
        return
    try:
        data = _read(path)
    except (OSError, EOFError, zlib.error):
        tally.add("unreadable")
        return
    text = decode(data, tally)
    if text is not None:
        yield Document(text, str(path))


def _read(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _paths(pattern: str) -> list[Path]:
    found = sorted(Path(p) for p in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"{pattern}: no such file")
    return found


NAMED = ("python", "packages", "man", "doc")
READERS: dict[str, Callable[[str, Tally], Iterator[Document]]] = {
    "python": _python,
    "packages": _packages,
    "man": _man,
    "doc": _doc,
    "files": _files,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": _hf,
}
