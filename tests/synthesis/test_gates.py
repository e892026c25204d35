"""A gate catches what it is for: for each, a planted bad task that it alone rejects, beside a good one that all accept."""

from __future__ import annotations

import pytest

from rorqual.synthesis.general.calculus import Arg, Atom
from rorqual.synthesis.general.gates import GATES, run_gates
from rorqual.synthesis.general.goals import Const, Pick, Selector, in_order

from .planted import PLANTED, good_trial


def rejecting(trial) -> set[str]:
    results = run_gates(trial, stop_early=False)
    trial.session.close()
    if trial.confined:
        trial.confined.close()
    return {result.name for result in results if not result.passed}


def test_the_good_task_passes_every_gate() -> None:
    trial = good_trial(confined=True)
    results = run_gates(trial, stop_early=False)
    assert [(r.name, r.detail) for r in results if not r.passed] == []
    assert [r.name for r in results] == list(GATES)
    mutation = next(r for r in results if r.name == "mutants_fail")
    assert mutation.measures["killed"] >= 10 and mutation.measures["score"] == 1.0


def test_every_gate_has_a_planted_task() -> None:
    assert set(PLANTED) == set(GATES)


@pytest.mark.parametrize("gate", PLANTED)
def test_a_planted_bad_task_is_rejected_by_its_gate_alone(gate: str) -> None:
    assert rejecting(good_trial(**PLANTED[gate])) == {gate}


def test_the_arguments_of_a_stored_step_follow_those_that_they_name() -> None:
    def pick(head: str) -> Pick:
        return Pick(Selector("rows", (Atom("size", "<=", Arg(head)),)))

    made = {"party": Const("p1"), "slot": pick("party.size"), "guide": pick("slot.region"), "alone": pick("self.size")}
    stored = dict(sorted(made.items()))
    assert list(in_order(made)) == list(made.items()), "an order that holds is left as it is"
    assert list(stored) == ["alone", "guide", "party", "slot"]
    assert [name for name, _ in in_order(stored)] == ["alone", "party", "slot", "guide"]
