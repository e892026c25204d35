"""The HTTP application: routes, limits, an orderly end. `make_app(backend, config)` is an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from rorqual.errors import require
from rorqual.serve import chat_api, completions_api, weights
from rorqual.serve.backend import Backend, EngineBackend, UpstreamBackend
from rorqual.serve.chat_api import Defaults
from rorqual.serve.constraints import Grammars
from rorqual.serve.failures import Refusal, error_body, install
from rorqual.serve.metrics import Metrics
from rorqual.serve.requests import ChatRequest, CompletionRequest

T = TypeVar("T")


@dataclass(frozen=True)
class ServerConfig:
    """Binds to loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str = ""
    """The environment variable that holds the bearer key; empty: no key is asked for."""
    max_body_bytes: int = 32 << 20
    weights_from_disk: bool = False
    """Let clients have the engine read other weights from a checkpoint on this machine's disk: for a trainer of its own."""
    defaults: Defaults = field(default_factory=Defaults)

    def __post_init__(self) -> None:
        require(
            self,
            port=(0 <= self.port <= 65535, "in [0, 65535] (0: any free one)"),
            max_body_bytes=(self.max_body_bytes >= 1024, "at least 1024"),
        )


def make_app(backend: Backend, config: ServerConfig | None = None, api_key: str = "") -> FastAPI:
    """The application over a backend. api_key: asked for as a bearer token, unless empty."""
    config = config or ServerConfig()
    metrics = Metrics(backend)
    grammars = (
        Grammars(backend.tokenizer, backend.service.engine.model.config.vocab_size)
        if isinstance(backend, EngineBackend)
        else None
    )
    app = FastAPI(title="Rorqual", lifespan=_lifespan(backend), docs_url=None, redoc_url=None)
    install(app)
    app.add_middleware(_Gate, max_body_bytes=config.max_body_bytes, api_key=api_key, metrics=metrics)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        _known_model(body.model, backend)
        choices = chat_api.open_choices(body, backend, grammars, config.defaults)
        if body.stream:
            return await _streaming(chat_api.stream(body, choices, backend))
        return await _unless_gone(request, lambda: chat_api.whole(body, choices, backend))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Any:
        _known_model(body.model, backend)
        choices = completions_api.open_texts(body, backend, config.defaults)
        if body.stream:
            return await _streaming(completions_api.stream_texts(body, choices, backend))
        return await _unless_gone(request, lambda: completions_api.whole_texts(body, choices, backend))

    if config.weights_from_disk and isinstance(backend, EngineBackend):
        weights.install(app, backend.service)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": backend.model_name, "object": "model", "owned_by": "rorqual"}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        takes = not isinstance(backend, EngineBackend) or backend.service.is_accepting
        return JSONResponse({"status": "ok" if takes else "draining"}, 200 if takes else 503)

    @app.get("/metrics")
    async def figures() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4")

    return app


def _lifespan(backend: Backend) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if isinstance(backend, EngineBackend):
            await backend.service.close(drain=True)
        elif isinstance(backend, UpstreamBackend):
            await backend.aclose()

    return lifespan


def _known_model(name: str, backend: Backend) -> None:
    if name and name != backend.model_name:
        raise Refusal(404, f"model: this server has {backend.model_name}, not {name}", "model", "model_not_found")


async def _streaming(events: AsyncIterator[str]) -> StreamingResponse:
    """Start a stream; closing it (the client has gone) closes the generator, which withdraws its requests."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _unless_gone(request: Request, answer: Callable[[], Awaitable[T]]) -> T:
    """The answer, withdrawn if the client disconnects before it is there."""
    work = asyncio.ensure_future(answer())

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)

    watcher = asyncio.ensure_future(watch())
    await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
    watcher.cancel()
    if not work.done():
        work.cancel()
        raise Refusal(499, "the client has gone")
    return await work


class _Gate:
    """Refuses bodies that are too large (however they are sent) and calls without the key; counts answers by status."""

    def __init__(self, app: Any, max_body_bytes: int, api_key: str, metrics: Metrics):
        self.app, self.max_body_bytes, self.api_key, self.metrics = app, max_body_bytes, api_key, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await self._answer(refusal, scope, receive, send)
            return
        body = await self._body(receive)
        if body is None:
            await self._answer((413, f"the body is larger than {self.max_body_bytes} bytes"), scope, receive, send)
            return
        await self.app(scope, _replayed(body, receive), self._counted(send, scope["path"]))

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and path != "/health" and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            return 401, "a bearer key is needed, and it is missing or wrong"
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return 413, f"the body has {length} bytes; at most {self.max_body_bytes} are taken"
        return None

    async def _body(self, receive: Any) -> list[Any] | None:
        """The messages that make up the body; None as soon as it outgrows the limit, whatever length was announced."""
        messages, size = [], 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self.max_body_bytes:
                return None
        return messages

    def _counted(self, send: Any, path: str) -> Any:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(path, message["status"])
            await send(message)

        return counted

    async def _answer(self, refusal: tuple[int, str], scope: Any, receive: Any, send: Any) -> None:
        self.metrics.answered(scope["path"], refusal[0])
        await JSONResponse(error_body(*refusal), refusal[0])(scope, receive, send)


def _replayed(messages: list[Any], receive: Any) -> Any:
    """Give the messages again, then whatever comes after them (that the client has gone)."""
    left = list(messages)

    async def replay() -> Any:
        return left.pop(0) if left else await receive()

    return replay
