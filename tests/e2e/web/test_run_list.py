"""A list of many runs: its pages, its filters, and changes that arrive while it is shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.e2e.web.server_process import ServerProcess
from tests.server.run_folder_writer import RunFolderWriter


def test_sixty_runs_are_shown_in_pages(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    output = server.workspace / "output"
    for at in range(60):
        RunFolderWriter(output / f"run-{at:02d}").write_start().write_steps(1, 2).write_exit()
    page = open_page(server, "#/runs")
    rows = page.get_by_role("list", name="Runs").get_by_role("listitem")
    place = page.get_by_role("navigation", name="Pages").get_by_role("status")
    page.get_by_role("combobox", name="Order").select_option("By name")
    expect(place).to_have_text("1 to 50 of 60")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Next").click()
    expect(place).to_have_text("51 to 60 of 60")
    expect(rows.first).to_contain_text("run-50")
    expect(page.get_by_role("button", name="Next")).to_be_disabled()

    rows.first.get_by_role("link").click()
    expect(page.get_by_role("heading", name="run-50")).to_be_visible()
    page.go_back()
    expect(place).to_have_text("51 to 60 of 60")

    RunFolderWriter(output / "run-99").write_start().write_exit()
    expect(rows.last).to_contain_text("run-99")
    shutil.rmtree(output / "run-99")
    expect(place).to_have_text("51 to 60 of 60")

    page.get_by_role("searchbox").fill("run-07")
    expect(rows).to_have_count(1)
    expect(place).to_have_count(0)
    page.get_by_role("searchbox").fill("nothing like this")
    expect(page.get_by_text("No run matches.")).to_be_visible()
