"""Real data found on this machine, as entities: a label that is unique, a kind, and a measure; each with its provenance.

A corpus that this machine lacks is a recorded value (`Missing`); another one is taken only where the world's plan names a
second choice, and the world then says so.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rorqual.tasks import Provenance

Entity = tuple[str, str, int]
"""(label, kind, measure)."""


@dataclass(frozen=True)
class Corpus:
    """What was read."""

    name: str
    kind: str
    """What the kinds are, as a column name: section, region, protocol."""
    measure: str
    """What the measure is, as a column name with its unit: installed_kb, port."""
    entities: tuple[Entity, ...]
    provenance: Provenance


@dataclass(frozen=True)
class Missing:
    """A corpus that could not be had, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    path: str
    kind: str
    measure: str
    licence: str
    read: Callable[[str], Iterator[Entity]]


def _zones(text: str) -> Iterator[Entity]:
    for line in text.splitlines():
        if not line.startswith("#"):
            _, position, zone = line.split("\t")[:3]
            region, _, city = zone.rpartition("/")
            yield city.replace("_", " "), region.partition("/")[0] or zone, _degrees(position)


def _degrees(position: str) -> int:
    """Degrees from the equator, of +DDMM+DDDMM or with seconds."""
    return int(position[1:3])


def _countries(text: str) -> Iterator[Entity]:
    for record in json.loads(text)["3166-1"]:
        yield record.get("common_name", record["name"]), f"{record['alpha_2'][0]}-codes", int(record["numeric"])


def _subdivisions(text: str) -> Iterator[Entity]:
    for record in json.loads(text)["3166-2"]:
        if record["code"][:2] in ("FR", "DE", "IT", "ES", "JP", "US", "BR", "IN", "NG", "KE"):
            yield record["name"], record["code"][:2], len(record["name"])


def _currencies(text: str) -> Iterator[Entity]:
    for record in json.loads(text)["4217"]:
        yield record["name"], f"{record['alpha_3'][0]}-codes", int(record["numeric"])


def _languages(text: str) -> Iterator[Entity]:
    types = {"L": "living", "E": "extinct", "H": "historical", "C": "constructed", "A": "ancient"}
    for index, record in enumerate(json.loads(text)["639-3"]):
        if record["scope"] == "I" and record["type"] in types and (record["type"] != "L" or index % 9 == 0):
            yield record["name"], types[record["type"]], len(record["name"])


def _scripts(text: str) -> Iterator[Entity]:
    for record in json.loads(text)["15924"]:
        yield record["name"], f"{int(record['numeric']) // 100}xx", int(record["numeric"])


def _packages(text: str) -> Iterator[Entity]:
    for record in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in record.splitlines() if ": " in line and not line.startswith(" "))
        if fields.keys() >= {"Package", "Section", "Installed-Size"}:
            yield fields["Package"], fields["Section"].rpartition("/")[2], int(fields["Installed-Size"])


def _services(text: str) -> Iterator[Entity]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) >= 2:
            port, _, protocol = words[1].partition("/")
            yield words[0], protocol, int(port)


def _media_types(text: str) -> Iterator[Entity]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) >= 2:
            yield words[0].partition("/")[2], words[0].partition("/")[0], len(words[1]) * 10 + len(words) - 1


def _manual_pages(path: str) -> Iterator[Entity]:
    for section in ("1", "5", "7", "8"):
        for page in sorted(Path(path, f"man{section}").glob("*.gz"))[::7]:
            yield page.name.partition(".")[0], f"section {section}", len(page.name)


def _characters(path: str) -> Iterator[Entity]:
    categories = {"Sm": "mathematical", "So": "symbol", "Po": "punctuation", "Sc": "currency sign"}
    for code in range(0x21, 0x2BFF):
        name = unicodedata.name(chr(code), "")
        if name and unicodedata.category(chr(code)) in categories and len(name) < 40:
            yield name.capitalize(), categories[unicodedata.category(chr(code))], code


ISO = "/usr/share/iso-codes/json/"
LGPL = "LGPL-2.1-or-later (iso-codes)"
SOURCES: dict[str, Source] = {
    "zones": Source("/usr/share/zoneinfo/zone1970.tab", "region", "degrees_from_equator", "public domain (tzdata)", _zones),
    "countries": Source(ISO + "iso_3166-1.json", "code_group", "numeric_code", LGPL, _countries),
    "subdivisions": Source(ISO + "iso_3166-2.json", "country", "name_length", LGPL, _subdivisions),
    "currencies": Source(ISO + "iso_4217.json", "code_group", "numeric_code", LGPL, _currencies),
    "languages": Source(ISO + "iso_639-3.json", "vitality", "name_length", LGPL, _languages),
    "scripts": Source(ISO + "iso_15924.json", "number_group", "number", LGPL, _scripts),
    "packages": Source("/var/lib/dpkg/status", "section", "installed_kb", "names and sizes only (Debian)", _packages),
    "services": Source("/etc/services", "protocol", "port", "public domain (netbase)", _services),
    "media_types": Source("/etc/mime.types", "family", "suffix_score", "public domain (media-types)", _media_types),
    "manual_pages": Source("/usr/share/man", "manual_section", "name_length", "names only", _manual_pages),
    "characters": Source("unicodedata", "category", "code_point", "Unicode License v3", _characters),
    "elements": Source("/usr/share/elements/elements.json", "block", "atomic_number", "-", _countries),
}
"""name -> where it is and how it is read. `elements` is not on a plain Debian machine: there it is recorded as missing."""


@cache
def corpus(name: str) -> Corpus | Missing:
    """One corpus, read once per process."""
    source = SOURCES[name]
    try:
        entities, content = _read(source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        return Missing(name, f"{source.path}: {type(error).__name__}: {error}")
    if len(entities) < 60:
        return Missing(name, f"{source.path}: only {len(entities)} entities")
    provenance = Provenance(source.path, f"{len(entities)} entities", hashlib.sha256(content).hexdigest(), source.licence)
    return Corpus(name, source.kind, source.measure, entities, provenance)


def _read(source: Source) -> tuple[tuple[Entity, ...], bytes]:
    path = Path(source.path)
    if path.is_file():
        content = path.read_bytes()
        found = source.read(content.decode("utf-8", "replace"))
        return _distinct(found), content
    if source.path.startswith("/") and not path.is_dir():
        raise FileNotFoundError("not on this machine")
    entities = _distinct(source.read(source.path))
    version = unicodedata.unidata_version if source.path == "unicodedata" else ""
    return entities, (version + json.dumps(entities)).encode()


def _distinct(found: Iterator[Entity]) -> tuple[Entity, ...]:
    """The first entity of each label, plain labels only: a comma or a quote in a name would blur the prose."""
    seen: dict[str, Entity] = {}
    for label, kind, measure in found:
        if 2 <= len(label) <= 40 and not set(label) & set(",;\"'()[]{}\\<>`"):
            seen.setdefault(label, (label, kind, measure))
    return tuple(seen.values())


def report() -> dict[str, str]:
    """What this machine has: name -> how many entities, or why none."""
    found = {name: corpus(name) for name in SOURCES}
    return {name: c.reason if isinstance(c, Missing) else c.provenance.key for name, c in found.items()}
