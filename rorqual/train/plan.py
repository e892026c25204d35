"""What training a model on a cluster would need: memory, layout, time, cost. Formulas and measured efficiencies; no allocation.

Memory of one device in bytes, N devices, a context group of c, one row of T tokens in work, layers recomputed:
    weights, gradients, optimiser   16 P / N for what is trained (4 master, 4 gradient, 8 moments), 2 P / N for what is frozen
    gathered layers                 2 layers x 2 bytes x (a layer's parameters, its routed experts cut over the expert group)
    kept activations                layers x T / c x 2 D bytes: each layer's input
    one layer's work                2 bytes x (T / c x (queries and values, or experts' hidden, + 4 D) + keys of T)
Time of a step: sum of FLOPs x passes / (N x peak x efficiency); parts are added up as if nothing overlapped.
    weights        2 x activated parameters a token; forward, again for recomputation, and two in the backward: 4 passes
    attention      rorqual/model/cost.py over the positions; forward twice and the backward's measured multiple
    index scores   likewise; the sparse stage's backward reads selected keys only
    warm-up        one forward, dense attention's scores once more for the target, index scores forward and backward
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rorqual.errors import UserError, require
from rorqual.model.config import ModelConfig
from rorqual.model.cost import dense_flops, sparse_flops, weight_flops
from rorqual.model.parameters import Parameters, count_parameters


@dataclass(frozen=True)
class ClusterConfig:
    devices: int = 2048
    device_memory_gib: float = 80.0
    peak_tflops: float = 989.0
    """Dense bf16, as vendors state it."""
    matmul_efficiency: float = 0.35
    """Share of the peak that weights' products reach in training, communication included (published MoE runs: 0.15 to 0.4)."""
    dense_attention_efficiency: float = 0.60
    """Measured on an H200: 597 TFLOP/s of a square 32K prefill, cuDNN back end, against 989."""
    sparse_attention_efficiency: float = 0.55
    """Measured on an H200: 546 TFLOP/s forward at 32K; the backward is lower, see sparse_backward_factor."""
    sparse_backward_factor: float = 5.0
    """Time of the sparse backward over the forward's (measured: 28.3 ms against 4.3 ms is 6.6; its limit is 2.5)."""
    index_efficiency: float = 0.50
    """Of the peak, index scores in bf16 with the ReLU and the sum over heads (measured in fp8: 1,000 of 1,320 TFLOP/s)."""
    dollars_per_hour: float = 2.0
    """For one device; the paper's cost figure uses 2."""

    def __post_init__(self) -> None:
        shares = ("matmul_efficiency", "dense_attention_efficiency", "sparse_attention_efficiency", "index_efficiency")
        positive = ("device_memory_gib", "peak_tflops", "dollars_per_hour", "sparse_backward_factor")
        require(
            self,
            devices=(self.devices >= 1, "at least 1"),
            **{name: (0 < getattr(self, name) <= 1, "in (0, 1]") for name in shares},
            **{name: (getattr(self, name) > 0, "more than 0") for name in positive},
        )


@dataclass(frozen=True)
class StagePlan:
    """One stage to plan: its batch and how it is laid out."""

    name: str
    steps: int
    rows: int
    length: int
    kind: str = "dense"
    """dense (pre-training, extension), warm-up, or sparse."""
    context: int = 1
    expert: int = 64

    def __post_init__(self) -> None:
        require(
            self,
            kind=(self.kind in ("dense", "warm-up", "sparse"), "dense, warm-up or sparse"),
            context=(self.context >= 1, "at least 1"),
            expert=(self.expert >= 1, "at least 1"),
        )


@dataclass(frozen=True)
class PlanConfig:
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stages: tuple[StagePlan, ...] = (
        StagePlan("extend", 3322, 480, 131072, "dense", context=8),
        StagePlan("warm_indexer", 1000, 16, 131072, "warm-up", context=128),
        StagePlan("train_sparse", 15000, 480, 131072, "sparse", context=8),
    )
    """Defaults: 209B tokens of V3.1's 128K phase, and the paper's two DSA stages."""
    positions: tuple[int, ...] = (0, 2048, 6656, 32768, 65536, 131071)


def plan(model: ModelConfig, config: PlanConfig) -> dict[str, Any]:
    """The plan as plain data, for each stage and position."""
    counted = count_parameters(model)
    total = counted.without_indexers + counted.indexers + counted.mtp_without_indexer + counted.mtp_indexer
    return {
        "parameters": {"total": total, "indexers": counted.indexers + counted.mtp_indexer, "activated": counted.activated},
        "cluster": asdict(config.cluster),
        "stages": [_stage(model, counted, config.cluster, stage) for stage in config.stages],
        "cost_by_position": [_cost(model, counted, config.cluster, position) for position in config.positions],
    }


def memory_bytes(model: ModelConfig, counted: Parameters, cluster: ClusterConfig, stage: StagePlan) -> dict[str, float]:
    """Bytes of one device by part; the module's docstring has the formulas."""
    indexers = counted.indexers + counted.mtp_indexer
    total = counted.checkpoint - counted.copies
    trained, frozen = (indexers, total - indexers) if stage.kind == "warm-up" else (total, 0)
    per_layer = _layer_parameters(model, stage.expert)
    tokens = stage.length / stage.context
    widest = max(model.n_heads * (model.qk_head_dim + model.v_head_dim), model.n_activated_experts * 3 * model.moe_inter_dim)
    keys = stage.length * (model.kv_lora_rank + model.qk_rope_head_dim + model.index_head_dim)
    layers = model.n_layers + model.n_mtp_layers
    return {
        "weights, gradients, optimiser": (16.0 * trained + 2.0 * frozen) / cluster.devices,
        "gathered layers": 2 * 2.0 * per_layer,
        "kept activations": 0.0 if stage.kind == "warm-up" else 2.0 * layers * tokens * model.dim,
        "one layer's work": 2.0 * (tokens * (widest + 4 * model.dim) + keys),
    }


def step_seconds(model: ModelConfig, counted: Parameters, cluster: ClusterConfig, stage: StagePlan) -> dict[str, float]:
    """Seconds of one step by part, as if parts did not overlap."""
    tokens, peak = stage.rows * stage.length, cluster.peak_tflops * 1e12 * cluster.devices
    middle = stage.length // 2  # FLOPs grow linearly with the position, so the middle one is the mean
    dense, sparse = dense_flops(model, middle, "expanded"), _selected_flops(model, stage.length)
    index = sparse_flops(model, middle) - _selected_flops(model, stage.length, at=middle)
    weights = weight_flops(model, counted, sparse=stage.kind != "dense")
    if stage.kind == "warm-up":
        # The target needs attention's scores again, in the absorbed form: its score half is (L + R) of (2L + R).
        score_share = (model.kv_lora_rank + model.qk_rope_head_dim) / (2 * model.kv_lora_rank + model.qk_rope_head_dim)
        attention = dense + dense_flops(model, middle, "absorbed") * score_share
        parts = {"weights": (weights, 1, cluster.matmul_efficiency)}
        parts |= {"attention and target": (attention, 1, cluster.dense_attention_efficiency)}
        parts |= {"index scores": (index, 3, cluster.index_efficiency)}
    elif stage.kind == "dense":
        parts = {"weights": (weights, 4, cluster.matmul_efficiency)}
        parts |= {"attention": (dense, 2 + 2.5, cluster.dense_attention_efficiency)}
    else:
        parts = {"weights": (weights, 4, cluster.matmul_efficiency)}
        parts |= {"attention": (sparse, 2 + cluster.sparse_backward_factor, cluster.sparse_attention_efficiency)}
        parts |= {"index scores": (index, 2, cluster.index_efficiency)}  # its backward runs over selected keys only
    return {name: tokens * flops * times / (peak * efficiency) for name, (flops, times, efficiency) in parts.items()}


def _stage(model: ModelConfig, counted: Parameters, cluster: ClusterConfig, stage: StagePlan) -> dict[str, Any]:
    _check_layout(model, cluster, stage)
    memory, seconds = (f(model, counted, cluster, stage) for f in (memory_bytes, step_seconds))
    step = sum(seconds.values())
    return {
        "name": stage.name,
        "layout": {"data": cluster.devices // stage.context, "context": stage.context, "expert": stage.expert},
        "memory_gib": {name: value / 2**30 for name, value in memory.items()},
        "memory_total_gib": sum(memory.values()) / 2**30,
        "fits": sum(memory.values()) / 2**30 < 0.9 * cluster.device_memory_gib,
        "step_seconds": seconds,
        "step_total_s": step,
        "tokens": stage.steps * stage.rows * stage.length,
        "tokens_per_s": stage.rows * stage.length / step,
        "days": stage.steps * step / 86400,
        "device_hours": stage.steps * step * cluster.devices / 3600,
        "dollars": stage.steps * step * cluster.devices / 3600 * cluster.dollars_per_hour,
    }


def _check_layout(model: ModelConfig, cluster: ClusterConfig, stage: StagePlan) -> None:
    if cluster.devices % stage.context or cluster.devices % stage.expert:
        raise UserError(
            f"plan: stage {stage.name}: context {stage.context} and expert {stage.expert} must divide {cluster.devices} devices"
        )
    if model.n_routed_experts % stage.expert:
        raise UserError(f"plan: stage {stage.name}: expert {stage.expert} does not divide {model.n_routed_experts} experts")


def _cost(model: ModelConfig, counted: Parameters, cluster: ClusterConfig, position: int) -> dict[str, float]:
    """Dollars per million prefilled tokens at a position, dense and sparse: FLOPs over the efficiencies, nothing else."""
    dollars = cluster.dollars_per_hour / 3600 / (cluster.peak_tflops * 1e12) * 1e6
    selected = _selected_flops(model, position + 1, at=position)
    index = sparse_flops(model, position) - selected
    dense = dense_flops(model, position, "expanded") / cluster.dense_attention_efficiency
    sparse = selected / cluster.sparse_attention_efficiency + index / cluster.index_efficiency
    weights = (weight_flops(model, counted, sparse=s) / cluster.matmul_efficiency for s in (False, True))
    return {"position": position, "dense": dollars * (next(weights) + dense), "sparse": dollars * (next(weights) + sparse)}


def _selected_flops(model: ModelConfig, length: int, at: int | None = None) -> float:
    """Attention over the selected keys, all layers: of the token at a position, or the mean over a sequence."""
    k = model.index_topk
    kept = min(at + 1, k) if at is not None else min(length, k) - max(min(length, k) ** 2, 0) / (2 * length)
    return model.n_layers * kept * model.n_heads * 2 * (2 * model.kv_lora_rank + model.qk_rope_head_dim)


def _layer_parameters(model: ModelConfig, expert: int) -> float:
    """Parameters of one MoE layer that a device gathers: all but the routed experts, and its own share of those."""
    experts = 3 * model.dim * model.moe_inter_dim
    rank = model.q_lora_rank or 0
    query = (
        (model.dim * rank + rank * model.n_heads * model.qk_head_dim) if rank else model.dim * model.n_heads * model.qk_head_dim
    )
    latent = model.dim * (model.kv_lora_rank + model.qk_rope_head_dim)
    values = model.kv_lora_rank * model.n_heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = query + latent + values + model.n_heads * model.v_head_dim * model.dim
    return attention + experts * (model.n_shared_experts + model.n_routed_experts / expert)


def render(found: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    lines = [f"parameters: {found['parameters']['total']:,} (indexers {found['parameters']['indexers']:,})"]
    for stage in found["stages"]:
        memory = ", ".join(f"{name} {value:.1f}" for name, value in stage["memory_gib"].items())
        parts = ", ".join(f"{name} {value:.2f}" for name, value in stage["step_seconds"].items())
        layout = " x ".join(f"{name} {size}" for name, size in stage["layout"].items())
        lines += [
            "",
            f"{stage['name']}: {stage['tokens'] / 1e9:,.1f}B tokens; {layout}",
            f"  memory per device {stage['memory_total_gib']:.1f} GiB ({memory}){'' if stage['fits'] else '  DOES NOT FIT'}",
            f"  step {stage['step_total_s']:.1f} s ({parts}); {stage['tokens_per_s']:,.0f} tokens/s",
            f"  {stage['days']:.1f} days, {stage['device_hours']:,.0f} device hours, ${stage['dollars']:,.0f}",
        ]
    lines += ["", "dollars per million prefilled tokens, by position: dense, sparse"]
    lines += [f"  {row['position']:>8,}  {row['dense']:.3f}  {row['sparse']:.3f}" for row in found["cost_by_position"]]
    return "\n".join(lines)
