"""Where documents come from: this machine, and files. A corpus is named `debian`, `manual`, `iso`, `python`, `wordnet`,
`facts` (made up, the same everywhere), or by the path of a .jsonl, .jsonl.gz or .parquet file with fields url, title, text
(others become lines `name: value`).

Corpora are read where they are and never stored with tasks; each reader states the licence of what it reads.
"""

from __future__ import annotations

import gettext
import gzip
import importlib
import inspect
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.tasks.retrieval import facts
from rorqual.tasks.retrieval.document import Document
from rorqual.tasks.task import TaskError

ISO_FOLDER, LOCALES = Path("/usr/share/iso-codes/json"), Path("/usr/share/locale")
MANUAL_FOLDER = Path("/usr/share/man")
WORDNET_FOLDER = Path("/usr/share/wordnet")
LANGUAGES = ("de", "es", "fr")
"""Of the translated names in the pages of codes."""
PACKAGE_FIELDS = (
    "Package", "Source", "Version", "Section", "Priority", "Architecture", "Maintainer", "Homepage", "Installed-Size",
    "Depends", "Recommends", "Suggests", "Tag", "Description",
)  # fmt: skip
MODULE_NAMES = """
abc argparse array ast asyncio base64 bisect calendar cmath cmd codecs collections colorsys configparser contextlib copy
csv dataclasses datetime decimal difflib dis email enum fileinput filecmp fnmatch fractions functools getpass gettext
glob graphlib gzip hashlib heapq hmac html http imaplib inspect io ipaddress itertools json keyword linecache locale
logging lzma mailbox math mimetypes multiprocessing netrc numbers operator os pathlib pickle pkgutil platform plistlib
poplib pprint queue quopri random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket
socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys tarfile tempfile textwrap
threading time timeit token tokenize trace traceback types typing unicodedata unittest urllib.parse urllib.request uuid
wave weakref webbrowser xml.dom xml.etree.ElementTree xmlrpc.client zipfile zipimport zlib zoneinfo
"""
MODULES = tuple(MODULE_NAMES.split())


@dataclass(frozen=True)
class Corpus:
    """How a named corpus is read. Raises TaskError, with what to do, where the machine does not hold it."""

    read: Callable[[], Iterable[Document]]
    licence: str
    source: str


def read_corpus(name: str) -> list[Document]:
    """The documents of a corpus, in an order that depends on their content alone, one per url."""
    documents = list(CORPORA[name].read()) if name in CORPORA else list(_file(Path(name)))
    unique = {document.url: document for document in reversed(documents)}
    return sorted(unique.values(), key=lambda document: document.url)


def package_records() -> Iterator[dict[str, str]]:
    """The records of all known Debian packages, field -> value, folded lines joined."""
    try:
        dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.CalledProcessError) as error:
        raise TaskError(f"corpus debian: apt-cache dumpavail fails ({error}); it needs a Debian machine") from None
    if not dump.strip():
        raise TaskError("corpus debian: apt knows no package; run apt-get update")
    for block in dump.split("\n\n"):
        record: dict[str, str] = {}
        field = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t") and field:
                record[field] += " " + line.strip()
            elif ": " in line:
                field, _, value = line.partition(": ")
                record[field] = value.strip()
        if "Package" in record:
            yield record


def _debian() -> Iterator[Document]:
    for record in package_records():
        name = record["Package"]
        lines = [f"{field}: {record[field]}" for field in PACKAGE_FIELDS if field in record]
        title = f"{name}: {record.get('Description', '')}".rstrip(": ")
        yield Document(f"https://packages.debian.example/{name}", title, "\n".join(lines))


def _manual() -> Iterator[Document]:
    paths = sorted(path for section in ("1", "5", "7", "8") for path in (MANUAL_FOLDER / f"man{section}").glob("*.gz"))
    if not paths:
        raise TaskError(f"corpus manual: no page under {MANUAL_FOLDER}; install man-db and manpages")
    for path in paths:
        name, _, section = path.name.removesuffix(".gz").rpartition(".")
        try:
            text = _plain_roff(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
        except (OSError, EOFError):
            continue
        if text:
            yield Document(f"https://manual.example/{section}/{name}", f"{name}({section})", text)


_ROFF_ESCAPES = [(re.compile(p), r) for p, r in (
    (r"\\f(?:\[[^]]*\]|\(..|.)", ""), (r"\\s[-+]?\d+", ""), (r"\\\*?\[[^]]*\]|\\\*?\((..)", ""), (r"\\[&|^/,:%]", ""),
    (r"\\-", "-"), (r"\\e", r"\\"), (r"\\~|\\ ", " "), (r'\\"[^\n]*', ""),
)]  # fmt: skip


def _plain_roff(source: str) -> str:
    """Text of a page, macros stripped: rough, since only words and lines matter for retrieval."""
    lines = []
    for line in source.split("\n"):
        if line.startswith(('.\\"', "'", ".so ", ".de", ".if", ".ie", ".el", ".nr", ".ds", ".TH", ".Dd", ".Dt", ".Os")):
            continue
        if line.startswith("."):
            macro, _, rest = line[1:].partition(" ")
            line = ("\n" + rest.upper() if macro in ("SH", "Sh") else rest).replace('"', "")
        for pattern, replacement in _ROFF_ESCAPES:
            line = pattern.sub(replacement, line)
        if line.strip():
            lines.append(line.rstrip())
    return "\n".join(lines).strip()


def _iso() -> Iterator[Document]:
    paths = sorted(ISO_FOLDER.glob("iso_*.json"))
    if not paths:
        raise TaskError(f"corpus iso: nothing under {ISO_FOLDER}; install iso-codes")
    for path in paths:
        domain = path.stem
        translate = {language: _translations(domain, language) for language in LANGUAGES}
        for entries in json.loads(path.read_text(encoding="utf-8")).values():
            for entry in entries:
                yield _code_page(domain, entry, translate)


def _translations(domain: str, language: str) -> gettext.NullTranslations:
    return gettext.translation(domain, str(LOCALES), [language], fallback=True)


def _code_page(domain: str, entry: Mapping[str, str], translate: Mapping[str, gettext.NullTranslations]) -> Document:
    name = entry["name"]
    code = next(entry[key] for key in ("code", "alpha_3", "alpha_4", "alpha_2", "numeric") if key in entry)
    lines = [f"Standard: {domain.replace('_', ' ', 1).upper()}"] + [f"{key}: {value}" for key, value in sorted(entry.items())]
    for language, catalogue in translate.items():
        if (local := catalogue.gettext(name)) != name:
            lines.append(f"name ({language}): {local}")
    return Document(f"https://codes.example/{domain}/{code}", name, "\n".join(lines))


def _python() -> Iterator[Document]:
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        yield from _module_pages(module_name, module)


def _module_pages(module_name: str, module: Any) -> Iterator[Document]:
    yield Document(f"https://python.example/{module_name}", f"module {module_name}", inspect.getdoc(module) or module_name)
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        for full_name, item in [(name, member), *_methods(name, member)]:
            if text := inspect.getdoc(item):
                full = f"{module_name}.{full_name}"
                yield Document(f"https://python.example/{full}", full, f"{full}{_signature(item)}\n\n{text}")


def _methods(name: str, member: Any) -> list[tuple[str, Any]]:
    if not inspect.isclass(member):
        return []
    return [(f"{name}.{m}", f) for m, f in sorted(vars(member).items()) if not m.startswith("_") and callable(f)]


def _signature(item: Any) -> str:
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(item)))
    except (TypeError, ValueError):
        return ""


def _wordnet() -> Iterator[Document]:
    if not (WORDNET_FOLDER / "data.noun").exists():
        raise TaskError(f"corpus wordnet: nothing under {WORDNET_FOLDER}; install wordnet-base")
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET_FOLDER / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            text = f"Words: {', '.join(words)}\nPart of speech: {part}\nMeaning: {gloss.strip()}"
            yield Document(f"https://words.example/{part}/{fields[0]}", words[0], text)


def _file(path: Path) -> Iterator[Document]:
    if not path.is_file():
        raise TaskError(f"corpus {path}: no such file, and no corpus of that name; there are {', '.join(CORPORA)}")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    for number, row in enumerate(rows):
        text, title = row.get("text"), str(row.get("title") or f"{path.stem} {number}")
        if not isinstance(text, str):
            raise TaskError(f"{path}: row {number}: expected a field text that holds a string, found {type(text).__name__}")
        extra = [f"{key}: {value}" for key, value in row.items() if key not in ("url", "title", "text") and value is not None]
        yield Document(str(row.get("url") or f"https://{path.stem}.example/{number}"), title, "\n".join([*extra, text]))


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise TaskError(f"{path}: line {number}: {error}") from None
            if not isinstance(row, dict):
                raise TaskError(f"{path}: line {number}: expected an object, found {type(row).__name__}")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise TaskError(f"{path}: reading Parquet needs pyarrow; pip install rorqual[synthesis]") from None
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


CORPORA: dict[str, Corpus] = {
    "debian": Corpus(_debian, "each package's own terms", "apt-cache dumpavail"),
    "manual": Corpus(_manual, "each page's own terms", str(MANUAL_FOLDER)),
    "iso": Corpus(_iso, "LGPL-2.1-or-later", str(ISO_FOLDER)),
    "python": Corpus(_python, "PSF-2.0", "docstrings of the standard library"),
    "wordnet": Corpus(_wordnet, "WordNet 3.0 licence", str(WORDNET_FOLDER)),
    facts.NAME: Corpus(facts.pages, "CC0-1.0", "made up"),
}
