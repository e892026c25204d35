"""DeepSeek Sparse Attention in three pictures: scores for all, a choice of the best, attention over the choice."""

from __future__ import annotations

SCORES = (0.30, 0.92, 0.12, 0.18, 0.55, 0.10, 0.86, 0.22, 0.35, 0.16, 0.74, 0.95)
"""Of twelve tokens, the last one being the token that looks; drawn, not measured."""
KEPT = 4
WIDTH, HEIGHT, BOX, PITCH, FLOOR = 250, 96, 15, 20, 78


def selection_steps() -> str:
    best = sorted(range(len(SCORES)), key=lambda i: -SCORES[i])[:KEPT]
    steps = (
        (
            _scores(),
            "<b>1</b> The lightning indexer scores every earlier token for the one that looks: cheap, so it may see all.",
        ),
        (_choice(best), f"<b>2</b> The <i>k</i> best are selected (here {KEPT} of {len(SCORES)}); the rest are passed over."),
        (_attention(best), "<b>3</b> Attention, which is expensive, reads the selected tokens alone."),
    )
    figures = "".join(f"<figure>{picture}<figcaption>{words}</figcaption></figure>" for picture, words in steps)
    return f"<div class='steps'>{figures}</div>"


def _picture(inside: str, chosen: tuple[int, ...] | list[int]) -> str:
    boxes = []
    for i in range(len(SCORES)):
        kind = "looks" if i == len(SCORES) - 1 else "kept" if i in chosen else "passed"
        boxes.append(f"<rect class='{kind}' x='{_left(i)}' y='{FLOOR}' width='{BOX}' height='{BOX}' rx='2'/>")
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' aria-hidden='true'>{inside}{''.join(boxes)}</svg>"


def _left(token: int) -> int:
    return 6 + token * PITCH


def _bars(best: tuple[int, ...] | list[int]) -> str:
    bars = []
    for i, score in enumerate(SCORES):
        height = round(54 * score)
        kind = "kept" if i in best else "passed"
        bars.append(f"<rect class='bar {kind}' x='{_left(i) + 4}' y='{FLOOR - 6 - height}' width='7' height='{height}'/>")
    return "".join(bars)


def _scores() -> str:
    return _picture(_bars(()), ())


def _choice(best: list[int]) -> str:
    threshold = min(SCORES[i] for i in best) - 0.05
    y = FLOOR - 6 - round(54 * threshold)
    return _picture(f"{_bars(best)}<path class='threshold' d='M2 {y} H{WIDTH - 2}'/>", best)


def _attention(best: list[int]) -> str:
    own = _left(len(SCORES) - 1) + BOX / 2
    arcs = []
    for i in best:
        x = _left(i) + BOX / 2
        if x != own:
            arcs.append(
                f"<path class='arc' d='M{x} {FLOOR - 3} Q{(x + own) / 2} {FLOOR - 12 - (own - x) / 1.8} {own} {FLOOR - 3}'/>"
            )
    return _picture("".join(arcs), best)
