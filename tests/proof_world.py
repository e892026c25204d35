"""A world of proofs small enough to watch: a tokenizer in which every phrase of the form is one token, and a tiny model."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from rorqual.chat import SPECIAL_TOKENS, Tokenizer, encode_with_sources
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.tasks import Store, Task, TaskRow, task_record
from rorqual.tasks.derivations import check, score_of, write_findings
from rorqual.tasks.proof_tasks import DERIVATION, Role, proof_task
from rorqual.tasks.proofs import (
    EVALUATION,
    EVALUATION_SCORE,
    META_EVALUATION,
    META_SCORE,
    SELF_EVALUATION,
    SOLUTION,
    write_evaluation,
    write_meta_evaluation,
    write_proof,
)

PHRASES = (
    EVALUATION, EVALUATION_SCORE, META_EVALUATION, META_SCORE, SELF_EVALUATION, SOLUTION, " \\boxed{", "\nNo flaw.\n", "Line 2: ",
    "Prove.\n\nProblem:\n", "Evaluate.\n\nProblem:\n", "Judge the evaluation.\n\nProblem:\n",
    "\n\nSolution:\n", "\n\nEvaluation:\n", "zero", "one", "comm", "null", "rule", "false", "0.5",
)  # fmt: skip
PROBLEMS = ("a+0 = a", "b+0 = b", "c+0 = c")
RULES = ("zero", "one", "comm", "null")


def phrase_tokenizer() -> Tokenizer:
    """Byte-level BPE that has merged the phrases, and nothing else, to the end."""
    backend = tokenizers.Tokenizer(models.BPE())
    phrases = tokenizers.Regex("|".join(re.escape(phrase) for phrase in sorted(PHRASES, key=len, reverse=True)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(phrases, "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(PHRASES, trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return Tokenizer(backend)


def solution(problem: str, rule: str) -> str:
    left, right = problem.split(" = ")
    return f"{left}\n= {right} [{rule}]"


def tasks() -> list[Task]:
    """To prove each problem; to verify a right and a wrong proof of it; to judge an honest and an inventing evaluation."""
    found = []
    for problem in PROBLEMS:
        payload = {"system": DERIVATION, "problem": problem}
        found.append(proof_task(Role.PROVE, {**payload, "gold": write_proof(solution(problem, "zero"), "No flaw.", 1)}, "brief"))
        for rule in ("zero", "one"):
            made = solution(problem, rule)
            findings = check(problem, made)
            gold = write_evaluation(write_findings(findings), score_of(findings))
            parts = {**payload, "solution": made}
            found.append(proof_task(Role.VERIFY, {**parts, "score": score_of(findings), "gold": gold}, "brief"))
            quality = 1.0 if rule == "one" else 0.0
            judged = {"evaluation": write_evaluation("Line 2: rule", 0.5), "quality": quality}
            judged["gold"] = write_meta_evaluation("No flaw.", quality)
            found.append(proof_task(Role.META_VERIFY, {**parts, **judged}, "brief"))
    return found


def store(directory: Path) -> Path:
    made = Store(directory)
    for number, task in enumerate(tasks()):
        made.append(task_record(TaskRow(task), (number,)))
    made.seal({})
    return directory


def guesses(task: Task, rng: random.Random) -> str:
    """A reply in form, whose content is drawn: what the model is taught before anything is rewarded."""
    analysis, score = rng.choice([("No flaw.", 1.0), ("Line 2: rule", 0.5), ("Line 2: false", 0.0)])
    role = Role(task.payload["role"])
    if role is Role.PROVE:
        return write_proof(solution(task.payload["problem"], rng.choice(RULES)), analysis, score)
    if role is Role.VERIFY:
        return write_evaluation(analysis, score)
    return write_meta_evaluation("No flaw.", rng.choice([0.0, 0.5, 1.0]))


def taught_model(directory: Path, steps: int = 150, seed: int = 0) -> Path:
    """A checkpoint that keeps the form and guesses the rest."""
    tokenizer, rng = phrase_tokenizer(), random.Random(seed)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=48, n_layers=2, n_dense_layers=1, inter_dim=96, max_positions=256, n_heads=2,
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, yarn=None, index_n_heads=2,
        index_head_dim=16, index_topk=64, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=32, n_expert_groups=1,
        n_limited_groups=1, n_mtp_layers=0, init_std=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(shape, seed=seed)
    adam = torch.optim.Adam(model.parameters(), 0.005)
    known = tasks()
    for _ in range(steps):
        rows = [_row(task, guesses(task, rng), tokenizer) for task in rng.sample(known, 8)]
        _learn(model, adam, rows)
    save_model(model, directory, dtype="float32")
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    return directory


def _row(task: Task, reply: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    chat = encode_with_sources([*task.messages, {"role": "assistant", "content": reply}], tokenizer, False)
    return list(chat.tokens), list(chat.loss_mask)


def _learn(model: Transformer, adam: torch.optim.Optimizer, rows: Sequence[tuple[list[int], list[bool]]]) -> None:
    length = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows])
    mask = torch.tensor([mask + [False] * (length - len(mask)) for _, mask in rows])
    losses = torch.nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    adam.zero_grad()
    losses[mask[:, 1:]].mean().backward()
    adam.step()
