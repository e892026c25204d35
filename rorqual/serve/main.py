"""Running the servers: load a checkpoint, or point at another engine, and serve until told to stop."""

from __future__ import annotations

import os
from pathlib import Path

from rorqual.engine import EngineConfig
from rorqual.errors import UserError
from rorqual.serve.app import ServerConfig, make_app
from rorqual.serve.backend import Backend, EngineBackend, UpstreamBackend
from rorqual.serve.opening import open_engine
from rorqual.serve.studio import Studio, StudioConfig, with_studio


def engine_backend(
    checkpoint: str, config: EngineConfig, dtype: str, device: str, max_waiting: int = 256, name: str = ""
) -> EngineBackend:
    """A checkpoint directory as a backend (rorqual/serve/opening.py)."""
    service, tokenizer = open_engine(checkpoint, config, dtype, device, max_waiting)
    return EngineBackend(service, tokenizer, name or Path(checkpoint).resolve().name)


def serve(backend: Backend, config: ServerConfig, studio: StudioConfig | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished first. studio: also the pages at /, on the same terms."""
    import uvicorn

    key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
    if config.api_key_env and not key:
        raise UserError(f"api_key_env: the environment variable {config.api_key_env} is not set")
    app = make_app(backend, config, key)
    if studio is not None:
        app = with_studio(app, Studio(backend, config.defaults, studio), config.host, key)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


def upstream_backend(url: str, model: str, key_env: str) -> UpstreamBackend:
    """Another engine's completions endpoint; without a model name, the first that it lists."""
    import httpx

    key = os.environ.get(key_env, "")
    backend = UpstreamBackend(url, model, key)
    if not model:
        try:
            listed = httpx.get(f"{backend.base}/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10)
            backend.model_name = listed.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{backend.base}/models: {type(error).__name__}: {error}; name a model with --model") from None
    return backend
