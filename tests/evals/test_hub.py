"""Rows from the Hugging Face hub. The hub's own client is used; what it would download stands in its cache on disk already, laid
out as it lays it out, since tests use no network. What is not there is asked of an address where nobody answers."""

from __future__ import annotations

import csv
import json
import socket

import pytest

from rorqual.errors import UserError
from rorqual.evals.benchmark import Options
from rorqual.evals.catalogue import BENCHMARKS, benchmark
from rorqual.evals.source import Hub, find, rows

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The client's cache, which is all that it may look at."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository, name, write):
        root = tmp_path / f"datasets--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(COMMIT)
        path = root / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)

    return put


def parquet(table):
    def write(path):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)

    return write


def text_rows(table):
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in table))


def csv_rows(table):
    def write(path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)

    return write


WRONG = {f"Incorrect Answer {number}": f"no {number}" for number in (1, 2, 3)}
FILES = {
    "gsm8k": ("main/test-00000-of-00001.parquet", parquet([{"question": "1+1?", "answer": "#### 2"}])),
    "math": ("test.jsonl", text_rows([{"problem": "1+1?", "solution": r"\boxed{2}", "answer": "2", "level": 3}])),
    "aime_2025": ("data/train-00000-of-00001.parquet", parquet([{"problem_idx": 1, "problem": "1+1?", "answer": 2}])),
    "hmmt_feb_2025": ("data/train-00000-of-00001.parquet", parquet([{"problem_idx": 1, "problem": "x?", "answer": r"\frac12"}])),
    "hmmt_nov_2025": ("data/train-00000-of-00001.parquet", parquet([{"problem_idx": 1, "problem": "x?", "answer": "7"}])),
    "gpqa_diamond": ("gpqa_diamond.csv", csv_rows([{"Question": "q?", "Correct Answer": "yes", "Record ID": "r", **WRONG}])),
    "mmlu_pro": ("data/test-00000-of-00001.parquet",
                 parquet([{"question_id": 7, "question": "q?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9,
                           "category": "law"}])),
    "hle": ("data/test-00000-of-00001.parquet",
            parquet([{"id": "h", "question": "q?", "image": "", "answer": "42", "answer_type": "exactMatch"},
                     {"id": "i", "question": "q?", "image": "data:x", "answer": "42", "answer_type": "exactMatch"}])),
    "humaneval": ("openai_humaneval/test-00000-of-00001.parquet",
                  parquet([{"task_id": "t", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
                            "test": "def check(f):\n    assert f() == 1\n"}])),
    "livecodebench": ("test6.jsonl",
                      text_rows([{"question_id": "l", "question_content": "q?",
                                  "public_test_cases": '[{"input": "1", "output": "1"}]', "private_test_cases": "[]"}])),
}  # fmt: skip


def test_every_benchmark_with_an_address_on_the_hub_is_read_from_there(cache):
    assert set(FILES) == {name for name, each in BENCHMARKS.items() if each.hub}
    for name, (path, write) in FILES.items():
        chosen = benchmark(name)
        cache(chosen.hub.repository, path, write)
        suite = chosen.load(chosen, Options())
        assert len(suite.tasks) == 1 and not suite.defects, (name, suite.defects)
        (task,) = suite.tasks.values()
        if name not in ("humaneval", "livecodebench"):
            assert suite.open_episode(task).finish(chosen.reference(task)).passed, name


def test_only_the_files_of_the_pattern_are_rows(cache):
    cache("a/b", "main/test-0.parquet", parquet([{"x": 1}]))
    cache("a/b", "main/train-0.parquet", parquet([{"x": 2}]))
    assert [row for _, row in rows(find(None, Hub("a/b", "main/test-*.parquet"), "n"))] == [{"x": 1}]
    with pytest.raises(UserError, match=r"a/b has no file other/\*; give a local copy with --data PATH"):
        find(None, Hub("a/b", "other/*"), "n")


def test_a_hub_that_can_not_be_reached_is_said_with_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    chosen = benchmark("gsm8k")
    with pytest.raises(UserError, match=r"gsm8k: the Hugging Face hub gave nothing \(.*--data PATH .*openai/gsm8k") as caught:
        chosen.load(chosen, Options())
    assert "\n" not in str(caught.value)


def test_without_the_hubs_client_the_message_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed; give a local copy with --data PATH"):
        find(None, Hub("a/b", "c"), "n")
