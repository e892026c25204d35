"""Finding the final answer in a message: in \\boxed{}, after ####, or (multiple choice) a letter in the usual phrases."""

from __future__ import annotations

import re

_LETTER = re.compile(r"(?:answer|choice|option)\s*(?:is|:)?\s*:?\s*\**\(?([A-Z])\)?\**(?![a-zA-Z])", re.IGNORECASE)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} (braces balanced) or \\fbox{...}; None where there is none that is closed."""
    for found in reversed(list(re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text))):
        depth, at = 1, found.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
            at += 1
        if not depth:
            return text[found.end() : at - 1].strip()
    return None


def final_answer(text: str) -> str | None:
    """The boxed answer, or what follows the last #### on its line (GSM8K's own form); None where a message gives neither."""
    inner = boxed(text)
    if inner is not None:
        return inner or None
    _, mark, rest = text.rpartition("####")
    answer = rest.strip().partition("\n")[0].strip() if mark else ""
    return answer or None


def choice(text: str, letters: str) -> str | None:
    """The chosen letter: boxed, or in the last phrase like "the answer is (C)", or the whole message. None: no choice made."""
    inner = boxed(text)
    if inner is not None:
        bare = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^}]*)\}", r"\1", inner).strip(" ().*$:")
        head = re.match(r"([A-Za-z])(?![A-Za-z])", bare)
        return _among(head.group(1), letters) if head else None
    phrases = [found for found in _LETTER.findall(text) if _among(found, letters)]
    if phrases:
        return _among(phrases[-1], letters)
    return _among(text.strip(" ().*\n"), letters)


def _among(letter: str, letters: str) -> str | None:
    return letter.upper() if len(letter) == 1 and letter.upper() in letters else None


def code_block(text: str) -> str | None:
    """The last fenced block of a message, or the whole message where it has no fence at all; None for an unclosed fence."""
    blocks = re.findall(r"```[^\n`]*\n(.*?)```", text, re.DOTALL)
    if blocks:
        return blocks[-1]
    return None if "```" in text else text
