"""A real headless Chromium for the tests of pages: the system's own, driven by playwright.

`with open_browser() as browser: page = browser.new_page(); page.goto(...)`. Where the browser or its driver is absent the test
skips and says what installs it. Playwright keeps an event loop in the thread that opened it, so a test that holds a browser
runs no loop of its own there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 860}


@contextmanager
def open_browser() -> Iterator[Any]:
    """A playwright Browser; it is closed with all its pages at the end."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make setup installs it")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium: make system installs it, or apt-get install chromium")
    # A browser that runs as root, as in a container, can't nest its own sandbox. It opens only pages of this machine.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=[*arguments, "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


def complaints(page: Any) -> list[str]:
    """A list that fills with the page's console errors, uncaught exceptions and requests to any other machine."""
    found: list[str] = []
    page.on("console", lambda message: message.type == "error" and found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: _is_elsewhere(request.url) and found.append(f"asked for {request.url}"))
    return found


def _is_elsewhere(url: str) -> bool:
    own = ("http://127.0.0.1", "http://localhost", "ws://127.0.0.1", "ws://localhost", "file:", "data:", "blob:", "about:")
    return not url.startswith(own)
