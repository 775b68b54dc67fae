"""Pictures and captions on the page: what comes in, what is written, many of them."""

from __future__ import annotations

import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import APIResponse, Page, Route, expect

from tests.e2e.web.page_actions import create_dataset, drop_files, upload_files
from tests.e2e.web.server_process import ServerProcess, wait_until

MANY = 300
SCROLL = """async () => {
  const gaps = [];
  let before = performance.now(), cards = 0;
  for (let n = 0; n < 200; n++) {
    scrollBy(0, 2000);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - before);
    before = now;
    cards = Math.max(cards, document.querySelectorAll("article").length);
  }
  gaps.sort((a, b) => a - b);
  return {median_ms: gaps[100], longest_ms: gaps.at(-1), cards, scrolled_px: scrollY};
}"""


def test_captions_are_edited_and_undone(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    folder = server.make_dataset("words", 3)
    file = folder / "disc-0001.txt"
    page = open_page(server, "#/datasets/words")
    caption = page.get_by_role("textbox", name="Caption of disc-0001.png")
    expect(caption).to_have_value("disc number 1\n")
    held: list[tuple[Route, APIResponse]] = []
    page.route("**/captions/*", lambda route: held.append((route, route.fetch())), times=1)
    caption.fill("un disco rojo ¡sí!")
    caption.press("Control+Enter")  # saves and goes on to the next
    expect(page.get_by_role("textbox", name="Caption of disc-0002.png")).to_be_focused()
    wait_until(lambda: page.title() and held, "the caption is written")
    assert file.read_text() == "un disco rojo ¡sí!"
    page.keyboard.press("Escape")
    page.keyboard.press("Control+z")  # what is saved just now is undone once it is
    route, answer = held.pop()
    route.fulfill(response=answer)
    expect(caption).to_have_value("disc number 1\n")
    wait_until(lambda: file.read_text() == "disc number 1\n", "the caption is as before")

    page.watch.allowed.append("409")
    file.write_text("from an editor")
    caption.fill("from the page")
    page.get_by_role("textbox", name="Caption of disc-0000.png").focus()
    told = page.get_by_role("alert").filter(has_text="changed elsewhere")
    expect(told).to_contain_text("from an editor")
    told.get_by_role("button", name="Overwrite with mine").click()
    wait_until(lambda: file.read_text() == "from the page", "the choice is written")


def test_uploads_that_are_refused_say_why_and_the_rest_comes_in(
    server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(server, "#/datasets")
    create_dataset(page, "mixed")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "script.png").write_text("<script>alert(1)</script>")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(tmp_path / "good.png", "inner/zipped.png")
        archive.writestr("inner/zipped.txt", "zipped <img src=x onerror=alert(1)>")
        archive.writestr("../outside.png", b"x")
    page.watch.allowed.append("415")
    upload_files(page, *(str(tmp_path / name) for name in ("good.png", "script.png", "more.zip")))
    expect(page.get_by_text("The dataset now has 2 images, 1 with a caption.")).to_be_visible()
    section = page.get_by_role("region", name="Upload")
    expect(section).to_contain_text("script.png")
    expect(section).to_contain_text("outside.png")
    # what a caption holds is text
    expect(page.get_by_role("textbox", name=re.compile("zipped.png"))).to_have_value(
        re.compile("onerror")
    )
    page.get_by_role("button", name=re.compile("^Without caption")).click()
    expect(page.locator("article .file")).to_have_text(["good.png"])


def test_what_is_dropped_comes_in_with_its_folders_and_a_bad_line_is_mended(
    server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(server, "#/datasets")
    create_dataset(page, "dropped")
    (tmp_path / "inner").mkdir()
    for name in ("one.png", "inner/two.png", "inner/three.png"):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
    (tmp_path / "notes.doc").write_text("not for training")
    page.watch.allowed.append("ERR_FAILED|500")
    page.route("**/files/one.png", lambda route: route.abort(), times=1)  # sent again by itself
    page.route("**/files/inner/two.png", lambda route: route.fulfill(status=500), times=1)
    page.route("**/api/v1/datasets", lambda route: route.abort(), times=1)  # asked when all is in
    desktop = (str(tmp_path / name) for name in ("one.png", "one.txt", "inner", "notes.doc"))
    drop_files(page, "main section", *desktop)
    told = page.get_by_role("region", name="Upload")
    expect(told).to_contain_text("The dataset now has 2 images, 2 with a caption.")
    expect(told).to_contain_text("inner/two.png: HTTP 500")
    expect(page.locator("article .file")).to_have_text(["inner/three.png", "one.png"])
    told.get_by_role("button", name="Retry failed uploads").click()
    expect(told).to_contain_text("The dataset now has 3 images, 3 with a caption.")
    expect(page.get_by_role("textbox", name="Caption of inner/two.png")).to_have_value(
        "caption of inner/two.png"
    )


def test_three_hundred_pictures_are_paged(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.make_dataset("many", MANY)
    page = open_page(server, "#/datasets/many", fresh=True)
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
    page.locator("summary").filter(has_text="Buckets").click()
    expect(page.get_by_role("row").filter(has_text="%").first).to_be_visible()


def test_the_list_reads_on_while_something_is_unread(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.make_dataset("slow", 4)
    unread = {"captioned": 1, "unread": 3}

    def half(route: Route) -> None:
        answer = route.fetch()
        told = [{**one, **unread} if one["name"] == "slow" else one for one in answer.json()]
        route.fulfill(response=answer, json=told)

    page = open_page(server, "#/new")
    page.route("**/api/v1/datasets", half, times=1)
    page.get_by_role("link", name="Datasets").click()
    card = page.get_by_role("listitem").filter(has_text="slow")
    expect(card.get_by_role("status")).to_have_text("Reading the folder… 3")
    expect(card).to_contain_text("Captioned4")
    expect(card.get_by_role("status")).to_have_count(0)


@pytest.mark.slow
def test_ten_thousand_pictures_stay_smooth(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """Says the times that it saw; they are bounded for a loaded machine."""
    folder = server.make_dataset("heaps", 20)
    for at in range(20, 10_000):
        for suffix in (".png", ".txt"):
            os.link(folder / f"disc-{at % 20:04d}{suffix}", folder / f"disc-{at:04d}{suffix}")
    began = time.monotonic()
    page = open_page(server, "#/datasets/heaps")
    expect(page.locator("article img").first).to_be_visible()
    seen = time.monotonic()
    expect(page.get_by_role("button", name="All 10,000")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="Reading the folder")).to_have_count(0)
    read = time.monotonic()
    frames = page.evaluate(SCROLL)
    page.get_by_role("button", name=re.compile("^View disc-")).first.focus()
    asked = time.monotonic()
    page.keyboard.press("End")
    expect(page.get_by_role("button", name="View disc-9999.png")).to_be_focused()
    ended = time.monotonic()
    print(
        f"first {seen - began:.2f} s, all read {read - began:.2f} s, "
        f"end {ended - asked:.2f} s, {frames}"
    )
    assert frames["cards"] < 200
    assert frames["median_ms"] < 200
    assert ended - asked < 20


def test_a_folder_of_this_machine_is_only_read(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    outside = server.workspace / "photos"
    server.make_dataset("seed", 2).rename(outside)
    page = open_page(server, "#/datasets")
    page.get_by_role("button", name="New dataset").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Use a folder on this machine").check()
    dialog.get_by_role("button", name="photos/").click()
    expect(dialog).to_contain_text("2 images in this folder")
    dialog.get_by_role("button", name="Create").click()
    expect(page.get_by_text("Files cannot be uploaded to this folder")).to_be_visible()
    expect(page.locator("article")).to_have_count(2)
