"""A finished checkpoint packed for others: small, in bf16, with what a porter needs to see that their engine computes the same.

    NAME/config.json, model.safetensors, tokenizer ...   the checkpoint; transformers and Rorqual open the directory
    NAME/README.md                                       the model card
    NAME/lineage.json                                    what it was made of
    NAME/vectors.safetensors                             this model's own: a prompt, its logits, selections, greedy tokens
    NAME/conformance/                                    golden vectors of the architecture, by a random model
    NAME/SHA256SUMS                                      of all the files above

An archive holds no times, owners or paths: packed again from the same checkpoint by the same code it has the same hash.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from rorqual.data.bpe import open_tokenizer
from rorqual.errors import UserError
from rorqual.model import conformance
from rorqual.model.checkpoint import Checkpoint
from rorqual.model.hf_config import rorqual_only
from rorqual.model.shards import whole_directory
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model
from rorqual.model.writing import convert
from rorqual.train.lineage import Making, write_record

ARCHIVE = ".tar.gz"
VECTORS, SUMS, CARD = "vectors.safetensors", "SHA256SUMS", "README.md"
GREEDY = 24
"""Tokens of the greedy continuation."""
LOGIT_ROWS = 16
"""Of the prompt's last positions, the logits are kept."""
TEXT = (
    "Rorquals are the largest whales. They feed by lunging: a mouthful of water and krill, as heavy as the whale itself, is "
    "taken in one gulp, and the water is pressed out between plates of baleen. What is kept is little; what is passed over is "
    "nearly everything. def lunge(water):\n    return [krill for krill in water if krill.size > 0]\n"
)


@dataclass(frozen=True)
class ReleaseConfig:
    dtype: Literal["bf16"] = "bf16"


@dataclass(frozen=True)
class Released:
    """What was packed. sha256: of the archive, or of SHA256SUMS where a directory was asked for."""

    path: Path
    sha256: str
    checkpoint_bytes: int
    bytes: int
    greedy_tokens: tuple[int, ...]


def release(model: Path, out: Path, card: str, limit_bytes: int) -> Released:
    """Pack the checkpoint `model` as `out`: an archive where that ends in .tar.gz, else a directory; whole or not at all.

    card: the text of the model card. Raises UserError where the checkpoint is larger than the limit, opens in Rorqual only, or
    `out` exists.
    """
    if only := rorqual_only(Checkpoint(model).config):
        raise UserError(f"{model}: opens in Rorqual only ({'; '.join(only)}), so a release would serve nobody else")
    if not is_archive(out):
        with whole_directory(out) as part:
            facts = _fill(model, part, card, limit_bytes)
        return Released(out, _hash(out / SUMS), *facts)
    if out.exists():
        raise UserError(f"{out}: exists; choose another path, or remove it")
    with _scratch(out) as part:
        facts = _fill(model, part, card, limit_bytes)
        digest = _pack(part, out)
    return Released(out, digest, facts[0], out.stat().st_size, facts[2])


def is_archive(out: Path) -> bool:
    return out.name.endswith(ARCHIVE)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A directory beside the archive to come, named as what it will hold; it is gone at the end."""
    import tempfile

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".release-") as home:
        part = Path(home) / out.name.removesuffix(ARCHIVE)
        part.mkdir()
        yield part


def _fill(model: Path, part: Path, card: str, limit_bytes: int) -> tuple[int, int, tuple[int, ...]]:
    """Everything of a release in a directory: bytes of the checkpoint, bytes of all, the greedy tokens."""
    saved = convert(model, part, "bf16")
    if saved.weight_bytes > limit_bytes:
        raise UserError(
            f"{model}: {saved.weight_bytes / 1e6:.1f} MB in bf16, more than {limit_bytes / 1e6:g} MB; raise --limit-mb, or "
            "release a smaller model"
        )
    write_record(part, Making("release", ReleaseConfig(), {"model": model}))
    vectors = own_vectors(load_model(part, "float32").eval(), open_tokenizer(part))
    save_file(vectors, part / VECTORS)
    conformance.write(part / "conformance")
    (part / CARD).write_text(card, encoding="utf-8")
    files = sorted(path for path in part.rglob("*") if path.is_file())
    sums = "".join(f"{_hash(path)}  {path.relative_to(part).as_posix()}\n" for path in files)
    (part / SUMS).write_text(sums, encoding="utf-8")
    total = sum(path.stat().st_size for path in files) + len(sums)
    return saved.weight_bytes, total, tuple(vectors["greedy_tokens"].tolist())


@torch.no_grad()
def own_vectors(model: Transformer, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """What this model computes in float32 of a prompt longer than top-k, so that selection matters.

    tokens int64 [T]; logits float32 [16, V] of its last positions; selected.L int32 [T, K] of each layer with an indexer,
    ascending, -1 last; greedy_tokens int64 [24] that follow; margins float32 [24]: by how much each was the likeliest, in
    logits, so that a porter can tell a near-tie from an error.
    """
    wanted = min(2 * model.config.index_topk + LOGIT_ROWS, model.config.max_positions - GREEDY)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    tokens = torch.tensor((ids * (wanted // len(ids) + 1))[:wanted])
    trace = Trace(selected_indices=True)
    logits = model(tokens[None], trace=trace)[0]  # [T, V]
    found = {f"selected.{layer}": selected for layer, selected in trace.selected.items()}
    greedy, margins = [], []
    grown, last = tokens, logits[-1]
    for _ in range(GREEDY):
        best = last.topk(2).values
        greedy.append(int(last.argmax()))
        margins.append(float(best[0] - best[1]))
        grown = torch.cat([grown, torch.tensor(greedy[-1:])])
        last = model(grown[None])[0, -1]
    own = {"tokens": tokens, "logits": logits[-LOGIT_ROWS:].float().clone()}
    return own | found | {"greedy_tokens": torch.tensor(greedy), "margins": torch.tensor(margins)}


def _pack(directory: Path, out: Path) -> str:
    """The directory as a gzipped archive under its final name; the hash of it. The same content gives the same bytes."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    try:
        with (
            open(part, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in [directory, *sorted(directory.rglob("*"))]:
                name = path.relative_to(directory.parent).as_posix()
                archive.add(path, name, recursive=False, filter=plain)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    return _hash(out)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
