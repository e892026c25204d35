"""A quick form of the fuzz proof (benchmarks/prove_chat_fuzz.py runs 100,000 outputs)."""

from __future__ import annotations

from benchmarks import prove_chat_fuzz


def test_mutated_outputs_are_read_without_an_exception() -> None:
    assert prove_chat_fuzz.main(quick=True)["outputs"] == prove_chat_fuzz.QUICK_COUNT
