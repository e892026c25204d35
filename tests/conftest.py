"""Shared fixtures: a skip with a reason where a GPU or the shared data is absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples every time, so that a run's result says something of the change; the nightly profile draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it (rorqual/cli.py says why)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported: its kernels then run on CPU

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real inputs that is never committed; a test that needs it skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium for the tests of one file (tests/browser.py); they skip where there is none."""
    from tests.browser import open_browser

    with open_browser() as opened:
        yield opened
