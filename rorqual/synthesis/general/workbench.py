"""Where a model builds a world: a sandbox with bash, search over the corpora of this machine, and a check that runs the gates.

The model leaves five files: database.sql (CREATE and INSERT; the first column of each table is its key), tools.py (functions over
`db`), task.json ({"prompt": ..., "policy": ..., "asks_answer": true or false}), solution.py and verify.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rorqual.sandbox import Limits, SandboxError, create
from rorqual.synthesis.general.corpora import SOURCES, Missing, corpus
from rorqual.tasks import SUBMIT, Provenance, Task, TaskError, Tools, Toolset, World, digest
from rorqual.tasks.episode import SUBMIT_TOOL

FILES = ("database.sql", "tools.py", "task.json", "solution.py", "verify.py")
MAX_CHARS = 6000
DUMP = """
import json, sqlite3
db = sqlite3.connect(":memory:")
db.executescript(open("database.sql").read())
made = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
tables, schema = ([row[i] for row in db.execute(made)] for i in (0, 1))
keys = {t: db.execute(f'PRAGMA table_info("{t}")').fetchone()[1] for t in tables}
rows = {t: [list(r) for r in db.execute(f'SELECT * FROM "{t}" ORDER BY 1')] for t in tables}
print(json.dumps({"schema": schema, "keys": keys, "rows": rows}))
"""


@dataclass
class Workbench:
    """One sandbox of one author. A context manager."""

    isolation: str = "bwrap"

    def __enter__(self) -> Workbench:
        self.sandbox = create(self.isolation, limits=Limits(timeout_s=30, memory_mb=512))
        self.queries: list[str] = []
        return self

    def __exit__(self, *exc: object) -> None:
        self.sandbox.close()

    def tools(self) -> Tools:
        """bash, search and write_file, as the paper's synthesis agent has them."""

        def bash(command: str) -> str:
            """Run a command in the sandbox; gives back its output.

            command: for /bin/sh
            """
            result = self.sandbox.run(["/bin/sh", "-c", command])
            return f"{result.stdout}{result.stderr}"[:MAX_CHARS] + f"\n[{result.ended}, exit code {result.exit_code}]"

        def search(query: str, source: str = "", topn: int = 10) -> list:
            """Search the real data of this machine for entities to fill a database with.

            query: words; an entity matches if its label or kind holds all of them
            source: one of the corpora; empty for all
            """
            self.queries.append(query)
            return find(query, source, min(topn, 100))

        def write_file(path: str, text: str) -> str:
            """Write a file of the working directory."""
            self.sandbox.upload(path, text)
            return f"{len(text)} characters written to {path}"

        return Toolset([bash, search, write_file])

    def read(self, name: str) -> str:
        try:
            return self.sandbox.download(name, 1 << 20).decode("utf-8", "replace")
        except SandboxError as error:
            raise TaskError(f"{name}: {error}") from error

    def world(self) -> World:
        """The world that the files describe. The SQL runs in the sandbox; only its rows come out. Raises TaskError."""
        self.read("database.sql")
        self.sandbox.upload("_dump.py", DUMP)
        result = self.sandbox.run([self.sandbox.python, "-I", "-S", "_dump.py"])
        if not result.is_ok:
            raise TaskError(f"database.sql: {(result.stderr.strip().splitlines() or [result.ended])[-1][:300]}")
        payload = json.loads(result.stdout)
        if not payload["keys"]:
            raise TaskError("database.sql: makes no table")
        salt = [[digest(payload["rows"]), 0]]
        payload["schema"].append("CREATE TABLE _ids (salt TEXT, given INTEGER)")
        payload["rows"]["_ids"] = salt
        payload["source"] = self.read("tools.py")
        structure = structural_fingerprint(payload)
        return World(f"e-{digest(payload)}", "general", payload, structure, ("authored",), self.provenance())

    def provenance(self) -> tuple[Provenance, ...]:
        return tuple(Provenance("search", query) for query in dict.fromkeys(self.queries))

    def task(self, world: World, tools: tuple[dict[str, Any], ...], task_id: str, level: int, tags: dict[str, str]) -> Task:
        """The task that the files describe. Raises TaskError."""
        try:
            asked = json.loads(self.read("task.json"))
            prompt, policy, asks = str(asked["prompt"]), str(asked.get("policy", "")), bool(asked.get("asks_answer", True))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TaskError(f'task.json: expected {{"prompt": ..., "policy": ..., "asks_answer": ...}}: {error!r}') from error
        payload = {"solution": self.read("solution.py"), "verifier": self.read("verify.py")}
        system = [{"role": "system", "content": policy}] if policy else []
        shown = (*tools, SUBMIT_TOOL) if asks and SUBMIT not in {t["function"]["name"] for t in tools} else tools
        messages = (*system, {"role": "user", "content": prompt})
        return Task(task_id, "general", messages, shown, world.id, payload, level, 64, tags, world.provenance)


def find(query: str, source: str, topn: int) -> list[dict[str, Any]]:
    """Entities whose label or kind holds all the words. A corpus that this machine lacks is a value that says so."""
    words = query.casefold().split()
    found: list[dict[str, Any]] = []
    for name in [source] if source in SOURCES else SOURCES:
        data = corpus(name)
        if isinstance(data, Missing):
            found.append({"source": name, "missing": data.reason})
            continue
        hits = [e for e in data.entities if all(word in f"{e[0]} {e[1]} {name}".casefold() for word in words)]
        found += [{"source": name, "label": label, data.kind: kind, data.measure: value} for label, kind, value in hits[:topn]]
    return found[: topn + len(SOURCES)]


def structural_fingerprint(payload: dict[str, Any]) -> str:
    """Of a world that no plan describes: column counts and sqlite's types, per table, names stripped."""
    shapes = sorted(
        [[type(v).__name__ for v in rows[0]] if rows else [] for t, rows in payload["rows"].items() if not t.startswith("_")]
    )
    return digest([shapes, sorted(line.count("(") for line in payload["source"].splitlines() if line.startswith("def "))])
