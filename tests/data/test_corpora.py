"""Corpora: every kind reads what it says, and what can't be read is counted or refused by name."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from rorqual.data.corpora import MAX_FILE_BYTES, Tally, decode, documents, plain_from_roff
from rorqual.errors import UserError


def texts(name: str, tally: Tally | None = None) -> list[str]:
    return [document.text for document in documents(name, tally or Tally())]


def test_files_read_a_file_a_tree_and_a_glob_in_path_order(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"sea"))
    (tmp_path / "d.bin").write_bytes(b"no text by its name")
    assert texts(f"files:{tmp_path}") == ["ay", "bee", "sea"]
    assert texts(f"files:{tmp_path}/b.txt") == ["bee"]
    assert texts(f"files:{tmp_path}/*.txt") == ["bee"]


def test_jsonl_and_parquet_read_the_named_field(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n\nnot json\n{"text": "two", "body": "b"}\n')
    tally = Tally()
    assert texts(f"jsonl:{tmp_path}/x.jsonl", tally) == ["one", "two"]
    assert tally.counts == {"read": 2, "not JSON": 1}
    with pytest.raises(UserError, match=r"x\.jsonl:1: has no field 'body'"):
        texts(f"jsonl:{tmp_path}/x.jsonl#body")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["p", "q", None]}), tmp_path / "x.parquet")
    assert texts(f"parquet:{tmp_path}/x.parquet#body") == ["p", "q"]
    with pytest.raises(UserError, match="no column 'text'; it has: body"):
        texts(f"parquet:{tmp_path}/x.parquet")
    (tmp_path / "y.parquet").write_text("no table")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        texts(f"parquet:{tmp_path}/y.parquet")


def test_the_standard_library_is_found_on_any_machine():
    document = next(iter(documents("python", Tally())))
    assert document.origin.startswith(sys.base_prefix) and document.text.strip()


def test_undecodable_bytes_are_replaced_where_few_and_skipped_where_many(tmp_path):
    tally = Tally()
    few = decode(b"\xff" + b"a" * 999, tally)
    assert few == "�" + "a" * 999 and tally.counts == {"bytes replaced": 1}
    assert decode(b"\xff\xfe" * 50 + b"a" * 100, tally) is None and tally.counts["undecodable"] == 1
    assert decode(b"a\0b", tally) is None and tally.counts["binary"] == 1


def test_a_damaged_archive_and_a_huge_file_are_counted_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-20])
    (tmp_path / "b.txt").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    (tmp_path / "c.txt").write_text("  \n")
    (tmp_path / "d.txt").write_text("kept")
    tally = Tally()
    assert texts(f"files:{tmp_path}", tally) == ["kept"]
    assert tally.counts == {"unreadable": 1, "too large": 1, "empty": 1, "read": 1}


@pytest.mark.parametrize("name", ["nowhere", "files", "python:x", "files:/no/such/file", "jsonl:/no/such.jsonl"])
def test_a_bad_name_is_an_error_that_quotes_it(name):
    with pytest.raises(UserError) as caught:
        texts(name)
    assert name.split(":")[-1] in str(caught.value)


def test_an_empty_corpus_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no readable text"):
        texts(f"files:{tmp_path}")


def test_hugging_face_datasets_say_what_to_install_where_the_library_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        texts("hf:some/name")


def test_hugging_face_datasets_are_read_by_split_and_column(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(name, split, streaming):
            assert (name, split, streaming) == ("some/name", "test", True)
            return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert texts("hf:some/name@test#body") == ["one", "two"]


def test_roff_becomes_words():
    page = ".TH LS 1\n.SH NAME\nls \\- list\n.B ls\n[\\fIOPTION\\fR]...\n\\(aqx\\(aq\n"
    assert plain_from_roff(page) == "\nNAME\nls - list\nls\n[OPTION]...\n x "


def test_corpora_json_is_utf8(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "鯨 ü"}, ensure_ascii=False), encoding="utf-8")
    assert texts(f"jsonl:{tmp_path}/x.jsonl") == ["鯨 ü"]
