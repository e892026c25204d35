"""An environment served as an MCP server: any MCP client becomes an agent in it.

    episode = open_episode(task, world)
    asyncio.run(serve_stdio(episode))

Besides the task's tools there are two of the server's own: `task` gives the messages and starts afresh, `finish` judges.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from rorqual.tasks.episode import Episode

TASK, FINISH = "task", "finish"
OWN_TOOLS = (
    (TASK, "Start the task afresh; gives back its messages.", {}),
    (
        FINISH,
        "End the task and have it judged.",
        {"answer": {"type": "string", "description": "the last message, if it is the answer"}},
    ),
)


def make_server(episode: Episode) -> Any:
    """An mcp.server.lowlevel.Server over one episode. Calls run one at a time, in a worker thread."""
    from mcp import types
    from mcp.server.lowlevel import Server

    lock = asyncio.Lock()
    listed = [types.Tool(name=name, description=text, input_schema=schema) for name, text, schema in _tools(episode)]

    async def list_tools(context: Any, params: Any) -> Any:
        return types.ListToolsResult(tools=listed)

    async def call_tool(context: Any, params: Any) -> Any:
        async with lock:
            text = await asyncio.to_thread(_observe, episode, params.name, params.arguments or {})
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=text.startswith('{"error"'))

    return Server("rorqual", instructions=episode.task.prompt, on_list_tools=list_tools, on_call_tool=call_tool)


def _tools(episode: Episode) -> list[tuple[str, str, dict[str, Any]]]:
    made = []
    for tool in episode.reset().tools:
        function = tool["function"]
        made.append((function["name"], function.get("description", ""), function["parameters"]))
    return made + [(name, text, {"type": "object", "properties": properties}) for name, text, properties in OWN_TOOLS]


def _observe(episode: Episode, name: str, arguments: dict[str, Any]) -> str:
    if name == TASK:
        return json.dumps({"messages": list(episode.reset().messages)}, ensure_ascii=False)
    if name == FINISH:
        return json.dumps(episode.finish(arguments.get("answer")).to_json(), ensure_ascii=False)
    return episode.call(name, arguments)


async def serve_stdio(episode: Episode) -> None:
    """Serve until the client goes away."""
    from mcp import stdio_server

    server = make_server(episode)
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())
