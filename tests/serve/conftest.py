"""A live server on loopback over a small random model, and one whose model says what a test wants it to say."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
import uvicorn

from rorqual.chat import encode_tokens
from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.serve.app import ServerConfig, make_app
from rorqual.serve.backend import EngineBackend
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, dim=32, n_layers=2, n_dense_layers=1, inter_dim=48, max_positions=8192, n_heads=2,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, yarn=None, index_n_heads=2,
    index_head_dim=16, index_topk=32, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=16, n_expert_groups=1,
    n_limited_groups=1, init_std=0.1,
)  # fmt: skip


class ForcedBackend(EngineBackend):
    """The real engine, made to say `script[i]` in its i-th generation by a constraint that admits one token at a time."""

    script: list

    def start(self, job):
        if self.script:
            tokens = self.script.pop(0)

            def forced(sampled):
                allowed = torch.zeros(CONFIG.vocab_size, dtype=torch.bool)
                allowed[tokens[len(sampled)]] = True
                return allowed

            job = replace(job, constraint=forced)
        return super().start(job)


def written(message, thinking=True):
    """The ids by which the format writes an assistant message after a user's."""
    return encode_tokens([message], TOKENIZER, thinking, context=[{"role": "user", "content": "q"}], add_bos=False)


class LiveServer:
    """uvicorn in a thread with a loop of its own, on a free port of loopback."""

    def __init__(self, make_backend, config=None, api_key=""):
        self._ready, self._config, self._key = threading.Event(), config or ServerConfig(port=0), api_key
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(make_backend)), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    async def _serve(self, make_backend):
        self.backend = make_backend()
        app = make_app(self.backend, self._config, self._key)
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._ready.set()
        await serving

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self):
        return self.backend.service.engine

    def stop(self):
        self._server.should_exit = True
        self._thread.join(30)


def forced_backend(engine_config=None, max_waiting=64):
    torch.manual_seed(0)
    engine = Engine(Transformer(CONFIG, seed=1), engine_config or EngineConfig(cache_tokens=16384, record_selection=True))
    backend = ForcedBackend(EngineService(engine, max_waiting), TOKENIZER, "small")
    backend.script = []
    return backend


@pytest.fixture(scope="module")
def server():
    live = LiveServer(forced_backend)
    yield live
    live.stop()


@pytest.fixture
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
