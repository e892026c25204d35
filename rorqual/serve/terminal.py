"""The terminal chat: streams a checkpoint's messages, shows its reasoning dimmed, carries out its calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

from rorqual.chat import MessageBuilder, StreamParser, Tokenizer, encode_tokens, with_tools
from rorqual.chat.deltas import ARGUMENTS, CONTENT, REASONING, TOOL_CALL, Delta
from rorqual.engine import Engine
from rorqual.model import load_model
from rorqual.policy import Message, SamplingParams, StopReason

STYLES = {REASONING: "dim italic", CONTENT: "", TOOL_CALL: "cyan", ARGUMENTS: "cyan"}


@dataclass(frozen=True)
class TerminalConfig:
    system: str = ""
    thinking: bool = True
    max_tokens: int = 512
    max_calls: int = 8
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int | None = None


@dataclass
class Tool:
    """A tool of the chat: its OpenAI-shaped definition, what it does, and what is to be closed at the end."""

    definition: dict[str, Any]
    call: Callable[[dict[str, Any]], str]
    close: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return self.definition["function"]["name"]


@dataclass
class Terminal:
    engine: Engine
    tokenizer: Tokenizer
    config: TerminalConfig
    tools: Sequence[Tool] = ()
    console: Console = field(default_factory=Console)
    messages: list[Message] = field(default_factory=list)

    @classmethod
    def open(cls, checkpoint: str, config: TerminalConfig, tools: Sequence[Tool], dtype: str, device: str) -> Terminal:
        return cls(Engine(load_model(checkpoint, dtype, device)), Tokenizer.open(checkpoint), config, tools)

    def __post_init__(self) -> None:
        self.thinking = self.config.thinking
        self.reset()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tool in self.tools:
            tool.close()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.config.system}] if self.config.system else []

    def run(self) -> None:
        """Ask and answer until /quit or the end of input; Ctrl-C ends an answer, not the chat."""
        self.console.print("/think /nothink /reset /history /quit", style="dim")
        while True:
            try:
                line = self.console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            if line and not self._command(line):
                with suppress(KeyboardInterrupt):
                    self.answer(line)

    def _command(self, line: str) -> bool:
        """Carry out a line that is a command; whether it was one."""
        if line in ("/think", "/nothink"):
            self.thinking = line == "/think"
            self.console.print(f"thinking {'on' if self.thinking else 'off'}", style="dim")
        elif line == "/reset":
            self.reset()
        elif line == "/history":
            self.console.print_json(json.dumps(self.messages, ensure_ascii=False))
        else:
            return False
        return True

    def answer(self, text: str) -> Message:
        """One user message to its answer, through as many rounds of calls as it takes. Half an answer leaves no trace."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            for _ in range(self.config.max_calls + 1):
                message = self._speak()
                self.messages.append(message)
                if not message.get("tool_calls"):
                    return message
                self.messages += [self._call(call) for call in message["tool_calls"]]
            return self.messages[-1]
        except BaseException:
            self.messages = before
            raise

    def _speak(self) -> Message:
        builder = MessageBuilder()
        for delta in self._deltas():
            builder.add([delta])
            self._show(delta)
        self.console.print()
        return builder.message()

    def _deltas(self) -> Iterator[Delta]:
        """Compute step by step, so that every token shows as it comes."""
        shown = with_tools(self.messages, [tool.definition for tool in self.tools])
        prompt = encode_tokens(shown, self.tokenizer, self.thinking)
        params = SamplingParams(
            self.config.max_tokens, self.config.temperature, self.config.top_p, seed=self.config.seed,
            stop_tokens=(self.tokenizer.eos_id,),
        )  # fmt: skip
        request = self.engine.add(prompt, params)
        parser, detokenizer, seen = StreamParser(self.thinking), self.tokenizer.detokenizer(), 0
        try:
            while not request.is_finished:
                self.engine.step()
                for sampled in request.sampled[seen:]:
                    for piece in detokenizer.feed(sampled.token):
                        yield from parser.feed(piece.text, piece.is_special)
                seen = len(request.sampled)
            yield from parser.finish()
        finally:
            self.engine.abort(request)
        if request.stop_reason is StopReason.TOO_LONG:
            self.console.print("the conversation no longer fits the context; /reset begins anew", style="red")

    def _show(self, delta: Delta) -> None:
        text = f"\n{delta.text} " if delta.kind == TOOL_CALL else delta.text
        if delta.kind in STYLES:
            self.console.print(Text(text, STYLES[delta.kind]), end="", soft_wrap=True)

    def _call(self, call: dict[str, Any]) -> Message:
        name = call["function"]["name"]
        tool = next((tool for tool in self.tools if tool.name == name), None)
        if tool is None:
            result = f"error: there is no tool {name}"
        else:
            result = tool.call(json.loads(call["function"]["arguments"] or "{}"))
        self.console.print(Text(f"  {result}", "green"), soft_wrap=True)
        return {"role": "tool", "tool_call_id": call.get("id"), "content": result}


def python_tool() -> Tool:
    """A stateful Python interpreter in the sandbox, begun with its first call."""
    from rorqual.sandbox.kernel import Kernel

    held: list[Kernel] = []

    def call(arguments: dict[str, Any]) -> str:
        if not held:
            held.append(Kernel())
        cell = held[0].run(str(arguments.get("code", "")), timeout_s=120.0)
        parts = [cell.output, cell.value or "", cell.error or ""]
        return "\n".join(part for part in parts if part) or str(cell.ended)

    def close() -> None:
        for kernel in held:
            kernel.close()

    return Tool(
        {
            "type": "function",
            "function": {
                "name": "python",
                "description": "Run Python code in a stateful Jupyter notebook. Times out after 120.0 seconds.",
                "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
            },
        },
        call,
        close,
    )
