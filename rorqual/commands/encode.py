"""Write chat messages as the exact prompt string that DeepSeek-V3.2 weights expect.

FILE holds JSON: a list of OpenAI-shaped messages, or an object with "messages" and perhaps "tools" and "response_format".
The prompt goes to standard output byte for byte, without a line end of its own.

    rorqual encode conversation.json
    echo '[{"role": "user", "content": "1+1=?"}]' | rorqual encode -
    rorqual encode conversation.json --tokenizer runs/tiny/model --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rorqual.chat import ChatError, Tokenizer, encode, encode_with_sources, with_tools
from rorqual.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="JSON of the messages; - for standard input")
    parser.add_argument("--chat", action="store_true", help="no thinking: the prompt ends with </think>")
    parser.add_argument("--keep-thinking", action="store_true", help="keep the reasoning of earlier rounds (drop_thinking off)")
    parser.add_argument("--tokenizer", metavar="PATH", help="write token ids of this tokenizer.json (or its directory) instead")
    parser.add_argument("--json", action="store_true", help="write a JSON object: prompt, or tokens and loss_mask")


def run(args: argparse.Namespace) -> None:
    where, text = read_input(args.file)
    messages = _messages(where, text)
    options: dict[str, Any] = {"thinking": not args.chat, "drop_thinking": not args.keep_thinking}
    if args.tokenizer:
        encoded = encode_with_sources(messages, Tokenizer.open(args.tokenizer), **options)
        found: dict[str, Any] = {"tokens": encoded.tokens, "loss_mask": [int(flag) for flag in encoded.loss_mask]}
        write_output(json.dumps(found if args.json else encoded.tokens) + "\n")
        return
    prompt = encode(messages, **options)
    write_output(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" if args.json else prompt)


def read_input(file: str) -> tuple[str, str]:
    """(Its name, its text) of a file or, for -, of standard input."""
    name = "standard input" if file == "-" else file
    try:
        found = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return name, found.decode("utf-8")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None


def write_output(text: str) -> None:
    """Text to standard output as UTF-8, byte for byte, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()


def _messages(where: str, text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        return found
    if "messages" not in found:
        raise ChatError(where, 'expected a list of messages, or an object with "messages"')
    messages, tools = found["messages"], found.get("tools") or []
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages
    if not isinstance(tools, list):
        raise ChatError(f"{where}: tools", f"expected a list, found {type(tools).__name__}")
    return with_tools(messages, tools, found.get("response_format"))
