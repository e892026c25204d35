"""How each engine's server is asked for tokens and what it gives back. Plain bodies in, plain bodies out; no connection here.

| | rorqual | vllm | sglang |
| --- | --- | --- | --- |
| ids and log-probs | `/v1/completions` | `/v1/completions`, return_token_ids | `/generate`, input_ids, return_logprob |
| kept set | yes | where the server returns `sampling_mask` | return_sampling_mask; needs a top_k |
| routed experts | yes | --enable-return-routed-experts | --enable-return-routed-experts |
| selected indices | yes | no | no |
| weights from disk | `/update_weights_from_disk` | `/collective_rpc`, in dev mode | `/update_weights_from_disk` |
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rorqual.errors import UserError
from rorqual.policy import Completion, KeptTokens, SamplingParams, StopReason
from rorqual.rollout.wire import Retry


@dataclass(frozen=True)
class Call:
    """One HTTP request; the path is below the server's root."""

    method: str
    path: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExpertLayout:
    """What a model's routing looks like: needed where an engine sends expert ids without a shape, or of dense layers too."""

    n_layers: int
    n_dense_layers: int
    n_activated_experts: int

    def read(self, ids: np.ndarray, computed: int) -> np.ndarray:
        """int [computed, MoE layers, K] of ids in any shape, for `computed` tokens or one more (the last sampled one).

        Raises UserError where they do not divide into all layers or into those with experts.
        """
        flat = ids.reshape(-1)
        for tokens in (computed, computed + 1):
            for layers, first in ((self.n_layers - self.n_dense_layers, 0), (self.n_layers, self.n_dense_layers)):
                if len(flat) == tokens * layers * self.n_activated_experts:
                    return flat.reshape(tokens, layers, -1)[:computed, first:].astype(np.int32)
        raise UserError(f"the engine gave {len(flat)} expert ids, which do not fit {computed} tokens of {self}")


class Dialect(Protocol):
    def refusals(self, params: SamplingParams) -> list[str]:
        """What of the parameters this engine cannot do, each with what to set instead."""
        ...

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Call: ...

    def read(self, answer: Mapping[str, Any], prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        """Raises Retry for an answer that is none, UserError for one that lacks what was asked for."""
        ...

    def reload(self, checkpoint: str, version: int) -> list[Call]: ...


def truncates(params: SamplingParams) -> bool:
    """Whether the distribution sampled from leaves tokens out."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


NO_SELECTION = "record_selected_indices: its answers hold no selections; set policy.replay.selection=false"


@dataclass(frozen=True)
class Rorqual:
    """`rorqual serve`: the fields under `rollout` of a choice."""

    model: str = ""
    processed_logprobs: bool = True
    experts: ExpertLayout | None = None

    def refusals(self, params: SamplingParams) -> list[str]:
        return []

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Call:
        body = _openai_body(self.model, prompt, params) | {
            "return_kept_tokens": params.record_kept_tokens,
            "return_routed_experts": params.record_routed_experts,
            "return_selected_indices": params.record_selected_indices,
        }
        return Call("POST", "/v1/completions", body)

    def read(self, answer: Mapping[str, Any], prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        choice = _choice(answer)
        found = _needed(choice, "rollout", "return_token_ids")
        kept, experts, selected = (found.get(name) for name in ("kept_tokens", "routed_experts", "selected_indices"))
        versions = found.get("policy_versions")
        return _whole(
            params,
            Completion(
                prompt, tuple(found["token_ids"]), np.array(found["sampled_logprobs"], np.float32), _reason(choice),
                kept_tokens=KeptTokens(_unpacked(kept["tokens"]), _unpacked(kept["offsets"])) if kept else None,
                routed_experts=_unpacked(experts) if experts else None,
                selected_indices=tuple(map(_unpacked, selected)) if selected is not None else None,
                temperature=params.temperature,
                policy_versions=None if versions is None else np.array(versions, np.int32),
            ),
        )  # fmt: skip

    def reload(self, checkpoint: str, version: int) -> list[Call]:
        return [Call("POST", "/update_weights_from_disk", {"model_path": checkpoint, "weight_version": str(version)})]


@dataclass(frozen=True)
class Vllm:
    """vLLM's OpenAI server. Sampled log-probs are the raw model's unless it was started with processed ones."""

    model: str = ""
    processed_logprobs: bool = False
    experts: ExpertLayout | None = None

    def refusals(self, params: SamplingParams) -> list[str]:
        refused = [NO_SELECTION] if params.record_selected_indices else []
        if (truncates(params) or params.temperature != 1 or params.logit_bias) and not self.processed_logprobs:
            refused.append(
                "temperature, truncation or bias: its log-probs are the raw model's; start it with --logprobs-mode "
                "processed_logprobs and set processed_logprobs=true, or sample at temperature 1 without truncation"
            )
        return refused

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Call:
        body = _openai_body(self.model, prompt, params) | {"logprobs": 1, "skip_special_tokens": False}
        return Call("POST", "/v1/completions", body)

    def read(self, answer: Mapping[str, Any], prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        choice = _choice(answer)
        logprobs = _needed(choice, "logprobs", "logprobs=1").get("token_logprobs") or []
        tokens = tuple(_needed(choice, "token_ids", "return_token_ids"))
        experts = choice.get("routed_experts")
        completion = Completion(
            prompt, tokens, np.array(logprobs, np.float32), _reason(choice), kept_tokens=_ragged(choice.get("sampling_mask")),
            routed_experts=_experts(self.experts, _npy(experts), prompt, tokens) if experts else None,
            temperature=params.temperature,
        )  # fmt: skip
        return _whole(params, completion)

    def reload(self, checkpoint: str, version: int) -> list[Call]:
        """Pause until no request is under way, read the checkpoint, forget prefixes of the old weights, go on."""
        return [
            Call("POST", "/pause?mode=wait"),
            Call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": checkpoint}}),
            Call("POST", "/reset_prefix_cache"),
            Call("POST", "/resume"),
        ]


@dataclass(frozen=True)
class Sglang:
    """SGLang's own /generate. It returns a sampling mask only where top_k bounds it."""

    model: str = ""
    processed_logprobs: bool = True
    experts: ExpertLayout | None = None

    def refusals(self, params: SamplingParams) -> list[str]:
        refused = [NO_SELECTION] if params.record_selected_indices else []
        if truncates(params) and params.top_k == 0:
            refused.append(
                "top_p or min_p alone: its sampling mask and log-probs of the kept set need a bound; set sampling.top_k"
            )
        if truncates(params) and not params.record_kept_tokens:
            refused.append("truncation without record_kept_tokens: it gives log-probs of the kept set only with the mask")
        if params.logit_bias:
            refused.append("logit_bias: its log-probs leave it out")
        return refused

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Call:
        sampling = {
            "max_new_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
            "top_k": params.top_k or -1, "min_p": params.min_p, "stop_token_ids": list(params.stop_tokens),
            "skip_special_tokens": False,
        }  # fmt: skip
        body = {
            "input_ids": list(prompt),
            "sampling_params": sampling | ({} if params.seed is None else {"sampling_seed": params.seed % 2**31}),
            "return_logprob": True,
            "return_routed_experts": params.record_routed_experts,
            "return_sampling_mask": truncates(params),
        }
        return Call("POST", "/generate", body)

    def read(self, answer: Mapping[str, Any], prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        meta = answer.get("meta_info")
        if not isinstance(meta, Mapping):
            raise Retry(f"the answer has no meta_info: {str(answer)[:200]}")
        sampled = _needed(meta, "output_token_logprobs", "return_logprob")
        tokens, logprobs = tuple(each[1] for each in sampled), [each[0] for each in sampled]
        if truncates(params):
            logprobs = _needed(meta, "output_token_sampling_logprobs", "return_sampling_mask")
        version, experts = str(meta.get("weight_version")), meta.get("routed_experts")
        completion = Completion(
            prompt, tokens, np.array(logprobs, np.float32), _sglang_reason(meta),
            kept_tokens=_kept(meta.get("output_token_sampling_mask"), len(tokens), truncates(params)),
            routed_experts=_experts(self.experts, _int32(experts), prompt, tokens) if experts else None,
            temperature=params.temperature, cached_len=int(meta.get("cached_tokens") or 0),
            policy_versions=np.full(len(tokens), int(version), np.int32) if version.isdigit() else None,
        )  # fmt: skip
        return _whole(params, completion)

    def reload(self, checkpoint: str, version: int) -> list[Call]:
        body = {"model_path": checkpoint, "abort_all_requests": False, "flush_cache": True, "weight_version": str(version)}
        return [Call("POST", "/update_weights_from_disk", body)]


DIALECTS: dict[str, Callable[[str, bool, ExpertLayout | None], Dialect]] = {"rorqual": Rorqual, "vllm": Vllm, "sglang": Sglang}


def _openai_body(model: str, prompt: Sequence[int], params: SamplingParams) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": list(prompt), "max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
        "return_token_ids": True, "stop_token_ids": list(params.stop_tokens),
    }  # fmt: skip
    optional = {"model": model, "top_k": params.top_k, "min_p": params.min_p, "logit_bias": dict(params.logit_bias)}
    body |= {name: value for name, value in optional.items() if value}
    return body | ({} if params.seed is None else {"seed": params.seed})


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
        raise Retry(f"the answer has no choices[0]: {str(answer)[:200]}")
    return choices[0]


def _needed(found: Mapping[str, Any], name: str, switch: str) -> Any:
    if found.get(name) is None:
        raise UserError(
            f"the engine's answer holds no {name}, though {switch} was asked for: is its version too old, or its switch off?"
        )
    return found[name]


def _whole(params: SamplingParams, completion: Completion) -> Completion:
    """The completion, if it has all that was asked for in the lengths that belong together."""
    count, computed = len(completion.tokens), len(completion.prompt_tokens) + max(len(completion.tokens) - 1, 0)
    if len(completion.logprobs) != count:
        raise UserError(f"the engine gave {count} tokens and {len(completion.logprobs)} log-probs")
    if params.record_kept_tokens and truncates(params) and completion.kept_tokens is None:
        raise UserError("the engine gave no kept set (sampling mask); without it set sampling.top_p=1, top_k=0")
    if params.record_routed_experts and completion.routed_experts is None:
        raise UserError(
            "the engine gave no routed experts; start it with --enable-return-routed-experts, or policy.replay.routing=false"
        )
    if completion.routed_experts is not None and len(completion.routed_experts) != computed:
        raise UserError(
            f"the engine gave routed experts of {len(completion.routed_experts)} tokens where {computed} were computed"
        )
    return completion


def _reason(choice: Mapping[str, Any]) -> StopReason:
    return {"length": StopReason.LENGTH, "abort": StopReason.ABORTED}.get(str(choice.get("finish_reason")), StopReason.STOP)


def _sglang_reason(meta: Mapping[str, Any]) -> StopReason:
    reason = meta.get("finish_reason")
    return _reason({"finish_reason": reason.get("type") if isinstance(reason, Mapping) else reason})


def _experts(layout: ExpertLayout | None, ids: np.ndarray, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    if layout is None:
        raise UserError("the engine sends expert ids in a layout of its own; give the policy the model's ExpertLayout")
    return layout.read(ids, len(prompt) + max(len(tokens) - 1, 0))


def _npy(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def _int32(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.int32)


def _kept(mask: Sequence[Sequence[int]] | None, tokens: int, truncated: bool) -> KeptTokens | None:
    """Ragged rows; where nothing was left out each row is empty, which keeps the whole vocabulary."""
    return _ragged([[]] * tokens) if not truncated else _ragged(mask)


def _ragged(rows: Sequence[Sequence[int]] | None) -> KeptTokens | None:
    if rows is None:
        return None
    arrays = [np.sort(np.array(row, np.int32)) for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return KeptTokens(np.concatenate([np.empty(0, np.int32), *arrays]).astype(np.int32), offsets)


def _unpacked(array: Mapping[str, Any]) -> np.ndarray:
    """An array as `rorqual serve` writes it: {"shape", "dtype", "data": base64}."""
    return np.frombuffer(base64.b64decode(array["data"]), np.dtype(array["dtype"])).reshape(array["shape"]).copy()
