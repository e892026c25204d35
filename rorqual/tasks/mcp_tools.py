"""A foreign MCP server as tools: `with McpTools.stdio(["some-server"]) as tools: tools.observe("search", {...})`.

The client lives on an event loop in a thread of its own, so that synchronous episodes can use it. What the server does wrong is
an observation: an error it reports, a time-out, its end, a result that is too large.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import Any

from rorqual.tasks.host import MAX_OBSERVATION, error_text
from rorqual.tasks.task import TaskError


class McpTools:
    """One MCP server's tools. `target`: stdio parameters, an address (http://...), or a server object of this process."""

    def __init__(self, target: Any, timeout_s: float = 30.0, max_chars: int = MAX_OBSERVATION):
        self._target, self.timeout_s, self.max_chars = target, timeout_s, max_chars
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="mcp-client")
        self.tools: list[dict[str, Any]] = []

    @staticmethod
    def stdio(command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> McpTools:
        """A server that is started as a process and spoken to over its standard streams."""
        from mcp import StdioServerParameters, stdio_client

        parameters = StdioServerParameters(command=command[0], args=list(command[1:]), env=dict(env) if env else None)
        return McpTools(stdio_client(parameters), timeout_s)

    def __enter__(self) -> McpTools:
        self._thread.start()
        started: Future[None] = Future()
        self._stop: asyncio.Event | None = None
        self._task = asyncio.run_coroutine_threadsafe(self._live(started), self._loop)
        try:
            started.result(self.timeout_s)
        except Exception as error:
            self.__exit__()
            raise TaskError(f"MCP server: not to be had: {type(error).__name__}: {error}") from error
        return self

    async def _live(self, started: Future[None]) -> None:
        """One coroutine opens and closes the client: its scopes may not be left from another."""
        from mcp import Client

        self._stop = asyncio.Event()
        try:
            async with AsyncExitStack() as stack:
                self._client = await stack.enter_async_context(Client(self._target))
                listed = await self._client.list_tools()
                self.tools = [_definition(tool) for tool in listed.tools]
                started.set_result(None)
                await self._stop.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)

    def observe(self, name: str, arguments: dict[str, Any]) -> str:
        """The text of a call's result."""
        if name not in {tool["function"]["name"] for tool in self.tools}:
            return error_text("unknown_tool", f"there is no tool {name}")
        future = asyncio.run_coroutine_threadsafe(self._client.call_tool(name, arguments), self._loop)
        try:
            result = future.result(self.timeout_s)
        except TimeoutError:
            future.cancel()
            return error_text("tool_timeout", f"no answer within {self.timeout_s} s")
        except Exception as error:
            return error_text("tool_failed", f"{type(error).__name__}: {error}"[:300])
        text = "\n".join(block.text if block.type == "text" else f"[{block.type}]" for block in result.content)
        if len(text) > self.max_chars:
            return error_text("result_too_large", f"{len(text)} characters; narrow the request")
        return error_text("tool_failed", text) if result.is_error and not text.startswith('{"error"') else text

    def __exit__(self, *exc: object) -> None:
        if self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            try:
                self._task.result(5.0)
            except Exception:
                self._task.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)


def _definition(tool: Any) -> dict[str, Any]:
    schema = tool.input_schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": tool.name, "description": tool.description or "", "parameters": schema}}
