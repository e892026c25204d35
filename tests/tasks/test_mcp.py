"""MCP both ways: an environment served to any MCP client, and a foreign MCP server's tools used like our own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rorqual.tasks import TaskError, open_episode
from rorqual.tasks.mcp_server import make_server
from rorqual.tasks.mcp_tools import McpTools

from .worlds import task, world

FOREIGN = """
import asyncio, time
from mcp import types, stdio_server
from mcp.server.lowlevel import Server

async def list_tools(context, params):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
    empty = {"type": "object", "properties": {}}
    names = {"add": schema, "sleep": empty, "flood": empty, "fail": empty}
    return types.ListToolsResult(tools=[types.Tool(name=n, description=f"{n}s", input_schema=s) for n, s in names.items()])

async def call_tool(context, params):
    if params.name == "sleep":
        await asyncio.sleep(30)
    if params.name == "fail":
        raise ValueError("broken")
    text = "x" * 10**6 if params.name == "flood" else str(params.arguments["a"] + params.arguments["b"])
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)])

async def main():
    server = Server("foreign", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (r, w):
        await server.run(r, w, server.create_initialization_options())

asyncio.run(main())
"""


def test_an_environment_is_played_through_mcp_to_its_verdict() -> None:
    episode = open_episode(task(), world(), "inline")
    with McpTools(make_server(episode)) as tools:
        names = [tool["function"]["name"] for tool in tools.tools]
        assert {"list_slots", "book", "submit", "task", "finish"} <= set(names)
        schema = next(t["function"]["parameters"] for t in tools.tools if t["function"]["name"] == "book")
        assert schema["properties"]["kind"]["enum"] == ["day", "night"] and schema["required"] == ["slot", "seats"]
        assert json.loads(tools.observe("task", {}))["messages"] == list(episode.task.messages)
        assert json.loads(tools.observe("book", {"slot": "S-9", "seats": 1}))["error"] == "not_found"
        tools.observe("book", {"slot": "S-3", "seats": 2})
        assert json.loads(tools.observe("finish", {"answer": "20"}))["outcome"] == "passed"
        tools.observe("task", {})
        assert json.loads(tools.observe("finish", {"answer": "20"}))["reasons"] == ["booking"]


def test_a_foreign_server_is_used_as_tools_and_its_failures_are_observations(tmp_path: Path) -> None:
    script = tmp_path / "foreign.py"
    script.write_text(FOREIGN)
    with McpTools.stdio([sys.executable, str(script)], timeout_s=10.0) as tools:
        assert [tool["function"]["name"] for tool in tools.tools] == ["add", "sleep", "flood", "fail"]
        assert tools.observe("add", {"a": 2, "b": 3}) == "5"
        assert json.loads(tools.observe("flood", {}))["error"] == "result_too_large"
        assert json.loads(tools.observe("fail", {}))["error"] == "tool_failed"
        assert json.loads(tools.observe("nothing", {}))["error"] == "unknown_tool"
        tools.timeout_s = 0.5
        assert json.loads(tools.observe("sleep", {}))["error"] == "tool_timeout"
        tools.timeout_s = 10.0
        assert tools.observe("add", {"a": 1, "b": 1}) == "2"


def test_a_server_that_is_not_there_says_so() -> None:
    with pytest.raises(TaskError, match="not to be had"), McpTools.stdio(["/nonexistent/server"], timeout_s=5.0):
        pass
