"""The interpreter in the sandbox keeps its state, is confined, and survives what a cell can do to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

from rorqual.sandbox.kernel import KERNEL_LIMITS, CellEnded, Kernel


@pytest.fixture(scope="module")
def kernel(confinement: None) -> Iterator[Kernel]:
    with Kernel(KERNEL_LIMITS.but(output_bytes=20_000)) as made:
        yield made


def test_state_values_output_and_errors(kernel: Kernel) -> None:
    assert kernel.run("x = 20").ended is CellEnded.DONE
    cell = kernel.run("print('out'); x * 2 + 2")
    assert (cell.output, cell.value) == ("out\n", "42")
    cell = kernel.run("1 / 0")
    assert cell.ended is CellEnded.ERROR and cell.error is not None
    assert "ZeroDivisionError" in cell.error and "\x1b" not in cell.error
    assert kernel.run("x").value == "20"


def test_there_is_no_network_and_no_one_elses_file(kernel: Kernel) -> None:
    assert "unreachable" in (kernel.run("import socket; socket.create_connection(('192.0.2.1', 80), 2)").error or "")
    assert kernel.run("import os; [p for p in ('/etc/passwd', '/root', '/home', '/work') if os.path.exists(p)]").value == "[]"
    assert kernel.run("open('made.txt', 'w').write('kept')").value == "4"
    assert kernel.sandbox.download("made.txt") == b"kept"


def test_a_slow_cell_is_interrupted_and_the_state_stays(kernel: Kernel) -> None:
    kernel.run("y = 7")
    cell = kernel.run("while True: pass", timeout_s=0.7)
    assert cell.ended is CellEnded.TIMEOUT and cell.wall_s < 4
    assert kernel.run("y").value == "7"


def test_a_flood_is_cut_and_the_state_stays(kernel: Kernel) -> None:
    kernel.run("z = 8")
    cell = kernel.run("while True: print('x' * 1000)", timeout_s=20)
    assert cell.ended is CellEnded.OUTPUT and len(cell.output) <= 20_000
    assert kernel.run("z").value == "8"


def test_a_cell_that_kills_or_ignores_costs_the_state_only(kernel: Kernel) -> None:
    kernel.run("w = 9")
    assert kernel.run("import os; os._exit(1)").ended is CellEnded.DIED
    assert "NameError" in (kernel.run("w").error or "")
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    assert kernel.run(stubborn, timeout_s=0.5).ended is CellEnded.RESTARTED
    assert kernel.run("1 + 1").value == "2"
    assert kernel.restarts == 2
    assert kernel.sandbox.download("made.txt") == b"kept"


def test_memory_is_bounded(kernel: Kernel) -> None:
    assert "MemoryError" in (kernel.run("b = bytearray(1 << 31)").error or "")


def test_packages_of_the_interpreter_are_there_and_read_only(kernel: Kernel) -> None:
    cell = kernel.run("import numpy; open(numpy.__file__, 'a')")
    assert "PermissionError" in (cell.error or "") or "Read-only file system" in (cell.error or "")
