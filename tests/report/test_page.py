"""The page as a reader meets it, in a real browser: nothing fetched, nothing broken, walked by pointer and by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rorqual.report.page import write
from tests.browser import complaints
from tests.report.made_run import HOSTILE, TOKENS, made_run, selected


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(made_run(tmp_path_factory.mktemp("runs") / "made"))


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """The page in a desktop window, with `complaints` on it; a test that leaves any has failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    found = complaints(page)
    page.goto(path.as_uri())
    yield page
    page.close()
    assert found == []


def shown(page: Any) -> dict[str, list[int]]:
    """Numbers of the tokens by what they are shown as."""
    classes = page.eval_on_selector_all("#tokens > span", "spans => spans.map(s => s.className)")
    return {
        "chosen": [i for i, name in enumerate(classes) if name.startswith("chosen")],
        "on": [i for i, name in enumerate(classes) if name == "on"],
        "later": [i for i, name in enumerate(classes) if name == "later"],
    }


def expected(token: int, layer: int) -> dict[str, list[int]]:
    row = selected(layer)[token]
    return {
        "chosen": [token],
        "on": [i for i in range(TOKENS) if row[i] and i != token],
        "later": list(range(token + 1, TOKENS)),
    }


def test_all_stands_in_one_file_of_less_than_8_mb_and_asks_for_nothing(opened: Any, path: Path) -> None:
    assert path.stat().st_size < 8e6
    addresses = opened.eval_on_selector_all("[src], link[href]", "all => all.map(e => e.src || e.href)")
    assert [address for address in addresses if not address.startswith("data:")] == []
    assert opened.evaluate("performance.getEntriesByType('resource').length") == 0


def test_every_plot_is_drawn_from_its_figures(opened: Any) -> None:
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    drawn = opened.eval_on_selector_all("figure.plot", "all => all.map(f => [f.id, f.querySelectorAll('.main-svg').length])")
    assert len(drawn) >= 15 and all(count for _, count in drawn), drawn
    traces = opened.evaluate("document.querySelector('#loss-by-position .canvas').data.map(t => [t.name, t.y[0]])")
    assert dict(traces)["sparse"] == pytest.approx(4.12)
    low, high = opened.evaluate(
        "document.querySelector('#held-out-heldout-primer .canvas').data.map(t => [t.error_y.arrayminus, t.error_y.array])[0]"
    )
    assert low == pytest.approx([0.1] * 4) and high == pytest.approx([0.1] * 4)


def test_a_plot_near_the_window_is_drawn_without_being_asked(opened: Any) -> None:
    opened.locator("#loss").scroll_into_view_if_needed()
    opened.wait_for_selector("#loss[data-drawn=yes]", timeout=10_000)


def test_a_click_on_a_token_shows_what_it_selected_in_each_layer(opened: Any) -> None:
    assert shown(opened) == expected(40, layer=1), "the page opens at the text's chosen token, in the last layer"
    for token in (20, 3, TOKENS - 1):
        opened.locator(f"#token-{token}").click()
        opened.mouse.move(0, 0)
        assert shown(opened) == expected(token, layer=1)
        assert f"Token {token + 1}," in opened.locator("#readout").inner_text()
    opened.locator("#layers label").first.click()
    opened.mouse.move(0, 0)
    assert shown(opened) == expected(TOKENS - 1, layer=0)
    readout = opened.locator("#readout").inner_text()
    assert all(words in readout for words in ("Layer 1", "attends to 8", "75.0\u00a0%", "90.0\u00a0%")), readout


def test_pointing_at_a_token_shows_its_selection_until_the_pointer_leaves(opened: Any) -> None:
    opened.locator("#token-30").hover()
    assert shown(opened) == expected(30, layer=1)
    opened.mouse.move(0, 0)
    assert shown(opened) == expected(40, layer=1)


def test_the_keyboard_alone_walks_the_tokens_and_changes_layer_and_text(opened: Any) -> None:
    opened.locator("input[name=text]").first.focus()
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.name") == "layer"
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "token-40"
    for key, token in (("ArrowLeft", 39), ("ArrowRight", 40), ("Home", 0), ("ArrowLeft", 0), ("End", TOKENS - 1)):
        opened.keyboard.press(key)
        assert shown(opened) == expected(token, layer=1), key
        assert opened.evaluate("document.activeElement.id") == f"token-{token}"
        assert opened.locator("[aria-selected=true]").count() == 1
    opened.keyboard.press("ArrowUp")
    assert shown(opened)["chosen"][0] < TOKENS - 1
    opened.keyboard.press("Shift+Tab")
    opened.keyboard.press("ArrowLeft")
    assert opened.evaluate("document.activeElement.value") == "0"
    assert opened.locator("#readout").inner_text().startswith("Layer 1")
    opened.keyboard.press("Shift+Tab")
    opened.keyboard.press("ArrowRight")
    assert shown(opened) == expected(5, layer=1), "the second text opens at its own chosen token"


def test_the_map_has_a_mark_for_each_selected_token(opened: Any) -> None:
    marks = opened.evaluate(
        """() => { const c = document.getElementById("map"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        const blank = d.slice(4 * (c.width - 1), 4 * c.width).join();
        return [...Array(c.width * c.height).keys()].filter(i => d.slice(4 * i, 4 * i + 4).join() !== blank); }"""
    )
    assert marks == selected(1).flatten().nonzero()[0].tolist()


def test_text_of_a_model_is_never_markup(opened: Any) -> None:
    assert opened.locator("img").count() == 0
    assert HOSTILE in opened.locator("#token-3").inner_text()
    assert HOSTILE in opened.locator(".turn.thinking pre").first.inner_text()
    assert HOSTILE in opened.locator(".sample").first.inner_text()


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_nothing_scrolls_sideways(browser: Any, path: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 812})
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    over = page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth")
    page.close()
    assert over == 0


def test_a_tap_chooses_on_a_phone(browser: Any, path: Path) -> None:
    phone = browser.new_context(viewport={"width": 375, "height": 812}, has_touch=True, is_mobile=True)
    page = phone.new_page()
    page.goto(path.as_uri())
    page.locator("#token-20").tap()
    assert shown(page) == expected(20, layer=1)
    phone.close()


CONTRAST = """() => {
  const lum = (c) => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
                       return .2126 * r + .7152 * g + .0722 * b };
  const parse = (s) => { const n = s.match(/[\\d.]+/g).map(Number); return n.length < 4 || n[3] > 0 ? n.slice(0, 3) : null };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c) return c }
                          return [255, 255, 255] };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg, .canvas, script, noscript, .skip") || !e.checkVisibility()) continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(behind(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    found.push([ratio, e.tagName + "." + e.className, e.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Any, path: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.evaluate(CONTRAST)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert len(found) > 200
    assert [each for each in found if each[0] < 4.5] == [], "WCAG AA wants 4.5"
    assert (paper == "rgb(18, 22, 26)") is (scheme == "dark")


def test_plots_follow_the_scheme(browser: Any, path: Path) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(path.as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    line = "document.querySelector('#loss-by-position .canvas').data[0].line.color"
    before = page.evaluate(line)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{line} !== '{before}'", timeout=10_000)
    page.close()


def test_the_page_has_landmarks_and_every_control_and_figure_a_name(opened: Any) -> None:
    for landmark in ("header", "nav[aria-label]", "main", "footer"):
        assert opened.locator(landmark).count() == 1, landmark
    assert opened.locator("html[lang=en]").count() == 1 and opened.locator("h1").count() == 1
    levels = opened.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(h => Number(h.tagName[1]))")
    assert all(b - a <= 2 for a, b in pairwise(levels)), "an attempt's h4 may follow a section's h2"
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll("[role=img], [role=region], [role=listbox], input")]
        .filter(e => !(e.getAttribute("aria-label") || e.closest("label")?.textContent.trim()))
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    targets = opened.eval_on_selector_all("nav a", "all => all.map(a => !!document.querySelector(a.hash))")
    assert len(targets) >= 12 and all(targets)


def test_without_scripts_the_words_and_the_figures_are_there(browser: Any, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "Choosing tokens needs scripts" in page.locator("#selection").inner_text()
    assert page.locator("#loss-by-position table").count() == 1
    assert "The answer to task-1 is 42." in page.locator("#trajectories").inner_text()
    context.close()
