"""The pages hold: every block of the tutorials runs or says why not, every command named anywhere exists."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.documents import ROOT, Block, blocks, commands

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
MARKED = [ROOT / "README.md", *TUTORIALS]
PAGES = [*MARKED, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = ("convert-your-model", "several-gpus", "mismatch-lab", "evaluate-with-context-management")
"""Pages whose commands train something or take long."""


def name_of(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", MARKED, ids=name_of)
def test_every_block_says_what_becomes_of_it(page):
    unmarked = [f"{page.name}:{block.line}" for block in blocks(page) if block.mark is None]
    assert unmarked == [], "see tests/documents.py for the comment that each block needs"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_named_exists(page):
    for command in commands(page):
        wrong = problem_of(command)
        assert wrong is None, f"{page.name}: {command}: {wrong}"


def problem_of(command: str) -> str | None:
    """What is wrong with a command that a page names, or None."""
    words = shlex.split(re.split(r"\s[|>&#]|\s{3,}", command)[0], comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if words[1] in targets else f"the Makefile has no target {words[1]}"
    if words[0] == "pytest":
        missing = [word for word in words[1:] if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()]
        return f"there is no {missing}" if missing else None
    if words[0] == "python":
        proofs = [word for word in words[3:] if re.fullmatch(r"[a-z_0-9]+", word)]
        missing = [proof for proof in proofs if not (ROOT / "benchmarks" / f"prove_{proof}.py").exists()]
        return f"there is no proof {missing}" if missing else None
    if words[0] == "torchrun":
        words = words[words.index("rorqual") :] if "rorqual" in words else ["rorqual", "run"]
    return problem_of_arguments(words[1:])


def problem_of_arguments(words: list[str]) -> str | None:
    names = words[0].rstrip(",").split("/")
    for name in names:
        source = ROOT / "rorqual" / "commands" / f"{name.replace('-', '_')}.py"
        if not source.exists() and name not in ("SUBCOMMAND", "COMMAND", "--help", "--version", "…"):
            return f"there is no command {name}"
    if len(names) > 1 or words[0].startswith("-") or not source.exists():
        return None
    text = source.read_text()
    if "from rorqual.launch import" in text:
        text += (ROOT / "rorqual" / "launch.py").read_text()  # options that commands of stages share
    takes_overrides = "TAKES_OVERRIDES = True" in text
    for word in words[1:]:
        option = word.split("=")[0]
        if option.startswith("--") and f'"{option}"' not in text and not (takes_overrides and "=" in word):
            return f"{words[0]} has no option {option}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_between_pages_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_is_current():
    """Where this fails: make reference."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make_reference  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for name, text in make_reference.pages().items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == text, f"{name} is old: make reference"


# --- running the tutorials


def prepared(folder: Path) -> dict[str, str]:
    """A directory as a reader of the tutorials may have it, and an environment in which `rorqual` is this checkout's."""
    from rorqual.chat import SPECIAL_TOKENS
    from rorqual.data.bpe import save_tokenizer, train_bpe
    from rorqual.data.recall import sample_text
    from rorqual.model.transformer import Transformer
    from rorqual.model.weights import save_model
    from tests.serve.conftest import CONFIG

    (folder / "my-texts").mkdir()
    for source in sorted((ROOT / "rorqual" / "chat").glob("*.py")):
        (folder / "my-texts" / f"{source.stem}.txt").write_text(source.read_text())
    texts = [text.read_text() for text in sorted((folder / "my-texts").iterdir())]
    tokenizer = train_bpe([*texts, *sample_text(np.random.default_rng(0), 500)], 768, SPECIAL_TOKENS)
    for name, indexers in (("my-model", "full"), ("my-dense-model", "none"), ("runs/tiny/model", "full")):
        model = Transformer(type(CONFIG)(**{**vars(CONFIG), "vocab_size": 768, "indexers": indexers}), seed=1)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_model(model, folder / name, "float32")
        save_tokenizer(tokenizer, folder / name)
    programs = folder / ".programs"
    programs.mkdir()
    for name, command in (("rorqual", "-m rorqual"), ("python", ""), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


class Reader:
    """Does what a page says, block by block, with free ports in the place of those it names."""

    def __init__(self, folder: Path):
        self.folder, self.environment = folder, prepared(folder)
        self.ports = {name: str(free_port()) for name in ("8000", "8001")}
        self.servers: list[subprocess.Popen] = []

    def read(self, block: Block) -> None:
        assert block.mark is not None
        module = block.mark["module"]
        if module and importlib.util.find_spec(module) is None:
            return
        text = re.sub(r"\b800[01]\b", lambda found: self.ports[found[0]], block.text)
        command = ["bash", "-ec", text] if block.language != "python" else ["python", "-c", text]
        if block.mark["ready"]:
            self.serve(command, block.mark["ready"])
            return
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"line {block.line}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    def serve(self, command: list[str], ready: str) -> None:
        log = self.folder / f".server-{len(self.servers)}"
        with open(log, "w") as file:
            command = [*command[:-1], f"exec {command[-1]}"]
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=file, stderr=file)
        self.servers.append(process)
        end = time.monotonic() + 120
        while not (ready in log.read_text() and self.answers(command[-1])):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def answers(self, command: str) -> bool:
        """Whether the port of a server takes connections; it says where it will be before it is there."""
        port = re.search(r"--port (\d+)", command)
        with socket.socket() as probe:
            return port is None or probe.connect_ex(("127.0.0.1", int(port[1]))) == 0

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW), id=p.stem) for p in MARKED])
def test_a_tutorial_can_be_followed(page, tmp_path):
    runnable = [block for block in blocks(page) if block.runs]
    if not runnable:
        pytest.skip("no block of this page runs here; each says why")
    reader = Reader(tmp_path)
    try:
        for block in runnable:
            reader.read(block)
    finally:
        reader.close()
