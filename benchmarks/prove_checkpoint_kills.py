"""Claim: a checkpoint writer killed at any moment (SIGKILL) leaves the older checkpoint or the newer one, whole, and the next
writer clears up after it; loading peaks above the model's size by less than a tenth of it and 80 MB, converting below 120 MB
whatever the size (shards of 20 MB, and at most 32 MB of the source mapped).

Writers overwrite one checkpoint, each with another seed, and are killed at moments spread over their whole run. After each
kill the directory must load, and its weights be all of one seed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rorqual.model import ModelConfig, Transformer, load_model
from rorqual.model.weights import save_model

SECONDS = 230
QUICK_SECONDS = 60
CONFIG = ModelConfig(
    vocab_size=512, dim=128, n_layers=3, n_dense_layers=1, inter_dim=256, max_positions=512, n_heads=4, q_lora_rank=64,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, yarn=None, index_n_heads=4, index_head_dim=32,
    index_topk=16, n_routed_experts=16, n_activated_experts=2, moe_inter_dim=64, n_expert_groups=4, n_limited_groups=2,
)  # fmt: skip
WRITER = """
import sys
from benchmarks.prove_checkpoint_kills import CONFIG
from rorqual.model import Transformer
from rorqual.model.weights import save_model
for seed in range(int(sys.argv[2]), 1 << 30):
    model = Transformer(CONFIG, seed)
    model.embed.weight.data[0] = seed
    print(seed, flush=True)
    save_model(model, sys.argv[1], "float32", shard_bytes=200_000, overwrite=True)
"""


def main(quick: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        return {"kills": _kills(Path(folder), 12 if quick else 60), "memory": _memory(Path(folder), 150 if quick else 900)}


def _kills(folder: Path, count: int) -> dict[str, int]:
    path, dice = folder / "m", random.Random(0)
    save_model(_model(0), path, "float32")
    seed, seen, replaced, leftovers = 0, 0, 0, 0
    for _ in range(count):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(seen + 1)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(dice.uniform(0, 0.25))
        writer.send_signal(signal.SIGKILL)
        begun = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        before, seed = seed, _seed_of(path)
        seen = max([seen + 1, *begun])
        assert before <= seed <= seen, f"found the weights of seed {seed}, expected {before} to {seen}"
        replaced += seed != before
        leftovers += len(list(folder.glob(".m.*"))) > 0
    save_model(_model(1), path, "float32", overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"m"}, "a dead writer's files are still there"
    return {"kills": count, "found_newer": replaced, "found_older": count - replaced, "kills_that_left_a_partial": leftovers}


def _model(seed: int) -> Transformer:
    model = Transformer(CONFIG, seed)
    model.embed.weight.data[0] = seed
    return model


def _seed_of(path: Path) -> int:
    """The seed whose weights the checkpoint holds, all of them."""
    found = load_model(path, "float32")
    seed = int(found.embed.weight[0, 0])
    for name, tensor in _model(seed).state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), f"{name} is not of seed {seed}"
    return seed


MEASURE = """
import sys
from rorqual.model import load_model
from rorqual.model.writing import convert
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
load_model(sys.argv[1], "float32")  # what torch imports on the way is not the model's
open("/proc/self/clear_refs", "w").write("5")
before = peak()
if sys.argv[3] == "load":
    model = load_model(sys.argv[2], "float32")
else:
    convert(sys.argv[2], sys.argv[3], "bf16", shard_bytes=20_000_000)
print(peak() - before)
"""


def _memory(folder: Path, megabytes: int) -> dict[str, float | int]:
    experts = max(8, int(megabytes / 5))
    shape = {"dim": 512, "moe_inter_dim": 256, "n_routed_experts": experts - experts % 4, "vocab_size": 4096}
    config = ModelConfig(**{**_fields(CONFIG), **shape})
    size = save_model(Transformer(config), folder / "big", "float32").weight_bytes
    load = _measured(folder, "load")
    converting = _measured(folder, str(folder / "bf16"))
    assert load < 1.1 * size + 80e6, f"loading {size / 1e6:.0f} MB peaked at {load / 1e6:.0f} MB"
    assert converting < 120e6, f"converting peaked at {converting / 1e6:.0f} MB"
    return {"checkpoint_bytes": size, "load_peak_over_size": round(load / size, 3), "convert_peak_bytes": converting}


def _fields(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _measured(folder: Path, what: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(folder / "m"), str(folder / "big"), what]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout)
