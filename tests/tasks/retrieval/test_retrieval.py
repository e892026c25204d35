from __future__ import annotations

import json
from pathlib import Path

import pytest

from rorqual.tasks import TaskError
from rorqual.tasks.retrieval import BROWSER_TOOLS, Browser, Document, build_index, open_retriever, read_corpus

WORDS = ["amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo", "juniper"]


def documents() -> list[Document]:
    """Document i holds word i once, word i+1 twice, and 40 filler words of its own."""
    made = []
    for i, word in enumerate(WORDS):
        text = f"{word} {WORDS[(i + 1) % 10]} {WORDS[(i + 1) % 10]}\n" + " ".join(f"filler{i}x{j}" for j in range(40))
        made.append(Document(f"https://words.example/{i}", f"Page {i}", text))
    return made


@pytest.fixture(params=["fts5", "tantivy"])
def retriever(request: pytest.FixtureRequest, tmp_path: Path):
    found = build_index(documents(), tmp_path / "index", request.param)
    yield found
    found.close()


def test_a_search_finds_exactly_the_documents_that_hold_the_word(retriever) -> None:
    for i, word in enumerate(WORDS):
        found = {hit.document.url[-1] for hit in retriever.search(word)}
        assert found == {str(i), str((i - 1) % 10)}
        assert retriever.search(word)[0].document.url.endswith(str((i - 1) % 10))  # the one that holds it twice


def test_a_query_of_signs_only_or_of_operators_is_no_error(retriever) -> None:
    assert retriever.search("?!*") == []
    assert retriever.search('" OR AND NEAR( ^') is not None
    assert retriever.search("amber", topn=0) == []


def test_an_index_appears_whole_and_opens_again_with_the_same_answers(tmp_path: Path) -> None:
    first = build_index(documents(), tmp_path / "a")
    second = open_retriever(tmp_path / "a")
    assert [h.number for h in first.search("cedar")] == [h.number for h in second.search("cedar")]
    assert first.digest == second.digest
    assert build_index(documents()[1:], tmp_path / "b").digest != first.digest
    with pytest.raises(TaskError, match="no index"):
        open_retriever(tmp_path / "c")


def test_tools_have_the_published_parameters() -> None:
    shape = {t["function"]["name"]: list(t["function"]["parameters"]["properties"]) for t in BROWSER_TOOLS}
    assert shape == {
        "search": ["query", "topn", "source"],
        "open": ["id", "cursor", "loc", "num_lines", "view_source", "source"],
        "find": ["pattern", "cursor"],
    }
    for tool in BROWSER_TOOLS:
        parameters = tool["function"]["parameters"]
        assert parameters["additionalProperties"] is False
        assert parameters["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert BROWSER_TOOLS[0]["function"]["parameters"]["required"] == ["query"]
    assert BROWSER_TOOLS[0]["function"]["parameters"]["properties"]["topn"]["default"] == 10


def test_a_result_page_reads_as_published(retriever) -> None:
    lines = Browser(retriever).observe("search", {"query": "cedar", "topn": 2}).split("\n")
    assert lines[0] == "[0] Search: cedar (search://web)"
    assert lines[2] == ""
    assert lines[3] == "L0:" and lines[4].startswith("L1: URL: ") and lines[5] == "L2: # Search Results"
    shown = [line for line in lines if line.startswith("L")]
    assert lines[1] == f"**viewing lines [0 - {len(shown) - 1}] of {len(shown) - 1}**"
    assert any("【0†Page 1; publish_date: none†words.example】" in line for line in lines)
    assert all(len(line) <= 90 for line in shown)


def test_links_open_by_id_and_by_address_and_parts_by_line(retriever) -> None:
    browser = Browser(retriever)
    browser.observe("search", {"query": "cedar"})
    by_id = browser.observe("open", {"id": 0})
    by_url = browser.observe("open", {"id": "https://words.example/1"})
    assert by_id.split("\n")[1:] == by_url.split("\n")[1:]
    part = browser.observe("open", {"cursor": 1, "loc": 3, "num_lines": 2}).split("\n")
    assert [line.split(":")[0] for line in part[3:]] == ["L3", "L4"]
    assert part[3] in by_id.split("\n")
    assert "match at L2" in browser.observe("find", {"pattern": "CEDAR", "cursor": 1})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("open", {}), ("open", {"id": 99}), ("open", {"id": "https://nowhere"}), ("open", {"id": True}), ("open", {"id": [1]}),
        ("find", {"pattern": "x"}), ("find", {}), ("search", {}), ("search", {"query": 3}), ("search", {"query": "a", "b": 1}),
        ("search", {"query": "a", "id": 1}), ("nothing", {}),
    ],
)  # fmt: skip
def test_what_a_caller_does_wrong_is_an_observation(retriever, name: str, arguments: dict) -> None:
    assert "error" in json.loads(Browser(retriever).observe(name, arguments))


def test_files_are_read_and_bad_rows_are_named(tmp_path: Path) -> None:
    good = tmp_path / "notes.jsonl"
    good.write_text('{"title": "A", "text": "alpha", "year": 3}\n\n{"text": "beta"}\n')
    found = read_corpus(str(good))
    assert [(d.title, d.text) for d in found] == [("A", "year: 3\nalpha"), ("notes 1", "beta")]
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"title": "A", "text": "alpha", "year": 3}]), tmp_path / "notes.parquet")
    assert [(d.title, d.text) for d in read_corpus(str(tmp_path / "notes.parquet"))] == [("A", "year: 3\nalpha")]
    for text, problem in (('{"title": 1}', "text"), ("[1]", "object"), ("{", "line 1")):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        with pytest.raises(TaskError, match=problem):
            read_corpus(str(bad))
    with pytest.raises(TaskError, match="no such file"):
        read_corpus(str(tmp_path / "absent.jsonl"))


def test_the_standard_library_is_a_corpus_in_one_order() -> None:
    found = read_corpus("python")
    assert len(found) > 1000 and found == read_corpus("python")
    assert any(d.title == "heapq.heappush" for d in found)
