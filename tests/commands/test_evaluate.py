"""rorqual evaluate from the command line."""

from __future__ import annotations

import json

import pytest

from rorqual.cli import main


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{i}+{i}?", "answer": f"add\n#### {2 * i}"} for i in range(5)] + [{"question": "broken"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(capsys, *arguments, status=0):
    assert main(["evaluate", *map(str, arguments)]) == status
    return capsys.readouterr()


def test_it_measures_stores_resumes_rescores_compares_and_draws(tmp_path, data, capsys):
    common = ["--benchmark", "gsm8k", "--data", data, "--json"]
    first = json.loads(evaluate(capsys, *common, "--policy", "program:corrupted", "--out", tmp_path / "bad").out)
    assert first["score"]["value"] == 0.0 and len(first["defective_rows"]) == 1 and first["tasks"] == 5
    gold = [*common, "--policy", "program:gold", "--out", tmp_path / "gold", "--n", 2, "--k", 1, 2]
    found = json.loads(evaluate(capsys, *gold, "--compare", tmp_path / "bad", "--page", "--beside", tmp_path / "bad").out)
    assert found["score"]["value"] == 1.0 and found["pass_at_k"]["2"]["value"] == 1.0 and found["licence"] == "MIT"
    assert found["comparison"]["wins"] == 5 and found["comparison"]["difference"]["value"] == 1.0
    page = (tmp_path / "gold" / "index.html").read_text()
    assert "Score against steps" in page and "program:corrupted" in page and "http-equiv" not in page
    assert 'src="http' not in page.partition("<body>")[2], "nothing is fetched"
    again = json.loads(evaluate(capsys, *gold, "--rescore").out)
    assert again["rescored"] and again["by_task"] == found["by_task"]
    assert json.loads((tmp_path / "gold" / "results.json").read_text())["score"] == again["score"]


def test_the_text_names_what_has_no_score(tmp_path, data, capsys):
    common = ["--benchmark", "gsm8k", "--data", data, "--out", tmp_path / "x", "--quiet"]
    out = evaluate(
        capsys, *common, "--policy", "program:failing", "--n", 20, "--context", "parallel-fewest-step", "--runs", 1
    ).out
    assert "WITHOUT A SCORE" in out and "DEFECTIVE ROWS     1" in out and "policy_failed" in out


@pytest.mark.parametrize(
    "arguments, status, says",
    [
        (["--benchmark", "nothing", "--policy", "x", "--out", "o"], 1, "there are aime_2025"),
        (["--benchmark", "gsm8k"], 2, "--policy and --out are needed"),
        (
            ["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--concurrency", "-9"],
            2,
            "--concurrency: expected",
        ),
        (["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--n", "0", "--k", "1"], 2, "at least k attempts"),
        (["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--max-turns", "0"], 2, "--max-turns: expected"),
        (["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--top-p", "0"], 2, "--top-p: expected in (0, 1]"),
        (["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--limit", "0"], 2, "--limit: expected at least 1"),
        (
            ["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--isolation", "x"],
            2,
            "--isolation: expected bwrap",
        ),
        (
            ["--benchmark", "needles", "--policy", "program:gold", "--out", "o", "--timeout", "0"],
            2,
            "--timeout: expected more than 0",
        ),
        (["--benchmark", "gsm8k", "--policy", "program:gold", "--out", "o", "--k", "2"], 2, "pass@k needs at least k"),
        (["--benchmark", "gsm8k", "--policy", "program:gold", "--out", "o", "--data", "absent.jsonl"], 1, "no such file"),
        (["--benchmark", "needles", "--count", "2", "--policy", "nowhere", "--out", "o"], 1, "no checkpoint directory"),
        (["--benchmark", "needles", "--count", "2", "--policy", "program:none", "--out", "o"], 1, "program:gold"),
        (["--benchmark", "needles", "--count", "2", "--policy", "program:gold", "--out", "o", "--rescore"], 2, "evaluation.json"),
        (["--benchmark", "imo_answerbench", "--policy", "program:gold", "--out", "o"], 1, "--data PATH"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, status, says):
    monkeypatch.chdir(tmp_path)
    said = evaluate(capsys, *arguments, status=status).err
    assert says in said and said.count("\n") == 1


def test_the_benchmarks_are_listed_with_licence_and_source(capsys):
    facts = json.loads(evaluate(capsys, "--benchmark", "list", "--json").out)
    assert {"gsm8k", "humaneval", "heldout", "browse", "needles"} <= {fact["name"] for fact in facts}
    assert all(fact["licence"] and fact["source"] for fact in facts)


def test_a_checkpoint_is_measured_and_another_one_is_not_taken_for_it(tmp_path, capsys):
    from rorqual.model.transformer import Transformer
    from rorqual.model.weights import save_model
    from tests.serve.conftest import CONFIG, TOKENIZER

    found = []
    for seed in (1, 1, 2):
        model = tmp_path / "model"
        save_model(Transformer(CONFIG, seed=seed), model, "float32", overwrite=True)
        TOKENIZER.backend.save(str(model / "tokenizer.json"))
        made = ["--count", "3", "--length", "200", "--max-tokens", "6", "--window", "4096", "--n", "2"]
        arguments = ["--benchmark", "ruler", *made, "--policy", model, "--out", tmp_path / "out", "--json"]
        found.append(json.loads(evaluate(capsys, *arguments).out))
    assert found[0]["identity"] == found[1]["identity"] != found[2]["identity"]
    assert found[0]["accounts"] == found[1]["accounts"] and found[0]["accounts"]["sampled_tokens"] > 6
    assert found[0]["not_played"] == 0 and sum(found[0]["outcomes"]["verdicts"].values()) == 6
    assert sum(1 for _ in (tmp_path / "out" / "attempts").rglob("*.npz")) == 12, "six attempts of each of two models"
