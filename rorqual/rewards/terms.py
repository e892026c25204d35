"""The terms of a reward (paper section 3.1): rule-based outcome, format, length penalty, language consistency.

The paper names them and publishes neither formulas nor weights; each form here is a choice, stated where it is made. Every
term maps a trajectory to a number, or to None where it can't be had, which drops the attempt instead of scoring it 0.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from rorqual.errors import require
from rorqual.rollout.trajectory import End, Trajectory


def outcome(trajectory: Trajectory) -> float | None:
    """The verdict's score in [0, 1]; None for an invalid verdict, or where the world or the policy's server failed."""
    if trajectory.end in (End.WORLD_FAILED, End.POLICY_FAILED):
        return None
    verdict = trajectory.verdict
    return None if verdict is None else verdict.score


def well_formed(trajectory: Trajectory) -> float:
    """1 where the attempt ended in a well-formed message, 0 where a completion was cut or was no message."""
    return 0.0 if trajectory.end in (End.MALFORMED, End.CUT) else 1.0


@dataclass(frozen=True)
class LengthPenalty:
    """0 up to `free_tokens` sampled tokens, falling linearly to -1 at `full_tokens`, and -1 beyond."""

    free_tokens: int = 4096
    full_tokens: int = 16384

    def __post_init__(self) -> None:
        require(
            self,
            free_tokens=(self.free_tokens >= 0, "at least 0"),
            full_tokens=(self.full_tokens > self.free_tokens, "more than free_tokens"),
        )

    def __call__(self, trajectory: Trajectory) -> float:
        over = trajectory.sampled_tokens - self.free_tokens
        return -min(max(over / (self.full_tokens - self.free_tokens), 0.0), 1.0)


def language_consistency(trajectory: Trajectory) -> float:
    """The share of letters in reasoning and answers that are of the prompt's main script; 1 where nothing was written.

    DeepSeek-R1's measure is the share of target-language words; words need a segmenter for each language, so this counts
    letters by script (Latin, Han with kana and Hangul apart, Cyrillic, ...), which tells mixing apart as it occurs in practice.
    """
    target = _main_script(_asked(trajectory))
    counts = _scripts(_written(trajectory))
    total = sum(counts.values())
    return 1.0 if target is None or not total else counts.get(target, 0) / total


def _asked(trajectory: Trajectory) -> str:
    users = [m for m in trajectory.messages if m.get("role") in ("user", "developer")]
    return str(users[0].get("content") or "") if users else ""


def _written(trajectory: Trajectory) -> str:
    texts = []
    for turn in trajectory.turns:
        texts += [str(turn.message.get(name) or "") for name in ("reasoning_content", "content")]
    return "\n".join(texts)


def _main_script(text: str) -> str | None:
    counts = _scripts(text)
    return max(counts, key=lambda script: (counts[script], script), default=None)


def _scripts(text: str) -> dict[str, int]:
    """Letters by the first word of their Unicode name: LATIN, CJK, HIRAGANA, CYRILLIC, ..."""
    counts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha():
            script = "LATIN" if letter.isascii() else unicodedata.name(letter, "UNKNOWN").split()[0]
            counts[script] = counts.get(script, 0) + 1
    return counts
