"""From an empty workspace to a LoRA that loads, as a person does it, with the real training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.e2e.web.page_actions import (
    create_dataset,
    expect_connection,
    expect_state,
    fill_options,
    upload_files,
)
from tests.e2e.web.server_process import (
    EXAMPLE_DIR,
    SERVER_DOWN,
    ServerProcess,
    wait_until,
)
from tests.inside import inside

PLANNED = 2000  # never reached: the run is stopped when enough was seen
EVERY = 10
NAME = "mi-zorbo"
PROMPT = "a big red zorbo in the centre, navy background"


def test_from_an_empty_workspace_to_a_lora_that_loads(
    real_server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(real_server)
    uploads_sixteen_pictures(page)
    configures(page)
    run = starts_and_watches(page)
    stops(page)
    last = -(-steps(real_server, run)[-1] // EVERY) * EVERY + EVERY
    resumes_while_the_server_dies(page, real_server, run, last)
    compares(page, last)
    loads_the_lora(page, tmp_path)


def uploads_sixteen_pictures(page: Page) -> None:
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    page.get_by_role("link", name="Add images").click()
    create_dataset(page, "zorbo")
    upload_files(page, *sorted(str(path) for path in (EXAMPLE_DIR / "zorbo").iterdir()))
    expect(page.get_by_text("The dataset now has 16 images, 16 with a caption.")).to_be_visible()
    expect(page.get_by_role("listitem").locator("article").first).to_be_visible()


def configures(page: Page) -> None:
    page.get_by_role("link", name="New run with this dataset").click()
    page.get_by_role("button", name="chroma-nano").click()
    page.get_by_role("textbox", name="Name", exact=True).fill(NAME)
    fill_options(
        page,
        max_train_steps=str(PLANNED),
        train_batch_size="1",
        checkpoint_step_interval=str(EVERY),
        validation_step_interval=str(EVERY),
        validation_num_inference_steps="4",
        validation_prompt=PROMPT,
    )
    expect(page.get_by_text("No problems found")).to_be_visible()
    expect(page.get_by_text("Estimated RAM while training (CPU)")).to_be_visible()
    expect(page.locator("dt", has_text="Total time")).to_be_visible()


def starts_and_watches(page: Page) -> str:
    """Loss and pictures come by themselves: the page that was loaded is never left."""
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name=NAME)).to_be_visible()
    page.evaluate("() => { window.loaded = 'once' }")
    loss = re.compile(r"^Loss: [\d.]+ at the end, Step [\d,]+$")
    expect(page.get_by_role("img", name=loss)).to_be_visible()
    page.get_by_role("tab", name="Images").click()
    expect(page.get_by_role("columnheader", name="Before")).to_be_visible()
    expect(page.get_by_role("columnheader", name="Step 10")).to_be_visible()
    expect(page.get_by_role("rowheader", name=PROMPT).first).to_be_visible()
    assert page.evaluate("() => window.loaded") == "once"
    return page.url.rpartition("#/runs/")[2].partition("/")[0]


def stops(page: Page) -> None:
    page.get_by_role("button", name="Stop", exact=True).click()
    expect_state(page, "Stopped")
    page.get_by_role("tab", name="Checkpoints and files").click()
    expect(page.get_by_role("link", name="Download the LoRA checkpoint-10")).to_be_visible()


def resumes_while_the_server_dies(page: Page, real: ServerProcess, run: str, last: int) -> None:
    page.get_by_role("button", name="Resume", exact=True).click()
    page.get_by_role("dialog").get_by_role("spinbutton").fill(str(last))
    page.get_by_role("dialog").get_by_role("button", name="Resume", exact=True).click()
    wait_until(lambda: names(real, run).count("run_started") == 2, "the run goes on")
    page.watch.allowed.append(SERVER_DOWN)
    real.kill()
    assert not list(real.workspace.glob("output/*/exit.json")), "it dies in the middle of the run"
    expect_connection(page, "No connection")
    real.start()
    expect_connection(page, "Live")
    expect_state(page, "Done")
    page.get_by_role("tab", name="Progress").click()
    expect(page.get_by_role("img", name=re.compile(rf"^Loss: .*, Step {last}$"))).to_be_visible()
    assert page.evaluate("() => window.loaded") == "once"
    assert names(real, run).count("run_started") == 2, "the training was started anew"
    assert steps(real, run) == list(range(1, last + 1)), "each is made once"


def names(real: ServerProcess, run: str) -> list[str]:
    return [event["kind"] for event in real.read_events(run)]


def steps(real: ServerProcess, run: str) -> list[int]:
    return [event["step"] for event in real.read_events(run) if event["kind"] == "step"]


def compares(page: Page, last: int) -> None:
    page.get_by_role("tab", name="Images").click()
    trained = page.get_by_role("row", name=re.compile(f"^{PROMPT}")).first
    trained.get_by_role("button", name=f"Open: {PROMPT}, step {last}").click()
    page.get_by_role("button", name="Compare").click()
    slider = page.get_by_role("slider", name=f"Divider between Before and Step {last}")
    expect(slider).to_be_focused()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "0%")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "2%")
    page.keyboard.press("Escape")
    expect(slider).to_have_count(0)


def loads_the_lora(page: Page, folder: Path) -> None:
    with page.expect_download() as coming:
        page.get_by_role("link", name="Download the LoRA", exact=True).click()
    assert coming.value.suggested_filename == f"{NAME}.safetensors"
    file = folder / "lora.safetensors"
    coming.value.save_as(file)
    told = inside(folder, "export", str(file), "--check", "--json")
    assert told.returncode == 0, told.stderr
    verdicts = {one["program"]: one for one in json.loads(told.stdout)["programs"]}
    for program in ("diffusers", "ComfyUI"):
        assert (verdicts[program]["outcome"], verdicts[program]["strength"]) == ("applied", 1.0)
