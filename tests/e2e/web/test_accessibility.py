"""Every page for everybody: axe-core in light and dark and in three languages; a phone's width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.web.page_actions import expect_saved
from tests.e2e.web.server_process import ServerProcess

LOOKS = (("en", "light"), ("en", "dark"), ("es", "light"), ("hi", "dark"))
PHONE = {"width": 390, "height": 844}
VIEWS = (
    "#/runs",
    "#/runs/RUN",
    "#/runs/RUN/pictures",
    "#/runs/RUN/log",
    "#/runs/RUN/config",
    "#/runs/RUN/files",
    "#/runs/FAILED",
    "#/runs/unknown",
    "#/new",
    "#/new/DRAFT",
    "#/datasets",
    "#/datasets/discs",
    "#/system",
    "#/settings",
    "#/playground",
    "#/playground/library",
    "#/compare/RUN/FAILED",
    "#/login",
)
CHECK = """async () => {
  const {violations} = await axe.run(document, {resultTypes: ['violations']});
  return violations.map(
    one => `${one.id}: ${one.nodes.map(node => node.target.join(' ')).join(', ')}`);
}"""
OPEN_CARDS = "() => document.querySelectorAll('main details').forEach(one => { one.open = true })"
WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@dataclass(frozen=True)
class Furnished:
    """A house with a run that is done, one that failed, a draft and a dataset."""

    house: ServerProcess
    names: dict[str, str]

    def address(self, view: str) -> str:
        for word, id in self.names.items():
            view = view.replace(word, id)
        return view


@pytest.fixture(scope="module")
def furnished(server: ServerProcess) -> Furnished:
    server.configure_fake_trainer(FAKE_STEP_S="0.01", FAKE_STEPS="40")
    done = server.enqueue("a run with a rather long name, as people write them", use_ema=True)[
        "run"
    ]
    server.wait_for_state(done, "done")
    server.configure_fake_trainer(FAKE_STEP_S="0.01", FAKE_STEPS="8", FAKE_OOM="cuda")
    failed = server.enqueue("fails")["run"]
    server.wait_for_state(failed, "failed")
    server.request_ok("PUT", "queue", {"paused": True})
    server.enqueue("waits")
    (server.workspace / "datasets" / "discs" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (server.workspace / "datasets" / "discs" / "disc-0000.txt").unlink()
    draft = server.create_draft("half done", learning_rate="fast", lora_rank=4)["id"]
    return Furnished(server, {"RUN": done, "FAILED": failed, "DRAFT": draft})


def load(page: Page, number: int, address: str) -> None:
    """Load the whole page anew, which another fragment alone would not do."""
    page.goto(f"/?{number}{address}")


def settled(page: Page, view: str) -> None:
    """The page is there with what it asked for."""
    expect(page.locator("main [aria-busy=true]:not(section)")).to_have_count(0)
    expect(page.locator("main h1, main .empty h2").first).to_be_visible()
    if view == "#/runs/RUN/pictures":
        expect(page.get_by_role("columnheader")).to_have_count(4)
    if view == "#/new/DRAFT":
        expect(page.locator("p.bad").filter(has_text="fast").first).to_be_visible()
        expect_saved(page)


def allow_what_is_meant(page: Page) -> None:
    page.watch.allowed.append("404")


def test_no_violation_of_accessibility(
    furnished: Furnished, open_page: Callable[..., Page], axe: Path
) -> None:
    page = open_page(furnished.house, fresh=True)
    allow_what_is_meant(page)
    page.context.add_init_script(path=axe)
    found = []
    for number, view in enumerate(VIEWS):
        load(page, number, furnished.address(view))
        choose(page, *LOOKS[0])
        settled(page, view)
        page.evaluate(OPEN_CARDS)
        settled(page, view)
        for language, theme in LOOKS:
            choose(page, language, theme)
            found += [f"{view} {language} {theme}: {one}" for one in page.evaluate(CHECK)]
    assert found == []


def test_dialogs_have_no_violation(
    furnished: Furnished, open_page: Callable[..., Page], axe: Path
) -> None:
    page = open_page(furnished.house, furnished.address("#/runs/RUN/pictures"), fresh=True)
    page.context.add_init_script(path=axe)
    page.reload()
    found = []

    def look(what: str) -> None:
        expect(page.get_by_role("dialog")).to_be_visible()
        for theme in ("light", "dark"):
            page.evaluate(f"() => {{ document.documentElement.dataset.theme = '{theme}' }}")
            found.extend(f"{what} {theme}: {one}" for one in page.evaluate(CHECK))
        page.keyboard.press("Escape")

    page.get_by_role("button", name="Open: fake prompt 0, step 40").click()
    page.get_by_role("button", name="Compare").click()
    look("compare")
    page.get_by_role("button", name="Train longer").click()
    look("resume")
    page.goto("/#/new")
    page.get_by_role("button", name="Import").click()
    look("import")
    page.goto("/#/datasets")
    page.get_by_role("button", name="New dataset").click()
    look("new dataset")
    page.goto("/#/datasets/discs")
    page.get_by_role("button", name="View disc-0001.png").click()
    look("picture")
    page.get_by_role("button", name="View disc-0001.png").click()
    page.get_by_role("dialog").get_by_role("button", name="Crop").click()
    look("crop")
    assert found == []


def choose(page: Page, language: str, theme: str) -> None:
    language_choice, theme_choice = (page.locator("header select").nth(at) for at in (0, 1))
    language_choice.select_option(language)
    theme_choice.select_option(theme)
    expect(page.locator("html")).to_have_attribute("lang", language)


@pytest.mark.parametrize(
    "language", ["hi", *(pytest.param(name, marks=pytest.mark.slow) for name in ("en", "es"))]
)
def test_a_phone_needs_no_sideways_scrolling(
    furnished: Furnished, open_page: Callable[..., Page], language: str
) -> None:
    page = open_page(
        furnished.house, viewport=PHONE, locale=language, has_touch=True, is_mobile=True
    )
    allow_what_is_meant(page)
    wider = {}
    for number, view in enumerate(VIEWS):
        load(page, number, furnished.address(view))
        settled(page, view)
        if page.evaluate(WIDER) > 0:
            wider[view] = page.evaluate(WIDER)
    assert wider == {}


def test_the_headers_of_the_page(furnished: Furnished, open_page: Callable[..., Page]) -> None:
    """The policy that all tests here run under forbids what a stored script would need."""
    page = open_page(furnished.house)
    answer = page.reload()
    assert answer is not None
    assert "script-src 'self';" in answer.headers["content-security-policy"]
    page.watch.allowed.append("Content Security Policy")
    page.evaluate(
        "() => { const one = document.createElement('script'); one.textContent = 'window.ran = 1';"
        " document.body.append(one) }"
    )
    assert page.evaluate("() => window.ran") is None
