"""The engine on two CPU cores against transformers' deepseek_v32 on the same checkpoint, float32, side by side in one run:
prefill of 8K tokens at least 5 times as fast in at most a quarter of the memory, decode at a context of 64K at least 20 times,
32 requests at a context of 1K at least 3 times its own batch of 32; after both gave the same greedy tokens.

Each measurement is a process of its own, so that peak memory is its own: resident size at the peak less that once the model
was loaded. The two programs take turns, measurement by measurement. Beside the wall clock stands processor time, which
neighbours on the machine disturb less.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 420
QUICK_SECONDS = 60

SHAPE: dict[str, Any] = dict(
    vocab_size=8192, dim=512, n_layers=8, n_dense_layers=1, inter_dim=1536, max_positions=131072, n_heads=8,
    q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, yarn=None,
    index_n_heads=8, index_head_dim=64, index_topk=256, n_routed_experts=16, n_activated_experts=4, moe_inter_dim=512,
    n_expert_groups=1, n_limited_groups=1, n_mtp_layers=0, init_std=0.05,
)  # fmt: skip


def main(quick: bool) -> dict[str, Any]:
    prefill, context, batch, short = (1024, 4096, 4, 256) if quick else (8192, 65536, 32, 1024)
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(directory)
        ours, peer = {}, {}
        for name, sizes in jobs(prefill, context, batch, short):
            ours[name], peer[name] = alone(f"ours_{name}", directory, *sizes), alone(f"peer_{name}", directory, *sizes)
    assert ours["greedy"]["tokens"] == peer["greedy"]["tokens"], "the two programs disagree; nothing is timed"
    ratios = {
        "prefill": ours["prefill"]["tokens_per_s"] / peer["prefill"]["tokens_per_s"],
        "prefill_memory": ours["prefill"]["peak_bytes"] / peer["prefill"]["peak_bytes"],
        "decode": ours["decode"]["tokens_per_s"] / peer["decode"]["tokens_per_s"],
        "batch": ours["batch"]["tokens_per_s"] / peer["batch"]["tokens_per_s"],
    }
    timed = ("prefill", "decode", "batch")
    processor = {k: ours[k]["tokens_per_processor_s"] / peer[k]["tokens_per_processor_s"] for k in timed}
    figures = {"sizes": dict(prefill=prefill, decode_context=context, batch=batch, batch_context=short), "ratios": ratios}
    figures["ratios_of_processor_time"] = processor
    figures |= {
        "ours": {k: v for k, v in ours.items() if k != "greedy"},
        "transformers": {k: v for k, v in peer.items() if k != "greedy"},
    }
    print(ratios, "by processor time", processor)
    if not quick:
        assert ratios["prefill"] >= 5 and ratios["decode"] >= 20 and ratios["batch"] >= 3, ratios
        assert ratios["prefill_memory"] <= 0.25, ratios
    return figures


def jobs(prefill: int, context: int, batch: int, short: int) -> list[tuple[str, tuple[int, ...]]]:
    return [("greedy", (600, 24)), ("prefill", (prefill,)), ("decode", (context,)), ("batch", (batch, short))]


def make_checkpoint(directory: str) -> None:
    import torch

    from rorqual.model.config import ModelConfig
    from rorqual.model.transformer import Transformer
    from rorqual.model.weights import save_model

    save_model(Transformer(ModelConfig(**SHAPE), seed=1), Path(directory) / "model", dtype=torch.float32)


def alone(job: str, directory: str, *sizes: int) -> dict[str, Any]:
    """Run one job in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(globals()[job], (str(Path(directory) / "model"), *sizes))
    print(job, sizes, {k: v for k, v in result.items() if k != "tokens"}, flush=True)
    return result


def prompt(length: int, seed: int = 0) -> list[int]:
    import torch

    return torch.randint(2, SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self):
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def rates(self, tokens: float) -> dict[str, float]:
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return {"tokens_per_s": tokens / wall, "tokens_per_processor_s": tokens / processor}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- ours


def engine(directory: str, cache_tokens: int, max_running: int = 64) -> Any:
    import torch

    from rorqual.engine import Engine, EngineConfig
    from rorqual.model import load_model

    torch.set_num_threads(2)
    model = load_model(directory, torch.float32, "cpu")
    return Engine(model, EngineConfig(cache_tokens=cache_tokens, max_running=max_running, prefix_cache=False))


def greedy(count: int) -> Any:
    from rorqual.policy import SamplingParams

    return SamplingParams(max_tokens=count, temperature=0)


def ours_greedy(directory: str, length: int, count: int) -> dict[str, Any]:
    return {"tokens": list(engine(directory, 2048).generate([prompt(length)], greedy(count))[0].tokens)}


def ours_prefill(directory: str, length: int) -> dict[str, Any]:
    runner = engine(directory, length + 64)
    runner.generate([prompt(64)], greedy(1))
    before, clock = peak(), Clock()
    runner.generate([prompt(length)], greedy(1))
    return {**clock.rates(length), "peak_bytes": peak() - before}


def ours_decode(directory: str, context: int, count: int = 16) -> dict[str, Any]:
    """The cache is filled with numbers, not by a prefill: what is in it makes no difference to the time."""
    runner = engine(directory, context + 128)
    for store in [*runner.cache._kv, *runner.cache._index_keys]:
        store.normal_()
    request = runner.add(prompt(context), greedy(count + 2))
    runner.scheduler._admit(request, 1, set())
    request.computed_len = context - 1
    for _ in range(2):
        runner.step()
    clock = Clock()
    for _ in range(count):
        runner.step()
    return clock.rates(count)


def ours_batch(directory: str, batch: int, context: int, count: int = 16) -> dict[str, Any]:
    runner = engine(directory, batch * (context + 128))
    # The first requests decode while the last are still prefilled: none may end before all have been timed together.
    requests = [runner.add(prompt(context, seed), greedy(count + 100)) for seed in range(batch)]
    while not all(request.num_sampled for request in requests):
        runner.step()
    while min(request.num_sampled for request in requests) < 2:
        runner.step()
    clock, tokens = Clock(), runner.counters.sampled_tokens
    for _ in range(count):
        runner.step()
    assert not any(request.is_finished for request in requests), "a request ended before the timing did"
    return clock.rates(runner.counters.sampled_tokens - tokens)


# --- transformers


def peer_model(directory: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def peer_greedy(directory: str, length: int, count: int) -> dict[str, Any]:
    import torch

    model, ids = peer_model(directory), torch.tensor([prompt(length)])
    done = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"tokens": done[0, length:].tolist()}


def peer_prefill(directory: str, length: int) -> dict[str, Any]:
    import torch

    model = peer_model(directory)
    with torch.no_grad():
        model(torch.tensor([prompt(64)]), logits_to_keep=1)
        before, clock = peak(), Clock()
        model(torch.tensor([prompt(length)]), use_cache=True, logits_to_keep=1)
    return {**clock.rates(length), "peak_bytes": peak() - before}


def peer_decode(directory: str, context: int, count: int = 4) -> dict[str, Any]:
    import torch

    model = peer_model(directory)
    return _peer_steps(model, _peer_cache(model, 1, context), torch.tensor([[5]]), count)


def peer_batch(directory: str, batch: int, context: int, count: int = 6) -> dict[str, Any]:
    import torch

    model, tokens = peer_model(directory), torch.full((batch, 1), 5)
    return _peer_steps(model, _peer_cache(model, batch, context), tokens, count)


def _peer_cache(model: Any, batch: int, context: int) -> Any:
    """A cache of so many tokens, filled with numbers."""
    import torch
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    for layer in range(SHAPE["n_layers"]):
        latent = torch.randn(batch, 1, context, SHAPE["kv_lora_rank"])
        cache.update(latent, torch.randn(batch, 1, context, SHAPE["qk_rope_head_dim"]), layer)
        cache.update_indexer(torch.randn(batch, context, SHAPE["index_head_dim"]), layer)
    return cache


def _peer_steps(model: Any, cache: Any, tokens: Any, count: int) -> dict[str, float]:
    import torch

    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
        clock = Clock()
        for _ in range(count):
            model(tokens, past_key_values=cache, use_cache=True)
    return clock.rates(count * len(tokens))
