"""A store in other people's shapes: Parquet, flat JSONL, a verifiers package, Harbor task directories."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rorqual.runlog import write_atomically
from rorqual.tasks.export_harbor import export_harbor
from rorqual.tasks.export_verifiers import export_verifiers
from rorqual.tasks.store import Store
from rorqual.tasks.task import World, canonical

COLUMNS = ("messages", "tools", "tags", "payload", "gates", "measures", "mechanisms", "provenance")
"""Nested columns: JSON text in Parquet, so that tasks of different families fit one table."""


def flat_rows(store: Store) -> Iterator[dict[str, Any]]:
    """One flat row per task, with what it needs of its world by id."""
    worlds = store.worlds()
    for row in store.rows():
        task, world = row.task.to_json(), worlds.get(row.task.world) or World("", row.task.family, {})
        yield {
            **task,
            "prompt": row.task.prompt,
            "fingerprint": world.fingerprint,
            "mechanisms": list(world.mechanisms),
            "gates": [gate.to_json() for gate in row.gates],
            "measures": dict(row.measures),
        }


def export_jsonl(store: Store, path: str | Path) -> None:
    """One JSON object per line."""
    write_atomically(path, "".join(canonical(row) + "\n" for row in flat_rows(store)))


def export_parquet(store: Store, path: str | Path) -> None:
    """One table of tasks, and beside it NAME.worlds.parquet with the worlds that they name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    rows = [{name: canonical(v) if name in COLUMNS else v for name, v in row.items()} for row in flat_rows(store)]
    worlds = [{"id": w.id, "fingerprint": w.fingerprint, "world": canonical(w.to_json())} for w in store.worlds().values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, table in ((path, rows), (path.with_suffix(".worlds.parquet"), worlds)):
        part = target.with_name(f".{target.name}.part")
        pq.write_table(pa.Table.from_pylist(table), part)
        part.replace(target)


def read_parquet(path: str | Path) -> list[dict[str, Any]]:
    """The rows of `export_parquet`, nested columns as they were."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [{name: json.loads(v) if name in COLUMNS else v for name, v in row.items()} for row in rows]


EXPORTS: dict[str, Callable[[Store, str | Path], None]] = {
    "parquet": export_parquet,
    "jsonl": export_jsonl,
    "verifiers": export_verifiers,
    "harbor": export_harbor,
}
"""name -> export(store, path)."""
