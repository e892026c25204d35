"""Where rollouts come from, behind one protocol: the embedded engine beside the trainer, or another engine over HTTP."""

from __future__ import annotations

import asyncio
import copy
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.policy import SamplingParams, TokenPolicy
from rorqual.rollout.dialects import ExpertLayout
from rorqual.rollout.remote import RemoteConfig, RemotePolicy, check
from rorqual.train.loop import Site


class Sampler(Protocol):
    def check(self, params: SamplingParams) -> None:
        """Raises UserError that names what cannot be had."""
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Sample with these weights from now on. All ranks call it."""
        ...

    def policy(self) -> Any:
        """An asynchronous context with the TokenPolicy of one batch of rollouts."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What went wrong at the boundary, how often."""
        ...

    def close(self) -> None: ...


class Colocated:
    """The embedded engine on the trainer's device, with weights of its own that are replaced in place."""

    def __init__(self, model: Transformer, config: EngineConfig, site: Site, max_waiting: int):
        own = copy.deepcopy(model).eval().requires_grad_(False).to(site.world.device)
        self.service = EngineService(Engine(own, config), max_waiting)
        self.counts: Mapping[str, int] = {}

    def check(self, params: SamplingParams) -> None:
        """The engine says so itself."""

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.service.command(lambda engine: engine.update_weights(weights.items(), version)).result()

    @asynccontextmanager
    async def policy(self) -> AsyncIterator[TokenPolicy]:
        yield self.service

    def close(self) -> None:
        asyncio.run(self.service.close())


class External:
    """Another engine over HTTP: weights reach it as a checkpoint in the Hugging Face format on a disk that it sees."""

    def __init__(self, config: RemoteConfig, model: Transformer, init: Path, site: Site, dtype: Any):
        self.config, self.shape, self.init, self.site, self.dtype = config, model.config, init.resolve(), site, dtype
        self.layout = ExpertLayout(self.shape.n_layers, self.shape.n_dense_layers, self.shape.n_activated_experts)
        self.counts: Counter[str] = Counter()
        self.version = 0
        self._still = threading.Lock()
        """Held while a batch is played: weights change between batches only."""

    def check(self, params: SamplingParams) -> None:
        check(self.config, params)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        with self._still:
            if self.site.world.is_main:
                path = self._write(weights, version)
                asyncio.run(self._reload(path, version))
                for old in path.parent.iterdir():
                    if old != path:
                        shutil.rmtree(old, ignore_errors=True)
            self.version = version
        self.site.world.barrier()

    @asynccontextmanager
    async def policy(self) -> AsyncIterator[TokenPolicy]:
        with self._still:
            async with RemotePolicy(self.config, self.layout, self.version) as policy:
                yield policy
                self.counts += policy.counts

    def close(self) -> None:
        shutil.rmtree(self.site.directory / "weights", ignore_errors=True)

    def _write(self, weights: Mapping[str, Tensor], version: int) -> Path:
        whole = Transformer(self.shape)
        whole.load_state_dict(weights)
        path = (self.site.directory / "weights" / f"{version:08d}").resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_model(whole, path, self.dtype, companions=self.init, overwrite=True)
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error}); mend it and start again: no step is lost") from None
        return path

    async def _reload(self, path: Path, version: int) -> None:
        async with RemotePolicy(self.config, self.layout) as policy:
            await policy.reload(str(path), version)
            self.counts += policy.counts
