"""The terminal: what a person sees of reasoning, calls and results, and what the conversation keeps."""

from __future__ import annotations

import io
import json

import torch
from rich.console import Console

from rorqual.engine import Engine
from rorqual.model.transformer import Transformer
from rorqual.serve.terminal import Terminal, TerminalConfig, Tool
from tests.serve.conftest import CONFIG, TOKENIZER, written


class Said(Engine):
    """The engine, made to say given messages."""

    script: tuple = ()

    def add(self, prompt, params, constraint=None):
        tokens = self.script.pop(0)

        def forced(sampled):
            allowed = torch.zeros(CONFIG.vocab_size, dtype=torch.bool)
            allowed[tokens[len(sampled)]] = True
            return allowed

        return super().add(prompt, params, forced)


def terminal(*messages, thinking=True, inputs=()):
    engine = Said(Transformer(CONFIG, seed=1))
    engine.script = [written(message, thinking) for message in messages]
    adder = Tool({"type": "function", "function": {"name": "add", "parameters": {}}}, lambda a: str(a["x"] + a["y"]))
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
    lines = iter(inputs)
    console.input = lambda *_: next(lines)
    return Terminal(engine, TOKENIZER, TerminalConfig("sys", thinking, max_tokens=900), [adder], console)


CALL = {
    "role": "assistant", "content": "", "reasoning_content": "I must add.",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": json.dumps({"x": 2, "y": 3})}}],
}  # fmt: skip


def test_reasoning_is_dim_calls_are_carried_out_and_their_results_shown():
    chat = terminal(CALL, {"role": "assistant", "content": "Five.", "reasoning_content": "ok"})
    assert chat.answer("2+3?")["content"] == "Five."
    shown = chat.console.file.getvalue()
    assert "\x1b[2;3m" in shown and "I must add." in shown.replace("\x1b[0m\x1b[2;3m", "")
    assert "add" in shown and "  5" in shown and "DSML" not in shown
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[3]["content"] == "5"


def test_commands_switch_thinking_and_begin_anew():
    hello = {"role": "assistant", "content": "Hi."}
    chat = terminal(hello, thinking=False, inputs=["/nothink", "hello", "/history", "/reset", "/think", "/quit"])
    chat.run()
    assert "Hi." in chat.console.file.getvalue() and chat.thinking
    assert chat.messages == [{"role": "system", "content": "sys"}]


def test_an_interrupted_answer_leaves_no_trace(monkeypatch):
    chat = terminal({"role": "assistant", "content": "Hi.", "reasoning_content": "x"}, inputs=["hello"])
    steps = iter(range(3))

    def interrupted(only_started=False, step=chat.engine.step):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(only_started)

    monkeypatch.setattr(chat.engine, "step", interrupted)
    chat.console.input = lambda *_, left=["hello"]: left.pop() if left else (_ for _ in ()).throw(EOFError)
    chat.run()
    assert [m["role"] for m in chat.messages] == ["system"] and chat.engine.pool.num_held == 0


def test_generate_and_chat_run_on_a_real_checkpoint(tmp_path):
    import subprocess
    import sys

    from rorqual.model.weights import save_model

    save_model(Transformer(CONFIG, seed=1), tmp_path / "m", dtype="float32")
    TOKENIZER.backend.save(str(tmp_path / "m" / "tokenizer.json"))
    command = [sys.executable, "-m", "rorqual"]
    done = subprocess.run(
        [*command, "generate", tmp_path / "m", "def ", "--max-tokens", "9", "--seed", "1", "--json", "--speculative"],
        capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert 1 <= len(found["tokens"]) <= 9 and "acceptance_rate" in found, done.stderr
    plain = subprocess.run(
        [*command, "generate", tmp_path / "m", "def ", "--max-tokens", "9", "--seed", "1"], capture_output=True, text=True
    )
    assert plain.stdout == "def " + found["text"] + "\n", "drafting changes nothing"
    talk = subprocess.run(
        [*command, "chat", tmp_path / "m", "--max-tokens", "5", "--seed", "1"],
        input="hi\n/quit\n",
        capture_output=True,
        text=True,
    )
    assert talk.returncode == 0 and "> " in talk.stdout, talk.stderr
    lost = subprocess.run([*command, "generate", tmp_path / "nothing", "x"], capture_output=True, text=True)
    assert lost.returncode == 1 and lost.stderr.startswith("rorqual generate:") and lost.stderr.count("\n") == 1
