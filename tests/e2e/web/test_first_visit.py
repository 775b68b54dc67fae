"""The first visit: a sample dataset, a trigger word and a run that fits, in three steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.web.server_process import ServerProcess
from tests.e2e.web.test_accessibility import CHECK, LOOKS, choose
from tests.server.run_folder_writer import RunFolderWriter


def test_from_the_sample_to_a_run_that_can_be_started(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/runs")
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    expect(page.get_by_role("button", name="Set up the run")).to_be_disabled()
    page.get_by_role("button", name="Use the sample images").click()
    expect(page.get_by_text("16 images, 16 with a caption")).to_be_visible()
    expect(page.get_by_label("Trigger word")).to_have_value("zorbo")
    page.get_by_role("button", name="Set up the run").click()
    expect(page.get_by_text("No problems found")).to_be_visible()
    [draft] = server.request_ok("GET", "drafts")
    assert [entry["id"] for entry in draft["datasets"]] == ["zorbo", "shapes"]
    assert (draft["name"], draft["config"]["modelspec_trigger"]) == ("zorbo", "zorbo")


def test_the_first_page_has_no_violation_of_accessibility(
    server: ServerProcess, open_page: Callable[..., Page], axe: Path
) -> None:
    page = open_page(server, fresh=True)
    page.context.add_init_script(path=axe)
    page.reload()
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    found = []
    for language, theme in LOOKS:
        choose(page, language, theme)
        found += [f"{language} {theme}: {one}" for one in page.evaluate(CHECK)]
    assert found == []


@pytest.fixture
def ended_run(server: ServerProcess) -> Iterator[str]:
    """The name of a run with 25 steps and a long log; it is gone afterwards: others need none."""
    run = RunFolderWriter(server.workspace / "output" / "tables").write_start().write_steps(1, 25)
    (run.path / "train.log").write_text("".join(f"line {at}\n" for at in range(20_000)))
    run.write_exit()
    yield run.path.name
    shutil.rmtree(run.path)


def test_the_tables_of_a_run_and_the_search_in_its_log(
    server: ServerProcess, open_page: Callable[..., Page], ended_run: str
) -> None:
    page = open_page(server, "#/runs")
    page.get_by_role("link", name=ended_run).click()
    page.get_by_text("Epochs and held-out losses").click()
    expect(page.get_by_role("row", name="2 10 – 19")).to_be_visible()
    page.get_by_role("tab", name="Log").click()
    page.get_by_role("searchbox", name="Search the whole log").fill("LINE 1234")
    expect(page.get_by_text("11 lines, the last 11 shown")).to_be_visible()
    expect(page.get_by_role("region", name="Lines that match")).to_contain_text("line 12349")
    page.get_by_role("searchbox", name="Search the whole log").fill("")
    expect(page.get_by_role("region", name="Log", exact=True)).to_contain_text("line 19999")
