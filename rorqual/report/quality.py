"""The page of an adaptation: whether quality held, and every figure behind it. Made from the report alone; no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #d8dee4}
th:first-child,td:first-child{text-align:left}.yes{color:#1a7f37}.no{color:#b42318}.void{color:#8a6d00}
svg{background:#f6f8fa;border-radius:6px}h1 span{font-weight:400}"""


def quality_page(report: dict[str, Any]) -> str:
    """A self-contained HTML page of the report that `rorqual adapt` writes."""
    verdict = report["verdict"]
    title = "quality held" if verdict["quality_held"] else "quality is not shown to have held"
    parts = [
        f"<h1>Dense to sparse: <span>{title}</span></h1>",
        f"<p>top-k {report['top_k']}; the control went on with dense attention for the same tokens.</p>",
        _verdict(verdict["claims"], report["thresholds"]),
        "<h2>Held-out loss by position</h2>",
        _losses(report["loss"]),
        "<h2>What the selection captures of attention's mass, by layer</h2>",
        _selection(report["selection"]),
        "<h2>Needle retrieval</h2>",
        _retrieval(report["retrieval"]),
        "<h2>Attention's cost for one token while decoding (FLOPs, all layers)</h2>",
        _cost(report["cost"]),
    ]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return head + "<body>" + "\n".join(parts) + "</body></html>"


def _verdict(claims: dict[str, Any], limits: dict[str, float]) -> str:
    texts = {
        "loss": f"held-out loss at most {limits['loss_ratio']} of the control's: {claims['loss']['ratio']:.4f}",
        "captured": f"at least {limits['captured_share']:.0%} of the true top-k's mass in each layer: "
        + ", ".join(f"{layer}: {share:.1%}" for layer, share in claims["captured"]["by_layer"].items()),
        "retrieval": f"retrieval within {limits['retrieval_points']:.0%} of the control, "
        f"which must reach {limits['control_retrieval']:.0%}",
        "selection matters": f"untrained indexers retrieve at most {limits['random_share']:.0%} of what trained ones do",
    }
    words = {True: ("yes", "holds"), False: ("no", "does not hold"), "void": ("void", "void: the control does not retrieve")}
    rows = []
    for name, claim in claims.items():
        css, word = words[claim["holds"]]
        rows.append(f"<li><b class='{css}'>{word}</b>: {escape(texts[name])}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _losses(losses: dict[str, Any]) -> str:
    edges = losses["control"]["edges"]
    rows = [
        (f"from {edge}", *(_number(losses[name]["by_position"][i]) for name in ("control", "sparse")))
        for i, edge in enumerate(edges)
    ]
    rows.append(("all", *(_number(losses[name]["loss"]) for name in ("control", "sparse"))))
    curves = {name: losses[name]["by_position"] for name in ("control", "sparse")}
    return _chart(edges, curves) + _table(("position", "dense control", "sparse"), rows)


def _selection(layers: dict[str, dict[str, float]]) -> str:
    rows = [
        (layer, f"{x['captured']:.1%}", f"{x['oracle']:.1%}", f"{x['captured'] / x['oracle']:.1%}", f"{x['recall']:.1%}")
        for layer, x in layers.items()
    ]
    return _table(("layer", "captured", "by the true top-k", "share of it", "recall of the true top-k"), rows)


def _retrieval(found: dict[str, Any]) -> str:
    names = list(found)
    rows = [
        (f"{cell['length']} tokens, depth {cell['depth']}", *(f"{found[name]['cells'][i]['accuracy']:.0%}" for name in names))
        for i, cell in enumerate(found[names[0]]["cells"])
    ]
    return _table(("needle", *names), [*rows, ("all", *(f"{found[name]['accuracy']:.1%}" for name in names))])


def _cost(rows: Sequence[dict[str, Any]]) -> str:
    table = [
        (f"{x['position']:,}", f"{x['dense']:.3g}", f"{x['sparse']:.3g}", f"{x['dense'] / x['sparse']:.2f}") for x in rows[:-1]
    ]
    return _table(("position", "dense", "sparse", "ratio"), table)


def _chart(xs: Sequence[float], curves: dict[str, Sequence[float | None]]) -> str:
    """Lines over the xs, drawn in a box of 600 by 200."""
    values = [v for ys in curves.values() for v in ys if v is not None]
    low, high = min(values), max(values)

    def point(x: float, y: float) -> str:
        return f"{20 + 560 * x / max(xs[-1], 1):.1f},{180 - 160 * (y - low) / max(high - low, 1e-9):.1f}"

    lines = []
    for (name, ys), colour in zip(curves.items(), ("#57606a", "#0969da"), strict=False):
        points = " ".join(point(x, y) for x, y in zip(xs, ys, strict=True) if y is not None)
        lines.append(
            f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='{points}'><title>{name}</title></polyline>"
        )
    return f"<svg width='600' height='200' role='img'>{''.join(lines)}</svg>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(x)}</th>" for x in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
