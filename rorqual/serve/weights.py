"""POST /update_weights_from_disk: a trainer that wrote a checkpoint has the engine read it. Off unless the server allows it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from rorqual.engine.service import EngineService
from rorqual.errors import UserError
from rorqual.model import load_model


class WeightsRequest(BaseModel):
    """SGLang's form. weight_version: a number; what completions report as their policy version from then on."""

    model_config = ConfigDict(extra="forbid")
    model_path: str
    weight_version: str = ""


def install(app: FastAPI, service: EngineService) -> None:
    @app.post("/update_weights_from_disk")
    async def update(body: WeightsRequest) -> dict[str, Any]:
        """Requests that have tokens end under the old weights; the others begin under the new ones."""
        try:
            version = await _update(service, body)
        except UserError as error:
            return {"success": False, "message": str(error)}
        return {"success": True, "message": "weights replaced", "weight_version": str(version)}


async def _update(service: EngineService, body: WeightsRequest) -> int:
    path, weight = Path(body.model_path), service.engine.model.embed.weight
    if not (path / "config.json").is_file():
        raise UserError(f"model_path: {path} holds no checkpoint")
    dtype = "float32" if weight.dtype == torch.float32 else "bfloat16"
    model = await asyncio.to_thread(load_model, path, dtype, weight.device)
    version = int(body.weight_version) if body.weight_version.isdigit() else None
    return await service.update_weights(model.state_dict().items(), version)
