"""Distinctness measured by structure, names stripped: of the schema graph, of the tools, of the policies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.synthesis.general.calculus import Arg, Atom
from rorqual.synthesis.general.domain import Domain
from rorqual.tasks import digest

Graph = tuple[dict[str, str], list[tuple[str, str, str]]]
"""(node -> its label, edges (from, to, label))."""
ROUNDS = 4


def weisfeiler_lehman(graph: Graph, rounds: int = ROUNDS) -> str:
    """The multiset of node colours after some rounds of refinement: equal for isomorphic graphs."""
    labels, edges = graph
    colours = dict(labels)
    for _ in range(rounds):
        around: dict[str, list[str]] = {node: [] for node in labels}
        for source, target, label in edges:
            around[source].append(f">{label}{colours[target]}")
            around[target].append(f"<{label}{colours[source]}")
        colours = {node: _hash(colours[node] + "|" + ",".join(sorted(around[node]))) for node in labels}
    return _hash(",".join(sorted(colours.values())))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def schema_graph(domain: Domain) -> Graph:
    """Tables, columns by kind, references; and the derived columns with what they sum."""
    labels = {name: "entity" if table.is_entity else "table" for name, table in domain.tables.items()}
    edges = []
    for name, table in domain.tables.items():
        for column in table.columns:
            node = f"{name}.{column.name}"
            labels[node] = (
                column.kind + ("?" if column.null_in else "") + ("*" if (name, column.name) in domain.derived_columns else "")
            )
            edges.append((name, node, "has"))
            if column.kind == "ref":
                edges.append((node, column.target, "refers"))
    for derived in domain.derived:
        edges.append(
            (f"{derived.table}.{derived.column}", f"{derived.child}.{derived.ref}", "sums" if derived.value else "counts")
        )
    return labels, edges


def tool_signatures(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The multiset of the tools' parameter kinds, without any name."""
    return sorted(_signature(tool["function"]["parameters"]) for tool in tools)


def _signature(schema: Mapping[str, Any]) -> str:
    kinds = []
    for name, value in schema["properties"].items():
        kind = value["type"] + (f"[{len(value['enum'])}]" if "enum" in value else "")
        kinds.append(kind + ("" if name in schema["required"] else "?"))
    return ",".join(sorted(kinds))


def policy_automaton(domain: Domain) -> Graph:
    """States of each life cycle, actions as steps between them, with the shapes of their guards and of the clauses."""
    labels: dict[str, str] = {}
    edges: list[tuple[str, str, str]] = []
    for action in domain.actions:
        labels[action.name] = "action/" + "/".join(
            sorted([_shape(g.atom) for g in action.guards] + [p.kind for p in action.params])
        )
        labels[action.name] += f"/{len(action.absent)}/{len(action.closed)}/{len(action.inserts)}/{len(action.puts)}"
        for move in action.moves:
            target = action.param(move.param).target
            for state in (*move.origins, move.to):
                labels.setdefault(f"{target}={state}", "state")
            edges += [(f"{target}={origin}", action.name, "from") for origin in move.origins]
            edges.append((action.name, f"{target}={move.to}", "to"))
    for i, clause in enumerate(domain.clauses):
        labels[f"clause{i}"] = f"clause/{_shape(clause.atom)}/{clause.is_enforced}"
        edges.append((f"clause{i}", clause.action, "binds"))
    return labels, edges


def _shape(atom: Atom) -> str:
    value = "column" if isinstance(atom.value, Arg) and "." in atom.value.path else type(atom.value).__name__
    return f"{atom.path.count('.')}{atom.op}{bool(atom.minus)}{value}"


def parts(domain: Domain, tools: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The three hashes: schema, tools, policy."""
    return {
        "schema": weisfeiler_lehman(schema_graph(domain)),
        "tools": digest(tool_signatures(tools)),
        "policy": weisfeiler_lehman(policy_automaton(domain)),
    }


def fingerprint(domain: Domain, tools: Sequence[Mapping[str, Any]]) -> str:
    """One hash of the three."""
    return digest(parts(domain, tools))


def shingles(text: str, width: int = 3) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}


def minhash(text: str, count: int = 64) -> tuple[int, ...]:
    """A sketch of a text: the share of equal places of two sketches estimates the overlap of their word triples."""
    hashes = [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "big") for s in shingles(text)]
    prime = (1 << 61) - 1
    return tuple(min((h * (2 * i + 3) + i * 0x9E3779B97F4A7C15) % prime for h in hashes) for i in range(count))


def similarity(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
