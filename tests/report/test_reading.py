"""What the page says of a run is what its files hold; what they lack is said in a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import UserError
from rorqual.report import controls, trajectories
from rorqual.report.ancestry import in_order
from rorqual.report.card import card
from rorqual.report.markup import count, data, duration, signed, size
from rorqual.report.page import page, sections, write
from rorqual.report.reading import read_run
from rorqual.report.training import title_of
from rorqual.runlog import RunLog
from tests.report.made_run import STAGES, made_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "made")


def test_a_run_that_left_only_its_log_has_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    RunLog(tmp_path, quiet=True).close()
    parts = {part.id: part.body for part in sections(read_run(tmp_path))}
    assert [name for name, body in parts.items() if "class='absent'" not in body] == ["controls"]
    assert "figure class='plot'" in parts["contexts"], "the paper's own figure stands there alone"
    assert write(tmp_path).stat().st_size > 1e6


def test_a_directory_that_is_no_run_or_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        read_run(tmp_path)
    RunLog(tmp_path, quiet=True).close()
    (tmp_path / "exhibits").mkdir()
    (tmp_path / "exhibits" / "cost.json").write_text('{"this"')
    with pytest.raises(UserError, match=r"cost\.json: not JSON"):
        read_run(tmp_path)


def test_no_section_is_missing_anything_when_the_run_has_everything(made: Path) -> None:
    parts = {part.id: part.body for part in sections(read_run(made))}
    assert [name for name, body in parts.items() if "class='absent'" in body] == []
    ids = re.findall(r" id='([^']+)'", page(read_run(made)))
    assert len(ids) == len(set(ids)), "ids are unique"


def test_stages_stand_in_the_order_they_ran_with_their_tokens_and_last_metrics(made: Path) -> None:
    run = read_run(made)
    assert [stage.name for stage in run.stages] == list(STAGES)
    assert run.stages[0].tokens == 20 * 4 * 64, "rows times length"
    grpo = run.stage("grpo")
    assert grpo is not None and grpo.tokens == 20 * 500 and grpo.is_rl, "where rows differ, what each step counted"
    assert grpo.curve("rollout/success")[1] == [step / 40 for step in range(20)]


def test_a_resumed_stage_counts_each_step_once_and_no_time_between_sessions(tmp_path: Path) -> None:
    RunLog(tmp_path, quiet=True).close()
    events: list[dict[str, Any]] = [
        {"time": 100.0, "kind": "begin"}, {"time": 110.0, "kind": "metrics", "step": 0, "train/loss": 5.0},
        {"time": 120.0, "kind": "metrics", "step": 1, "train/loss": 4.0}, {"time": 900.0, "kind": "begin"},
        {"time": 901.0, "kind": "resumed", "stage": "pretrain", "step": 1},
        {"time": 905.0, "kind": "metrics", "step": 1, "train/loss": 3.0},
        {"time": 907.0, "kind": "stage ended", "stage": "pretrain", "steps": 2, "seconds": 6.0},
    ]  # fmt: skip
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"time": 9')
    (stage,) = read_run(tmp_path).stages
    assert stage.curve("train/loss") == ([0, 1], [5.0, 3.0])
    assert stage.seconds == 20 + 7 and stage.resumes == 1 and stage.has_ended


def test_an_evaluation_belongs_to_the_stage_whose_checkpoint_it_measured(made: Path) -> None:
    run = read_run(made)
    of_stages = [each["stage"] for each in run.evaluations if each["context"] == "none"]
    assert of_stages == ["cold-start", "specialists/retail", "distill", "grpo"]
    assert {each["suite"] for each in run.evaluations} == {"heldout, primer"}, "the store is named by the directory"
    body = next(part.body for part in sections(run) if part.id == "held-out")
    assert "47.5 % [37.5, 57.5]" in body and "Specialist (retail)" in body


def test_attempts_are_chosen_by_rule_solved_and_failed_alike(made: Path) -> None:
    run = read_run(made)
    assert len(run.attempts) == 12
    chosen = trajectories.choose(run.attempts)
    assert [(a.record["task_id"], a.passed) for a in chosen] == [("task-1", True), ("task-2", False)], "no task twice"


def test_lineage_shows_every_record_once_and_parents_before_children(made: Path) -> None:
    records = read_run(made).lineage["records"]
    order = in_order(records)
    assert sorted(order) == sorted(records)
    assert all(order.index(p["id"]) < order.index(name) for name in records for p in records[name]["parents"])


def test_committed_figures_are_called_another_run_with_date_commit_and_command(tmp_path: Path) -> None:
    record = {"command": "python -m benchmarks.prove x", "commit": "0123456789", "cores": 2, "date": "2026-11-22T01:02:03",
              "figures": {"a": {"b": 0.25}, "many": list(range(100))}}  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(record))
    body = controls.section(tmp_path).body
    for words in ("another run · 2026-11-22 · commit 0123456 · 2 CPU cores", "python -m benchmarks.prove x", "a.b", "0.25",
                  "more figures in x.json"):  # fmt: skip
        assert words in body, words


def test_every_committed_result_of_the_repository_is_shown() -> None:
    body = controls.section().body
    names = [path.stem.replace("_", " ") for path in controls.RESULTS.glob("*.json")]
    assert names and all(f"<b>{name}</b>" in body for name in names)


def test_a_run_without_a_dense_control_points_to_a_committed_one_only_where_there_is_one(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in (False, True):
        monkeypatch.setattr(controls, "is_committed", lambda name, known=known: known and name == "sparse_quality")
        body = next(part.body for part in sections(read_run(made)) if part.id == "dense-or-sparse")
        assert "<code>rorqual adapt</code> trains a control" in body
        assert ("among the committed proofs below" in body) == known


def test_the_model_card_states_the_run_and_its_limits(made: Path) -> None:
    text = card(read_run(made))
    assert text.startswith("---\nlicense: apache-2.0") and "2.04 million-parameter" in text
    assert "| Sparse training | 20 | 5,120 |" in text and "heldout after mixed rl: 47.5 % (95 % interval" in text.lower()
    assert "What it is not" in text


def test_numbers_are_written_as_people_read_them() -> None:
    assert [count(x) for x in (0, 1234, 2.04e6, 6.7e11)] == ["0", "1,234", "2.04 million", "670 billion"]
    assert [duration(x) for x in (3.21, 59, 240, 7200)] == ["3.2 s", "59 s", "4.0 min", "2.0 h"]
    assert [size(x) for x in (512, 2**20, 3 * 2**30)] == ["512 bytes", "1 MiB", "3 GiB"]
    assert [signed(x) for x in (0.0033, -0.01)] == ["+0.33 %", "−1.00 %"]
    assert [title_of(x) for x in ("specialists/maths-thinking", "specialist-retail", "cold-start", "some-thing")] == [
        "Specialist (maths-thinking)", "Specialist (retail)", "Cold start", "Some thing",
    ]  # fmt: skip


def test_data_in_the_page_can_not_end_its_element_and_reads_back() -> None:
    text = data("x", {"a": "</script><!--", "b": [1, None]})
    inner = text.partition(">")[2].removesuffix("</script>")
    assert "<" not in inner and json.loads(inner) == {"a": "</script><!--", "b": [1, None]}
