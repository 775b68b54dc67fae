"""What a person does on the pages, by the words that they read there."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect


def option(page: Page, name: str) -> Locator:
    """The field of an option among all, found as a person finds it: by search."""
    page.get_by_role("searchbox", name="Search options").fill(name)
    return page.get_by_role("region", name="All options").locator(f'[data-option="{name}"]')


def settle(page: Page, **values: str) -> None:
    """Write options into the form; it is saved when this returns."""
    for name, value in values.items():
        field = option(page, name).locator("input, select, textarea").first
        if field.evaluate("one => one.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    saved(page)


def saved(page: Page) -> None:
    expect(page.get_by_role("status").filter(has_text=re.compile("^Saved$"))).to_be_visible()


def badge(page: Page, state: str) -> None:
    expect(page.locator("main .badge").first).to_have_text(state)


def connection(page: Page, said: str) -> None:
    expect(page.locator("header .connection")).to_contain_text(said)


def new_dataset(page: Page, name: str) -> None:
    page.get_by_role("button", name="New dataset").click()
    page.get_by_role("dialog").get_by_label("Name").fill(name)
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("heading", name=name, level=1)).to_be_visible()


def upload(page: Page, *paths: str) -> None:
    page.locator('input[type="file"]:not([webkitdirectory])').set_input_files(list(paths))
