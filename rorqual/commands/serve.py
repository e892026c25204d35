"""Serve a checkpoint over an OpenAI-compatible HTTP API, with thinking and tool calls, and the studio's pages at /.

Example: rorqual serve runs/tiny/model --port 8000

The studio: chat with visible thinking, what the indexer selected, environments of --tasks, runs of --runs. With a bearer key a
browser is asked for it once. --no-studio serves the API alone.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint directory with its tokenizer.json")
    parser.add_argument("--host", default="127.0.0.1", help="loopback unless told otherwise")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", default="", help="what /v1/models calls it (the directory's name)")
    parser.add_argument("--dtype", default="float32", help="float32, bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-tokens", type=int, default=65536, help="room of the paged cache, all requests together")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests queued before 429 is answered")
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP layer; nothing but the speed changes")
    parser.add_argument("--record-selection", action="store_true", help="keep selected indices, for clients that ask for them")
    parser.add_argument(
        "--weights-from-disk", action="store_true", help="let clients load other weights from this disk (for a trainer)"
    )
    parser.add_argument("--no-thinking", action="store_true", help="requests that do not say get no reasoning")
    parser.add_argument("--api-key-env", default="", help="environment variable that holds the bearer key clients must send")
    parser.add_argument("--no-studio", action="store_true", help="the API alone, no pages at /")
    parser.add_argument(
        "--tasks", default="", metavar="DIR", help="the studio's environments: a task store, or a directory of some"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the studio looks for runs to compare")
    parser.add_argument("--isolation", default="bwrap", help="how the programs of environments are confined: bwrap, process, oci")


def run(args: argparse.Namespace) -> None:
    from rorqual.engine import EngineConfig
    from rorqual.serve.app import ServerConfig
    from rorqual.serve.chat_api import Defaults
    from rorqual.serve.main import engine_backend, serve
    from rorqual.serve.studio import StudioConfig

    config = ServerConfig(
        args.host, args.port, args.api_key_env, weights_from_disk=args.weights_from_disk,
        defaults=Defaults(thinking=not args.no_thinking),
    )  # fmt: skip
    engine = EngineConfig(cache_tokens=args.cache_tokens, speculative=args.speculative, record_selection=args.record_selection)
    backend = engine_backend(args.model, engine, args.dtype, args.device, args.max_waiting, args.name)
    studio = None if args.no_studio else StudioConfig(args.tasks, args.runs, args.isolation)
    print(f"rorqual serve: {backend.model_name} at http://{args.host}:{args.port}/v1", file=sys.stderr, flush=True)
    if studio is not None:
        print(f"rorqual serve: the studio at http://{args.host}:{args.port}/", file=sys.stderr, flush=True)
    serve(backend, config, studio)
