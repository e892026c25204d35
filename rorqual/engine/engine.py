"""The engine: prompts in token ids go in, completions come out; continuous batching over a paged cache.

A step has three beats: the scheduler decides, the runner computes, the engine samples and settles what came of it. A
request's tokens and log-probs do not depend on its batch, on chunking, on preemption or on the prefix cache: on a CPU in
float32 they are the same bits.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.blocks import BlockPool
from rorqual.engine.cache import PagedCache
from rorqual.engine.decoder import Decoder, is_drawn_on_device
from rorqual.engine.records import RecordStore
from rorqual.engine.request import Constraint, Request
from rorqual.engine.runner import Runner, Step
from rorqual.engine.sampler import NO_NUMBERS, Draw, Sampled, sample_rows
from rorqual.engine.scheduler import Scheduler, SchedulerConfig, Work
from rorqual.errors import UserError, require
from rorqual.model.call import AttentionMode
from rorqual.model.transformer import Transformer
from rorqual.policy import Completion, KeptTokens, SamplingParams, StopReason


@dataclass(frozen=True)
class EngineConfig:
    """Sizes in tokens."""

    block_size: int = 64
    cache_tokens: int = 65536
    """Room of the paged cache, for all requests together; a part-filled block counts whole."""
    cache_dtype: Literal["model", "fp8"] = "model"
    """fp8 keeps a token in 656 + 132 bytes a layer (at the released sizes) instead of 1,408 in bfloat16, rounded to 8 bits."""
    max_context: int | None = None
    """Longest prompt and completion together; None: the model's max_positions."""
    max_step_tokens: int = 2048
    max_running: int = 64
    prefix_cache: bool = True
    speculative: bool = False
    """Let the MTP layer guess the next token; tokens and log-probs stay the same ones, only sooner."""
    record_routing: bool = True
    """Keep every token's experts, so that a completion can carry them: 2 bytes per MoE layer and expert."""
    record_selection: bool = False
    """Keep every query's selection: 4 * index_topk bytes per token and selecting layer."""
    device_steps: int = 16
    """On a GPU: how many tokens of each request are decoded at most before the host decides anew; 0 decodes as on a CPU, without
    CUDA graphs and with the sampler on the host."""
    seed: int | None = None
    """Of requests that bring none: derived from this and their number; None: drawn from the system."""

    def __post_init__(self) -> None:
        require(
            self,
            block_size=(self.block_size >= 1, "at least 1"),
            cache_tokens=(self.cache_tokens >= self.block_size, f"at least one block ({self.block_size})"),
            device_steps=(self.device_steps >= 0, "at least 0"),
            max_context=(self.max_context is None or self.max_context >= 2, "at least 2, or none"),
        )


@dataclass
class Counters:
    """What the engine has done since it was made."""

    steps: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    finished: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted tokens that were the ones sampled; 0 before any draft."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class Engine:
    """`Engine(model).generate([[1, 2, 3]], SamplingParams())`. One thread at a time may call it."""

    model: Transformer
    config: EngineConfig = field(default_factory=EngineConfig)
    mode: AttentionMode | None = None
    """None: the absorbed form on a CPU, where results are the same bits in any company; on a GPU prompts take multi-head form
    where that is faster (`AttentionMode.masked_factor`)."""

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        if config.speculative and model.mtp is None:
            raise UserError("speculative: this model has no MTP layer to draft with (n_mtp_layers is 0)")
        weight = model.embed.weight
        self.attention = self.mode or AttentionMode(form="auto" if weight.is_cuda else "absorbed")
        num_blocks = config.cache_tokens // config.block_size
        self.pool = BlockPool(num_blocks, config.block_size)
        on_device = weight.is_cuda and config.device_steps > 0 and not config.speculative
        self.cache = PagedCache(
            model.config,
            num_blocks,
            config.block_size,
            weight.dtype,
            weight.device,
            spare=on_device,
            packed=config.cache_dtype == "fp8",
        )
        self.records = RecordStore(
            model.config, self.cache.num_slots, config.record_routing, config.record_selection, weight.device
        )
        limits = SchedulerConfig(config.max_step_tokens, config.max_running, config.prefix_cache, int(config.speculative))
        self.scheduler = Scheduler(limits, self.pool)
        self.runner = Runner(model, self.cache, self.records, self.attention)
        self.decoder = self._decoder(captures=True) if on_device else None
        self.max_context = min(config.max_context or model.config.max_positions, model.config.max_positions)
        self.version = 0
        self.counters = Counters()
        self._arrivals = 0

    def _decoder(self, captures: bool) -> Decoder:
        return Decoder(self.model, self.cache, self.records, self.attention, self.config.device_steps, captures)

    # --- asking

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        constraints: Sequence[Constraint | None] | None = None,
    ) -> list[Completion]:
        """Complete all prompts; one SamplingParams for all, or one for each. Completions come in the order of the prompts."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        constraints = constraints or [None] * len(prompts)
        requests = [self.add(*each) for each in zip(prompts, params, constraints, strict=True)]
        while not all(request.is_finished for request in requests):
            self.step()
        return [self.completion(request) for request in requests]

    def add(self, prompt: Sequence[int], params: SamplingParams, constraint: Constraint | None = None) -> Request:
        """Queue one request. Raises UserError for an empty prompt, an unknown id, or a record that is not kept."""
        self._check(prompt, params)
        seed = params.seed if params.seed is not None else self._seed()
        request = Request(self._arrivals, tuple(int(t) for t in prompt), params, seed, constraint)
        self._arrivals += 1
        if len(prompt) >= self.max_context:
            request.stop_reason = StopReason.TOO_LONG
        elif params.max_tokens == 0:
            request.stop_reason = StopReason.LENGTH
        else:
            self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """Withdraw a request; its blocks are free at once."""
        if not request.is_finished:
            self._finish(request, StopReason.ABORTED)

    # --- computing

    def step(self, only_started: bool = False) -> list[Request]:
        """Compute one step; returns the requests that got tokens or ended. only_started: admit none that has no token yet."""
        work = self.scheduler.schedule(only_started)
        ended = [request for request in list(self.scheduler.running) if request.is_finished]
        for request in ended:
            self._finish(request, request.stop_reason or StopReason.OUT_OF_MEMORY)
        if not work:
            return ended
        on_device = [item for item in work if self._is_on_device(item)]
        others = [item for item in work if not self._is_on_device(item)]
        touched = self._compute(others) if others else []
        if on_device:
            touched += self._decode(on_device, len(others))
        for request in touched:
            if request.is_finished:
                self._finish(request, request.stop_reason or StopReason.STOP)
        return ended + touched

    def _compute(self, work: list[Work]) -> list[Request]:
        """One forward over any work, and what is drawn from it."""
        step = self.runner.run(work)
        self.counters.steps += 1
        self.counters.computed_tokens += sum(item.count for item in work)
        touched = self._sample(work, step)
        if self.config.speculative:
            self._guess(work, step)
        return touched

    def _is_on_device(self, item: Work) -> bool:
        return self.decoder is not None and item.count == 1 and item.is_last and is_drawn_on_device(item.request)

    def _decode(self, work: list[Work], others: int) -> list[Request]:
        """Decode some requests by a run of steps on the device: as many as they want at most and have blocks for, and one where
        other requests are computed beside them or wait for a place."""
        assert self.decoder is not None
        is_awaited = others or (self.scheduler.waiting and len(self.scheduler.running) < self.config.max_running)
        wanted = {item.request: self._wanted(item.request) for item in work}
        steps = 1 if is_awaited else self.scheduler.reserve(wanted, self.config.device_steps)
        requests = list(wanted)
        for drawn in self.decoder.run(requests, steps):
            for request, token in zip(requests, drawn, strict=True):
                if not request.is_finished:
                    if token is None:
                        raise FloatingPointError(NO_NUMBERS)
                    self.scheduler.computed(request, len(request.tokens))
                    self._append(request, token)
                    self.counters.computed_tokens += 1
            self.counters.steps += 1
        return requests

    def _wanted(self, request: Request) -> int:
        """How many tokens a request may get yet."""
        return min(request.params.max_tokens - request.num_sampled, self.max_context - len(request.tokens))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int | None = None, mixing: bool = False) -> int:
        """Replace weights in place, by the model's own parameter names; returns the new version.

        Requests that already have tokens are first computed to their end under the old weights, so that no completion mixes
        versions; with `mixing` they go on under the new ones (their cache is computed again), and `policy_versions` tells
        which token is of which. Raises UserError for an unknown name or another shape, before anything has changed.
        """
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        given = list(weights)
        for name, tensor in given:
            if name not in own:
                raise UserError(f"update_weights: the model has no {name}")
            if own[name].shape != tensor.shape:
                raise UserError(f"update_weights: {name}: expected {list(own[name].shape)}, found {list(tensor.shape)}")
        while not mixing and self.scheduler.num_started:
            self.step(only_started=True)
        for request in list(reversed(self.scheduler.running)):
            self.scheduler.preempt(request)
        with torch.no_grad():
            for name, tensor in given:
                own[name].copy_(tensor)
        self.version = self.version + 1 if version is None else version
        self.scheduler.renew(struct.pack("q", self.version))
        return self.version

    # --- settling

    def completion(self, request: Request) -> Completion:
        """What came of a finished request."""
        params, sampled = request.params, request.sampled
        return Completion(
            prompt_tokens=request.prompt_tokens,
            tokens=tuple(s.token for s in sampled),
            logprobs=np.array([s.logprob for s in sampled], dtype=np.float32),
            stop_reason=request.stop_reason or StopReason.ABORTED,
            model_logprobs=np.array([s.model_logprob for s in sampled], dtype=np.float32),
            top_logprobs=tuple(s.top_logprobs for s in sampled) if params.top_logprobs else None,
            kept_tokens=_kept(sampled) if params.record_kept_tokens else None,
            routed_experts=request.records[0],
            selected_indices=request.records[1],
            temperature=params.temperature,
            policy_versions=np.array(request.versions, dtype=np.int32),
            cached_len=request.cached_len,
            statistics={"drafted": request.drafted, "accepted": request.accepted, "preemptions": request.preemptions},
        )

    def _sample(self, work: list[Work], step: Step) -> list[Request]:
        """Draw the next token of every request whose known tokens are all computed, and the one after where a draft was right."""
        last = [(item, row) for item, row in zip(work, step.ends, strict=True) if item.is_last]
        drawn = self._draw(step, [(item.request, row) for item, row in last])
        right = {
            item.request: row + 1
            for (item, row), first in zip(last, drawn, strict=True)
            if item.has_draft and first is not None and first.token == item.request.draft
        }
        for item in work:
            wrong = item.has_draft and item.request not in right
            item.request.drafted += item.has_draft
            self.scheduler.computed(item.request, item.start + item.count - wrong)
        following = [(request, row) for request, row in right.items() if not request.is_finished]
        self._draw(step, following)
        for request, _ in following:
            request.accepted += 1
        return [item.request for item, _ in last]

    def _draw(self, step: Step, asked: list[tuple[Request, int]]) -> list[Sampled | None]:
        """Draw one token for each request from a row of the step, append it, and say whether the request ends with it."""
        if not asked:
            return []
        logits = self.runner.logits(step, [row for _, row in asked])
        if self.decoder is not None and all(is_drawn_on_device(request) for request, _ in asked):
            sampled = self.decoder.draw(logits, [request for request, _ in asked])
            if None in sampled:
                raise FloatingPointError(NO_NUMBERS)
        else:
            draws = [Draw(request.params, request.seed, request.num_sampled, _allowed(request)) for request, _ in asked]
            sampled = sample_rows(logits, draws)
        for (request, _), drawn in zip(asked, sampled, strict=True):
            if drawn is None:
                request.stop_reason = StopReason.CONSTRAINT
            else:
                self._append(request, drawn)
        return sampled

    def _append(self, request: Request, drawn: Sampled) -> None:
        request.sampled.append(drawn)
        request.tokens.append(drawn.token)
        request.versions.append(self.version)
        self.counters.sampled_tokens += 1
        if drawn.token in request.params.stop_tokens:
            request.stop_reason = StopReason.STOP
        elif request.num_sampled >= request.params.max_tokens or len(request.tokens) >= self.max_context:
            request.stop_reason = StopReason.LENGTH

    def _guess(self, work: list[Work], step: Step) -> None:
        """Run the MTP layer over the step's rows, now that the token after each is known; keep its guesses as drafts."""
        following, rows, owners, at = [], [], [], 0
        for item in work:
            known = item.request.tokens[item.start + 1 : item.start + item.count + 1]
            following += known + [0] * (item.count - len(known))
            if item.is_last and not item.request.is_finished:
                rows.append(at + len(item.request.tokens) - 2 - item.start)  # the last row whose next token is known
                owners.append(item.request)
            at += item.count
        for request, token in zip(owners, self.runner.guesses(step, following, rows), strict=True):
            # A guess pays only if the token after it is wanted too.
            request.draft = token if request.params.max_tokens - request.num_sampled > 1 else None

    def _finish(self, request: Request, reason: StopReason) -> None:
        request.stop_reason = reason
        self.counters.finished += 1
        self.counters.preemptions += request.preemptions
        self.counters.cached_tokens += request.cached_len
        self.counters.drafted += request.drafted
        self.counters.accepted += request.accepted
        request.records = self._records(request)
        self.scheduler.finish(request)

    def _records(self, request: Request) -> tuple[np.ndarray | None, tuple[np.ndarray, ...] | None]:
        """Routing and selection of the tokens that went through the model: all but the last sampled one."""
        params = request.params
        if not (params.record_routed_experts or params.record_selected_indices):
            return None, None
        length = min(len(request.tokens) - 1, request.computed_len) if request.sampled else request.computed_len
        slots = self.cache.slots(request.blocks, length)
        experts = self.records.experts(slots).cpu().numpy() if params.record_routed_experts else None
        selected = tuple(s.cpu().numpy() for s in self.records.selected(slots)) if params.record_selected_indices else None
        return experts, selected

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        size = self.model.config.vocab_size
        if not len(prompt):
            raise UserError("prompt: expected at least one token, found none (begin with the BOS token)")
        if min(prompt) < 0 or max(prompt) >= size:
            raise UserError(f"prompt: expected ids in [0, {size}), found {min(prompt)} to {max(prompt)}")
        for token in params.logit_bias:
            if not 0 <= token < size:
                raise UserError(f"logit_bias: expected ids in [0, {size}), found {token}")
        if params.record_selected_indices and not self.config.record_selection:
            raise UserError("record_selected_indices: this engine keeps no selections; make it with record_selection=True")
        if params.record_routed_experts and not self.config.record_routing:
            raise UserError("record_routed_experts: this engine keeps no routing; make it with record_routing=True")

    def _seed(self) -> int:
        if self.config.seed is None:
            return secrets.randbits(63)
        return (self.config.seed << 32) + self._arrivals


def _allowed(request: Request) -> Tensor | None:
    """What the request's grammar admits next."""
    return request.constraint([s.token for s in request.sampled]) if request.constraint else None


def _kept(sampled: list[Sampled]) -> KeptTokens:
    """Ragged rows; where nothing was left out the row is empty."""
    rows = [np.empty(0, np.int32) if s.kept is None else s.kept for s in sampled]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return KeptTokens(np.concatenate([np.empty(0, np.int32), *rows]), offsets)
