"""What all pages of the studio share: the header with its links, light and dark, and the style sheet."""

from __future__ import annotations

from dataclasses import dataclass

from nicegui import ui

TABS = {"/": ("Chat", "forum"), "/environments": ("Environments", "construction"), "/runs": ("Runs", "show_chart")}
"""path -> its title and icon."""
DARK_COOKIE = "rorqual_dark"

STYLE = """
:root { --line: rgb(128 128 128 / .3); --quiet: #5b6770; --paper: #fff; --accent: #0a6c82; --mark: 10 140 170; }
.body--dark { --quiet: #a5b1ba; --paper: #16202a; --accent: #5cc8de; --mark: 70 190 220; background: #0f161d; }
.body--dark :is(.q-btn--outline, .q-btn--flat:not(.text-white), .q-field, .q-toggle) { --q-primary: #5cc8de; }
body { font-family: system-ui, sans-serif; line-height: 1.5; }
.nicegui-content { padding: 0; gap: 0; align-items: stretch; }
.frame { width: 100%; max-width: 84rem; margin: 0 auto; }
.panels { background: none; } .panels > .q-panel > .q-tab-panel, .panels .q-tab-panel { padding: 1rem; overflow: visible; }
.panels, .panels > .q-panel { overflow: visible; }
.panels .nicegui-tab-panel { align-items: stretch; }
.top { background: #0b4a5a; color: #fff; display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1rem;
  padding: .4rem 1rem; }
.top .name { margin: 0; }
.top .model { opacity: .85; overflow-wrap: anywhere; }
.grow { flex: 1; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.top :focus-visible { outline-color: #fff; }
h1, h2, h3 { font-size: 1.15rem; line-height: 1.3; font-weight: 650; margin: 0 0 .5rem; letter-spacing: 0; }
h3 { font-size: 1rem; }
.quiet { color: var(--quiet); }
.box { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; min-width: 0; }
.stack { display: flex; flex-direction: column; gap: .75rem; min-width: 0; }
.line { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; }
.halves { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1rem; align-items: start; }
.halves.listing { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); }
.side { position: sticky; top: 1rem; max-height: calc(100vh - 2rem); overflow: auto; }
@media (max-width: 62rem) {
  .halves, .halves.listing { grid-template-columns: minmax(0, 1fr); }
  .side { position: static; max-height: none; }
}
.text, .code { white-space: pre-wrap; overflow-wrap: anywhere; }
.code { font: .85rem/1.45 ui-monospace, monospace; }
.scroll { max-height: 22rem; overflow: auto; }
.user { align-self: flex-end; max-width: 85%; background: color-mix(in srgb, var(--accent) 16%, var(--paper)); }
.thinking .text { font-style: italic; color: var(--quiet); }
.call { border-left: 4px solid var(--accent); }
.composer { position: sticky; bottom: 0; padding: .5rem 0; background: var(--page); z-index: 2; }
body { --page: #fff; } body.body--dark { --page: #0f161d; }
.composer .q-field { flex: 1 1 12rem; }
.tokens { font: .85rem/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 55vh; overflow: auto; padding: .4rem; border: 1px solid var(--line); border-radius: .4rem; }
.token { cursor: pointer; border-radius: .2rem; box-shadow: inset 0 0 0 .5px var(--line); }
.token.selected { background: rgb(var(--mark) / calc(.15 + .6 * var(--share))); border-bottom: 2px solid var(--accent); }
.token.later { opacity: .45; }
.token.chosen { outline: 2px solid #d35400; font-weight: 700; }
.items .q-item { border-radius: .4rem; align-items: flex-start; }
.items [aria-current=true] { background: color-mix(in srgb, var(--accent) 18%, var(--paper)); }
.chart { width: 100%; height: 22rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
td.figure { text-align: right; font-variant-numeric: tabular-nums; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
"""


@dataclass(frozen=True)
class Frame:
    """A drawn page: the tabs that switch its panels, and the panels' container."""

    tabs: ui.tabs
    panels: ui.tab_panels


def frame(model_name: str, path: str, dark: str | None) -> Frame:
    """Draw the header and the panels' container. dark: the browser's own wish, "0" or "1"; None follows the system."""
    ui.add_css(STYLE)
    ui.colors(primary="#0a6c82", positive="#1a7f37", negative="#b3261e", warning="#8a5a00")
    mode = ui.dark_mode(None if dark is None else dark == "1")
    with ui.element("header").classes("top"):
        ui.html("Rorqual", tag="h1", sanitize=False).classes("name")
        with ui.tabs(value=path).props(  # type: ignore[arg-type] - a tab's name
            'inline-label no-caps dense aria-label="Pages"'
        ) as tabs:
            for name, (title, icon) in TABS.items():
                ui.tab(name, title, icon)
        ui.label(model_name).classes("model grow")
        _dark_switch(mode)
    with ui.element("main").classes("frame") as main:
        panels = ui.tab_panels(tabs, value=path, animated=False, keep_alive=True).classes("panels")
    ui.skip_link("Skip to the page", target=main)
    tabs.on_value_change(lambda event: ui.run_javascript(f"history.replaceState(null, '', {str(event.value)!r})"))
    return Frame(tabs, panels)


def _dark_switch(mode: ui.dark_mode) -> None:
    async def turn() -> None:
        is_dark = mode.value
        if is_dark is None:
            is_dark = await ui.run_javascript("matchMedia('(prefers-color-scheme: dark)').matches", timeout=5)
        mode.value = not is_dark
        ui.run_javascript(f"document.cookie = '{DARK_COOKIE}={int(not is_dark)}; path=/; max-age=31536000; SameSite=Strict'")

    ui.button(icon="contrast", on_click=turn).props('flat round color=white aria-label="Light or dark"')
