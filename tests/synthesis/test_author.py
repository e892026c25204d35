"""A model behind an endpoint builds worlds by the paper's loop: its mistakes are repaired or refused, its failures have names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.errors import UserError
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy
from rorqual.synthesis import Request, maker
from rorqual.synthesis.general.author import AuthorConfig, run_authors
from rorqual.synthesis.general.gates import GATES
from rorqual.tasks import Record, Store, TaskRow

from .endpoint_script import Script
from .scripted_model import scripted_model

CONFIG = AuthorConfig(max_turns=14, max_checks=4, solver_attempts=4, solver_turns=4)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted_model(Script()) as address:
        yield address


def author(url: str, *categories: str, config: AuthorConfig = CONFIG) -> dict[str, list[Record]]:
    """Let one author work on each category at the same time: category -> its records."""
    found: dict[int, list[Record]] = {}

    async def run() -> None:
        endpoint = EndpointConfig(url, timeout_s=1.0, max_tries=2, first_pause_s=0.01)
        async with EndpointPolicy(endpoint) as policy:
            jobs = [run_authors(policy, config, [i], 1, found.__setitem__, [name]) for i, name in enumerate(categories)]
            await asyncio.gather(*jobs)

    asyncio.run(run())
    return {name: found[i] for i, name in enumerate(categories)}


def test_typical_mistakes_are_repaired_and_the_difficulty_is_raised(url: str) -> None:
    records = author(url, "repairs")["repairs"]
    assert [r.kind for r in records] == ["world", "task", "world", "task"]
    rows = [TaskRow.from_json(r.value) for r in records if r.kind == "task"]
    assert all(row.is_accepted for row in rows)
    assert {gate.name for gate in rows[1].gates} == set(GATES)
    assert [row.measures["pass@1"] for row in rows] == [1.0, 0.5]  # the scripted solver errs every other time on the harder one
    assert rows[1].task.payload["foreign"], "the first level's gold run is a foreign one for the second"
    assert "sqlite3" not in rows[0].task.payload["solution"]


def test_failures_have_names_and_never_touch_a_sibling(url: str) -> None:
    named = {
        "always passes": "gates_refused", "ignores answer": "gates_refused", "stops": "stopped_half_way",
        "bad sql": "gates_refused", "chatters": "turns_used_up",
        "garbage": "endpoint_unavailable", "stalls": "endpoint_unavailable",
        "breaks off": "endpoint_unavailable",
    }  # fmt: skip
    found = author(url, *named, "repairs")
    assert {name: records[-1].value["gate"] for name, records in found.items() if name in named} == named
    assert sum(r.kind == "task" for r in found["repairs"]) == 2
    details = {name: found[name][-1].value["detail"] for name in named}
    assert "initial_fails" in details["always passes"]
    assert "mutants_fail" in details["ignores answer"] or "cheap" in details["ignores answer"]
    assert "TABEL" in details["bad sql"]
    assert "no answer within" in details["stalls"]


def test_tools_that_hang_are_refused_in_bounded_time(url: str) -> None:
    from rorqual.synthesis.general import author as module

    records = author(url, "tools hang", config=AuthorConfig(max_turns=4, max_checks=1, solver_attempts=1, tool_timeout_s=1.0))[
        "tools hang"
    ]
    assert records[-1].value["gate"] == str(module.End.REFUSED)
    assert "timeout" in records[-1].value["detail"]


def test_the_command_fills_a_store_from_an_endpoint_and_every_gate_holds_again(url: str, tmp_path: Path) -> None:
    from rorqual.synthesis.general import author as module

    categories, module.CATEGORIES = module.CATEGORIES, ("repairs",)
    try:
        store = Store(tmp_path)
        overrides = ("solver_attempts=4", "solver_turns=4", "endpoint_timeout_s=2.0")
        request = Request(2, store, endpoint=url, model="scripted", overrides=overrides)
        report = maker("general").synthesize(request)
    finally:
        module.CATEGORIES = categories
    assert report["tasks"] == 2 and store.is_sealed
    worlds = store.worlds()
    for row in store.rows():
        results = maker("general").regate(row.task, worlds[row.task.world], "bwrap")
        assert [r.name for r in results if not r.passed] == []


def test_an_endpoint_that_brings_nothing_ends_with_its_reasons(url: str, tmp_path: Path) -> None:
    from rorqual.synthesis.general import author as module

    categories, module.CATEGORIES = module.CATEGORIES, ("garbage",)
    try:
        request = Request(1, Store(tmp_path), endpoint=url, overrides=("endpoint_max_tries=1",))
        with pytest.raises(UserError, match="endpoint_unavailable"):
            maker("general").synthesize(request)
    finally:
        module.CATEGORIES = categories
    assert len(Store(tmp_path).rejected()) == 3
