"""The page of evaluations: made from results alone, with what was published beside what was measured."""

from __future__ import annotations

import json

from rorqual.cli import main
from rorqual.evals import browse
from rorqual.evals.published import FIGURE_6, TABLE_3, TABLE_3_MODELS, published_costs, published_curves


def test_the_page_sets_each_strategy_beside_the_papers_figure_and_tables(tmp_path, capsys):
    browse.made(tmp_path / "data", people=12, questions=4)
    common = ["evaluate", "--benchmark", "browse", "--data", str(tmp_path / "data"), "--policy", "program:gold", "--quiet"]
    contexts = ("none", "summary", "discard-75", "discard-all", "parallel-fewest-step")
    for context in contexts:
        assert main([*common, "--context", context, "--out", str(tmp_path / context)]) == 0
    beside = ["--beside", *(str(tmp_path / context) for context in contexts[1:])]
    assert main([*common, "--out", str(tmp_path / "none"), "--page", *beside]) == 0
    capsys.readouterr()
    page = (tmp_path / "none" / "index.html").read_text()
    assert "Score against steps" in page and "figure 6" in page
    for context in contexts:
        assert f"{context} (program:gold)" in page and (context == "none" or f"{context} (published)" in page)
    assert "published: DeepSeek-V3.2 Thinking" in page and "51.4" in page


def test_the_contest_stands_on_its_page(tmp_path, capsys):
    problem = {"id": "p", "statement": "s", "samples": [["", "1"]], "subtasks": [{"points": 7, "cases": [["", "1"]]}],
               "reference": "```python\nprint(1)\n```"}  # fmt: skip
    (tmp_path / "c.jsonl").write_text(json.dumps(problem))
    arguments = ["evaluate", "--benchmark", "contest", "--data", str(tmp_path / "c.jsonl"), "--policy", "program:gold"]
    assert main([*arguments, "--out", str(tmp_path), "--page", "--quiet"]) == 0
    assert "7 of 7 points, 1 of 1 problems solved" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text()
    assert "by the rule of IOI" in page and "492 of 600 points, gold" in page


def test_published_figures_are_given_by_row():
    assert published_costs("AIME 2025")["DeepSeek-V3.2-Speciale"] == (96.0, 23) and published_costs("MMLU-Pro") == {}
    assert len(TABLE_3["Codeforces"]) == len(TABLE_3_MODELS) and "Kimi-K2-Thinking" not in published_costs("Codeforces")
    assert published_curves("BrowseComp")["discard-all"][-1] == FIGURE_6["discard-all"][-1] and published_curves("x") == {}
