"""A run that was really made ends with a page that shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual import cli
from rorqual.parallel.world import World
from rorqual.report.page import sections
from rorqual.report.reading import read_run
from rorqual.stages import run as pipeline
from rorqual.stages.recipe import Recipe, load_recipe
from tests.browser import complaints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pre-training half of the smoke recipe."""
    full = load_recipe("smoke")
    half = Recipe(full.model, full.prepare, full.pretrain, full.extend, full.warm_indexer, full.train_sparse,
                  sample=full.sample, exhibits=full.exhibits)  # fmt: skip
    directory = tmp_path_factory.mktemp("runs") / "smoke"
    pipeline.main(half, directory, World(0, 1, torch.device("cpu")), quiet=True)
    return directory


def test_a_run_ends_with_a_page_whose_sections_have_what_the_run_made(run: Path) -> None:
    found = read_run(run)
    parts = {part.id: part.body for part in sections(found)}
    made = ("stages", "selection", "mass", "dense-or-sparse", "cost", "lineage")
    assert [name for name in made if "class='absent'" in parts[name]] == []
    assert [stage.name for stage in found.stages] == ["pretrain", "extend", "warm-indexer", "train-sparse"]
    assert all(stage.has_ended and stage.memory_bytes > 1e7 and stage.tokens > 0 for stage in found.stages)
    text = (run / "report.html").read_text()
    assert len(text) < 8e6 and not re.findall(r"(?:/tmp/|/root/|/home/)", text.rpartition("</script><script>")[0][:400_000])


def test_the_command_makes_the_same_page_again(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = (run / "report.html").read_text()
    assert cli.main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (run / "report.html").read_text() == before
    assert cli.main(["report", str(run / "data")]) == 1
    assert "no run" in capsys.readouterr().err


def test_its_tokens_can_be_walked(browser: Any, run: Path) -> None:
    page = browser.new_page()
    found = complaints(page)
    page.goto((run / "report.html").as_uri())
    first = page.locator("#readout").inner_text()
    page.locator("[aria-selected=true]").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#readout").inner_text() != first
    top_k = load_recipe("smoke").model.index_topk
    assert page.locator("#tokens .on").count() in (top_k - 1, top_k), "the chosen token itself may be among them"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.close()
    assert found == []
