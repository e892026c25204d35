"""The studio's chat: messages as they stream, thinking and calls to be seen, and the indexer's selection of what was said."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from nicegui import background_tasks, ui

from rorqual.chat import ChatError, Delta
from rorqual.chat.deltas import ABANDONED, ARGUMENTS, CONTENT, REASONING, TOOL_CALL
from rorqual.errors import UserError
from rorqual.policy import Message
from rorqual.serve.backend import EngineBackend
from rorqual.serve.failures import Refusal
from rorqual.serve.studio_conversation import (
    Conversation,
    EnvironmentTools,
    NoTools,
    PythonTool,
    Result,
    Said,
    Settings,
    Workbench,
)
from rorqual.serve.studio_selection import SelectionView
from rorqual.tasks.episode import AsyncEpisode

if TYPE_CHECKING:
    from rorqual.serve.studio import Studio

REDRAW_S = 0.05
"""A browser is sent what is new so often, however fast tokens come."""
TOOLS = {"none": "no tools", "python": "Python in the sandbox"}


class ChatPage:
    """One visitor's conversation and its controls."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.conversation: Conversation = studio.conversation()
        self._answering: asyncio.Task[None] | None = None

    def draw(self) -> None:
        with ui.element("div").classes("halves"):
            with ui.element("section").props('aria-label="Conversation"').classes("stack"):
                self._controls()
                self.log = ui.element("div").props('role="log" aria-live="polite" aria-label="Messages"').classes("stack")
                self._greet()
                self._composer()
            with ui.element("section").props('aria-label="What the indexer selected"').classes("box stack side"):
                backend = self.studio.backend
                self.selection = SelectionView(backend if isinstance(backend, EngineBackend) else None)

    def _controls(self) -> None:
        defaults = self.studio.defaults
        with ui.expansion("Settings", icon="tune").classes("box").props("dense"), ui.element("div").classes("line"):
            self.thinking = ui.switch("Thinking", value=defaults.thinking)
            self.temperature = ui.number("Temperature", value=defaults.temperature, min=0, max=2, step=0.1).style("width: 7rem")
            self.max_tokens = ui.number("Tokens at most", value=512, min=1, step=64, precision=0).style("width: 9rem")
            self.tools = ui.select(TOOLS, value="none", label="Tools", on_change=self._change_tools).style("min-width: 12rem")
            ui.button("New conversation", icon="restart_alt", on_click=self.begin_anew).props("outline no-caps")

    def _composer(self) -> None:
        with ui.element("form").classes("composer line").props('aria-label="Write a message"') as form:
            self.entry = ui.textarea("Message").props("autogrow outlined dense autofocus input-style='max-height: 30vh'")
            self.entry.on("keydown.enter", self.send, js_handler="(e) => { if (!e.shiftKey) { e.preventDefault(); emit(); } }")
            self.entry.on("keydown.escape", self.stop)
            self.send_button = ui.button("Send", icon="send", on_click=self.send).props("no-caps unelevated")
            self.stop_button = ui.button("Stop", icon="stop", on_click=self.stop).props("no-caps outline")
            self.stop_button.set_visibility(False)
        form.on("submit", js_handler="(e) => e.preventDefault()")

    def _greet(self) -> None:
        with self.log:
            self.greeting = ui.label("Say something to the model. Enter sends, Shift+Enter begins a line, Escape stops.")
            self.greeting.classes("quiet")

    # --- what a visitor does

    async def send(self) -> None:
        text = (self.entry.value or "").strip()
        if not text or self._answering is not None:
            return
        self.entry.value = ""
        self._answering = background_tasks.create(self._answer(text), name="answer", context=self.log)

    def stop(self) -> None:
        if self._answering is not None:
            self._answering.cancel()

    async def begin_anew(self) -> None:
        await self._replace(self.conversation.workbench, [])

    async def try_environment(self, episode: AsyncEpisode) -> None:
        """A conversation over an opened environment; its task waits in the message field."""
        messages = list(episode.task.messages)
        self.tools.set_options({**TOOLS, "environment": "the opened environment"}, value="environment")
        await self._replace(EnvironmentTools(episode), [m for m in messages if m["role"] != "user"])
        self.entry.value = episode.task.prompt

    async def close(self) -> None:
        self.stop()
        await self.conversation.workbench.close()

    async def _change_tools(self) -> None:
        if self.tools.value != "environment":
            await self._replace(PythonTool() if self.tools.value == "python" else NoTools(), [])

    async def _replace(self, workbench: Workbench, messages: list[Message]) -> None:
        self.stop()
        if workbench is not self.conversation.workbench:
            await self.conversation.workbench.close()
        self.conversation = self.studio.conversation()
        self.conversation.workbench, self.conversation.messages = workbench, messages
        self.log.clear()
        self._greet()
        self.selection.clear()

    # --- an answer as it comes

    async def _answer(self, text: str) -> None:
        settings = Settings(bool(self.thinking.value), float(self.temperature.value or 0), int(self.max_tokens.value or 1))
        self.greeting.set_visibility(False)
        self._set_busy(True)
        with self.log:
            ui.label(text).classes("box text user")
        turn = None
        try:
            async with aclosing(self.conversation.answer(text, settings)) as steps:
                async for step in steps:
                    if turn is None:
                        turn = _Turn(self.log)
                    turn.take(step)
                    if isinstance(step, Said):
                        if step.completion is not None:
                            await self.selection.show([*step.completion.prompt_tokens, *step.completion.tokens])
                        turn = turn if step.message.get("tool_calls") else None
                    elif isinstance(step, Result) and turn.is_answered:
                        turn = None
        except asyncio.CancelledError:
            self._note("Stopped. This answer is not part of the conversation.")
        except (Refusal, ChatError, UserError) as error:
            self._note(str(error), is_error=True)
        finally:
            self._answering = None
            if not self.log.is_deleted:
                if turn is not None:
                    turn.redraw()
                self._set_busy(False)

    def _note(self, text: str, is_error: bool = False) -> None:
        if self.log.is_deleted:
            return  # the visitor has gone
        with self.log:
            ui.label(text).classes("text-negative" if is_error else "quiet").props("role=alert" if is_error else "")

    def _set_busy(self, busy: bool) -> None:
        self.send_button.set_visibility(not busy)
        self.stop_button.set_visibility(busy)
        self.log.props(f"aria-busy={str(busy).lower()}")


class _Turn:
    """One message of the model on the page, with the results of its calls."""

    def __init__(self, log: ui.element):
        self.texts = {REASONING: "", CONTENT: ""}
        self.calls: list[_Call] = []
        self._results, self._drawn_at = 0, 0.0
        with log, ui.element("article").classes("box stack").props('aria-label="Answer of the model"') as self.box:
            self.thinking = ui.expansion("Thinking", icon="psychology", value=True).classes("thinking").props("dense")
            with self.thinking:
                self.reasoning = ui.label().classes("text")
            self.content = ui.label().classes("text answer")
            self.ended = ui.label().classes("quiet")
        for element in (self.thinking, self.content, self.ended):
            element.set_visibility(False)

    @property
    def is_answered(self) -> bool:
        """All calls of the message have their results."""
        return self._results == len(self.calls)

    def take(self, step: Delta | Result | Said) -> None:
        if isinstance(step, Said):
            self._end(step)
        elif isinstance(step, Result):
            self.calls[self._results].answer(step.content)
            self._results += 1
        elif step.kind in self.texts:
            self.texts[step.kind] += step.text
        elif step.kind == TOOL_CALL:
            with self.box:
                self.calls.append(_Call(step.text))
            self.ended.move(self.box)
        elif step.kind == ARGUMENTS and self.calls:
            self.calls[-1].written += step.text
        elif step.kind == ABANDONED and self.calls:
            self.calls.pop().answer("The call was never finished.")
        if time.monotonic() - self._drawn_at > REDRAW_S:
            self.redraw()

    def redraw(self) -> None:
        self._drawn_at = time.monotonic()
        for text, label, shown in (
            (self.texts[REASONING], self.reasoning, self.thinking),
            (self.texts[CONTENT], self.content, self.content),
        ):
            if text and label.text != text:
                label.set_text(text)
                shown.set_visibility(True)
        for call in self.calls:
            call.redraw()

    def _end(self, said: Said) -> None:
        self.redraw()
        usage = said.usage
        words = {"stop": "", "tool_calls": "", "length": " · cut off at the limit of tokens"}.get(
            said.finish_reason, said.finish_reason
        )
        if not any(self.texts.values()) and not self.calls:
            words += " · it said nothing"
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.ended.set_text(f"{usage['prompt_tokens']} tokens in ({cached} cached), {usage['completion_tokens']} out{words}")
        self.ended.set_visibility(True)


class _Call:
    """One call of a message: the function, its arguments as they come, what it gave."""

    def __init__(self, name: str):
        self.written = ""
        with ui.element("div").classes("box call stack").props(f'role="group" aria-label="Call of {name}"'):
            ui.label(name).style("font-weight: 600")
            self.arguments = ui.label().classes("code")
            self.result = ui.label("…").classes("code scroll quiet")

    def redraw(self) -> None:
        if self.arguments.text != self.written:
            self.arguments.set_text(self.written)

    def answer(self, content: str) -> None:
        self.result.set_text(content or "(nothing)")
        self.result.classes(remove="quiet")
