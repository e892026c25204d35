"""Put exact thinking and tool-call handling in front of another engine's completions endpoint.

The upstream (vLLM, SGLang, llama.cpp) serves /v1/completions over text; this serves /v1/chat/completions.

Example: rorqual proxy --upstream http://127.0.0.1:8001 --port 8000
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", required=True, metavar="URL", help="with or without /v1")
    parser.add_argument("--model", default="", help="the upstream's model (default: the first it lists)")
    parser.add_argument("--host", default="127.0.0.1", help="loopback unless told otherwise")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--upstream-key-env", default="", help="environment variable that holds the upstream's key")
    parser.add_argument("--api-key-env", default="", help="environment variable that holds the bearer key clients must send")
    parser.add_argument("--no-thinking", action="store_true", help="requests that do not say get no reasoning")


def run(args: argparse.Namespace) -> None:
    from rorqual.serve.app import ServerConfig
    from rorqual.serve.chat_api import Defaults
    from rorqual.serve.main import serve, upstream_backend

    backend = upstream_backend(args.upstream, args.model, args.upstream_key_env)
    print(f"rorqual proxy: {backend.model_name} at http://{args.host}:{args.port}/v1", file=sys.stderr, flush=True)
    serve(backend, ServerConfig(args.host, args.port, args.api_key_env, defaults=Defaults(thinking=not args.no_thinking)))
