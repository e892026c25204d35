"""Continue a prompt with a checkpoint, or answer it as one user turn of a chat.

Example: rorqual generate runs/tiny/model "def " --max-tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint directory with its tokenizer.json")
    parser.add_argument("prompt", help="the text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--chat", action="store_true", help="write the prompt as a user message in the chat format")
    parser.add_argument("--no-thinking", action="store_true", help="with --chat: no reasoning")
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP layer; nothing but the speed changes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="tokens, log-probs, the reason it stopped, and speed")


def run(args: argparse.Namespace) -> None:
    import time

    from rorqual.chat import Tokenizer, encode_tokens
    from rorqual.chat.markers import EOS
    from rorqual.engine import Engine, EngineConfig
    from rorqual.errors import UserError
    from rorqual.model import load_model
    from rorqual.policy import SamplingParams

    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    tokenizer = Tokenizer.open(args.model)
    if args.chat:
        prompt = encode_tokens([{"role": "user", "content": text}], tokenizer, thinking=not args.no_thinking)
    else:
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    params = SamplingParams(args.max_tokens, args.temperature, args.top_p, seed=args.seed, stop_tokens=(tokenizer.eos_id,))
    engine = Engine(load_model(args.model, args.dtype, args.device), EngineConfig(speculative=args.speculative))
    began = time.perf_counter()
    done = engine.generate([prompt], params)[0]
    seconds = time.perf_counter() - began
    if done.stop_reason not in ("stop", "length"):
        raise UserError(f"nothing was generated: {done.stop_reason}; the prompt has {len(prompt)} tokens")
    written = tokenizer.decode(done.tokens).removesuffix(EOS)
    if not args.json:
        print(written if args.chat else text + written)
        return
    found = {
        "prompt_tokens": list(done.prompt_tokens),
        "tokens": list(done.tokens),
        "text": written,
        "logprobs": [round(float(p), 6) for p in done.logprobs],
        "stop_reason": str(done.stop_reason),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(len(done.tokens) / seconds, 1),
    }
    if args.speculative:
        found["acceptance_rate"] = engine.counters.acceptance_rate
    print(json.dumps(found, ensure_ascii=False))
