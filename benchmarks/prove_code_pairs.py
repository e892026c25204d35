"""Pairs of releases of differently built packages give valid environments, and known-bad pairs are refused with the reason.

For each pair: the set-up ladder, three runs of both states, fail-to-pass and pass-to-fail under the gold change, and the gates in
fresh sandboxes. Packages are fetched from the index once. The quick form takes two small ones.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from rorqual.synthesis.code import CodeConfig
from rorqual.synthesis.code.candidates import make, plan
from rorqual.synthesis.code.projects import project

SECONDS, QUICK_SECONDS = 900, 120
PAIRS = (
    "cachetools==5.4.0..5.5.0", "sqlparse==0.5.0..0.5.1", "tomlkit==0.12.5..0.13.0", "dep-logic==0.3.0..0.4.0",
    "semver==3.0.1..3.0.2", "pathspec==0.11.2..0.12.1", "h11==0.14.0..0.16.0", "marko==2.1.0..2.1.2", "mistune==3.0.2..3.1.0",
    "humanize==4.10.0..4.11.0", "portion==2.4.2..2.5.0", "natsort==8.3.1..8.4.0", "wcwidth==0.2.12..0.2.13",
    "idna==3.7..3.8", "more-itertools==10.2.0..10.3.0", "parso==0.8.2..0.8.3", "boltons==23.1.1..24.0.0", "toolz==0.12.0..0.12.1",
)  # fmt: skip
BAD = {
    "sqlparse==0.4.3..0.4.4": "same_build",
    "boltons==23.0.0..23.1.1": "tests",
    "tomli==2.0.1..2.0.2": "set_up",
    "inflection==0.5.0..0.5.1": "tests_changed",
    "click==8.1.7..8.1.8": "same_build",
}
LEAST_VALID, QUICK = 10, ("sqlparse==0.5.0..0.5.1", "sqlparse==0.4.3..0.4.4")


def examine(wish: str) -> dict[str, Any]:
    """What came of one pair, whole."""
    config = CodeConfig(releases=(wish,), projects=(), parts=False)
    assert plan(config).job(0) is not None
    made, name = make(config, 0), wish.partition("==")[0]
    found: dict[str, Any] = {}
    try:
        new = project(f"{name}=={wish.partition('..')[2]}")
        found = {
            "build": new.rungs["build"][:80],
            "extras": new.rungs["extras"],
            "tests": len(new.passing),
            "flaky": len(new.flaky),
        }
    except Exception as error:
        found = {"set_up": str(error)[:200]}
    if made.row is None or not made.row.is_accepted:
        gate = made.refusal or next(g for g in made.row.gates if not g.passed)  # type: ignore[union-attr]
        return {**found, "refused": gate.name, "reason": gate.detail[:200]}
    payload = made.row.task.payload
    return {
        **found,
        "fail_to_pass": len(payload["fail_to_pass"]),
        "pass_to_pass": len(payload["pass_to_pass"]),
        "pass_to_fail": 0,
    }


def main(quick: bool = False) -> dict[str, Any]:
    wanted = [wish for wish in (*PAIRS, *BAD) if not quick or wish in QUICK]
    found = {wish: examine(wish) for wish in wanted}
    for wish, gate in BAD.items():
        if wish in found:
            assert "refused" in found[wish], f"{wish} was accepted, though it is known as {gate}"
    set_up = {wish: row for wish, row in found.items() if "tests" in row and wish not in BAD}
    builds = Counter(row["build"].split(":")[0] for row in set_up.values())
    valid = [wish for wish, row in found.items() if "fail_to_pass" in row]
    if quick:
        assert valid == [QUICK[0]], found
    else:
        assert len(set_up) >= LEAST_VALID and len(builds) >= 4, (len(set_up), builds)
        assert len(valid) >= LEAST_VALID, f"only {len(valid)} pairs are valid whole: {found}"
    return {"valid_pairs": len(valid), "environments": len(set_up), "environments_by_build": dict(builds), "pairs": found}
