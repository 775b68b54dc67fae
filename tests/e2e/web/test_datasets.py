"""Pictures and captions on the page: what comes in, what is written, many of them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.e2e.web.hands import new_dataset, upload
from tests.e2e.web.house import House, until

pytestmark = pytest.mark.slow  # the browser: until every one is seen stable on two busy cores

MANY = 300


def test_captions_are_edited_and_undone(house: House, visit: Callable[..., Page]) -> None:
    folder = house.pictures("words", 3)
    file = folder / "disc-0001.txt"
    page = visit(house, "#/datasets/words")
    caption = page.get_by_role("textbox", name="Caption of disc-0001.png")
    expect(caption).to_have_value("disc number 1\n")
    caption.fill("un disco rojo ¡sí!")
    caption.press("Control+Enter")  # saves and goes on to the next
    expect(page.get_by_role("textbox", name="Caption of disc-0002.png")).to_be_focused()
    until(lambda: file.read_text() == "un disco rojo ¡sí!", "the caption is written")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+z")
    expect(caption).to_have_value("disc number 1\n")
    until(lambda: file.read_text() == "disc number 1\n", "the caption is as before")

    page.watch.allowed.append("409")
    file.write_text("from an editor")
    caption.fill("from the page")
    page.get_by_role("textbox", name="Caption of disc-0000.png").focus()
    told = page.get_by_role("alert").filter(has_text="changed elsewhere")
    expect(told).to_contain_text("from an editor")
    told.get_by_role("button", name="Write mine over it").click()
    until(lambda: file.read_text() == "from the page", "the choice is written")


def test_uploads_that_are_refused_say_why_and_the_rest_comes_in(
    house: House, visit: Callable[..., Page], tmp_path: Path
) -> None:
    page = visit(house, "#/datasets")
    new_dataset(page, "mixed")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "script.png").write_text("<script>alert(1)</script>")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(tmp_path / "good.png", "inner/zipped.png")
        archive.writestr("inner/zipped.txt", "zipped <img src=x onerror=alert(1)>")
        archive.writestr("../outside.png", b"x")
    page.watch.allowed.append("415")
    upload(page, *(str(tmp_path / name) for name in ("good.png", "script.png", "more.zip")))
    expect(page.get_by_text("The dataset now has 2 pictures, 1 with a caption.")).to_be_visible()
    section = page.get_by_role("region", name="Upload")
    expect(section).to_contain_text("script.png")
    expect(section).to_contain_text("outside.png")
    # what a caption holds is text
    expect(page.get_by_role("textbox", name=re.compile("zipped.png"))).to_have_value(re.compile("onerror"))
    page.get_by_role("button", name=re.compile("^Without caption")).click()
    expect(page.locator("article .file")).to_have_text(["good.png"])


def test_three_hundred_pictures_are_paged(house: House, visit: Callable[..., Page]) -> None:
    house.pictures("many", MANY)
    page = visit(house, "#/datasets/many")
    cards = page.locator("article")
    expect(cards.first).to_be_visible()
    assert cards.count() < MANY / 2, "only what is in view is in the page"
    asked: list[str] = []
    page.on("request", lambda request: "/items?" in request.url and asked.append(request.url))
    page.get_by_role("button", name="View disc-0000.png").focus()
    page.keyboard.press("End")
    expect(page.get_by_role("button", name=f"View disc-0{MANY - 1}.png")).to_be_focused()
    expect(page.get_by_role("textbox", name=f"Caption of disc-0{MANY - 1}.png")).to_have_value(
        f"disc number {MANY - 1}\n"
    )
    assert cards.count() < MANY / 2
    assert asked, "the last page was asked for when it came into view"
    page.get_by_text("Buckets").click()
    expect(page.get_by_role("row").filter(has_text="%").first).to_be_visible()


def test_a_folder_of_this_machine_is_only_read(house: House, visit: Callable[..., Page]) -> None:
    outside = house.workspace / "photos"
    house.pictures("seed", 2).rename(outside)
    page = visit(house, "#/datasets")
    page.get_by_role("button", name="New dataset").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Use a folder of this machine").check()
    dialog.get_by_role("button", name="photos/").click()
    expect(dialog).to_contain_text("Pictures here: 2")
    dialog.get_by_role("button", name="Create").click()
    expect(page.get_by_text("This folder belongs to you")).to_be_visible()
    expect(page.locator("article")).to_have_count(2)
