"""Search for a proof by generate, verify and refine; a search that was killed goes on where it was.

Example: rorqual prove problem.txt --prover http://127.0.0.1:8000 --log runs/proof.jsonl --rounds=4
Prover and verifier are a checkpoint's directory or an address; the verifier is the prover unless one is given ("program" checks
the formal system of docs/proofs.md exactly). --setting paper is 64 proofs, 64 verifications, 16 rounds; released, the run.sh.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("problem", help="a file that holds the problem, or - for standard input")
    parser.add_argument("--prover", required=True, help="a checkpoint's directory or an http(s) address")
    parser.add_argument("--verifier", help="the same, or program; default: the prover")
    parser.add_argument("--setting", choices=["paper", "released"], default="paper", help="overrides follow as --field=value")
    parser.add_argument("--in-turn", type=int, metavar="N", help="one proof instead of a pool, revised up to N times")
    parser.add_argument("--log", help="a JSONL file of all replies, with which the same command goes on")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=True, help="of checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for checkpoints")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    import asyncio

    import torch

    from rorqual.config import build, parse_override, to_mapping
    from rorqual.errors import UserError
    from rorqual.rollout.refinement import PAPER, RELEASED, RefineConfig, refine, refine_in_turn
    from rorqual.stages.proof_pool import JudgeConfig, close, open_role

    values: dict[str, Any] = to_mapping(PAPER if args.setting == "paper" else RELEASED)
    values |= {".".join(keys): value for keys, value in map(parse_override, args.overrides)}
    config = build(RefineConfig, values, "--field=value")
    problem = sys.stdin.read() if args.problem == "-" else _text(Path(args.problem))
    log, services = Path(args.log) if args.log else None, []
    try:
        roles = {"prover": args.prover, "verifier": args.verifier or args.prover}
        opened = {
            name: open_role(
                name, role, JudgeConfig(words=config.words, thinking=args.thinking), services, torch.device(args.device)
            )
            for role, name in roles.items()
        }
        prover, verifier = opened[roles["prover"]], opened[roles["verifier"]]
        if prover is None or verifier is None:
            raise UserError("--prover and --verifier: expected a checkpoint's directory or an http(s) address")
        if args.in_turn is not None:
            made = asyncio.run(refine_in_turn(problem.strip(), prover, config, args.in_turn, log))
            proof, score, found = made.best, made.best.self_score if made.best else None, made
        else:
            found = asyncio.run(refine(problem.strip(), prover, verifier, config, log, _progress(args.json)))
            proof, score = (found.best.proof, found.best.score) if found.best else (None, None)
    finally:
        close(services)
    _print(args, proof, score, found)
    return 0 if found.end == "passed" else 1


def _text(path: Path) -> str:
    from rorqual.errors import UserError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def _progress(quiet: bool) -> Any:
    def advanced(number: int, pool: Any) -> None:
        if not quiet:
            best = max(each.score for each in pool)
            print(f"round {number + 1}: {len(pool)} proofs, the best scores {best:.3f}", file=sys.stderr, flush=True)

    return advanced


def _print(args: argparse.Namespace, proof: Any, score: float | None, found: Any) -> None:
    accounts = vars(found.accounts)
    if args.json:
        shown = {"end": str(found.end), "score": score, "solution": proof.solution if proof else None, "accounts": accounts}
        print(json.dumps(shown))
        return
    print(proof.solution if proof else "no readable proof was found")
    print(f"end: {found.end}, score: {score}", file=sys.stderr)
    for name, counts in accounts.items():
        if counts:
            print(f"{name}: {', '.join(f'{role} {count}' for role, count in counts.items())}", file=sys.stderr)
