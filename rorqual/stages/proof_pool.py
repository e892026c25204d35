"""Proof tasks as a pool for GRPO: who judges, how a judge is opened, and which domain each role is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rorqual.chat import Tokenizer
from rorqual.config import build, to_mapping
from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.errors import UserError, require
from rorqual.model.weights import load_model
from rorqual.policy import ChatPolicy, ChatReply, Message, SamplingParams
from rorqual.rewards.domains import DomainReward
from rorqual.rewards.proof_judges import JudgedProof, Judges
from rorqual.rewards.proof_programs import PROGRAMS, ProofProgram
from rorqual.rewards.proofs import ProofWeights
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy
from rorqual.rollout.speaker import ChatMode, ChatOfTokens
from rorqual.stages import grpo
from rorqual.stages.grpo import TaskPool
from rorqual.stages.task_set import TaskSet
from rorqual.tasks.proof_tasks import Role
from rorqual.tasks.proofs import Words
from rorqual.train.loop import Site

DOMAINS = {Role.PROVE: "proof", Role.VERIFY: "verification", Role.META_VERIFY: "meta_verification"}
"""Each role is a domain of its own, with its own share of the prompts, beta and weights."""
PROOF_REWARD = DomainReward(outcome=1.0, format=0.0, length=0.0, language=0.0)
"""The verdict's score is the whole reward of a proof role: its format stands in it already (rorqual.rewards.proofs)."""
TRAINED, PROGRAM, NONE = "trained", "program", "none"
PROOFS, JUDGE = "proofs", "judge of proofs"
"""In a lineage record: the setting that says how proofs were judged, and the role of the checkpoint that judged them."""


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges proofs and analyses, and how they are asked. Lengths are in tokens."""

    verifier: str = TRAINED
    """trained: the newest verifier of this run; program: the exact one of the formal system; or a checkpoint, or an address."""
    meta_verifier: str = TRAINED
    """The same; none: R_meta is 1. There is no trained one in the first verifier's training, so R_meta is 1 there."""
    verifications: int = 1
    """Evaluations of each proof; their mean is R_Y."""
    meta_checks: int = 1
    tries: int = 3
    max_tokens: int = 65536
    temperature: float = 1.0
    thinking: bool = True
    words: Words = "full"
    """As the tasks were made."""
    weights: ProofWeights = field(default_factory=ProofWeights)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("verifications", "meta_checks", "tries", "max_tokens")
        require(
            self,
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
            verifier=(self.verifier != NONE, "one that scores proofs"),
        )


class _Endpoint:
    """An EndpointPolicy for stages that start an event loop for each of their steps: an HTTP client belongs to one loop."""

    def __init__(self, url: str):
        self.config, self._loop, self._policy = EndpointConfig(url), None, None

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        loop: Any = asyncio.get_running_loop()
        if self._policy is None or self._loop is not loop:
            self._loop, self._policy = loop, EndpointPolicy(self.config)
        return await self._policy.reply(messages, tools, params)


@contextmanager
def open_judges(config: JudgeConfig, trained: Path | None, device: torch.device) -> Iterator[Judges]:
    """The judges, ready to be asked from any event loop. trained: the newest verifier of the run, None before there is one."""
    services: list[EngineService] = []
    opened: dict[str, ChatPolicy | None] = {}

    def judge(spec: str, role: str) -> ChatPolicy | None:
        name = str(trained) if spec == TRAINED and trained else spec
        key = f"{PROGRAM}:{role}" if name == PROGRAM else name
        if key not in opened:
            opened[key] = open_role(name, role, config, services, device)
        return opened[key]

    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed)
    try:
        yield Judges(
            judge(config.verifier, "verifier"), judge(config.meta_verifier, "meta_verifier"), params, config.verifications,
            config.meta_checks, config.tries, config.words, config.weights,
        )  # fmt: skip
    finally:
        close(services)


def close(services: Sequence[EngineService]) -> None:
    for service in services:
        asyncio.run(service.close(drain=False))


def open_role(
    name: str, role: str, config: JudgeConfig, services: list[EngineService], device: torch.device
) -> ChatPolicy | None:  # fmt: skip
    """A policy for a role, by its name in the config; an engine that it needs is added to `services`, to be closed."""
    if name in (TRAINED, NONE):
        return None
    if name == PROGRAM and f"exact_{role}" in PROGRAMS:
        return ProofProgram(PROGRAMS[f"exact_{role}"])
    if name.startswith(("http://", "https://")):
        return _Endpoint(name)
    if not Path(name).is_dir():
        raise UserError(
            f"judges.{role}={name}: expected {TRAINED}, {PROGRAM} (of judges), a checkpoint's directory or an http(s) address"
        )
    model = load_model(Path(name), "float32").requires_grad_(False).to(device)
    services.append(EngineService(Engine(model, config.engine), max_waiting=1 << 16))
    return ChatOfTokens(services[-1], Tokenizer.open(Path(name)), ChatMode(config.thinking))


def proof_pool(
    tasks: TaskSet, judges: Judges, domains: Sequence[str], config: JudgeConfig | None = None, trained: Path | None = None
) -> TaskPool:  # fmt: skip
    """The tasks of these domains: proof roles judged by `judges`, other families by their own verifiers.

    config, trained: what the judges were opened with, for the lineage record. Raises UserError for a domain without a task.
    """
    by_domain: dict[str, list[str]] = {}
    for task in tasks.tasks.values():
        domain = DOMAINS[Role(task.payload["role"])] if task.family == "proof" else task.family
        if domain in domains:
            by_domain.setdefault(domain, []).append(task.id)
    if missing := [domain for domain in domains if domain not in by_domain]:
        raise UserError(
            f"no task of the split {tasks.split} for {', '.join(missing)}; rorqual synthesize makes some (--family proof)"
        )

    def opened(task_id: str) -> Any:
        task = tasks.tasks[task_id]
        return JudgedProof(task, judges) if task.family == "proof" else tasks.open(task_id)

    asked = config is not None and TRAINED in (config.verifier, config.meta_verifier)
    sources = {**tasks.sources, JUDGE: trained} if trained and asked else tasks.sources
    settings = {**tasks.settings, PROOFS: {"domains": list(domains), "judges": to_mapping(config)}} if config else tasks.settings
    return TaskPool(by_domain, opened, sources, settings)


def judged_again(
    stage: grpo.Config, parents: Mapping[str, Path], tasks: TaskSet, proofs: Mapping[str, Any], site: Site
) -> Path:  # fmt: skip
    """A stage with judged proofs from its lineage record: the same judges, domains and tasks."""
    config, trained = build(JudgeConfig, proofs["judges"], "lineage"), parents.get(JUDGE)
    with open_judges(config, trained, site.world.device) as judges:
        pool = proof_pool(tasks, judges, proofs["domains"], config, trained)
        return grpo.main(stage, parents["init"], pool, site)
