"""Write a checkpoint again in another dtype or layout: float32, bf16 or block FP8.

    rorqual convert DeepSeek-V3.2 v32-bf16 --dtype bf16
    rorqual convert runs/tiny/model tiny-fp8 --dtype fp8

Streams shard by shard: memory holds one shard, never the model. Reads float32, bf16, fp16 and block FP8, per-expert and fused
names; carries the tokenizer, the chat template and generation_config.json along. DST appears whole or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory")
    parser.add_argument("target", metavar="DST", help="the directory to write; must not exist, or be empty")
    parser.add_argument("--dtype", required=True, choices=["bf16", "fp8", "float32"])
    parser.add_argument(
        "--layout",
        choices=["released", "fused"],
        default="released",
        help="released: a tensor per expert, what every engine reads; fused: as transformers 5 holds them",
    )
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest size of a shard in gigabytes")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.errors import UsageError
    from rorqual.model.writing import convert

    if not args.shard_gb > 0:
        raise UsageError(f"--shard-gb: expected more than 0, found {args.shard_gb:g}")
    saved = convert(
        args.source,
        args.target,
        args.dtype,
        shard_bytes=int(args.shard_gb * 1e9),
        layout=args.layout,
        overwrite=args.overwrite,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(saved) | {"path": str(saved.path)}))
        return
    print(f"{saved.path}: {saved.tensors:,} tensors, {saved.weight_bytes:,} bytes, {len(saved.files)} shard(s), {args.dtype}")
    if saved.rorqual_only:
        print(f"This model opens in Rorqual only: {'; '.join(saved.rorqual_only)}.")
