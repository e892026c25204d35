"""Pairs of states, an old one and one that mends it: of releases, of a git history's commits, of issue-and-patch files."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.synthesis.code.sources import fetch, git, is_wanted, texts, tree
from rorqual.tasks import Provenance, TaskError

Files = Mapping[str, str]
MAX_COMMITS, MAX_ISSUE_CHARS = 2000, 6000
CHANGE_LOG = re.compile(
    r"(^|/)(change|changes|changelog|history|news|releases?|whatsnew|versions?)[^/]*\.(md|rst|txt)$|(^|/)(CHANGES|CHANGELOG|HISTORY|NEWS)$",
    re.I,
)
_MENDS = re.compile(r"\b(fix(es|ed)?|close[sd]?|resolve[sd]?)\b[^\n]{0,40}#\d+", re.I)
_TRAILER = re.compile(
    r"^(signed-off-by|co-authored-by|reviewed-by|change-id|(fix(es|ed)?|close[sd]?|resolve[sd]?):? *#\d+).*$", re.I | re.M
)


@dataclass(frozen=True)
class Pair:
    """`new` mends `old`. `issue` is empty where the change log has to speak."""

    name: str
    source: str
    """release, history or instance."""
    old_label: str
    new_label: str
    old: Files = field(repr=False)
    new: Files = field(repr=False)
    issue: str = ""
    provenance: Provenance = field(default_factory=lambda: Provenance(""))
    patch: str = ""
    """The gold patch where the source gives one: the filters of issue texts read it."""


@cache
def release_pair(wish: str) -> Pair:
    """name==OLD..NEW. Raises TaskError."""
    name, _, versions = wish.partition("==")
    old, _, new = versions.partition("..")
    return Pair(name, "release", old, new, fetch(f"{name}=={old}"), fetch(f"{name}=={new}"),
                provenance=Provenance(f"{name}=={new}", f"since {old}"))  # fmt: skip


@cache
def commits(repository: str) -> tuple[tuple[str, str, str], ...]:
    """(commit, parent, message) of those that mend a numbered issue and have one parent, newest first. Raises TaskError."""
    log = git(repository, "log", f"--max-count={MAX_COMMITS}", "--no-merges", "--format=%H%x00%P%x00%B%x01").decode(
        "utf-8", "replace"
    )
    found = [entry.strip("\n").split("\0") for entry in log.split("\x01") if entry.strip()]
    return tuple((c, p, m) for c, p, m in found if p and " " not in p and _MENDS.search(m))


def commit_pair(repository: str, number: int) -> Pair:
    commit, parent, message = commits(repository)[number]
    name = Path(repository).resolve().name
    issue = re.sub(r"\n{3,}", "\n\n", _TRAILER.sub("", message)).strip()
    return Pair(name, "history", parent[:12], commit[:12], tree(repository, parent), tree(repository, commit), issue,
                Provenance(name, commit))  # fmt: skip


@cache
def instances(path: str) -> tuple[dict[str, Any], ...]:
    """The rows of an issue-and-patch file, with the fields of SWE-bench. Raises TaskError."""
    wanted = ("instance_id", "repo", "base_commit", "patch", "test_patch", "problem_statement")
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise TaskError(f"instances={path}: {type(error).__name__}: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or (lost := [name for name in wanted if not isinstance(row.get(name), str)]):
            raise TaskError(
                f"instances={path}: row {number} is no object with {', '.join(wanted if not isinstance(row, dict) else lost)}"
            )
    return tuple(rows)


def instance_pair(row: Mapping[str, Any], clones: str) -> Pair:
    """The base commit of a local clone, and the same with both patches applied. Raises TaskError."""
    owner, _, name = row["repo"].rpartition("/")
    places = [Path(clones) / part for part in (f"{owner}__{name}", name) if part and "/" not in part]
    place = next((p for p in places if p.is_dir()), None)
    if place is None or ".." in row["repo"]:
        raise TaskError(f"{row['instance_id']}: no clone of {row['repo']} in {clones}")
    old = tree(str(place), row["base_commit"])
    new = apply_patches(old, [row["patch"], row["test_patch"]], row["instance_id"])
    return Pair(name, "instance", row["base_commit"][:12], row["instance_id"], old, new, row["problem_statement"],
                Provenance(row["repo"], row["instance_id"]), row["patch"])  # fmt: skip


def apply_patches(files: Files, patches: list[str], name: str) -> dict[str, str]:
    """The files after unified diffs; git itself refuses paths that lead out. Raises TaskError."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(text.encode())
        for patch in patches:
            command = ["git", "apply", "--whitespace=nowarn", "-"]
            env = {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent), "PATH": "/usr/local/bin:/usr/bin:/bin"}
            done = subprocess.run(command, cwd=folder, input=patch.encode(), capture_output=True, env=env)
            if done.returncode:
                raise TaskError(f"{name}: a patch does not apply: {done.stderr.decode(errors='replace').strip()[-200:]}")
        found = {str(p.relative_to(folder)): p for p in sorted(Path(folder).rglob("*")) if p.is_file() and not p.is_symlink()}
        return texts({path: p.read_bytes() for path, p in found.items() if is_wanted(path, p.stat().st_size)})


def change_log(pair: Pair) -> str:
    """What the new state's change log says more than the old one's."""
    added: list[str] = []
    for path, text in pair.new.items():
        if CHANGE_LOG.search(path) and text != pair.old.get(path):
            lines = difflib.unified_diff(pair.old.get(path, "").splitlines(), text.splitlines(), n=0)
            added += [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(added)).strip()[:MAX_ISSUE_CHARS]
