"""The tools search, open and find, with the surface of the published encoder's search example.

A page is `[n] TITLE (URL)`, `**viewing lines [a - b] of c**`, an empty line, and numbered lines `L0:` ...; links in it stand as
`【id†title†host】`. n is the page's cursor: pages opened in one session count up from 0.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from rorqual.tasks.host import argument_problem, error_text
from rorqual.tasks.retrieval.document import Document
from rorqual.tasks.retrieval.retriever import Hit, Retriever

WIDTH = 80
SHOWN_LINES = 120
"""How many lines `open` shows where it is not told."""
SNIPPET_CHARS = 220
MAX_HITS = 50
FIND_CONTEXT, MAX_MATCHES = 4, 20
SCHEMA = "http://json-schema.org/draft-07/schema#"
SOURCE = {"type": "string", "enum": ["web", "news"], "default": "web"}


def _tool(name: str, description: str, required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    parameters |= {"additionalProperties": False, "$schema": SCHEMA}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _integer(description: str, default: int = -1) -> dict[str, Any]:
    return {"type": "integer", "description": description, "default": default}


BROWSER_TOOLS: tuple[dict[str, Any], ...] = (
    _tool(
        "search",
        "Search the collection and show the best matches with links.",
        ["query"],
        query={"type": "string", "description": "The words to look for"},
        topn=_integer("How many matches to show", 10),
        source=SOURCE,
    ),
    _tool(
        "open",
        "Open a link of a shown page by its id, or an address, or a page shown before; show its lines from `loc` on.",
        [],
        id={
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "description": "A link's id, or an address; -1 for the page itself",
            "default": -1,
        },
        cursor=_integer("The page that holds the link; -1 for the latest"),
        loc=_integer("The first line to show; -1 for the start"),
        num_lines=_integer("How many lines to show; -1 for as many as fit"),
        view_source={"type": "boolean", "description": "Show the text unwrapped", "default": False},
        source=SOURCE,
    ),
    _tool(
        "find",
        "Find a text, whatever its case, in a page shown before.",
        ["pattern"],
        pattern={"type": "string", "description": "The text to find"},
        cursor=_integer("The page to look in; -1 for the latest"),
    ),
)


@dataclass
class Page:
    """What a cursor points at."""

    title: str
    url: str
    lines: list[str]
    links: list[Document] = field(default_factory=list)
    raw: str = ""


class Browser:
    """One agent's session over a retriever. Mistakes of the caller are observations: {"error": ..., "message": ...}."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever
        self.pages: list[Page] = []

    @property
    def tools(self) -> list[dict[str, Any]]:
        return list(BROWSER_TOOLS)

    def observe(self, name: str, arguments: dict[str, Any]) -> str:
        tool = next((t for t in BROWSER_TOOLS if t["function"]["name"] == name), None)
        if tool is None:
            return error_text("unknown_tool", f"there is no tool {name}")
        if problem := _problem(tool["function"]["parameters"], arguments):
            return error_text("invalid_arguments", problem)
        try:
            return getattr(self, name)(**arguments)
        except BrowseError as error:
            return error_text("not_found", str(error))

    def search(self, query: str, topn: int = 10, source: str = "web") -> str:
        """A page of hits. There is one collection: `source` is accepted and changes nothing."""
        hits = self._hits(query, topn)
        lines = [f"URL: search://{source}?q={query}", "# Search Results", ""]
        for number, hit in enumerate(hits):
            lines += _wrapped(_hit_line(number, hit, query), "  ")
        if not hits:
            lines.append("No results.")
        return self._show(Page(f"Search: {query}", f"search://{source}", ["", *lines], [hit.document for hit in hits]))

    def _hits(self, query: str, topn: int) -> list[Hit]:
        return self.retriever.search(query, max(1, min(topn, MAX_HITS)))

    def links(self, query: str, topn: int = 10) -> list[Document]:
        """The links of the page that `search` shows, for programs that read nothing else of it; the page is not kept."""
        return [hit.document for hit in self._hits(query, topn)]

    def open(
        self, id: int | str = -1, cursor: int = -1, loc: int = -1, num_lines: int = -1, view_source: bool = False,
        source: str = "web",
    ) -> str:  # fmt: skip
        """A document's page, or another part of a page shown before."""
        page = self._page(cursor) if id == -1 else self._document_page(self._linked(id, cursor), view_source)
        if view_source and id == -1:
            page = Page(page.title, page.url, (page.raw or "\n".join(page.lines)).split("\n"), page.links, page.raw)
        return self._show(page, max(loc, 0), num_lines if num_lines > 0 else SHOWN_LINES)

    def find(self, pattern: str, cursor: int = -1) -> str:
        """The places where the text stands, each with the lines around it."""
        page = self._page(cursor)
        found = [i for i, line in enumerate(page.lines) if pattern.lower() in line.lower()] if pattern else []
        if not found:
            return error_text("not_found", f"no {pattern!r} in {page.title}")
        lines = [""]
        for number, i in enumerate(found[:MAX_MATCHES]):
            lines += [f"# 【{number}†match at L{i}】", *page.lines[i : i + FIND_CONTEXT], ""]
        return self._show(Page(f"Find: {pattern} in {page.title}", page.url, lines, [], page.raw))

    def _linked(self, id: int | str, cursor: int) -> Document:
        if isinstance(id, str):
            if (document := self.retriever.get(id)) is None:
                raise BrowseError(f"no page at {id}")
            return document
        links = self._page(cursor).links
        if not 0 <= id < len(links):
            raise BrowseError(f"the page has no link {id}; it has {len(links)}")
        return links[id]

    def _document_page(self, document: Document, view_source: bool) -> Page:
        if view_source and document.text:
            return Page(document.title, document.url, document.text.split("\n"), [], document.text)
        lines = ["", f"URL: {document.url}"]
        for line in document.text.split("\n"):
            lines += _wrapped(line)
        return Page(document.title, document.url, lines, [], document.text)

    def _page(self, cursor: int) -> Page:
        if not self.pages:
            raise BrowseError("no page has been shown yet")
        if cursor == -1:
            return self.pages[-1]
        if not 0 <= cursor < len(self.pages):
            raise BrowseError(f"no page with cursor {cursor}; the latest is {len(self.pages) - 1}")
        return self.pages[cursor]

    def _show(self, page: Page, first: int = 0, count: int = SHOWN_LINES) -> str:
        total = len(page.lines)
        if first >= total:
            raise BrowseError(f"the page has {total} lines; there is no line {first}")
        self.pages.append(page)
        last = min(first + count, total)
        head = [
            f"[{len(self.pages) - 1}] {page.title} ({page.url})",
            f"**viewing lines [{first} - {last - 1}] of {total - 1}**",
            "",
        ]
        return "\n".join([*head, *(f"L{i}: {page.lines[i]}".rstrip(" ") for i in range(first, last))])


class BrowseError(Exception):
    """What an agent asked for is not there."""


def _problem(schema: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """`open` takes a number or a text as id, which the tables' own checker does not know."""
    rest = {name: value for name, value in arguments.items() if name != "id"}
    if "id" in arguments and (isinstance(arguments["id"], bool) or not isinstance(arguments["id"], int | str)):
        return "id: expected an integer or a string"
    known = {name: value for name, value in schema["properties"].items() if name != "id"}
    if "id" in arguments and "id" not in schema["properties"]:
        return "id: no such argument"
    return argument_problem({**schema, "required": schema.get("required", []), "properties": known}, rest)


def _hit_line(number: int, hit: Hit, query: str) -> str:
    document = hit.document
    return f"  * 【{number}†{document.title}; publish_date: none†{document.host}】 {_snippet(document.text, query)}"


def _snippet(text: str, query: str) -> str:
    """The stretch that begins at the line where the first of the query's words stands."""
    flat = re.sub(r"\s+", " ", text)
    places = [i for word in query.lower().split() if len(word) > 3 and (i := flat.lower().find(word)) >= 0]
    start = max(0, min(places, default=0) - 40)
    cut = flat[start : start + SNIPPET_CHARS]
    return ("..." if start else "") + cut + ("..." if start + SNIPPET_CHARS < len(flat) else "")


def _wrapped(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]
