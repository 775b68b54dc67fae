"""Actions of a user on the pages, found by the visible words."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

MAX_TABS = 200
SAVED_TEXTS = ("Saved", "Guardado", "सहेजा गया")


def find_option(page: Page, name: str) -> Locator:
    """Return the field of an option, found by the search like a user does."""
    page.get_by_role("searchbox", name="Search options").fill(name)
    return page.get_by_role("region", name="All options").locator(f'[data-option="{name}"]')


def fill_options(page: Page, **values: str) -> None:
    """Fill options into the form, and wait until the draft is saved."""
    for name, value in values.items():
        field = find_option(page, name).locator("input, select, textarea").first
        if field.evaluate("one => one.tagName") == "SELECT":
            field.select_option(value)
        elif field.get_attribute("type") == "checkbox":
            field.set_checked(value == "true")
        else:
            field.fill(value)
    expect_saved(page)


def tab_to(page: Page, target: Locator, key: str = "Tab") -> None:
    """Move the focus to an element with the keyboard alone."""
    expect(target).to_be_visible()
    for _ in range(MAX_TABS):
        if target.evaluate("one => one === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead to {target}")


def type_into(page: Page, field: Locator, text: str) -> None:
    """Replace the text of a field with the keyboard alone."""
    tab_to(page, field)
    page.keyboard.press("Control+A")
    page.keyboard.type(text)


def expect_saved(page: Page) -> None:
    words = "|".join(SAVED_TEXTS)
    expect(page.get_by_role("status").filter(has_text=re.compile(f"^({words})$"))).to_be_visible()


def expect_state(page: Page, state: str) -> None:
    expect(page.locator("main .badge").first).to_have_text(state)


def expect_connection(page: Page, said: str) -> None:
    expect(page.locator("header .connection")).to_contain_text(said)


def create_dataset(page: Page, name: str) -> None:
    page.get_by_role("button", name="New dataset").click()
    page.get_by_role("dialog").get_by_label("Name").fill(name)
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("heading", name=name, level=1)).to_be_visible()


def drop_files(page: Page, onto: str, *paths: str) -> None:
    """Drag files and folders from the desktop onto an element, and drop them."""
    where = page.locator(onto).bounding_box()
    assert where is not None
    x, y = where["x"] + where["width"] / 2, where["y"] + where["height"] / 2
    mouse = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": list(paths), "dragOperationsMask": 1}
        mouse.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})
    mouse.detach()


def upload_files(page: Page, *paths: str) -> None:
    page.locator('input[type="file"]:not([webkitdirectory])').set_input_files(list(paths))
