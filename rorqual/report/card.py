"""The model card of a released checkpoint: what it is, what was measured, how to open it, what it is not good for."""

from __future__ import annotations

from collections.abc import Iterator

from rorqual.report.markup import count, duration, percent, signed
from rorqual.report.reading import Run
from rorqual.report.training import title_of

FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [deepseek_v32, sparse-attention, mixture-of-experts, tiny, conformance]
---
"""

USE = """## Open it

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(".")
```

`rorqual chat .` talks to it, `rorqual serve .` serves it behind an OpenAI-shaped API.

## Check your engine against it

`vectors.safetensors` holds a prompt (`tokens`), the `logits` of its last positions, the indexers' choice by layer
(`selected.L`, ascending, -1 where fewer), and the `greedy_tokens` that follow with their `margins`: all of this checkpoint,
its weights read as float32. `conformance/` holds every intermediate of a small random model with all mechanisms of the
architecture; its README names each. `SHA256SUMS` is over all files, `lineage.json` says what the checkpoint was made of.
"""

LIMITS = """## What it is not

A demonstration, trained in minutes on text found on one machine: it knows next to nothing, repeats itself, and must not be
used for anything that matters. It was filtered for nothing. The architecture is DeepSeek-V3.2's; the weights have nothing to
do with DeepSeek's.
"""


def card(run: Run) -> str:
    """Markdown."""
    title = f"# {run.name}: a {_size(run)} model of the DeepSeek-V3.2 architecture\n"
    said = "Multi-head latent attention, a lightning indexer in every layer, sparse attention over what it selects, experts.\n"
    return "\n".join([FRONT, title, said, *_shape(run), "## How it was made\n", *_stages(run), *_measured(run), USE, LIMITS])


def _size(run: Run) -> str:
    made = run.exhibits.get("model")
    return f"{count(made['parameters'])}-parameter" if made else "small"


def _shape(run: Run) -> Iterator[str]:
    shape = run.exhibits.get("model", {}).get("shape")
    if shape:
        names = ("n_layers", "dim", "n_heads", "kv_lora_rank", "n_routed_experts", "n_activated_experts", "index_n_heads",
                 "index_topk", "max_positions", "vocab_size")  # fmt: skip
        yield "| " + " | ".join(names) + " |"
        yield "|" + " --- |" * len(names)
        yield "| " + " | ".join(str(shape[name]) for name in names) + " |\n"


def _stages(run: Run) -> Iterator[str]:
    yield "| stage | steps | tokens | time |"
    yield "| --- | ---: | ---: | ---: |"
    for stage in run.stages:
        tokens = count(stage.tokens) if stage.tokens else ""
        yield f"| {title_of(stage.name)} | {len(stage.metrics):,} | {tokens} | {duration(stage.seconds)} |"
    yield ""


def _measured(run: Run) -> Iterator[str]:
    lines = []
    losses = run.exhibits.get("quality", {}).get("loss", {})
    for name in ("control", "before, dense", "same weights, dense"):
        if name in losses:
            change = signed(losses["sparse"]["loss"] / losses[name]["loss"] - 1)
            lines.append(f"- Held-out loss after sparse training, against {losses[name]['about']}: {change}")
    for each in run.evaluations:
        score = each["score"]
        if each["context"] == "none" and score.get("value") is not None:
            interval = f"95 % interval {percent(score['low'])} to {percent(score['high'])}, {each['tasks']} tasks"
            lines.append(f"- {each['benchmark']} after {title_of(each['stage']).lower()}: {percent(score['value'])} ({interval})")
    if lines:
        yield "## What was measured\n"
        yield from lines
        yield ""
