"""The published tables of DeepSeek-V3.2, as data, so that a measured score can be set beside the paper's.

Scores are per cent unless a rating; None where the paper gives none. `starred` is the score with context management.
"""

from __future__ import annotations

from dataclasses import dataclass

MODELS = ("Claude-4.5-Sonnet", "GPT-5 High", "Gemini-3.0-Pro", "Kimi-K2-Thinking", "MiniMax-M2", "DeepSeek-V3.2 Thinking")

TABLE_2: dict[str, tuple[float | None, ...]] = {
    "MMLU-Pro": (88.2, 87.5, 90.1, 84.6, 82.0, 85.0),
    "GPQA Diamond": (83.4, 85.7, 91.9, 84.5, 77.7, 82.4),
    "HLE (text)": (13.7, 26.3, 37.7, 23.9, 12.5, 25.1),
    "LiveCodeBench (CoT)": (64.0, 84.5, 90.7, 82.6, 83.0, 83.3),
    "Codeforces": (1480, 2537, 2708, None, None, 2386),
    "AIME 2025": (87.0, 94.6, 95.0, 94.5, 78.3, 93.1),
    "HMMT Feb 2025": (79.2, 88.3, 97.5, 89.4, None, 92.5),
    "HMMT Nov 2025": (81.7, 89.2, 93.3, 89.2, None, 90.2),
    "IMOAnswerBench": (None, 76.0, 83.3, 78.6, None, 78.3),
    "Terminal Bench 2.0": (42.8, 35.2, 54.2, 35.7, 30.0, 46.4),
    "SWE Verified": (77.2, 74.9, 76.2, 71.3, 69.4, 73.1),
    "SWE Multilingual": (68.0, 55.3, None, 61.1, 56.5, 70.2),
    "BrowseComp": (24.1, 54.9, None, None, 44.0, 51.4),
    "BrowseCompZh": (42.4, 63.0, None, 62.3, 48.5, 65.0),
    "HLE with search": (32.0, 35.2, 45.8, 44.9, 31.8, 40.8),
    "tau2-bench": (84.7, 80.2, 85.4, 74.3, 76.9, 80.3),
    "MCP-Universe": (46.5, 47.9, 50.7, 35.6, 29.4, 45.9),
    "MCP-Mark": (33.3, 50.9, 43.1, 20.4, 24.4, 38.0),
    "Tool-Decathlon": (38.6, 29.0, 36.4, 17.6, 16.0, 35.2),
}
"""Table 2; columns are MODELS."""

WITH_CONTEXT_MANAGEMENT = {"Kimi-K2-Thinking": 60.2, "DeepSeek-V3.2 Thinking": 67.6}
"""BrowseComp's starred scores of table 2."""

TAU2_BY_CATEGORY = {"airline": 63.8, "retail": 81.1, "telecom": 96.2}
"""DeepSeek-V3.2; the model also plays the user."""

TABLE_3_MODELS = ("GPT-5 High", "Gemini-3.0-Pro", "Kimi-K2-Thinking", "DeepSeek-V3.2 Thinking", "DeepSeek-V3.2-Speciale")


@dataclass(frozen=True)
class Cost:
    """A score, and the output tokens it took, in thousands."""

    score: float
    kilotokens: float


def _costs(*pairs: tuple[float, float] | None) -> tuple[Cost | None, ...]:
    return tuple(Cost(*pair) if pair else None for pair in pairs)


TABLE_3: dict[str, tuple[Cost | None, ...]] = {
    "AIME 2025": _costs((94.6, 13), (95.0, 15), (94.5, 24), (93.1, 16), (96.0, 23)),
    "HMMT Feb 2025": _costs((88.3, 16), (97.5, 16), (89.4, 31), (92.5, 19), (99.2, 27)),
    "HMMT Nov 2025": _costs((89.2, 20), (93.3, 15), (89.2, 29), (90.2, 18), (94.4, 25)),
    "IMOAnswerBench": _costs((76.0, 31), (83.3, 18), (78.6, 37), (78.3, 27), (84.5, 45)),
    "LiveCodeBench (CoT)": _costs((84.5, 13), (90.7, 13), (82.6, 29), (83.3, 16), (88.7, 27)),
    "Codeforces": _costs((2537, 29), (2708, 22), None, (2386, 42), (2701, 77)),
    "GPQA Diamond": _costs((85.7, 8), (91.9, 8), (84.5, 12), (82.4, 7), (85.7, 16)),
    "HLE (text)": _costs((26.3, 15), (37.7, 15), (23.9, 24), (25.1, 21), (30.6, 35)),
}
"""Table 3; columns are TABLE_3_MODELS."""

TABLE_4: dict[str, tuple[tuple[float, ...], float, str]] = {
    "IMO 2025": ((7, 7, 7, 7, 7, 0), 42, "gold"),
    "CMO 2025": ((18, 18, 9, 21, 18, 18), 126, "gold"),
    "IOI 2025": ((100, 82, 72, 100, 55, 83), 600, "gold"),
}
"""Speciale's points by problem, the points there are, the medal. The ICPC World Finals are below."""

ICPC_SUBMISSIONS = {"A": 3, "C": 1, "D": 1, "E": 2, "F": 2, "H": 1, "I": 1, "J": 1, "K": 1, "L": 1}
"""ICPC World Finals 2025: submissions for each solved problem, 10 of 12."""

TABLE_5: dict[str, tuple[float, float, float]] = {
    "DeepSeek-V3.2-Exp": (12, 18, 26),
    "Claude-4.5-Sonnet": (34, 47, 62),
    "Gemini-3.0-Pro": (51, 65, 74),
    "GPT-5-Thinking": (62, 75, 82),
}
"""Pass@1, pass@2, pass@4 on 50 synthesised general tasks."""

TABLE_9: dict[str, tuple[float, float]] = {
    "Terminal Bench 2.0": (37.1, 46.4),
    "SWE Verified": (72.1, 73.1),
    "SWE Multilingual": (68.9, 70.2),
    "tau2-bench": (77.2, 80.3),
    "MCP-Universe": (38.6, 45.9),
    "MCP-Mark": (26.5, 38.0),
    "Tool-Decathlon": (25.6, 35.2),
}
"""DeepSeek-V3.2, non-thinking and thinking."""

FIGURE_6: dict[str, tuple[tuple[float, float], ...]] = {
    "summary": ((140, 53.4), (193, 57.0), (256, 59.0), (364, 60.2)),
    "discard-75": ((107, 54.3), (129, 57.0), (143, 57.1), (160, 57.6)),
    "discard-all": (
        (118, 51.0), (184, 58.5), (235, 61.6), (278, 63.5), (316, 64.8), (350, 65.9), (381, 66.6), (404, 67.3), (411, 67.65),
    ),
    "parallel-fewest-step": tuple(
        (87.5 * count, score)
        for count, score in enumerate((51.5, 58.9, 62.3, 64.2, 65.3, 66.5, 67.2, 67.8, 68.1, 68.5), 1)
    ),
}  # fmt: skip
"""BrowseComp under context management: (mean real steps, score). Read from the image; about 87.5 steps for each parallel run."""


def published_scores(row: str) -> dict[str, float]:
    """A row of table 2 by model, without the models that the paper gives no score for; empty for an unknown row."""
    return {model: score for model, score in zip(MODELS, TABLE_2.get(row, ()), strict=False) if score is not None}


def published_costs(row: str) -> dict[str, tuple[float, float]]:
    """A row of table 3 by model: score, and thousands of output tokens; empty for a row that it lacks."""
    costs = zip(TABLE_3_MODELS, TABLE_3.get(row, ()), strict=False)
    return {model: (cost.score, cost.kilotokens) for model, cost in costs if cost is not None}


def published_curves(row: str) -> dict[str, list[tuple[float, float]]]:
    """Figure 6 by strategy, where the row is BrowseComp's."""
    return {strategy: list(points) for strategy, points in FIGURE_6.items()} if row == "BrowseComp" else {}
