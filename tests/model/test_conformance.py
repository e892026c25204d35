"""The golden vectors are the model's own: every module gives what the formulas give; a check finds what differs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rorqual.cli import main
from rorqual.errors import UserError
from rorqual.kernels import index_score, select_tokens, sparse_attention
from rorqual.model import AttentionMode, Trace, Transformer, load_model
from rorqual.model.conformance import CONFIG, TIES, check, golden_tensors, smallest_margin, write
from rorqual.model.conformance_readme import MEANINGS
from rorqual.model.rope import frequencies, rotate_interleaved, rotation, softmax_scale

FAILED = ("DIFFERS", "WRONG SHAPE", "MISSING")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conformance") / "vectors"
    write(path)
    return path


class Port:
    """Our model as an engine port would be: its modules' tensors under the golden names."""

    def __init__(self, model: Transformer, inputs: dict[str, Tensor]):
        self.model, self.tokens = model, inputs["tokens"]
        self.rotation = rotation(inputs["positions"], model.config)
        self.out: dict[str, Tensor] = {}
        self.raw: dict[str, Any] = {}

    def run(self) -> dict[str, Tensor]:
        c, model = self.model.config, self.model
        handles = [m.register_forward_hook(partial(self._keep, name)) for name, m in model.named_modules() if name]
        trace = Trace(selected_indices=True)
        states = model.states(self.tokens[None], trace=trace)
        logits = model.logits(states.hidden)
        mtp_hidden = model.mtp_hidden(states)[:-1]
        for i, at in enumerate(["layers.0.", "layers.1.", "mtp.layer."]):
            self._layer(at, trace.selected[i])
        self.raw.clear()
        expanded = model.states(self.tokens[None], mode=AttentionMode(form="expanded"))
        model.mtp_hidden(expanded)
        for handle in handles:
            handle.remove()
        for at in ("layers.0.", "layers.1.", "mtp.layer."):
            self._expanded(at)
        cos, sin = self.rotation.cos, self.rotation.sin
        self.out |= {"frequencies": frequencies(c), "cos": cos, "sin": sin, "softmax_scale": torch.tensor([softmax_scale(c)])}
        self.out |= {"embedding": model.embed(self.tokens), "hidden": states.hidden, "logits": logits}
        self.out |= {"mtp.logits": model.logits(mtp_hidden)}
        return self.out

    def _keep(self, name: str, _module: nn.Module, args: tuple, result: Any) -> None:
        self.raw[name] = result
        self.raw[f"{name} <-"] = args[0]

    def _put(self, at: str, **tensors: Tensor) -> None:
        """The MTP module has no next token at the last row."""
        rows = slice(0, -1) if at.startswith("mtp") else slice(None)
        self.out |= {f"{at}{name}": tensor[rows] for name, tensor in tensors.items()}

    def _layer(self, at: str, selected: Tensor) -> None:
        c, raw, rows = self.model.config, self.raw, len(self.tokens)
        block: Any = self.model.get_submodule(at.removesuffix("."))
        if at.startswith("mtp"):
            self._put("mtp.", input=raw["mtp.eh_proj"])
        x, q_latent = raw[f"{at}attn_norm"], raw[f"{at}attn.q_norm"]
        q = raw[f"{at}attn.wq_b"].unflatten(-1, (c.n_heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = rotate_interleaved(q_rope, self.rotation)
        latent, k_rope = raw[f"{at}attn.kv_norm"], rotate_interleaved(raw[f"{at}attn.wkv_a"][:, c.kv_lora_rank :], self.rotation)
        self._put(at, attn_norm=x, q_latent=q_latent, q_nope=q_nope, q_rope=q_rope, latent=latent, k_rope=k_rope)
        self._attention(at, block, x, q_latent, q_nope, q_rope, torch.cat([latent, k_rope], -1), selected)
        self._put(at, attention_output=raw[f"{at}attn"][0], ffn_norm=raw[f"{at}ffn_norm"], output=raw[at.removesuffix(".")][0])
        ffn = raw[f"{at}ffn"]
        self._put(at, ffn_output=ffn if isinstance(ffn, Tensor) else ffn[0])
        if f"{at}ffn.router" in raw:
            routing = raw[f"{at}ffn.router"]
            routed, shared = raw[f"{at}ffn.experts"], raw[f"{at}ffn.shared_experts"]
            choice = routing.scores + block.ffn.router.expert_bias
            self._put(at, router_scores=routing.scores, router_choice=choice, experts=routing.experts, gates=routing.gates)
            self._put(at, routed_output=routed, shared_output=shared)
        assert rows == len(x)

    def _attention(
        self, at: str, block: Any, x: Tensor, q_latent: Tensor, q_nope: Tensor, q_rope: Tensor, kv: Tensor, selected: Tensor
    ) -> None:
        c = self.model.config
        index, key = block.attn.indexer.queries(x, q_latent, self.rotation), block.attn.indexer.keys(x, self.rotation)
        scores = index_score(index.query, key, index.weight)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        if at.startswith("mtp"):
            scores = scores[:, :-1]
        up = block.attn.wkv_b.weight.unflatten(0, (c.n_heads, -1))[:, : c.qk_nope_head_dim]
        absorbed = torch.einsum("tha,hal->thl", q_nope, up)
        q = torch.cat([absorbed, q_rope], -1)
        mixed, lse = sparse_attention(q, kv, selected, softmax_scale(c), c.kv_lora_rank)
        heads = self.raw[f"{at}attn.wo <-"].unflatten(-1, (c.n_heads, -1))
        self._put(at, index_query=index.query, index_key=key, index_weight=index.weight, index_score=scores, selected=selected)
        self._put(at, absorbed_query=absorbed, absorbed_latent_output=mixed, absorbed_head_output=heads, lse=lse)

    def _expanded(self, at: str) -> None:
        c = self.model.config
        kv = self.raw[f"{at}attn.wkv_b"].unflatten(-1, (c.n_heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        heads = self.raw[f"{at}attn.wo <-"].unflatten(-1, (c.n_heads, -1))
        self._put(at, expanded_k_nope=k_nope, expanded_v=v, expanded_head_output=heads)


def our_tensors(vectors: Path) -> dict[str, Tensor]:
    """All that the model's modules give for the golden inputs, in float32."""
    import dataclasses

    inputs = load_file(vectors / "inputs.safetensors")
    model = load_model(vectors / "model", "float32")
    assert model.config == dataclasses.replace(CONFIG)
    with torch.no_grad():
        out = Port(model, inputs).run()
        covering = Transformer(dataclasses.replace(CONFIG, index_topk=64)).eval()
        covering.load_state_dict(model.state_dict())
        dense = Port(covering, inputs).run()
    names = ("selected", "lse", "absorbed_head_output", "expanded_head_output", "attention_output")
    out |= {f"covering.layers.0.{name}": dense[f"layers.0.{name}"] for name in names}
    out["covering.logits"] = dense["logits"]
    query, key, weight = (inputs[f"ties.index_{part}"] for part in ("query", "key", "weight"))
    T, S = TIES["T"], TIES["S"]
    hidden = torch.arange(S) > S - T + torch.arange(T)[:, None]
    out["ties.index_score"] = index_score(query, key, weight).masked_fill(hidden, -torch.inf)
    out["ties.selected"] = select_tokens(query, key, weight, TIES["topk"])
    return {name: tensor.contiguous() for name, tensor in out.items()}


def test_the_models_modules_give_the_golden_tensors(vectors: Path, tmp_path: Path) -> None:
    save_file(our_tensors(vectors), tmp_path / "ours.safetensors")
    results = check(tmp_path / "ours.safetensors", vectors)
    failed = {result.name: (result.status, result.error, result.note) for result in results if result.status in FAILED}
    inner = {f"ours: {at}{name}" for at in ("layers.1.", "mtp.layer.") for name in ("group_scores", "groups")}
    assert set(failed) == inner and all(status == "MISSING" for status, _, _ in failed.values()), failed
    assert len(results) == len(golden_tensors()["float64"])


def test_every_tensor_is_documented_and_every_document_is_of_a_tensor(vectors: Path) -> None:
    text = (vectors / "README.md").read_text()
    tensors = golden_tensors()
    for file in ("inputs", "float64"):
        for name, array in tensors[file].items():
            assert f"| `{name}` | [{', '.join(map(str, array.shape))}] | {array.dtype} |" in text
    ends = (
        {name.rpartition(".")[2] for arrays in tensors.values() for name in arrays}
        | set(tensors["inputs"])
        | {"ties.index_score"}
    )
    assert set(MEANINGS) <= ends
    assert tensors["float64"].keys() == tensors["float32"].keys()


def test_the_cases_are_what_they_claim() -> None:
    out = golden_tensors()["float64"]
    assert smallest_margin() > 1e-4
    assert (out["layers.0.selected"][8:] >= 0).all() and (out["layers.0.selected"][0] == [0, *[-1] * 7]).all()
    recent = np.arange(32, 40)
    assert not (out["layers.0.selected"][39] == recent).all()
    rows = np.arange(40)[:, None]
    everything = np.where(np.arange(64)[None] <= rows, np.arange(64)[None], -1)
    assert (out["covering.layers.0.selected"] == everything).all()
    assert np.abs(out["covering.logits"] - out["logits"]).max() > 0.1
    for i in range(2):
        np.testing.assert_allclose(out[f"layers.{i}.absorbed_head_output"], out[f"layers.{i}.expanded_head_output"], atol=1e-12)
    straddling, at_zero = 0, 0
    for row, chosen in zip(out["ties.index_score"], out["ties.selected"], strict=True):
        last = row[chosen].min()
        tied = np.flatnonzero(row == last)
        taken = [s for s in tied if s in chosen]
        straddling += len(taken) < len(tied)
        at_zero += len(taken) < len(tied) and last == 0
        assert taken == list(tied[: len(taken)]) and (np.delete(row, chosen) <= last).all()
    assert straddling > 8 and at_zero > 2  # ReLU leaves plateaus of exact zeros: there ties are most common
    chosen_without_bias = np.sort(np.argsort(-out["layers.1.router_scores"], 1)[:, :3], 1)
    assert (chosen_without_bias != out["layers.1.experts"]).any(1).sum() > 5


def test_expert_choices_are_not_decided_by_rounding() -> None:
    out = golden_tensors()["float64"]
    for at in ("layers.1.", "mtp.layer."):
        for t, chosen in enumerate(out[f"{at}experts"]):
            groups = out[f"{at}group_scores"][t]
            picked = out[f"{at}groups"][t]
            assert groups[picked].min() - np.delete(groups, picked).max() > 1e-4
            allowed = [e for e in range(16) if e // 4 in picked and e not in chosen]
            choice = out[f"{at}router_choice"][t]
            assert choice[chosen].min() - choice[allowed].max() > 1e-4


def test_float32_follows_float64_and_chooses_alike(vectors: Path) -> None:
    results = check(vectors / "float32.safetensors")
    assert {result.status for result in results} <= {"equal", "close"}
    truth, narrow = golden_tensors()["float64"], golden_tensors()["float32"]
    for name, array in truth.items():
        assert narrow[name].dtype == (array.dtype if array.dtype.kind == "i" else np.float32), name
        if array.dtype.kind == "i":
            assert (narrow[name] == array).all(), name


def test_writing_is_reproducible_and_checks_itself(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["conformance", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["float64"] > 80
    for file in vectors.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(vectors)).read_bytes(), file
    assert main(["conformance", "--check", str(vectors)]) == 0
    assert main(["conformance", "--check", str(vectors), "--against", str(tmp_path / "again")]) == 0
    assert main(["conformance", str(vectors)]) == 1
    assert "exists" in capsys.readouterr().err


def changed(vectors: Path, target: Path, change: Any) -> Path:
    tensors = load_file(vectors / "float32.safetensors")
    change(tensors)
    save_file(tensors, target)
    return target


HARM = {
    "a value": ("layers.0.latent", lambda t: t["layers.0.latent"][3].mul_(1.01), "DIFFERS"),
    "a NaN": ("layers.0.latent", lambda t: t["layers.0.latent"][3, 1].fill_(float("nan")), "DIFFERS"),
    "half-split for interleaved": (
        "layers.0.q_rope",
        lambda t: t.update({"layers.0.q_rope": t["layers.0.q_rope"].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)}),
        "DIFFERS"),
    "a future score": ("layers.0.index_score", lambda t: t["layers.0.index_score"][0, 1].fill_(0.0), "DIFFERS"),
    "another selection": ("ties.selected", lambda t: t["ties.selected"][0, 0].add_(1), "DIFFERS"),
    "gates of the biased scores": ("layers.1.gates", lambda t: t["layers.1.gates"].mul_(1.001), "DIFFERS"),
    "a shape": ("logits", lambda t: t.update(logits=t["logits"][:-1].clone()), "WRONG SHAPE"),
    "floats for indices": ("ties.selected", lambda t: t.update({"ties.selected": t["ties.selected"].float()}), "WRONG SHAPE"),
    "nothing": ("hidden", lambda t: t.pop("hidden"), "MISSING"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_what_differs_is_found_and_named(vectors: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    tensor, change, status = HARM[name]
    file = changed(vectors, tmp_path / "theirs.safetensors", change)
    results = {result.name: result.status for result in check(file)}
    assert {key for key, found in results.items() if found in FAILED} == {f"theirs: {tensor}"}
    assert results[f"theirs: {tensor}"] == status
    assert main(["conformance", "--check", str(file)]) == 1
    assert main(["conformance", "--check", str(file), "--partial"]) == (0 if status == "MISSING" else 1)
    assert f"theirs: {tensor}" in capsys.readouterr().out


def test_rows_of_a_selection_may_be_in_any_order_and_half_precision_is_given_room(vectors: Path, tmp_path: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.bfloat16()
            elif name.endswith("selected"):
                tensors[name] = tensor.flip(-1).long()

    results = check(changed(vectors, tmp_path / "bf16.safetensors", other))
    assert {result.status for result in results} <= {"equal", "close"}


def test_wrong_use_is_said(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["conformance"]) == 2
    assert main(["conformance", str(tmp_path / "a"), "--check", str(vectors)]) == 2
    assert main(["conformance", str(tmp_path / "a"), "--partial"]) == 2
    assert main(["conformance", "--check", str(tmp_path / "absent")]) == 1
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not readable as safetensors"):
        check(tmp_path / "bad.safetensors")
    save_file({"unknown": torch.ones(1)}, tmp_path / "other.safetensors")
    assert main(["conformance", "--check", str(tmp_path / "other.safetensors"), "--partial"]) == 1
    assert "no tensor has a golden name" in capsys.readouterr().out
