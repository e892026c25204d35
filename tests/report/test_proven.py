"""The tables of committed proofs, from figures as the proofs themselves make them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import prove_post_training, prove_speciale, prove_transfer
from benchmarks.prove_post_training import Evaluated
from rorqual.report import controls, proven


def test_post_training_step_by_step() -> None:
    def evaluated(name: str, solved: int) -> Evaluated:
        return Evaluated(name, {"maths": {f"t{n}": float(n < solved) for n in range(20)}})

    stages = {name: evaluated(name, solved) for name, solved in (("base", 0), ("cold start", 4), ("distilled", 12))}
    figures = prove_post_training.table(stages, {"maths": evaluated("maths", 13)})
    text = proven.shown(
        "post_training",
        figures | {"why": ["Distilled on few tasks."], "other_domains": {"code": {"iterations": 3, "rollout/success": 0.0625}}},
    )
    assert text is not None
    for words in ("maths, 20 tasks", "20.0 % [", "specialist maths", "+20.0 [", "cold start -&gt; specialists", "+45.0 [",
                  "−5.0 [", "specialists: does not hold", "generalist: does not hold", "Distilled on few tasks.",
                  "rollout/success", "0.062"):  # fmt: skip
        assert words in text, words


def test_transfer_and_solvers() -> None:
    def results(solved: int) -> list:
        tasks = {f"t{n}": [float(n < solved)] * 4 for n in range(10)}
        ends = {"ends": {"answered": 30, "malformed": 10}}
        return [{"by_task": tasks, "outcomes": ends, "accounts": {"tool_calls": 8, "refused_calls": 2}}]

    models = [prove_transfer.SFT, *prove_transfer.ARMS]
    figures = prove_transfer.table({("fifty", name): results(2 + n) for n, name in enumerate(models)}, models)
    figures["solvers"] = {"program: careful": prove_transfer.solver_row({"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0] * 4})}
    text = proven.shown("transfer", figures)
    assert text is not None
    for words in ("Set: fifty", "20.0 % [", "75.0 %", "+10.0 [", "program: careful", "pass@2", "62.5 % ["):
        assert words in text, words


def test_both_recipes_at_each_strength() -> None:
    cells = [prove_speciale.Cell(arm, 0.5, seed) for arm in prove_speciale.ARMS for seed in range(3)]
    found = {
        cell: prove_speciale.Found(0.5 + 0.01 * cell.seed, 20.0 + 4 * (cell.arm == "speciale") + cell.seed, (1.0, 2.0))
        for cell in cells
    }
    figures = prove_speciale.report(prove_speciale.Found(0.3, 12.0), found, prove_speciale.FULL)
    assert figures["by_weight"]["0.5"]["verdict"] == {"reasoning is longer": True, "held-out success is higher": False}
    text = proven.shown("speciale", figures)
    assert text is not None
    for words in ("4.0 [4.0, 4.0]", "0.0 [0.0, 0.0]", "51.0 [", "reasoning is longer: yes; held-out success is higher: not shown",
                  "the base: 30.0 % at 12.0 tokens"):  # fmt: skip
        assert words in text, words


def test_committed_proof_rewards_have_their_table() -> None:
    record = json.loads((controls.RESULTS / "proof_rewards.json").read_text())
    text = proven.shown("proof_rewards", record["figures"])
    assert text is not None and "always zero" in text and "mostly flawed" in text and "verifiers.even" not in text
    assert text in controls.section().body


def test_figures_of_another_form_are_shown_plainly(tmp_path: Path) -> None:
    (tmp_path / "speciale.json").write_text(json.dumps({"figures": {"verdict": {"longer": 1}}}))
    assert "verdict.longer" in controls.section(tmp_path).body
