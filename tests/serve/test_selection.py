"""What the studio shows of the indexer is what was sampled with; its library and its forms, without a browser."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

from rorqual.errors import UserError
from rorqual.policy import SamplingParams
from rorqual.serve.selection import selection_of
from rorqual.serve.studio_library import Library, arguments_of
from rorqual.tasks import Store, TaskRow, task_record, world_record
from tests.serve.conftest import forced_backend
from tests.tasks import worlds


def test_the_selection_shown_is_the_one_that_was_sampled_with():
    async def both():
        backend = forced_backend()
        params = SamplingParams(max_tokens=20, seed=3, record_selected_indices=True)
        done = await backend.service.complete(list(range(1, 80)), params)
        shown = await selection_of(backend, [*done.prompt_tokens, *done.tokens])
        await backend.service.close()
        return done, shown

    done, shown = asyncio.run(both())
    assert shown.layers == (0, 1) and len(shown.texts) == 99
    for sampled_with, row in zip(done.selected_indices, shown.rows, strict=True):
        np.testing.assert_array_equal(sampled_with, row[:98])
    token = 90
    shares = shown.shares(token, None)
    expected = [sum(p in shown.of(token, layer) for layer in shown.layers) / 2 for p in range(token + 1)]
    assert shares == expected and len(shown.of(token, 0)) == 32


def test_texts_too_long_to_look_into_are_refused():
    async def ask():
        backend = forced_backend()
        try:
            await selection_of(backend, [1] * 8193)
        finally:
            await backend.service.close()

    with pytest.raises(UserError, match="8193 tokens are too many"):
        asyncio.run(ask())


def test_the_library_says_what_is_missing(tmp_path):
    task = worlds.task()
    store = Store(tmp_path / "stores" / "one")
    store.append(world_record(worlds.world(), (0,)))
    store.append(task_record(TaskRow(task), (0, 0)))
    with pytest.raises(UserError, match="--tasks DIR"):
        Library("", "bwrap").shelves()
    with pytest.raises(UserError, match="no task store here"):
        Library(str(tmp_path), "bwrap").shelves()
    library = Library(str(tmp_path / "stores"), "bwrap")  # a directory of stores
    assert [task.id for _, task in library.search("")] == [task.id]
    assert library.search("no such words") == []


def test_a_form_becomes_arguments():
    schema = {"properties": {"n": {"type": "integer"}, "note": {"type": "string"}, "ids": {"type": "array"}}, "required": ["n"]}
    assert arguments_of(schema, {"n": 3.0, "note": "", "ids": "[1, 2]"}) == {"n": 3, "ids": [1, 2]}
    assert arguments_of(schema, {"n": None, "note": "x", "ids": ""}) == {"n": None, "note": "x"}
    with pytest.raises(UserError, match="ids: expected JSON of type array"):
        arguments_of(schema, {"n": 1, "ids": "[1"})


def test_the_api_alone_loads_nothing_of_the_studio():
    code = "import sys, rorqual.serve.main, rorqual.commands.serve; sys.exit('nicegui' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_studio_the_root_is_an_ordinary_missing_page(server):
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(server.url, timeout=30)
    assert missing.value.code == 404 and missing.value.headers["content-type"] == "application/json"
