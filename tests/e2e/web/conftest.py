"""Chromium, pages that fail their test on anything unusual, and servers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.web.server_process import (
    FAKE_COMMAND,
    REAL_COMMAND,
    ROOT,
    STATIC_DIR,
    TIMEOUT_S,
    ServerProcess,
)

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE_PATH = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="session")
def axe() -> Path:
    """axe-core's one file, among what the pages are built with."""
    if not AXE_PATH.exists():
        pytest.skip(
            "NOT TESTED, accessibility: axe-core is not there, npm --prefix web ci fetches it"
        )
    return AXE_PATH


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser on a busy machine takes its time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One for all tests here. It ends with them: its event loop would be in the way of others.

    No test fails for want of a browser, which is fetched over the network; the pages come with the
    package.
    """
    found = next(filter(None, map(shutil.which, BROWSER_NAMES)), None)
    if found is None:
        pytest.skip(
            f"NOT TESTED, the pages: no browser, none of {', '.join(BROWSER_NAMES)} is installed"
        )
    assert (STATIC_DIR / "index.html").exists(), "the pages are not built: pip install --editable ."
    expect.set_options(timeout=1000 * TIMEOUT_S)
    with sync_playwright() as player:
        started = player.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


class PageMonitor:
    """What a page should never do. `allowed`: what a test does on purpose."""

    def __init__(self, page: Page, origin: str) -> None:
        self.origin, self.recorded = origin, list[str]()
        self.allowed: list[str] = []
        page.on(
            "console",
            lambda told: (
                told.type == "error"
                and self.recorded.append(f"console: {told.text} {told.location['url']}")
            ),
        )
        page.on("pageerror", lambda error: self.recorded.append(f"error: {error}"))
        page.on("request", lambda request: self._request(request.url))
        page.on("websocket", lambda socket: self._request(socket.url.replace("ws:", "http:", 1)))

    def _request(self, url: str) -> None:
        if not url.startswith((self.origin + "/", "data:", "blob:")):
            self.recorded.append(f"request: {url}")

    @property
    def unexpected(self) -> list[str]:
        return [
            one for one in self.recorded if not any(re.search(word, one) for word in self.allowed)
        ]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return a function that opens a page.

    open_page(server, "#/runs", **context) makes a new browser context; beside=page opens a second
    tab in the context of that page. page.watch.allowed takes patterns of expected errors.
    """
    contexts, watches = [], []

    def opened(
        house: ServerProcess, hash: str = "#/", beside: Page | None = None, **wishes: Any
    ) -> Page:
        if beside is None:
            usual = {
                "viewport": {"width": 1280, "height": 800},
                "locale": "en-US",
                "accept_downloads": True,
            }
            context = browser.new_context(base_url=house.origin, **{**usual, **wishes})
            context.set_default_timeout(1000 * TIMEOUT_S)
            contexts.append(context)
        else:
            context = beside.context
        page = context.new_page()
        page.watch = PageMonitor(page, house.origin)
        watches.append(page.watch)
        page.goto(f"/{hash}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [watch.unexpected for watch in watches if watch.unexpected] == []


def run_server(folder: Path, command: tuple[str, ...]) -> Iterator[ServerProcess]:
    house = ServerProcess(folder, command)
    try:
        house.start()
        yield house
    finally:
        house.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real application; its trainings only pretend."""
    yield from run_server(tmp_path_factory.mktemp("house"), FAKE_COMMAND)


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`simpletuner server`, which really trains."""
    yield from run_server(tmp_path_factory.mktemp("real"), REAL_COMMAND)
