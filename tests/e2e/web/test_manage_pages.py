"""Runs are found, named, compared, deleted and brought back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.web.server_process import ServerProcess, wait_until


@pytest.fixture(scope="module")
def two_runs(server: ServerProcess) -> dict[str, str]:
    server.configure_fake_trainer(FAKE_STEPS="8", FAKE_STEP_S="0.01")
    runs = {
        name: server.enqueue(name, lora_rank=rank)["run"] for name, rank in (("fox", 4), ("owl", 8))
    }
    for run in runs.values():
        server.wait_for_state(run, "done")
    return runs


def test_two_runs_side_by_side(
    server: ServerProcess, two_runs: dict[str, str], open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/runs")
    for name in two_runs:
        page.get_by_role("checkbox", name=f"Select {name}").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("row", name="lora_rank")).to_contain_text("4")
    expect(page.get_by_role("row", name="lora_rank")).to_contain_text("8")
    expect(page.get_by_role("row", name="max_train_steps")).to_have_count(0)
    row = page.get_by_role("row").filter(has_text="fake prompt 0")
    expect(row.get_by_role("img")).to_have_count(2)
    page.get_by_role("slider", name="Step").fill("0")
    expect(row.get_by_role("img").first).to_have_attribute("alt", "fake prompt 0, Step 0")


def test_a_deleted_run_comes_back(
    server: ServerProcess, two_runs: dict[str, str], open_page: Callable[..., Page]
) -> None:
    page = open_page(server, f"#/runs/{two_runs['fox']}")
    page.get_by_role("button", name="Name and notes").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("The fox")
    dialog.get_by_label("Tags").fill("animal, red")
    dialog.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="The fox")).to_be_visible()
    page.watch.allowed.append(r"404 .*/files/images/")  # asked for just before it was deleted
    page.get_by_role("button", name="Delete").click()
    rows = page.get_by_role("list", name="Runs").get_by_role("listitem")
    expect(rows.filter(has_text="The fox")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(rows.filter(has_text="The fox")).to_be_visible()
    expect(rows.filter(has_text="The fox")).to_contain_text("animal")
    page.get_by_role("searchbox").fill("red")
    expect(rows).to_have_count(1)


def test_an_archived_run_is_hidden_until_it_is_asked_for(
    server: ServerProcess, two_runs: dict[str, str], open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/runs")
    page.get_by_role("checkbox", name="Select owl").check()
    page.get_by_role("button", name="Archive").click()
    rows = page.get_by_role("list", name="Runs").get_by_role("listitem")
    expect(rows.filter(has_text="owl")).to_have_count(0)
    page.get_by_role("checkbox", name="Archived (1)").check()
    expect(rows.filter(has_text="owl")).to_be_visible()


def test_a_dataset_is_renamed_deleted_and_restored_from_the_trash(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.make_dataset("birds")
    page = open_page(server, "#/datasets/birds")
    page.get_by_role("button", name="View disc-0001.png").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("article")).to_have_count(3)
    page.get_by_role("button", name="Rename").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("finches")
    dialog.get_by_role("button", name="Rename").click()
    expect(page.get_by_role("heading", name="finches", level=1)).to_be_visible()
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("finches was moved to the trash.")).to_be_visible()
    page.goto("/#/settings")
    page.get_by_role("button", name="Restore finches").click()
    names = lambda: [one["name"] for one in server.request_ok("GET", "datasets")]  # noqa: E731
    wait_until(lambda: "finches" in names(), "it is restored")


def test_the_token_is_stored_and_not_shown(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/settings")
    page.get_by_placeholder("hf_…").fill("hf_secret_of_a_test")
    page.get_by_role("button", name="Save the token").click()
    expect(page.get_by_text("A token is stored.")).to_be_visible()
    page.reload()
    expect(page.get_by_text("A token is stored.")).to_be_visible()
    assert "hf_secret" not in page.content()
    page.get_by_role("button", name="Remove the token").click()
    expect(page.get_by_text("No token is stored.")).to_be_visible()
