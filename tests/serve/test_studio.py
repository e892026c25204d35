"""The studio in a real browser: chat that streams, the indexer's selection, environments by hand, runs, keyboard, phone, dark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rorqual.runlog import RunLog
from rorqual.tasks import Store, TaskRow, task_record, world_record
from tests.browser import DESKTOP, PHONE, complaints
from tests.serve.studio_server import ANSWER
from tests.tasks import worlds

TASK = worlds.task()
WAIT_MS = 60_000
"""How long a browser waits for what must come; a busy machine is slow."""


def start_server(tasks, runs, key=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.serve.studio_server", str(tasks), str(runs), key]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, text=True)
    port = process.stdout.readline().strip()
    assert port, "the server did not start"
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A store of one task in a world of tables, and two runs with curves."""
    root = tmp_path_factory.mktemp("studio")
    store = Store(root / "tasks")
    store.append(world_record(worlds.world(), (0,)))
    store.append(task_record(TaskRow(TASK), (0, 0)))
    store.seal({})
    for name, start in (("first", 4.0), ("second/inner", 3.0)):
        log = RunLog(root / "runs" / name, quiet=True)
        for step in range(5):
            log.metrics(step, **{"train/loss": start - step / 4, "train/lr": 0.1})
        log.close()
    return root


@pytest.fixture(scope="module")
def studio(folders):
    process, url = start_server(folders / "tasks", folders / "runs")
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(browser, studio):
    page = browser.new_page(viewport=DESKTOP)
    page.set_default_timeout(WAIT_MS)
    wrong = complaints(page)
    page.goto(studio)
    page.get_by_role("textbox", name="Message").wait_for()
    yield page
    page.close()
    assert wrong == []


def fits_the_width(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_answer_streams_with_thinking_a_call_its_result_and_the_selection(page, tmp_path):
    page.get_by_text("Settings").click()
    page.get_by_role("combobox", name="Tools").click()
    page.get_by_role("option", name="Python in the sandbox").click()
    # What stands on the page at each change, seen from within: a stream shows many growing prefixes.
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
        const found = [...document.querySelectorAll('.answer')].map((e) => e.textContent).join('');
        if (found && found !== window.seen.at(-1)) window.seen.push(found);
    }).observe(document.body, {subtree: true, childList: true, characterData: true}); }""")
    message = page.get_by_role("textbox", name="Message")
    message.fill("What is the sum of the first ten squares?")
    message.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_text("tokens in").nth(1).wait_for()
    log = page.get_by_role("log", name="Messages")
    assert log.get_by_text("I had better compute it.").is_visible()
    assert '{"code": "print(sum(' in log.get_by_role("group", name="Call of python").inner_text()
    assert "385" in log.get_by_role("group", name="Call of python").inner_text().splitlines()[-1]
    seen = page.evaluate("window.seen")
    assert "".join(page.locator(".answer").all_text_contents()) == "Let me see." + ANSWER
    assert len(seen) > 5 and all(("Let me see." + ANSWER).startswith(text) for text in seen)
    tokens = page.get_by_role("listbox", name="Tokens of the conversation")
    page.get_by_role("button", name="Send").wait_for()  # the view has looked into the last message too
    last = int(page.get_by_text(re.compile(r"^Token \d+ ")).inner_text().split()[1])
    tokens.locator(f".chosen[data-at='{last}']").wait_for()
    tokens.focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_text(f"Token {last - 1} ").wait_for()
    assert 0 < tokens.locator(".selected").count() <= 2 * 32  # two layers, each top-k 32
    page.screenshot(path=tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size > 20_000


def test_the_view_marks_what_one_layer_selected_for_a_clicked_token(page):
    say(page, "hello")
    page.get_by_role("combobox", name="Layer").click()
    page.get_by_role("option", name="layer 1").click()
    tokens = page.get_by_role("listbox", name="Tokens of the conversation")
    tokens.locator("[data-at='3']").click()
    page.get_by_text("Token 3 ").wait_for()
    assert tokens.locator(".selected").evaluate_all("all => all.map((e) => Number(e.dataset.at))") == [0, 1, 2, 3]


def say(page, text):
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("tokens in").first.wait_for()
    page.get_by_role("listbox", name="Tokens of the conversation").locator(".chosen").wait_for()


def test_an_answer_can_be_stopped_and_leaves_no_trace(page):
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill("4000")
    page.get_by_role("textbox", name="Message").fill("on and on")
    page.get_by_role("textbox", name="Message").press("Enter")
    page.get_by_role("article", name="Answer of the model").wait_for()
    page.get_by_role("textbox", name="Message").press("Escape")
    page.get_by_text("Stopped. This answer is not part of the conversation.").wait_for()
    page.get_by_role("button", name="Send").wait_for()


def test_an_environment_is_tried_by_hand_and_judged(page, tmp_path):
    page.get_by_role("tab", name="Environments").click()
    page.get_by_text("1 tasks").wait_for()
    page.get_by_role("listitem").first.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Hand in").click()
    page.get_by_text("failed, score 0").wait_for()
    call_by_hand(page, "list_slots")
    assert '"S-3"' in page.get_by_role("log", name="Calls").inner_text()
    call_by_hand(page, "book", slot="S-3", seats="2")
    page.get_by_role("textbox", name="Answer").fill("20")
    page.get_by_role("button", name="Hand in").click()
    page.get_by_text("passed, score 1").wait_for()
    page.screenshot(path=tmp_path / "environment.png")


def call_by_hand(page, tool, **fields):
    page.get_by_role("combobox", name="Tool").click()
    page.get_by_role("option", name=tool, exact=True).click()
    for name, value in fields.items():
        page.get_by_label(name, exact=True).fill(value)
    calls = page.get_by_role("log", name="Calls").get_by_role("group")
    before = calls.count()
    page.get_by_role("button", name="Call", exact=True).click()
    calls.nth(before).wait_for()


def test_the_model_is_given_the_opened_environment(page):
    page.get_by_role("tab", name="Environments").click()
    page.get_by_role("listitem").first.click()
    page.get_by_role("button", name="Let the model try").click()
    message = page.get_by_role("textbox", name="Message")
    message.wait_for()
    assert message.input_value() == TASK.prompt


def test_runs_are_compared_by_a_metric(page):
    page.get_by_role("tab", name="Runs").click()
    page.get_by_text("2 runs under").wait_for()
    page.get_by_role("combobox", name="Runs").click()
    for name in ("first", "second/inner"):
        page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")
    table = page.get_by_role("table")
    table.get_by_role("row", name="second/inner").wait_for()
    assert table.get_by_role("row", name="first 5").inner_text().split("\t") == ["first", "5", "4", "3", "3", "4"]
    assert page.locator("canvas").count() == 1


def test_the_keyboard_reaches_every_part(page):
    page.locator("body").press("Tab")
    names = []
    for _ in range(12):
        names.append(
            page.evaluate("(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent).trim()")
        )
        page.keyboard.press("Tab")
    for part in ("Skip to the page", "Light or dark", "Settings", "Message"):
        assert any(part in name for name in names), (part, names)


def test_it_fits_a_phone_and_follows_the_systems_dark_mode(browser, studio, tmp_path):
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(studio)
        page.get_by_role("textbox", name="Message").wait_for()
        assert page.evaluate("document.body.classList.contains('body--dark')") == (scheme == "dark")
        for tab in ("Environments", "Runs", "Chat"):
            page.get_by_role("tab", name=tab).click()
            assert fits_the_width(page), tab
        page.screenshot(path=tmp_path / f"phone-{scheme}.png")
        context.close()


def test_light_and_dark_are_kept(page, studio):
    dark = "document.body.classList.contains('body--dark')"
    before = page.evaluate(dark)
    page.get_by_role("button", name="Light or dark").click()
    page.wait_for_function(f"{dark} !== {str(before).lower()}")
    page.goto(studio)
    page.wait_for_function(f"{dark} !== {str(before).lower()}")


def test_the_api_stands_beside_the_studio_as_it_was(studio):
    def status(path, **headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(studio + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    assert status("/health") == (200, b'{"status":"ok"}')
    assert json.loads(status("/v1/models")[1])["data"][0]["id"] == "small"
    missing, body = status("/v1/nothing")
    assert missing == 404 and json.loads(body)["error"]["type"] == "not_found_error"
    assert status("/v1/chat/completions")[0] == 405
    assert status("/", Origin="http://elsewhere.example")[0] == 403
    assert status("/", Host="elsewhere.example")[0] == 421


def test_a_key_opens_the_studio_once_and_guards_it_without(browser, folders):
    process, url = start_server(folders / "tasks", folders / "runs", key="sésame")
    try:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(url)
        page.get_by_label("bearer key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That is not the key.").wait_for()
        page.get_by_label("bearer key").fill("sésame")
        page.keyboard.press("Enter")
        page.get_by_role("textbox", name="Message").wait_for()
        (cookie,) = [c for c in context.cookies() if c["name"] == "rorqual_studio"]
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and "sésame" not in cookie["value"]
        for path in ("/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url + path, timeout=30)
            assert refused.value.code == 401
        context.close()
    finally:
        process.terminate()
        process.wait(30)
