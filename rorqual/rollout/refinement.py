"""Test-time search for a proof (DeepSeekMath-V2): generate, verify, refine, until a proof passes or the rounds are used up.

`refine` keeps a pool. Each round the best proofs, by the mean score of their evaluations, go back to the prover together with
evaluations of them, those that name flaws first; what comes is verified and joins the pool. It ends with a proof that every one
of its verifications scores 1. `refine_in_turn` is the sequential form: one proof, its author's own evaluation, again and again
until it scores itself 1.

Provers and verifiers are ChatPolicies. Every reply is a line of an append-only log before anything is made of it, under a name
that fixes its seed; so a search that was killed goes on where it was, and asks nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any

from rorqual.errors import UserError, require
from rorqual.policy import ChatPolicy, SamplingParams, StopReason
from rorqual.tasks.proofs import (
    Evaluation,
    Malformed,
    Messages,
    Proof,
    Words,
    prover_messages,
    read_evaluation,
    read_proof,
    refine_messages,
    verifier_messages,
)
from rorqual.tasks.task import digest


@dataclass(frozen=True)
class RefineConfig:
    """The paper's high-compute search by default: 64 proofs, 64 verifications each, 16 rounds. Lengths are in tokens."""

    pool: int = 64
    """Proofs of the first round."""
    verifications: int = 64
    """Evaluations of each proof."""
    best: int = 64
    """Proofs that a round refines, the best of all so far."""
    prompts_per_proof: int = 8
    """Refinements asked for of each of them, each with evaluations of its own."""
    evaluations_per_prompt: int = 1
    samples_per_prompt: int = 1
    rounds: int = 16
    """The first one counts."""
    proof_tokens: int = 131072
    evaluation_tokens: int = 65536
    temperature: float = 1.0
    top_p: float = 1.0
    words: Words = "full"
    seed: int = 0
    concurrency: int = 64
    max_requests: int | None = None
    """A budget over both roles, replies of an earlier run included; None: none."""
    max_tokens: int | None = None
    """The same of sampled tokens; requests under way when it is reached are finished."""

    def __post_init__(self) -> None:
        counts = ("pool", "verifications", "best", "prompts_per_proof", "evaluations_per_prompt", "samples_per_prompt", "rounds",
                  "proof_tokens", "evaluation_tokens", "concurrency")  # fmt: skip
        limits = ("max_requests", "max_tokens")
        require(
            self,
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
            **{name: (getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or none") for name in limits},
        )


PAPER = RefineConfig()
"""Each of the 64 best with 8 evaluations, one refinement for each pair."""
RELEASED = RefineConfig(
    pool=128, verifications=64, best=32, prompts_per_proof=1, evaluations_per_prompt=8, samples_per_prompt=4, top_p=0.95
)
"""The released run.sh: 128 generations a round; after the first, 32 prompts (a proof, up to 8 evaluations), 4 samples each."""


class SearchEnd(StrEnum):
    """Why a search ended."""

    PASSED = "passed"  # a proof whose every verification scored 1
    ROUNDS = "rounds"
    BUDGET = "budget"
    NO_PROOFS = "no_proofs"  # a round brought no readable proof, and there was none before


@dataclass
class Accounts:
    """What a search cost, replies of earlier runs included. Malformed replies are paid for; failed ones are asked again."""

    requests: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    malformed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def add(self, table: str, role: str, count: int = 1) -> None:
        counts = getattr(self, table)
        counts[role] = counts.get(role, 0) + count


@dataclass(frozen=True)
class Candidate:
    """A proof of the pool with what its verifiers said."""

    name: str
    round: int
    proof: Proof
    evaluations: tuple[Evaluation, ...]
    asked: int
    """Verifications asked for; those that were malformed or failed are not among the evaluations."""

    @property
    def score(self) -> float:
        """The mean over its evaluations; 0 where none could be read."""
        return fmean(each.score for each in self.evaluations) if self.evaluations else 0.0

    @property
    def passes(self) -> bool:
        return len(self.evaluations) == self.asked and all(each.score == 1 for each in self.evaluations)


@dataclass(frozen=True)
class Found:
    """The best proof (None where none could be read), and how the search went."""

    best: Candidate | None
    end: SearchEnd
    rounds: int
    accounts: Accounts
    candidates: int = 0
    best_by_round: tuple[float, ...] = ()
    """The best score in the pool after each round."""


class _Spent(Exception):
    """The budget is used up."""


class Journal:
    """The append-only log of a search: one line a reply, under its name. A line cut short by a kill is asked for again."""

    def __init__(self, path: Path | None, header: dict[str, Any]):
        self.path, self.replies = path, dict[str, dict[str, Any]]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        has_header = False
        for line in text.splitlines():
            record = _parsed(line)
            has_header |= record is not None and "header" in record
            if record is not None and "header" in record and record["header"] != header:
                changed = sorted(name for name in header if record["header"].get(name) != header[name])
                raise UserError(f"{path}: holds another search ({', '.join(changed)} differ); choose another file")
            if record is not None and "name" in record:
                self.replies[record["name"]] = record
        if text and not text.endswith(b"\n"):
            self._append(b"\n")
        if not has_header:
            self._write({"header": header})

    def keep(self, name: str, record: dict[str, Any]) -> None:
        self.replies[name] = record
        if self.path is not None:
            self._write({"name": name, **record})

    def _write(self, record: dict[str, Any]) -> None:
        self._append(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        assert self.path is not None
        with open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


FREE = ("concurrency", "max_requests", "max_tokens", "rounds")
"""Settings that a resumed search may change: no reply depends on them."""


class _Search:
    """One search under way: asks policies, keeps the journal and the accounts."""

    def __init__(self, problem: str, config: RefineConfig, log: Path | None):
        settings = {name: value for name, value in asdict(config).items() if name not in FREE}
        self.problem, self.config = problem, config
        self.journal = Journal(log, {"problem": problem, **settings})
        self.accounts, self.slots = Accounts(), asyncio.Semaphore(config.concurrency)
        for record in self.journal.replies.values():
            self.accounts.add("requests", record["role"])
            self.accounts.add("tokens", record["role"], record["tokens"])

    async def ask(self, role: str, policy: ChatPolicy, messages: Messages, name: str) -> str | None:
        """The text of a reply, from the log or the policy; None where the policy failed. Raises _Spent.

        A reply belongs to its name and its prompt: where a failure of an earlier run changed what is asked, it is asked anew.
        """
        name = f"{name}#{digest(list(messages), 8)}"
        async with self.slots:
            if name in self.journal.replies:
                return self.journal.replies[name]["text"]
            self._check_budget()
            self.accounts.add("requests", role)
            reply = await policy.reply(messages, (), self._params(role, name))
            if reply.stop_reason not in (StopReason.STOP, StopReason.LENGTH, StopReason.CONSTRAINT):
                self.accounts.add("requests", role, -1)
                self.accounts.add("failed", role)
                return None
            text = str(reply.message.get("content") or "")
            tokens = reply.usage.get("completion_tokens") or len(text) // 4
            self.accounts.add("tokens", role, tokens)
            self.journal.keep(name, {"role": role, "text": text, "tokens": tokens})
            return text

    def _params(self, role: str, name: str) -> SamplingParams:
        config = self.config
        limit = config.proof_tokens if role == "prover" else config.evaluation_tokens
        seed = int.from_bytes(hashlib.blake2b(f"{config.seed}/{name}".encode(), digest_size=7).digest(), "little")
        return SamplingParams(max_tokens=limit, temperature=config.temperature, top_p=config.top_p, seed=seed)

    def _check_budget(self) -> None:
        for table, limit in (("requests", self.config.max_requests), ("tokens", self.config.max_tokens)):
            if limit is not None and sum(getattr(self.accounts, table).values()) >= limit:
                raise _Spent

    async def prove(self, policy: ChatPolicy, messages: Messages, name: str) -> Proof | None:
        return await self._read("prover", policy, messages, name, read_proof)

    async def verify(self, policy: ChatPolicy, proof: Proof, name: str) -> tuple[Evaluation, ...]:
        """The evaluations that could be read, of those that the config asks for."""
        messages = verifier_messages(self.problem, proof.solution, self.config.words)
        asked = [
            self._read("verifier", policy, messages, f"{name}/v{n}", read_evaluation) for n in range(self.config.verifications)
        ]
        return tuple(each for each in await asyncio.gather(*asked) if each is not None)

    async def _read(self, role: str, policy: ChatPolicy, messages: Messages, name: str, read: Callable) -> Any:
        text = await self.ask(role, policy, messages, name)
        found = read(text) if text is not None else None
        if isinstance(found, Malformed):
            self.accounts.add("malformed", role)
            return None
        return found


async def refine(
    problem: str, prover: ChatPolicy, verifier: ChatPolicy, config: RefineConfig | None = None, log: Path | None = None,
    advanced: Callable[[int, Sequence[Candidate]], None] = lambda round, pool: None,
) -> Found:  # fmt: skip
    """Search for a proof with a pool. log: a JSONL file; the same call goes on with what it holds. advanced: after each round.

    Raises UserError where the log belongs to another problem or other settings.
    """
    config = config or PAPER
    search, pool, course = _Search(problem, config, log), list[Candidate](), list[float]()

    def found(end: SearchEnd) -> Found:
        best = pool[ranked_places(pool)[0]] if pool else None
        return Found(best, end, len(course), search.accounts, len(pool), tuple(course))

    for number in range(config.rounds):
        try:
            pool += await _round(search, prover, verifier, pool, number)
        except _Spent:
            return found(SearchEnd.BUDGET)
        if not pool:
            return found(SearchEnd.NO_PROOFS)
        course.append(max(each.score for each in pool))
        advanced(number, pool)
        if any(each.passes for each in pool):
            return found(SearchEnd.PASSED)
    return found(SearchEnd.ROUNDS)


async def _round(
    search: _Search, prover: ChatPolicy, verifier: ChatPolicy, pool: Sequence[Candidate], number: int
) -> list[Candidate]:
    """The new proofs of a round, verified; a solution that stands in the pool word for word is not verified again."""

    async def attempt(messages: Messages, name: str) -> tuple[str, Proof | None]:
        return name, await search.prove(prover, messages, name)

    prompts = _prompts(search, pool, number)
    made = await _all(attempt(messages, name) for messages, name in prompts)
    known, fresh = {each.proof.solution for each in pool}, list[tuple[str, Proof]]()
    for name, proof in made:
        if proof is not None and proof.solution not in known:
            known.add(proof.solution)
            fresh.append((name, proof))
    evaluations = await _all(search.verify(verifier, proof, name) for name, proof in fresh)
    return [
        Candidate(name, number, proof, read, search.config.verifications)
        for (name, proof), read in zip(fresh, evaluations, strict=True)
    ]


async def _all(jobs: Any) -> list[Any]:
    """Every result; the replies under way are awaited, and so kept, before a spent budget ends the search."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    raised = [each for each in results if isinstance(each, BaseException)]
    if raised:
        raise next((each for each in raised if not isinstance(each, _Spent)), raised[0])
    return results


def _prompts(search: _Search, pool: Sequence[Candidate], number: int) -> list[tuple[Messages, str]]:
    """What the prover is asked in a round, each request with its name."""
    config = search.config
    if not pool:
        messages = prover_messages(search.problem, config.words)
        return [(messages, f"r{number}/p{n}") for n in range(config.pool)]
    prompts = []
    for place in ranked_places(pool, f"{config.seed}/{number}")[: config.best]:
        candidate = pool[place]
        for n in range(config.prompts_per_proof):
            chosen = choose_evaluations(candidate, n, config, f"{config.seed}/{number}/{candidate.name}")
            texts = [each.text for each in chosen]
            messages = refine_messages(search.problem, candidate.proof.solution, texts, config.words)
            prompts += [(messages, f"r{number}/c{place}.{n}.{s}") for s in range(config.samples_per_prompt)]
    return prompts


def ranked_places(pool: Sequence[Candidate], seed: str = "") -> list[int]:
    """Places in the pool, best first: by mean score, then by the author's own score; ties are drawn by the seed.

    Ties drawn anew each round keep the search from mending the same few proofs again and again.
    """

    def badness(place: int) -> tuple[bool, float, float]:
        return (not pool[place].passes, -pool[place].score, -pool[place].proof.self_score)

    places = list(range(len(pool)))
    random.Random(seed).shuffle(places)
    return sorted(places, key=badness)


def choose_evaluations(candidate: Candidate, prompt: int, config: RefineConfig, seed: str) -> list[Evaluation]:
    """The evaluations that the prompt-th refinement of a proof is shown: those below 1 first, each kind in a drawn order."""
    order = list(candidate.evaluations)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda each: each.score == 1)
    count = config.evaluations_per_prompt
    if not order:
        return []
    return [order[(prompt * count + i) % len(order)] for i in range(min(count, len(order)))]


# --- one proof after another


@dataclass(frozen=True)
class Revised:
    """The proofs of one sequence, the last one last."""

    proofs: tuple[Proof, ...]
    end: SearchEnd
    accounts: Accounts

    @property
    def best(self) -> Proof | None:
        """The last of those with the highest score by their author: later ones answer more objections."""
        return max(reversed(self.proofs), key=lambda each: each.self_score, default=None)


async def refine_in_turn(
    problem: str, prover: ChatPolicy, config: RefineConfig | None = None, revisions: int = 8, log: Path | None = None,
    name: str = "s0",
) -> Revised:  # fmt: skip
    """Write a proof, then mend it by its author's own evaluation up to `revisions` times, until that scores 1.

    name: of the sequence in the log; sequences with different names draw different proofs.
    """
    search, proofs = _Search(problem, config or PAPER, log), list[Proof]()
    messages = prover_messages(problem, search.config.words)
    for turn in range(revisions + 1):
        try:
            proof = await search.prove(prover, messages, f"{name}/{turn}")
        except _Spent:
            return Revised(tuple(proofs), SearchEnd.BUDGET, search.accounts)
        if proof is None:
            continue  # another sample from the same prompt: there is nothing new to say
        proofs.append(proof)
        if proof.self_score == 1:
            return Revised(tuple(proofs), SearchEnd.PASSED, search.accounts)
        messages = refine_messages(problem, proof.solution, [proof.self_evaluation.text], search.config.words)
    return Revised(tuple(proofs), SearchEnd.ROUNDS if proofs else SearchEnd.NO_PROOFS, search.accounts)
