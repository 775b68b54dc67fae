"""Chromium, pages that fail their test on anything unusual, and servers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    expect,
    sync_playwright,
)
from playwright.sync_api import Error as PlaywrightError

from tests.e2e.web.server_process import (
    FAKE_COMMAND,
    REAL_COMMAND,
    ROOT,
    STATIC_DIR,
    TIMEOUT_S,
    ServerProcess,
)

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome")
ORIGIN_WITHOUT_SCRIPT = "/api/v1/system"
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
        self._page = page
        self._listeners: dict[str, Callable[[Any], None]] = {
            "console": self._console,
            "pageerror": lambda error: self.recorded.append(f"error: {error}"),
            "request": lambda request: self._request(request.url),
            "websocket": lambda socket: self._request(socket.url.replace("ws:", "http:", 1)),
        }
        for event, listener in self._listeners.items():
            page.on(event, listener)

    def stop(self) -> None:
        for event, listener in self._listeners.items():
            self._page.remove_listener(event, listener)

    def _console(self, told: ConsoleMessage) -> None:
        if told.type == "error":
            self.recorded.append(f"console: {told.text} {told.location['url']}")

    def _request(self, url: str) -> None:
        if not url.startswith((self.origin + "/", "data:", "blob:")):
            self.recorded.append(f"request: {url}")

    @property
    def unexpected(self) -> list[str]:
        return [
            one for one in self.recorded if not any(re.search(word, one) for word in self.allowed)
        ]


class SharedPages:
    """One page for each server of a module, taken by one test after the other.

    A process for a new context takes more than a second of CPU; loading the page anew in the one
    that is there takes a quarter.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._idle: dict[str, Page] = {}

    def new_context(self, origin: str, **wishes: Any) -> BrowserContext:
        usual = {
            "viewport": {"width": 1280, "height": 800},
            "locale": "en-US",
            "accept_downloads": True,
        }
        context = self._browser.new_context(base_url=origin, **{**usual, **wishes})
        context.set_default_timeout(1000 * TIMEOUT_S)
        return context

    def take(self, origin: str) -> Page:
        """Return a page in which no test has left anything."""
        return self._idle.pop(origin, None) or self.new_context(origin).new_page()

    def give_back(self, origin: str, page: Page) -> None:
        """Remove what a browser keeps of a page; the page of a server that is down is closed."""
        try:
            page.unroute_all()
            for other in page.context.pages:
                if other != page:
                    other.close()
            # A document of the same origin without the application, which could write again.
            page.goto(ORIGIN_WITHOUT_SCRIPT)
            page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
            page.context.clear_cookies()
            page.set_viewport_size({"width": 1280, "height": 800})
            self._idle[origin] = page
        except PlaywrightError:
            page.context.close()

    def close(self) -> None:
        for page in self._idle.values():
            page.context.close()


@pytest.fixture(scope="module")
def shared_pages(browser: Browser) -> Iterator[SharedPages]:
    pages = SharedPages(browser)
    yield pages
    pages.close()


@pytest.fixture
def open_page(shared_pages: SharedPages) -> Iterator[Callable[..., Page]]:
    """Return a function that opens a page.

    open_page(server, "#/runs") loads a page in which nothing is stored. open_page(server, "#/runs",
    **context) makes a new browser context, which a test needs that changes its clock, its scripts or
    its listeners: context may be fresh=True. beside=page opens a second tab in the context of that
    page. page.watch.allowed takes patterns of expected errors.
    """
    contexts, watches = list[BrowserContext](), list[PageMonitor]()
    shared: dict[str, Page] = {}

    def opened(
        house: ServerProcess,
        hash: str = "#/",
        beside: Page | None = None,
        fresh: bool = False,
        **wishes: Any,
    ) -> Page:
        if beside is not None:
            page = beside.context.new_page()
        elif fresh or wishes or house.origin in shared:
            contexts.append(shared_pages.new_context(house.origin, **wishes))
            page = contexts[-1].new_page()
        else:
            page = shared[house.origin] = shared_pages.take(house.origin)
        page.watch = PageMonitor(page, house.origin)
        watches.append(page.watch)
        page.goto(f"/{hash}")
        return page

    yield opened
    for context in contexts:
        context.close()
    for origin, page in shared.items():
        with suppress(PlaywrightError):  # the test has closed it
            page.title()  # what the page reported until now has arrived when this is answered
        page.watch.stop()
        shared_pages.give_back(origin, page)
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
