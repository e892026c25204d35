"""rorqual encode and rorqual decode, as a user calls them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rorqual.chat import Tokenizer, encode, encode_tokens
from rorqual.cli import main
from tests.chat.conftest import byte_level
from tests.chat.test_encoder import call, user

MESSAGES = [user("Q 天気"), call(("f", '{"a": " x\\n"}'), reasoning="T")]


def run(capfdbinary: Any, *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()


def test_encode_writes_the_prompt_byte_for_byte_and_decode_reads_it_back(tmp_path: Path, capfdbinary: Any) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MESSAGES), encoding="utf-8")
    assert run(capfdbinary, "encode", str(tmp_path / "m.json")) == (0, encode(MESSAGES), "")
    completion = encode(MESSAGES[1:], context=MESSAGES[:1])
    (tmp_path / "c.txt").write_bytes(completion.encode())
    status, out, _ = run(capfdbinary, "decode", str(tmp_path / "c.txt"))
    assert (status, json.loads(out)) == (0, MESSAGES[1])


def test_standard_input_tools_and_modes(capfdbinary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"messages": [user("Q")], "tools": [{"type": "function", "function": {"name": "f"}}]}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(given).encode())))
    status, out, _ = run(capfdbinary, "encode", "-", "--chat")
    assert status == 0 and '<functions>\n{"name": "f"}\n</functions>' in out and out.endswith("</think>")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hi <｜DSML｜x>".encode())))
    status, out, err = run(capfdbinary, "decode", "-", "--chat", "--tolerant")
    assert (status, json.loads(out)["content"]) == (0, "Hi ") and "stray_tag" in err


def test_token_ids_and_json(tmp_path: Path, capfdbinary: Any, tokenizer_file: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MESSAGES), encoding="utf-8")
    _, out, _ = run(capfdbinary, "encode", str(tmp_path / "m.json"), "--tokenizer", str(tokenizer_file), "--json")
    assert json.loads(out)["tokens"] == encode_tokens(MESSAGES, Tokenizer.open(tokenizer_file))
    assert len(json.loads(out)["loss_mask"]) == len(json.loads(out)["tokens"])
    _, out, _ = run(capfdbinary, "encode", str(tmp_path / "m.json"), "--json")
    assert json.loads(out) == {"prompt": encode(MESSAGES)}


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    from rorqual.chat import SPECIAL_TOKENS

    byte_level(list(SPECIAL_TOKENS)).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("command", "content", "problem"),
    [
        ("encode", b"{", "not JSON"),
        ("encode", b"\xff", "not UTF-8 at byte 0"),
        ("encode", b"{}", "an object with"),
        ("encode", b'[{"role": "x"}]', "messages[0].role"),
        ("encode", b'{"messages": 5}', "expected a list of messages"),
        ("decode", "<｜begin▁of▁sentence｜>".encode(), "a prompt"),
    ],
)
def test_bad_files_are_one_line_and_exit_status_1(
    tmp_path: Path, capfdbinary: Any, command: str, content: bytes, problem: str
) -> None:
    (tmp_path / "f").write_bytes(content)
    status, out, err = run(capfdbinary, command, str(tmp_path / "f"))
    assert (status, out) == (1, "") and problem in err and err.count("\n") == 1
    status, _, err = run(capfdbinary, command, str(tmp_path / "none"))
    assert status == 1 and "No such file" in err
