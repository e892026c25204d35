"""The studio's environments: browse the tasks of a store, call a task's tools by hand, hand in an answer, get the verdict."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nicegui import run, ui

from rorqual.errors import UserError
from rorqual.serve.studio_library import Shelf, arguments_of
from rorqual.tasks import Task, Verdict
from rorqual.tasks.episode import AsyncEpisode

if TYPE_CHECKING:
    from rorqual.serve.studio import Studio
    from rorqual.serve.studio_chat import ChatPage

PER_PAGE = 12
LOOKS = {"passed": ("positive", "check_circle"), "failed": ("negative", "cancel"), "invalid": ("warning", "help")}


class EnvironmentPage:
    """One visitor's view of the library, and the attempt that is open."""

    def __init__(self, studio: Studio, chat: ChatPage, tabs: ui.tabs):
        self.studio, self.chat, self.tabs = studio, chat, tabs
        self.found: list[tuple[Shelf, Task]] = []
        self.desk: Desk | None = None

    def draw(self) -> None:
        with ui.element("div").classes("halves listing"):
            with ui.element("section").props('aria-label="Tasks"').classes("box stack side"):
                self.search = ui.input("Search", on_change=self.find).props("dense outlined clearable debounce=300 type=search")
                self.count = ui.label().classes("quiet").props("aria-live=polite")
                self.items = ui.list().classes("items").props('role="list"')
                self.pages = ui.pagination(1, 1, on_change=self._draw_items).props("max-pages=5")
            with ui.element("section").props('aria-label="The opened environment"').classes("stack") as self.place:
                self.hint = ui.label("Choose a task to open its environment.").classes("quiet")
        ui.timer(0.05, self.find, once=True)

    async def find(self) -> None:
        try:
            self.found = await run.io_bound(self.studio.library.search, self.search.value or "") or []
        except (UserError, OSError) as error:
            self.count.set_text(str(error))
            for element in (self.search, self.pages, self.hint):
                element.set_visibility(False)
            return
        self.count.set_text(f"{len(self.found)} tasks")
        self.pages.max = max(1, -(-len(self.found) // PER_PAGE))
        self.pages.set_visibility(self.pages.max > 1)
        if self.pages.value != 1:
            self.pages.set_value(1)
        else:
            self._draw_items()

    def _draw_items(self) -> None:
        self.items.clear()
        begin = ((self.pages.value or 1) - 1) * PER_PAGE
        with self.items:
            for shelf, task in self.found[begin : begin + PER_PAGE]:
                self._item(shelf, task)

    def _item(self, shelf: Shelf, task: Task) -> None:
        is_open = self.desk is not None and self.desk.task.id == task.id
        with ui.item(on_click=lambda: self.open(shelf, task)).props(f"aria-current={str(is_open).lower()}"), ui.item_section():
            ui.item_label(_first_words(task.prompt))
            ui.item_label(f"{task.family} · tier {task.tier} · {len(task.tools)} tools").props("caption")

    async def open(self, shelf: Shelf, task: Task) -> None:
        await self.close()
        self.place.clear()
        with self.place:
            self.desk = Desk(task, self.studio.library.open(shelf, task), self.let_model_try)
            await self.desk.begin()
        self._draw_items()
        # On a phone it stands below the list.
        block = "innerWidth < 992 ? 'start' : 'nearest'"
        ui.run_javascript(f"getHtmlElement({self.place.id}).scrollIntoView({{block: {block}}})")

    async def let_model_try(self, episode: AsyncEpisode) -> None:
        await episode.reset()
        await self.chat.try_environment(episode)
        self.tabs.set_value("/")

    async def close(self) -> None:
        if self.desk is not None:
            desk, self.desk = self.desk, None
            await desk.episode.close()


class Desk:
    """One opened environment: the question, its tools as forms, what was called, the answer, the verdict."""

    def __init__(self, task: Task, episode: AsyncEpisode, let_model_try: Any):
        self.task, self.episode = task, episode
        for message in task.messages:
            ui.label(str(message["content"])).classes(f"box text {'' if message['role'] == 'user' else 'quiet'}")
        with ui.element("div").classes("line"):
            ui.button("Start over", icon="restart_alt", on_click=self.begin).props("outline no-caps")
            ui.button("Let the model try", icon="smart_toy", on_click=lambda: let_model_try(episode)).props("outline no-caps")
        if task.tools:
            self._draw_tools()
        self.log = ui.element("div").props('role="log" aria-live="polite" aria-label="Calls"').classes("stack")
        with ui.element("div").classes("box stack").props('role="group" aria-label="Answer"'):
            self.answer = ui.textarea("Answer").props("autogrow outlined dense")
            with ui.element("div").classes("line"):
                ui.button("Hand in", icon="gavel", on_click=self.judge).props("no-caps unelevated")
                self.verdict = ui.element("div").props("role=status").classes("line")

    def _draw_tools(self) -> None:
        self.definitions = {tool["function"]["name"]: tool["function"] for tool in self.task.tools}
        with ui.element("div").classes("box stack").props('role="group" aria-label="Tools"'):
            self.tool = ui.select(
                list(self.definitions), value=next(iter(self.definitions)), label="Tool", on_change=self._draw_form
            )
            self.tool.props("dense outlined")
            self.form = ui.element("div").classes("stack")
            ui.button("Call", icon="play_arrow", on_click=self.call).props("no-caps unelevated").style("align-self: start")
        self._draw_form()

    def _draw_form(self) -> None:
        definition = self.definitions[self.tool.value]
        parameters = definition.get("parameters", {})
        self.form.clear()
        with self.form:
            ui.label(definition.get("description", "")).classes("text")
            self.fields = {
                name: _field(name, schema, name in parameters.get("required", ()))
                for name, schema in parameters.get("properties", {}).items()
            }

    async def begin(self) -> None:
        """The initial state."""
        self.log.clear()
        self.verdict.clear()
        try:
            await self.episode.reset()
        except Exception as error:
            _tell(self.log, f"The environment can't be opened: {error}")

    async def call(self) -> None:
        name = self.tool.value
        schema = self.definitions[name].get("parameters", {})
        try:
            arguments = arguments_of(schema, {key: field.value for key, field in self.fields.items()})
            observation = await self.episode.call(name, arguments)
        except Exception as error:
            _tell(self.log, str(error))
            return
        with self.log, ui.element("div").classes("box call").props(f'role="group" aria-label="Call of {name}"'):
            ui.label(f"{name}({json.dumps(arguments, ensure_ascii=False)})").classes("code").style("font-weight: 600")
            ui.label(_readable(observation)).classes("code scroll")

    async def judge(self) -> None:
        self.verdict.clear()
        try:
            verdict = await self.episode.finish(self.answer.value or None)
        except Exception as error:
            _tell(self.verdict, str(error))
            return
        with self.verdict:
            _draw_verdict(verdict)


def _field(name: str, schema: dict[str, Any], is_required: bool) -> Any:
    label, kind = name + ("" if is_required else " (optional)"), schema.get("type", "string")
    if "enum" in schema or kind == "boolean":
        options = schema.get("enum") or [True, False]
        made: Any = ui.select(options, label=label, value=options[0] if is_required else None, clearable=not is_required)
    elif kind in ("integer", "number"):
        made = ui.number(label, precision=0 if kind == "integer" else None)
    elif kind in ("array", "object"):
        made = ui.textarea(f"{label}: JSON {kind}").props("autogrow")
    else:
        made = ui.input(label)
    made.props("dense outlined")
    if schema.get("description"):
        made.props["hint"] = schema["description"]
    return made


def _draw_verdict(verdict: Verdict) -> None:
    colour, icon = LOOKS[str(verdict.outcome)]
    score = "" if verdict.score is None else f", score {verdict.score:g}"
    ui.chip(f"{verdict.outcome}{score}", icon=icon, color=colour, text_color="white")
    if verdict.reasons:
        ui.label("; ".join(verdict.reasons)).classes("text")


def _tell(place: ui.element, text: str) -> None:
    with place:
        ui.label(text).classes("text-negative text").props("role=alert")


def _readable(observation: str) -> str:
    try:
        return json.dumps(json.loads(observation), indent=1, ensure_ascii=False)
    except json.JSONDecodeError:
        return observation


def _first_words(text: str, limit: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit].rsplit(" ", 1)[0] + " …"
