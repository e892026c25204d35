"""The studio's view of the indexer: choose a token of what was said, see which tokens it selected, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import events, ui
from nicegui.element import Element

from rorqual.errors import UserError
from rorqual.serve.backend import EngineBackend
from rorqual.serve.selection import Selection, selection_of

ALL = -1


class Tokens(Element, component="studio_tokens.js"):
    """A text as tokens to choose from; emits `choose` with a position."""

    def __init__(self, label: str):
        super().__init__()
        self._props.update(texts=[], label=label)

    def fill(self, texts: Sequence[str]) -> None:
        self._props["texts"] = list(texts)
        self.update()

    def mark(self, chosen: int, shares: Sequence[float]) -> None:
        self.run_method("mark", chosen, list(shares))


class SelectionView:
    """A panel that follows the conversation. Without an engine (backend None) it says why it is empty."""

    def __init__(self, backend: EngineBackend | None):
        self.backend = backend
        self._tokens: list[int] = []
        self._selection: Selection | None = None
        self._chosen = -1
        with ui.element("div").classes("line"):
            ui.html("What the indexer selected", tag="h2", sanitize=False).classes("grow")
            self.follow = ui.switch("Follow", value=True, on_change=self.refresh).tooltip("Look into each answer when it ends")
        self.layer = ui.select({ALL: "all layers"}, value=ALL, label="Layer", on_change=self._mark).props("dense outlined")
        self.said = ui.label().classes("quiet").props("aria-live=polite")
        self.tokens = Tokens("Tokens of the conversation: choose one with the arrow keys")
        self.tokens.on("choose", self._choose)
        self.clear()

    def clear(self) -> None:
        self._tokens, self._selection = [], None
        for element in (self.layer, self.tokens):
            element.set_visibility(False)
        self.said.set_text(
            "When the model has answered, its tokens stand here. Choose one to see which earlier tokens it attended to."
            if self.backend
            else "The tokens of another engine can't be looked into."
        )

    async def show(self, tokens: Sequence[int]) -> None:
        """Look into this text, if the view follows."""
        self._tokens = list(tokens)
        await self.refresh()

    async def refresh(self) -> None:
        if not (self.follow.value and self.backend and self._tokens):
            return
        try:
            self._selection = await selection_of(self.backend, self._tokens)
        except UserError as error:
            self.clear()
            self.said.set_text(str(error))
            return
        options = {ALL: f"all {len(self._selection.layers)} layers"} | {i: f"layer {i}" for i in self._selection.layers}
        self.layer.set_options(options, value=self.layer.value if self.layer.value in options else ALL)
        self.tokens.fill(self._selection.texts)
        for element in (self.layer, self.tokens):
            element.set_visibility(True)
        self._chosen = len(self._tokens) - 1
        self._mark()

    def _choose(self, event: events.GenericEventArguments) -> None:
        self._chosen = int(event.args)
        self._mark()

    def _mark(self) -> None:
        selection = self._selection
        if selection is None or not 0 <= self._chosen < len(selection.texts):
            return
        layer = None if self.layer.value == ALL else self.layer.value
        shares = selection.shares(self._chosen, layer)
        self.tokens.mark(self._chosen, shares)
        count, where = sum(share > 0 for share in shares), "some layer" if layer is None else f"layer {layer}"
        self.said.set_text(
            f"Token {self._chosen} {selection.texts[self._chosen]!r} sees {self._chosen + 1}; {where} selected {count}."
        )
