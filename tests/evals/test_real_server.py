"""`rorqual serve` as a process of its own: the same benchmark gives the same tokens and scores as the embedded engine."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from rorqual.cli import main
from rorqual.evals import runner
from rorqual.evals.benchmark import Options
from rorqual.evals.catalogue import benchmark
from rorqual.evals.policies import Player
from rorqual.evals.results import table
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.policy import ChatReply, StopReason
from rorqual.rollout.agent import speaker_of, turn_seed
from rorqual.rollout.archive import Archive
from tests.evals.test_serving import OpenAIClient
from tests.serve.conftest import CONFIG, TOKENIZER

TASKS, SAMPLES = 6, 3


def talkative(seed):
    """A random model that says As and Bs and ends: its first channel never changes, so the head's first column is a bias.
    (A merely random one writes special tokens anywhere, which is no message, and never answers.)"""
    model = Transformer(CONFIG, seed=seed)
    with torch.no_grad():
        model.embed.weight[:, 0] = 30.0
        head = model.head.weight
        kept = [*(TOKENIZER.encode(letter)[0] for letter in "AB"), TOKENIZER.eos_id]
        rows = head[kept] * 20.0
        head[:], head[:, 0] = 0.0, -20.0
        head[kept], head[kept, 0] = rows, 0.0
        head[kept[0], 0] = 0.15
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(talkative(3), path, "float32")
    TOKENIZER.backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two choices each: a message that is one letter answers, and is right about every other time."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"question_id": i, "question": f"{i}?", "options": ["a", "b"], "answer": "AB"[i % 2]} for i in range(TASKS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def url(checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rorqual", "serve", str(checkpoint), "--port", str(port), "--cache-tokens", "16384"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        assert process.poll() is None, "the server did not start"
        yield address
    finally:
        process.terminate()
        process.wait(60)


def evaluate(capsys, data, policy, out):
    arguments = ["evaluate", "--benchmark", "mmlu_pro", "--data", data, "--policy", policy, "--out", out, "--n", SAMPLES]
    arguments += ["--json", "--max-tokens", 48, "--thinking", "off", "--seed", 5, "--cache-tokens", 16384]
    assert main([str(each) for each in arguments]) == 0
    return json.loads(capsys.readouterr().out), said(out)


def said(out):
    """Every attempt, by task and sample, as it was stored."""
    found = {}
    for path in sorted(out.glob("attempts/*/*/*.npz")):
        task, sample = path.name.removesuffix(".npz").replace("%2f", "/").rsplit(".", 1)
        found[task, int(sample)] = Archive(path.parent).load(task, int(sample))
    return found


def texts(found):
    return {key: (each.end, [turn.message.get("content") for turn in each.turns]) for key, each in found.items()}


def lengths(found):
    return {key: [turn.sampled_tokens for turn in each.turns] for key, each in found.items()}


SAME = ("score", "by_task", "passed_attempts", "pass_at_k", "majority", "outcomes", "mean_steps", "curve")


def test_the_endpoint_gives_the_tokens_and_scores_of_the_embedded_engine(checkpoint, data, url, tmp_path, capsys):
    embedded, own = evaluate(capsys, data, checkpoint, tmp_path / "embedded")
    served, theirs = evaluate(capsys, data, url, tmp_path / "served")
    assert {"passed", "wrong"} <= embedded["outcomes"]["verdicts"].keys(), embedded["outcomes"]
    assert len({text for _, group in texts(own).values() for text in group}) >= 4, "the seeds differ by task and sample"
    assert texts(own) == texts(theirs) and lengths(own) == lengths(theirs)
    assert {name: embedded[name] for name in SAME} == {name: served[name] for name in SAME}
    assert embedded["accounts"]["sampled_tokens"] == served["accounts"]["sampled_tokens"]


class Recording(OpenAIClient):
    """The openai client, which also keeps the bytes of every token that the server says it sampled."""

    def __init__(self, url, name):
        super().__init__(url)
        self.name, self.tokens = name, {}

    async def reply(self, messages, tools, params):
        done = await self.client.chat.completions.create(
            model=self.name, messages=list(messages), max_tokens=params.max_tokens, temperature=params.temperature,
            top_p=params.top_p, seed=params.seed, logprobs=True, extra_body={"thinking": False},
        )  # fmt: skip
        choice = done.choices[0]
        self.tokens[messages[-1]["content"], params.seed] = b"".join(bytes(t.bytes or ()) for t in choice.logprobs.content)
        reason = StopReason.LENGTH if choice.finish_reason == "length" else StopReason.STOP
        usage = {"completion_tokens": done.usage.completion_tokens, "prompt_tokens": done.usage.prompt_tokens}
        return ChatReply({"role": "assistant", "content": choice.message.content or ""}, reason, usage=usage)


def test_the_openai_client_gives_them_too_token_by_token(checkpoint, data, url, tmp_path, capsys):
    embedded, own = evaluate(capsys, data, checkpoint, tmp_path / "embedded")
    chosen = benchmark("mmlu_pro")
    suite, policy = chosen.load(chosen, Options(data=str(data))), Recording(url, checkpoint.name)
    config = runner.Config(samples=SAMPLES, max_tokens=48, thinking=False, seed=5, concurrency=4)
    player = Player("openai", speaker_of(policy), policy)
    store = runner.cache(tmp_path / "client", chosen, suite, config, player.identity)
    attempts = asyncio.run(runner.run(chosen, suite, player, config, store))
    found = table(chosen, suite, attempts, config)
    assert texts(said(tmp_path / "client")) == texts(own) and lengths(said(tmp_path / "client")) == lengths(own)
    assert {name: embedded[name] for name in SAME if name != "curve"} == {name: found[name] for name in SAME if name != "curve"}
    for (task, sample), each in own.items():
        (completion,) = (turn.completion for turn in each.turns)
        written = TOKENIZER.decode([token for token in completion.tokens if token != TOKENIZER.eos_id]).encode()
        seed = turn_seed(5, task, sample, 0)
        given = policy.tokens[suite.tasks[task].messages[-1]["content"], seed]
        assert given in (written, written + TOKENIZER.decode([TOKENIZER.eos_id]).encode()), (task, sample)


def test_a_checkpoint_can_be_the_judge_and_babble_is_no_verdict(checkpoint, tmp_path, capsys):
    rows = [{"id": f"q{i}", "question": f"{i}?", "answer": "7", "answer_type": "exactMatch"} for i in range(3)]
    (tmp_path / "hle.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "--benchmark", "hle", "--data", str(tmp_path / "hle.jsonl"), "--policy", "program:gold", "--json"]
    assert main([*arguments, "--judge", str(checkpoint), "--out", str(tmp_path / "out"), "--judge-max-tokens", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcomes"]["reasons"] == {"judge_undecided": 3} and found["score"]["value"] is None
