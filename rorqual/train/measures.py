"""Speed and memory of training: FLOPs by stated formulas, MFU against the device's peak, peak memory."""

from __future__ import annotations

import resource
import time
from functools import cache

import torch

from rorqual.model.config import ModelConfig
from rorqual.parallel.world import World

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bf16 FLOP/s that vendors state, by a part of the device's name."""


def forward_flops_per_token(config: ModelConfig, length: int, sparse: bool, mtp: bool = True) -> dict[str, float]:
    """FLOPs of one token of a packed sequence of `length`, averaged over its positions, by component.

    A matrix product of an [a, b] weight counts 2 a b. Attention counts 2 H (qk + v) for each key that a query sees (the
    expanded form when dense; the absorbed one, 2 H (2 L + R), when sparse), the indexer 2 I C for each key before it.
    """
    layers = config.n_layers + (config.n_mtp_layers if mtp else 0)
    moe_layers = layers - config.n_dense_layers
    seen = (length + 1) / 2
    D, H, L, R = config.dim, config.n_heads, config.kv_lora_rank, config.qk_rope_head_dim
    rank = config.q_lora_rank
    query = D * H * config.qk_head_dim if rank is None else rank * (D + H * config.qk_head_dim)
    values = H * config.v_head_dim
    projections = query + D * (L + R) + L * H * (config.qk_nope_head_dim + config.v_head_dim) + values * D
    experts = config.n_activated_experts + config.n_shared_experts
    flops = {
        "projections": 2.0 * projections * layers,
        "dense ffn": 6.0 * D * config.inter_dim * config.n_dense_layers,
        "moe": (6.0 * D * config.moe_inter_dim * experts + 2.0 * D * config.n_routed_experts) * moe_layers,
        "head": 2.0 * D * config.vocab_size * (1 + (config.n_mtp_layers if mtp else 0)),
        "attention": 2.0 * H * (config.qk_head_dim + config.v_head_dim) * seen * layers,
    }
    if sparse and config.has_indexer:
        k = config.index_topk
        kept = seen if length <= k else (k * (k + 1) / 2 + (length - k) * k) / length
        flops["attention"] = 2.0 * H * (2 * L + R) * kept * layers
        heads = config.index_n_heads * config.index_head_dim
        flops["indexer"] = layers * (
            2.0 * (rank or D) * heads + 2.0 * D * (config.index_head_dim + config.index_n_heads) + 2.0 * heads * seen
        )
    return flops


def train_flops_per_token(config: ModelConfig, length: int, sparse: bool, mtp: bool = True) -> float:
    """Forward and backward: three times the forward; recomputation is not counted, as is usual for MFU."""
    return 3 * sum(forward_flops_per_token(config, length, sparse, mtp).values())


@cache
def peak_flops(device: torch.device) -> float:
    """The device's peak: stated for known GPUs in bf16, else measured by a float32 matrix product (a CPU)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAK_FLOPS.items() if part in name), float("nan"))
    a = torch.ones(512, 512)
    torch.mm(a, a)
    began = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a)
    return 10 * 2 * 512**3 / (time.perf_counter() - began)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Tokens per second and MFU of each step: `start` where it begins, `lap` where it ends."""

    def __init__(self, config: ModelConfig, length: int, sparse: bool, world: World):
        self.flops, self.device = train_flops_per_token(config, length, sparse), world.device
        self.peak = peak_flops(world.device) * world.size
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def lap(self, tokens: int) -> dict[str, float]:
        """Metrics of the step that ends now; tokens: of the global batch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        rate = tokens / (time.perf_counter() - self._began)
        memory = peak_memory_bytes(self.device)
        return {"train/tokens_per_s": rate, "train/mfu": rate * self.flops / self.peak, "train/memory_bytes": memory}
