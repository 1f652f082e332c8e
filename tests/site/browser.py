"""The browser that the tests of the site and of JupyterLab open: a Chromium of the system, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = f"no browser: none of {', '.join(NAMES)} is installed. Remedy: apt-get install chromium, or set CHROMIUM"


def executable() -> str:
    """The browser's path; without one the test is skipped, and fails in continuous integration."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    return found


@contextmanager
def opened() -> Iterator[Browser]:
    """A headless browser. Without a sandbox: continuous integration runs as root, and the pages are our own."""
    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Complaints:
    """What a page may not do while it is open: ask the network, log an error, raise one."""

    def __init__(self, page: Page, allowed: tuple[str, ...]):
        self.found: list[str] = []
        self.allowed = (*allowed, "data:", "blob:", "about:")
        page.route("**/*", self._on_request)
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._note(f"raised {error}"))

    def _on_request(self, route: Route) -> None:
        if route.request.url.startswith(self.allowed):
            route.continue_()
        else:
            self._note(f"asked the network for {route.request.url}")
            route.abort()

    def _note(self, complaint: str) -> None:
        self.found.append(complaint)
