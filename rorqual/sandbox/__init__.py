"""Floor 0: runs untrusted programs confined; knows no tasks.

from rorqual.sandbox import Limits, create

with create(limits=Limits(timeout_s=5)) as sandbox:
    sandbox.upload("program.py", "print(6 * 7)")
    result = sandbox.run([sandbox.python, "program.py"])
    assert result.is_ok and result.stdout == "42\\n"
"""

from __future__ import annotations

from typing import Any

from rorqual.sandbox.protocol import (
    Bind,
    Ended,
    Handle,
    Limits,
    Result,
    Sandbox,
    SandboxConfig,
    SandboxError,
)
from rorqual.sandbox.view import site_packages

__all__ = [
    "Bind",
    "Ended",
    "Handle",
    "Limits",
    "Result",
    "Sandbox",
    "SandboxConfig",
    "SandboxError",
    "create",
    "open_sandbox",
    "site_packages",
]


def create(backend: str = "bwrap", **settings: Any) -> Sandbox:
    """A sandbox; close it, or use it as a context manager. settings: the fields of SandboxConfig.

    Raises SandboxError with reason "unavailable", and what to do, where this machine can't make one.
    """
    return open_sandbox(SandboxConfig(backend=backend, **settings))


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """A sandbox of the configured back end."""
    if config.backend == "bwrap":
        from rorqual.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox(config)
    if config.backend == "process":
        from rorqual.sandbox.process import ProcessSandbox

        return ProcessSandbox(config)
    from rorqual.sandbox.oci import OciSandbox

    return OciSandbox(config)
