"""rorqual bench times nothing wrong, says what it needs, and reports each peer that fails."""

from __future__ import annotations

import pytest

from rorqual.bench import timing
from rorqual.commands import bench
from rorqual.errors import UserError

torch = pytest.importorskip("torch")


def case(error: float) -> timing.Case:
    return timing.Case(ours=lambda: None, error=lambda: error, tolerance=1e-3, flops=1.0, bytes=1.0)


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_a_wrong_result_is_not_timed(error):
    with pytest.raises(UserError, match="result is wrong"):
        timing.check("op", case(error))


def test_a_right_result_passes_with_its_error():
    assert timing.check("op", case(5e-4)) == 5e-4


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        bench.run(None)  # type: ignore[arg-type]


def test_an_absent_peer_is_noted_with_its_reason():
    absent: dict[str, str] = {}
    assert timing.peer("no_such_module", "call", absent) is None
    assert "ModuleNotFoundError" in absent["call"]


def test_a_description_names_peers_that_run_fail_and_lack():
    figures = dict.fromkeys(("ms", "tflops", "gb_per_s", "share_of_limit", "limit_ms", "error", "tolerance", "held_gib"), 1.0)
    peers = {"fast": {"ms": 2.0, "ratio": 2.0}, "broken": {"failed": "no kernel"}}
    text = timing.describe({**figures, "op": "x", "device": "y", "peers": peers, "absent": {"gone": "not installed"}})
    assert "ours is 2.00 times as fast" in text and "broken: no kernel" in text and "gone: not here (not installed)" in text
