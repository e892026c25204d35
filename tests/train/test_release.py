"""A release opens elsewhere and does there what its vectors say."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rorqual import cli
from rorqual.runlog import RunLog, read_events
from rorqual.train.lineage import read_lineage
from tests.byte_tokenizer import byte_tokenizer
from tests.model.small_models import small_model

TOPK = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has ended."""
    from rorqual.data.bpe import save_tokenizer
    from rorqual.model.weights import save_model

    directory = tmp_path_factory.mktemp("runs") / "small"
    tokenizer = byte_tokenizer().backend
    RunLog(directory, quiet=True).close()
    companions = directory / "data"
    companions.mkdir()
    save_tokenizer(tokenizer, companions)
    # With few index heads ReLU leaves many scores at exactly 0, and among equals torch.topk chooses as it likes.
    sizes = {"n_heads": 4, "index_n_heads": 16, "vocab_size": tokenizer.get_vocab_size(), "index_topk": TOPK}
    model = small_model(3, **sizes, max_positions=256)
    save_model(model, directory / "model", "float32", companions=companions)
    return directory


@pytest.fixture(scope="module")
def released(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release as an archive, as the command makes it."""
    out = tmp_path_factory.mktemp("out") / "small.tar.gz"
    assert cli.main(["release", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def unpacked(released: Path) -> Path:
    with tarfile.open(released) as archive:
        archive.extractall(released.parent / "unpacked", filter="data")
    return released.parent / "unpacked" / "small"


@torch.no_grad()
def test_transformers_opens_it_and_continues_with_the_same_greedy_tokens(unpacked: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peer = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32, attn_implementation="eager").eval()
    peer.config._experts_implementation = "eager"
    vectors = load_file(unpacked / "vectors.safetensors")
    tokens = vectors["tokens"]
    assert len(tokens) > 2 * TOPK, "selection matters"
    logits = peer(tokens[None]).logits[0]
    torch.testing.assert_close(logits[-len(vectors["logits"]) :], vectors["logits"], atol=2e-4, rtol=2e-4)
    greedy = tokens
    for _ in vectors["greedy_tokens"]:
        greedy = torch.cat([greedy, peer(greedy[None]).logits[0, -1:].argmax(-1)])
    assert float(vectors["margins"].min()) > 1e-3, "no near-tie, which rounding would decide"
    assert greedy[len(tokens) :].tolist() == vectors["greedy_tokens"].tolist()
    assert len(set(vectors["greedy_tokens"].tolist())) > 3, "not one token over and over"
    text = AutoTokenizer.from_pretrained(unpacked).decode(tokens[:30])
    assert text == "Rorquals are the largest whale"


def test_every_file_has_the_hash_that_is_written_down(released: Path, unpacked: Path, run: Path) -> None:
    sums = dict(reversed(line.split("  ")) for line in (unpacked / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == digest, name
    own = hashlib.sha256(released.read_bytes()).hexdigest()
    assert released.with_name("small.tar.gz.sha256").read_text() == f"{own}  small.tar.gz\n"
    assert read_events(run, "released")[0]["sha256"] == own


def test_it_carries_card_lineage_and_golden_vectors_and_no_trace_of_who_packed_it(unpacked: Path, released: Path) -> None:
    assert (unpacked / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    own, records = read_lineage(unpacked)
    assert records[own]["stage"] == "release" and [p["role"] for p in records[own]["parents"]] == ["model"]
    assert (unpacked / "conformance" / "float64.safetensors").is_file()
    assert '"bfloat16"' in (unpacked / "config.json").read_text()
    with tarfile.open(released) as archive:
        assert {(m.uid, m.gid, m.uname, m.mtime) for m in archive.getmembers()} == {(0, 0, "", 0)}


def test_packed_again_it_has_the_same_hash(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rorqual.train.lineage.environment", lambda: {"commit": "one and the same"})
    archives = [tmp_path / place / "small.tar.gz" for place in ("here", "there")]
    for archive in archives:
        assert cli.main(["release", str(run), "--out", str(archive)]) == 0
    assert archives[0].read_bytes() == archives[1].read_bytes()


def test_the_selections_in_its_vectors_are_top_k_and_causal(unpacked: Path) -> None:
    vectors = load_file(unpacked / "vectors.safetensors")
    layers = [tensor for name, tensor in vectors.items() if name.startswith("selected.")]
    assert len(layers) == 3
    for selected in layers:
        for row, chosen in enumerate(selected):
            real = chosen[chosen >= 0]
            assert len(real) == min(TOPK, row + 1) and int(real.max()) <= row and (real.diff() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit-mb", "0.01"], "more than 0.01 MB"),
        (["--limit-mb", "0"], "expected more than 0"),
    ],
)
def test_what_can_not_be_released_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    out = tmp_path / "x.tar.gz"
    assert cli.main(["release", str(run), "--out", str(out), *arguments]) in (1, 2)
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_release_never_replaces_a_file_and_a_run_without_a_model_has_none(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "x.tar.gz").write_text("mine")
    assert cli.main(["release", str(run), "--out", str(tmp_path / "x.tar.gz")]) == 1
    assert (tmp_path / "x.tar.gz").read_text() == "mine" and "exists" in capsys.readouterr().err
    RunLog(tmp_path / "empty", quiet=True).close()
    assert cli.main(["release", str(tmp_path / "empty"), "--out", str(tmp_path / "y")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err
