"""What a newcomer meets before the first step: warnings, prompts, one story from dataset to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.e2e.web.page_actions import create_dataset, expect_saved, expect_state, upload_files
from tests.e2e.web.server_process import ServerProcess, wait_until


def test_from_the_dataset_to_a_run_with_prompts(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """The chosen dataset is named and in the draft, and its captions become prompts."""
    server.make_dataset("foxes")
    page = open_page(server, "#/datasets/foxes")
    page.get_by_role("link", name="New run with this dataset").click()
    expect(page.get_by_text("The new run uses the dataset foxes: 4 images, 4")).to_be_visible()
    expect(page.locator("[data-preset]").first).to_contain_text("suits this machine")
    page.locator('[data-preset="nano"]').click()
    expect(page.get_by_role("textbox", name="Name", exact=True)).to_have_value("foxes")
    expect(page.get_by_label("Prompt 1", exact=True)).to_have_value("disc number 0")
    expect_saved(page)
    id = page.url.rpartition("/")[2]
    prompts = lambda: server.request_ok("GET", f"drafts/{id}")["prompts"]  # noqa: E731
    wait_until(lambda: len(prompts()) == 2, "two captions are prompts")
    page.get_by_role("button", name="Add a prompt").click()
    page.get_by_label("Prompt 3", exact=True).fill("a fox at night")
    expect(page.get_by_text(str(server.workspace / "output" / "foxes"))).to_be_visible()
    server.configure_fake_trainer(FAKE_STEPS="2")
    page.get_by_role("button", name="Start training").click()
    expect_state(page, "Done")
    run = page.url.rpartition("#/runs/")[2].partition("/")[0]
    config = server.request_ok("GET", f"runs/{run}")["config"]
    library = json.loads(Path(config["user_prompt_library"]).read_text())
    assert [entry["prompt"] for entry in library.values()][-1] == "a fox at night"


def test_a_base_that_this_machine_cannot_train_is_warned_of_and_asked_about(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    draft = server.create_draft("heavy", model_flavour="base")
    page = open_page(server, f"#/new/{draft['id']}")
    warning = "training base would take weeks"
    expect(page.locator('[data-option="model_flavour"] .warn').first).to_contain_text(warning)
    page.get_by_role("button", name="Start training").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(warning)
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("No problems found")).to_have_count(0)


def test_missing_captions_stop_the_start_with_a_link_to_them(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    folder = server.make_dataset("gaps")
    (folder / "disc-0002.txt").unlink()
    sets = [{"id": "gaps", "type": "local", "instance_data_dir": str(folder)}]
    body = {"name": "gaps", "config": {"model_flavour": "nano"}, "datasets": sets}
    draft = server.request_ok("POST", "drafts", body)
    page = open_page(server, f"#/new/{draft['id']}")
    expect(page.get_by_text("1 image has no caption (disc-0002.png)")).to_be_visible()
    expect(page.get_by_role("button", name="Start training")).to_be_disabled()
    page.get_by_role("link", name="Show images without a caption").click()
    expect(page.locator("article .file")).to_have_text(["disc-0002.png"])


def test_the_search_knows_other_names_of_an_option(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server, f"#/new/{server.create_draft('names')['id']}")
    page.get_by_role("searchbox", name="Search options").fill("network_rank")
    found = page.get_by_role("region", name="All options").locator('[data-option="lora_rank"]')
    expect(found).to_contain_text("Also accepted: network_rank, network_dim")


def test_help_is_in_the_language_of_the_page(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    draft = server.create_draft("idioma")["id"]
    page = open_page(server, f"#/new/{draft}", locale="es-ES")
    expect(page.get_by_text("Tasa de aprendizaje.").first).to_be_visible()
    expect(page.get_by_text("Learning rate.")).to_have_count(0)


def test_an_output_dir_elsewhere_has_a_way_out(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    draft = server.create_draft("elsewhere", output_dir="/workspace/chroma-output")["id"]
    page = open_page(server, f"#/new/{draft}")
    page.get_by_role("button", name="Use output/chroma-output").first.click()
    expect(page.get_by_text("No problems found")).to_be_visible()


def test_the_result_of_a_dry_run_is_there_again(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    draft = server.create_draft("again")["id"]
    page = open_page(server, f"#/new/{draft}")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_text("nothing stands in the way")).to_be_visible()
    page.goto("/#/runs")
    page.goto(f"/#/new/{draft}")
    expect(page.get_by_text("nothing stands in the way")).to_be_visible()


def test_an_upload_names_copies_and_tiny_images(
    server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        Image.new("RGB", (300, 300), (9, 9, 9)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "dot.png")
    page = open_page(server, "#/datasets")
    create_dataset(page, "findings")
    upload_files(page, *(str(tmp_path / f"{name}.png") for name in ("one", "two", "dot")))
    expect(page.get_by_text("1 image exists more than once: one.png = two.png")).to_be_visible()
    expect(page.get_by_text("1 image is smaller than 256 px")).to_be_visible()
    page.get_by_role("button", name="Identical 2").click()
    expect(page.locator("article .file")).to_have_text(["one.png", "two.png"])


def test_an_error_message_goes_away_by_itself(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/datasets/findings-2", fresh=True)
    page.watch.allowed.append("404|422|409")
    page.clock.install()
    page.goto("/#/datasets")
    page.get_by_role("button", name="New dataset").click()
    page.route("**/api/v1/datasets", lambda route: route.fulfill(status=409, body="{}"))
    page.get_by_role("dialog").get_by_label("Name").fill("taken")
    page.get_by_role("dialog").get_by_role("button", name="Create").click()
    toast = page.locator(".toast.error")
    expect(toast).to_be_visible()
    page.clock.fast_forward(13_000)
    expect(toast).to_have_count(0)


def test_a_run_that_fails_on_its_data_leads_to_the_dataset(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """The reason is said once; resuming, which would fail again, is not the first offer."""
    server.configure_fake_trainer(FAKE_STEPS="2", FAKE_FAIL="3")
    job = server.enqueue("bad-data")
    server.wait_for_state(job["run"], "failed")
    page = open_page(server, f"#/runs/{job['run']}")
    expect(page.get_by_text("failed on request")).to_have_count(1)
    expect(page.get_by_role("link", name="Open the dataset discs")).to_be_visible()
    page.get_by_role("button", name="Resume").or_(
        page.get_by_role("button", name="Start again")
    ).first.click()
    expect(page.get_by_role("dialog")).to_contain_text("starts from the beginning")


def test_the_report_is_among_the_files(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.configure_fake_trainer(FAKE_STEPS="2")
    run = server.enqueue("reported")["run"]
    server.wait_for_state(run, "done")
    (server.run_folder(run) / "report.html").write_text("<p>report")
    page = open_page(server, f"#/runs/{run}/files")
    expect(page.get_by_role("link", name="Download report.html")).to_be_visible()
