"""The drawing of cost by position: every measured point stands where its figures say, and the page is well-formed."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from benchmarks.draw_positions import _apart, panels, svg, ticks

POSITIONS = [4096, 32768, 131072]


def record() -> dict[str, Any]:
    prefill = [
        {"position": p, "rows": 4096, "dense_attention": p / 1000, "sparse_attention": 5.0, "dense_step": 1.0, "sparse_step": 2.0}
        for p in POSITIONS
    ]
    decode = [{**point, "batch": 64} for point in prefill]
    model = {"prefill": prefill, "decode": decode, "decode_fp8": decode[:2], "prefill_attention_crossover": 5000.0}
    return {"command": "made & tested", "layer": model, "small": model}


@pytest.mark.parametrize("largest", [0.3, 1, 7, 62, 139.5, 8000])
def test_ticks_are_even_begin_at_zero_and_reach_the_largest(largest: float) -> None:
    found = ticks(largest)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert found[0] == 0 and found[-1] >= largest and len(steps) == 1 and 4 <= len(found) <= 14


def test_costs_are_microseconds_a_token() -> None:
    layer_prefill, layer_decode, *_ = panels(record())
    dense, sparse = layer_prefill.lines
    assert dense.points[1] == (32768, pytest.approx(1e3 * 32.768 / 4096)) and sparse.points[0][1] == pytest.approx(1e3 * 5 / 4096)
    assert [line.name for line in layer_decode.lines] == ["dense", "sparse", "sparse, FP8 cache"]
    assert layer_decode.lines[2].points[-1][0] == 32768 and layer_prefill.crossover == 5000


def test_the_drawing_is_well_formed_and_holds_every_point() -> None:
    root = ET.fromstring(svg(record()))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(len(line.points) for panel in panels(record()) for line in panel.lines)
    heights = [float(each.attrib["cy"]) for each in circles[:3]]
    assert heights == sorted(heights, reverse=True)  # the dense line of the first panel climbs
    assert "made & tested" in "".join(root.itertext())


def test_labels_keep_their_order_and_their_distance() -> None:
    assert _apart([100.0, 50.0, 52.0, 53.0]) == [100.0, 50.0, 64.0, 78.0]
