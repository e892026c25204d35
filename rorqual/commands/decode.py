"""Read what a DeepSeek-V3.2 model wrote after its prompt into an OpenAI-shaped message, as JSON.

FILE holds the completion: what follows the prompt, with or without its end of sentence. By default it's read strictly, and
what the format doesn't allow stays plain text; --tolerant mends it and lists the repairs on standard error.

    rorqual decode completion.txt
    rorqual decode - --chat --tolerant < completion.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rorqual.chat import new_id, no_id, parse_with_repairs
from rorqual.chat.markers import BOS
from rorqual.commands.encode import read_input, write_output
from rorqual.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the completion's text; - for standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt ended with </think>: no reasoning comes first")
    parser.add_argument("--tolerant", action="store_true", help="mend malformed output; repairs go to standard error")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of the request's tools: type the arguments by their schemas")
    parser.add_argument("--ids", action="store_true", help="give every call an id")
    parser.add_argument("--json", action="store_true", help="write {message, repairs} as one object")


def run(args: argparse.Namespace) -> None:
    where, text = read_input(args.file)
    if text.startswith(BOS):
        raise UserError(f"{where}: begins with {BOS}: a prompt; decode takes what a model wrote after it")
    message, repairs = parse_with_repairs(
        [(text, None)],
        thinking=not args.chat,
        mode="tolerant" if args.tolerant else "strict",
        tools=_tools(args.tools) if args.tools else None,
        new_id=new_id if args.ids else no_id,
    )
    found: dict[str, Any] = message
    if args.json:
        found = {"message": message, "repairs": [repair._asdict() for repair in repairs]}
    write_output(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    for repair in [] if args.json else repairs:
        print(f"repair: {repair.kind}: {repair.text!r}", file=sys.stderr)


def _tools(file: str) -> list[dict[str, Any]]:
    where, text = read_input(file)
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(tools, list):
        raise UserError(f"{where}: expected a list of tools, found {type(tools).__name__}")
    return tools
