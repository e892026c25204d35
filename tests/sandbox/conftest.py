"""A sandbox of the default back end, or a skip that says why this machine makes none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rorqual.sandbox import Limits, Sandbox, SandboxError, create


@pytest.fixture(scope="session")
def confinement() -> None:
    """Skips where bubblewrap is absent or namespaces are off."""
    try:
        create().close()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sandbox(confinement: None) -> Iterator[Sandbox]:
    with create(limits=Limits(timeout_s=20, memory_mb=256, disk_mb=32)) as made:
        yield made
