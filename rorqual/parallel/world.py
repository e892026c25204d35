"""The processes of a run: who I am, how sequences and experts are spread, and sums over ranks. One process needs no group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rorqual.errors import UserError, require


@dataclass(frozen=True)
class ParallelConfig:
    """How a run under torchrun is spread. Weights and optimiser state are always sharded over all ranks (FSDP2)."""

    context: int = 1
    """Ranks that share one sequence: queries are cut, latents and index keys are gathered."""
    expert: int = 1
    """1: experts are sharded like all weights. The number of ranks: each rank owns some experts, and tokens travel to them."""

    def __post_init__(self) -> None:
        require(self, context=(self.context >= 1, "at least 1"), expert=(self.expert >= 1, "at least 1"))


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    config: ParallelConfig = ParallelConfig()
    mesh: DeviceMesh | None = None
    """Axes data and context; None for one process."""
    flat: DeviceMesh | None = None
    """All ranks on one axis: what weights are sharded over."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the batch's rows is mine."""
        return self.rank // self.config.context

    @property
    def data_size(self) -> int:
        return self.size // self.config.context

    @property
    def context_rank(self) -> int:
        return self.rank % self.config.context

    @property
    def flat_mesh(self) -> DeviceMesh:
        assert self.flat is not None, "one process has no mesh"
        return self.flat

    @property
    def context_group(self) -> dist.ProcessGroup:
        assert self.mesh is not None, "one process has no mesh"
        return self.mesh["context"].get_group()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start(config: ParallelConfig, device: str | None = None) -> World:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or stand alone.

    device: cpu or cuda; None takes a GPU where there is one. Raises UserError where the ranks don't divide as asked.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size % config.context:
        raise UserError(f"parallel.context {config.context}: does not divide the {size} processes")
    if config.expert not in (1, size):
        raise UserError(f"parallel.expert {config.expert}: expected 1 or the number of processes, {size}")
    if size == 1:
        return World(rank, size, place, config)
    if not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    mesh = init_device_mesh(place.type, (size // config.context, config.context), mesh_dim_names=("data", "context"))
    flat = init_device_mesh(place.type, (size,), mesh_dim_names=("all",))
    return World(rank, size, place, config, mesh, flat)


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str | None, local_rank: int) -> torch.device:
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device {kind}: expected cpu or cuda")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device that torch can use; rorqual doctor says why")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
