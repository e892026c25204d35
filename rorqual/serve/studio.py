"""The studio: a page at / beside the API, to talk to the model, see what its indexer selects, try environments, compare runs.

Built on NiceGUI, which carries its own assets, so that it works offline. The API's application is left as it is: a request whose
path begins as one of the API's goes to it and meets nothing of the studio. One process holds one studio (NiceGUI's limit).
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import FastAPI, Request
from starlette.routing import Router

from rorqual.serve.backend import Backend
from rorqual.serve.chat_api import Defaults
from rorqual.serve.studio_conversation import Conversation
from rorqual.serve.studio_guard import Guard
from rorqual.serve.studio_library import Library


@dataclass(frozen=True)
class StudioConfig:
    """What the studio shows beside the model."""

    tasks: str = ""
    """A task store, or a directory of stores; empty: no environments."""
    runs: str = "runs"
    """The directory under which runs are looked for."""
    isolation: str = "bwrap"
    """How the programs of environments are confined."""


@dataclass
class Studio:
    """What all visitors share."""

    backend: Backend
    defaults: Defaults
    config: StudioConfig

    @cached_property
    def library(self) -> Library:
        return Library(self.config.tasks, self.config.isolation)

    def conversation(self) -> Conversation:
        return Conversation(self.backend, self.defaults)


def with_studio(api: FastAPI, studio: Studio, host: str, key: str = "") -> Any:
    """One ASGI application of the API and the studio. host: where it listens; key: what opens it, unless empty."""
    from nicegui import ui

    # NiceGUI looks through all objects of the process for its server; some of torch's warn when they are looked at.
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)
    pages = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for path in ("/", "/environments", "/runs"):
        ui.page(path, title="Rorqual studio")(_page(studio))
    ui.run_with(
        pages, title="Rorqual studio", favicon="🐋", dark=None, tailwind=False, binding_refresh_interval=None,
        show_welcome_message=False, reconnect_timeout=10.0, language="en-US",
    )  # fmt: skip
    return _Front(api, pages, Guard(pages, key, host))


def _page(studio: Studio) -> Any:
    from nicegui import ui

    from rorqual.serve.studio_chat import ChatPage
    from rorqual.serve.studio_environments import EnvironmentPage
    from rorqual.serve.studio_frame import DARK_COOKIE, frame
    from rorqual.serve.studio_runs import RunsPage

    async def page(request: Request) -> None:
        drawn = frame(studio.backend.model_name, request.url.path, request.cookies.get(DARK_COOKIE))
        chat = ChatPage(studio)
        environments = EnvironmentPage(studio, chat, drawn.tabs)
        runs = RunsPage(studio)
        with drawn.panels:
            for path, each in {"/": chat, "/environments": environments, "/runs": runs}.items():
                with ui.tab_panel(path):
                    each.draw()

        async def close() -> None:
            await chat.close()
            await environments.close()

        ui.context.client.on_delete(close)

    return page


class _Front:
    """Sends each request to the API or to the studio by the first part of its path; both live and end together."""

    def __init__(self, api: FastAPI, pages: FastAPI, guarded: Any):
        self.api, self.guarded = api, guarded
        self.own = {path.split("/")[1] for route in api.routes if (path := getattr(route, "path", ""))}

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            async with api.router.lifespan_context(api), pages.router.lifespan_context(pages):
                yield

        self._lifespan = Router(lifespan=lifespan)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["path"].split("/")[1] in self.own:
            await self.api(scope, receive, send)
        else:
            await self.guarded(scope, receive, send)
