"""A server with the studio, for a browser: a small random model that says its script first. Prints its port.

    python -m tests.serve.studio_server TASKS RUNS [KEY]

It runs in a process of its own: NiceGUI knows one application per process.
"""

from __future__ import annotations

import asyncio
import sys

import torch
import uvicorn

from rorqual.chat import encode_tokens
from rorqual.serve.app import ServerConfig, make_app
from rorqual.serve.studio import Studio, StudioConfig, with_studio
from tests.serve.conftest import TOKENIZER, forced_backend

ANSWER = "The sum of the first ten squares is 385. " * 8
CALL = {"name": "python", "arguments": '{"code": "print(sum(i * i for i in range(1, 11)))"}'}
SCRIPT = [
    {"role": "assistant", "reasoning_content": "I had better compute it.", "content": "Let me see.",
     "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}]},
    {"role": "assistant", "reasoning_content": "The tool says 385.", "content": ANSWER},
]  # fmt: skip


def scripted() -> list[list[int]]:
    """Each message's ids, as the format writes them after a user's message."""
    context = [{"role": "user", "content": "q"}]
    return [encode_tokens([message], TOKENIZER, True, context=context, add_bos=False) for message in SCRIPT]


async def main(tasks: str, runs: str, key: str = "") -> None:
    torch.set_num_threads(1)  # threads that wait for one another are slow beside a busy neighbour
    backend = forced_backend()
    backend.script = scripted()
    config = ServerConfig(port=0)
    studio = Studio(backend, config.defaults, StudioConfig(tasks, runs))
    app = with_studio(make_app(backend, config, key), studio, config.host, key)
    server = uvicorn.Server(uvicorn.Config(app, host=config.host, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if not serving.done():
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
