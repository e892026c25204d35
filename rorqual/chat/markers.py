"""The marker strings of the DeepSeek-V3.2 chat format [encoding_dsv32.py; spec 4.3], and how to find them in text.

The bar ｜ is U+FF5C and the ▁ is U+2581. Each of SPECIAL_TOKENS is one id of a tokenizer; RESERVED are further strings
that DeepSeek's own tokenizers hold as one id, so that they too would turn special if they stood in a flat prompt.
"""

from __future__ import annotations

import re

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, DSML)
"""What a tokenizer trained for this format must hold as single ids, in this order from id 0 (DeepSeek's 0, 1, 2 first)."""

RESERVED = (
    *SPECIAL_TOKENS,
    "<|EOT|>",
    "<｜place▁holder▁no▁",
    *(f"<｜fim▁{name}｜>" for name in ("hole", "begin", "end")),
    *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    *(f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end")),
)

OPEN = f"<{DSML}"
CLOSE = f"</{DSML}"
STRUCTURE = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, OPEN, CLOSE, DSML)
"""What has a meaning in a model's output."""

RESERVED_PATTERN = re.compile("|".join(map(re.escape, sorted(RESERVED, key=len, reverse=True))))
STRUCTURE_PATTERN = re.compile(r"<(?:/?｜DSML｜|/?think>|｜(?:begin▁of▁sentence|end▁of▁sentence|User|Assistant)｜>)|｜DSML｜")
PARTIAL = frozenset(marker[:n] for marker in STRUCTURE for n in range(1, len(marker)))
LONGEST = max(map(len, STRUCTURE))


def find_reserved(text: str) -> str | None:
    """The first reserved string in a text; None where there is none."""
    if "<" not in text and "｜" not in text:
        return None
    match = RESERVED_PATTERN.search(text)
    return match.group() if match else None


def partial_suffix(text: str) -> int:
    """The length of the longest end of a text that could still grow into a marker of STRUCTURE; 0 where there is none.

    No marker holds a second "<", and only ｜DSML｜ begins with the bar, so two looks from the right are enough.
    """
    start = max(0, len(text) - LONGEST)
    for first in "<｜":
        at = text.rfind(first, start)
        if at >= 0 and text[at:] in PARTIAL:
            return len(text) - at
    return 0


def escape_markers(json_text: str) -> str:
    """JSON text in which no reserved string stands, of the same value: their bars are \\uff5c, the < of think tags \\u003c.

    Valid only where every marker stands inside a JSON string, which is the only place where JSON can hold one.
    """
    return RESERVED_PATTERN.sub(lambda match: _escaped(match.group()), json_text)


def _escaped(marker: str) -> str:
    if "｜" in marker:
        return marker.replace("｜", "\\uff5c")
    return marker.replace("|", "\\u007c") if "|" in marker else marker.replace("<", "\\u003c")


_ESCAPE = re.compile(r"\\(?:u(?:(ff5c)|(003c)|(007c))|.)", re.DOTALL)


def unescape_markers(json_text: str) -> str:
    """Undo `escape_markers`: the same JSON value, spelt as before. May span any cut that splits no backslash escape."""
    return _ESCAPE.sub(_unescaped, json_text) if "\\u" in json_text else json_text


def _unescaped(match: re.Match[str]) -> str:
    bar, angle, ascii_bar = match.groups()
    return "｜" if bar else "<" if angle else "|" if ascii_bar else match.group()
