"""What `rorqual prove` refuses, by name and with the promised exit status."""

from __future__ import annotations

import pytest

from rorqual.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prover", "nowhere"], "nowhere: expected"),
        (["--prover", "http://127.0.0.1:9", "--pool=0"], "pool: expected at least 1"),
        (["--prover", "http://127.0.0.1:9", "--pols=1"], "no such field"),
        (["--prover", "program"], "program: expected"),
    ],
)
def test_a_search_that_cannot_be_had_is_refused(tmp_path, capsys, arguments, message):
    problem = tmp_path / "problem.txt"
    problem.write_text("a+0 = a")
    assert main(["prove", str(problem), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert main(["prove", str(tmp_path / "none.txt"), "--prover", "http://127.0.0.1:9"]) == 1
