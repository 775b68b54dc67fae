"""Statistics of a dataset, and what a person decides about single images there."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.e2e.web.server_process import ServerProcess


def test_copies_are_found_and_left_out_and_an_image_is_cropped(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    folder = server.make_dataset("twins", 3)
    shutil.copy(folder / "disc-0001.png", folder / "copy.png")
    (folder / "copy.txt").write_text("a disc")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    page = open_page(server, "#/datasets/twins")
    page.get_by_text("Statistics").click()
    page.get_by_label("Trigger word (optional)").fill("disc number")
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("button", name="Inspect again")).to_be_visible()
    expect(page.get_by_role("list", name="Findings")).to_contain_text(
        "images that are the same file"
    )
    expect(page.get_by_text("3 of 4")).to_be_visible()
    page.get_by_role("button", name="Leave copy.png out").first.click()
    page.get_by_role("button", name="Left out 1").click()
    expect(page.locator("article")).to_have_count(1)
    expect(page.locator("article")).to_contain_text("left out")

    page.get_by_role("button", name="All 4").click()
    page.get_by_role("combobox", name="Order").select_option("Shortest caption first")
    expect(page.locator("article").first).to_contain_text("copy.png")
    page.get_by_role("button", name="View disc-0001.png").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Crop", exact=True).click()
    dialog.get_by_label("Width").fill("64")
    dialog.get_by_label("Left").fill("16")
    dialog.get_by_role("button", name="Use this part").click()
    dialog.get_by_role("button", name="Close").click()
    items = server.request_ok("GET", "datasets/twins/items?sort=longest")["items"]
    boxes = {item["file"]: item["crop_box"] for item in items}
    assert boxes["disc-0001.png"] == [16, 0, 64, 96]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
