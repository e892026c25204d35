"""Talk to a checkpoint in the terminal: thinking shown dimmed, tool calls with their results.

Inside: /think and /nothink switch the reasoning, /reset begins anew, /history shows the messages, /quit ends.

Example: rorqual chat runs/tiny/model --python
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint directory with its tokenizer.json")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--no-thinking", action="store_true")
    parser.add_argument("--python", action="store_true", help="give the model a stateful Python interpreter in the sandbox")
    parser.add_argument("--max-tokens", type=int, default=512, help="of each message")
    parser.add_argument("--max-calls", type=int, default=8, help="rounds of tool calls before you are asked again")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> None:
    from rorqual.serve.terminal import Terminal, TerminalConfig, python_tool

    config = TerminalConfig(
        args.system, not args.no_thinking, args.max_tokens, args.max_calls, args.temperature, args.top_p, args.seed
    )
    tools = [python_tool()] if args.python else []
    with Terminal.open(args.model, config, tools, args.dtype, args.device) as terminal:
        terminal.run()
