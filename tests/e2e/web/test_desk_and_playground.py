"""The dataset desk, captions by a model, and images of the real program, in the browser."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.e2e.web.server_process import ServerProcess, wait_until


def test_a_trigger_word_in_all_captions_and_back(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    folder = server.make_dataset("desk")
    page = open_page(server, "#/datasets/desk")
    page.locator("summary").filter(has_text="All captions").click()
    page.get_by_label("Replacement").fill("zorbo, ")
    expect(page.get_by_text("zorbo, disc number 0")).to_be_visible()
    page.get_by_role("button", name="Change 4 captions").click()
    wait_until(
        lambda: (folder / "disc-0000.txt").read_text() == "zorbo, disc number 0\n", "it changes"
    )
    expect(page.get_by_role("textbox", name="Caption of disc-0001.png")).to_have_value(
        "zorbo, disc number 1\n"
    )
    page.get_by_role("button", name="Undo", exact=True).click()
    wait_until(lambda: (folder / "disc-0000.txt").read_text() == "disc number 0\n", "it is undone")


def test_a_grid_of_strengths_in_the_playground(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """The queue runs the real program; the LoRA of a pretended run is refused in plain words."""
    page = open_page(server, "#/playground")
    page.get_by_label("Prompts").fill("a big red star in the centre, navy background")
    page.get_by_label("Base model").select_option("nano")
    page.get_by_role("spinbutton", name="steps").fill("2")
    page.get_by_role("button", name="Generate 1 image").click()
    image = page.get_by_role("img", name="a big red star in the centre")
    expect(image).to_be_visible()
    page.get_by_role("button", name="Start from this").click()
    page.locator("summary").filter(has_text="Start from an image").click()
    expect(page.get_by_label("Image", exact=True)).not_to_have_value("")
    page.get_by_role("button", name="As a validation prompt").click()
    expect(page.get_by_label("Prompt 1", exact=True)).to_have_value(
        "a big red star in the centre, navy background"
    )
