"""Screenshots for the guides, of a real training: python -m tests.e2e.web.screenshots [--steps 150]

Trains the packaged example through the REST API, then writes docs/screens/*.png. It takes minutes
on two CPU cores. --run shows the run folder of an earlier training instead. --home: where the
workspace is made.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from simpletuner.config.documents import read_document
from tests.e2e.web.conftest import BROWSER_NAMES
from tests.e2e.web.page_actions import expect_saved
from tests.e2e.web.server_process import EXAMPLE_DIR, ROOT, TIMEOUT_S, ServerProcess

SCREENSHOTS_DIR = ROOT / "docs" / "screens"
DESKTOP_VIEWPORT, PHONE_VIEWPORT = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
MAX_FILE_BYTES = 400_000
SHORTEN_PATHS = """(folder) => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    texts.currentNode.data = texts.currentNode.data.replaceAll(folder, "~");
  }
}"""
TRAINING_TIMEOUT_S = 3600.0


def copy_datasets(house: ServerProcess) -> list[dict[str, Any]]:
    """The example's two, in the workspace."""
    sets: list[dict[str, Any]] = read_document(
        EXAMPLE_DIR / "multidatabackend.json", "multidatabackend.json"
    ).value
    for one in sets:
        folder = house.workspace / "datasets" / one["id"]
        shutil.copytree(EXAMPLE_DIR / one["id"], folder)
        one["instance_data_dir"] = str(folder)
    return sets


def copy_run(house: ServerProcess, run_dir: Path) -> str:
    copy_datasets(house)
    shutil.copytree(run_dir, house.workspace / "output" / "zorbo")
    return str(house.request_ok("GET", "runs")["runs"][0]["id"])


def train_run(house: ServerProcess, steps: int) -> str:
    """The example's run, done."""
    sets = copy_datasets(house)
    config = read_document(EXAMPLE_DIR / "config.json", "config.json").value
    for name in ("output_dir", "data_backend_config", "user_prompt_library"):
        del config[name]
    prompts = json.loads((EXAMPLE_DIR / "prompts.json").read_text())
    every = max(1, steps // 5)
    config |= {
        "max_train_steps": steps,
        "checkpoint_step_interval": every,
        "validation_step_interval": every,
        "checkpoints_total_limit": 5,
        "user_prompt_library": str(house.workspace / "prompts.json"),
    }
    shown = {name: prompts[name] for name in ("red-navy", "orange-teal", "green-cream")}
    (house.workspace / "prompts.json").write_text(json.dumps(shown))
    draft = house.request_ok(
        "POST", "drafts", {"name": "zorbo", "config": config, "datasets": sets}
    )
    run = str(house.request_ok("POST", "jobs", {"draft": draft["id"]})["run"])
    deadline = time.monotonic() + TRAINING_TIMEOUT_S
    while house.run_state(run) not in ("done", "failed", "lost", "stopped"):
        assert time.monotonic() < deadline
        time.sleep(2)
    assert house.run_state(run) == "done", house.request_ok("GET", f"runs/{run}/log")["text"]
    return run


def save_screenshot(page: Page, name: str, folder: Path) -> None:
    """One file, once nothing moves any more. folder: shown as ~, it is a temporary one."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1500)
    page.evaluate(SHORTEN_PATHS, str(folder))
    path = SCREENSHOTS_DIR / f"{name}.png"
    page.screenshot(path=path, animations="disabled")
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)} {size // 1000} kB")
    assert size < MAX_FILE_BYTES


def save_all_screenshots(
    browser: Browser, house: ServerProcess, run: str, only: str | None
) -> None:
    def opened(
        hash: str, scheme: str = "light", viewport: dict[str, int] = DESKTOP_VIEWPORT
    ) -> Page:
        context = browser.new_context(
            base_url=house.origin,
            viewport=viewport,
            color_scheme=scheme,
            locale="en-US",
            device_scale_factor=1,
        )
        page = context.new_page()
        page.set_default_timeout(1000 * TIMEOUT_S)
        page.goto(f"/{hash}")
        return page

    views: dict[str, Callable[[], Page]] = {
        "run": lambda: wait_for_loss_chart(opened(f"#/runs/{run}")),
        "compare": lambda: open_comparison(opened(f"#/runs/{run}/pictures", "dark")),
        "new-run": lambda: fill_new_run_form(opened("#/new")),
        "datasets": lambda: open_crop_preview(opened("#/datasets/zorbo")),
        "phone": lambda: wait_for_loss_chart(opened(f"#/runs/{run}", "dark", PHONE_VIEWPORT)),
        "pictures": lambda: wait_for_images(opened(f"#/runs/{run}/pictures")),
    }
    for name, view in views.items():
        if only not in (None, name):
            continue
        page = view()
        save_screenshot(page, name, house.folder)
        page.context.close()


def save_first_visit(browser: Browser, folder: Path) -> None:
    """The first page of a workspace without runs, with the sample images."""
    house = ServerProcess(folder / "new", name="chroma")
    try:
        house.start()
        context = browser.new_context(
            base_url=house.origin, viewport=DESKTOP_VIEWPORT, color_scheme="light", locale="en-US"
        )
        page = context.new_page()
        page.set_default_timeout(1000 * TIMEOUT_S)
        page.goto("/")
        page.get_by_role("button", name="Use the sample images").click()
        expect(page.get_by_text("16 images, 16 with a caption")).to_be_visible()
        save_screenshot(clear_focus(page), "first-visit", house.folder)
        context.close()
    finally:
        house.close()


def wait_for_loss_chart(page: Page) -> Page:
    expect(page.get_by_role("img", name=re.compile("^Loss: "))).to_be_visible()
    return page


def wait_for_images(page: Page) -> Page:
    expect(page.get_by_role("columnheader", name="Before")).to_be_visible()
    return page


def open_comparison(page: Page) -> Page:
    wait_for_images(page)
    page.get_by_role("row", name=re.compile("^a big red zorbo")).first.get_by_role(
        "button"
    ).last.click()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("slider")).to_be_focused()
    return page


def fill_new_run_form(page: Page) -> Page:
    page.locator('[data-preset="12gb"]').click()
    page.get_by_label("Add a dataset").select_option("zorbo")
    page.get_by_role("button", name="Add", exact=True).click()
    expect_saved(page)
    expect(page.locator("dt", has_text="Total time")).to_be_visible(
        timeout=1000 * TRAINING_TIMEOUT_S
    )
    expect(page.get_by_text("Estimating…")).to_have_count(0, timeout=1000 * TRAINING_TIMEOUT_S)
    return clear_focus(page)


def open_crop_preview(page: Page) -> Page:
    page.get_by_text("Crop preview").click()
    page.get_by_label("Resolution", exact=True).fill("128")
    expect(page.locator("article img").first).to_be_visible()
    return clear_focus(page)


def clear_focus(page: Page) -> Page:
    page.mouse.move(0, 0)
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0) }")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--only", help="Take this one only.")
    parser.add_argument("--home", type=Path, help="A folder that is not there yet.")
    given = parser.parse_args()
    SCREENSHOTS_DIR.mkdir(parents=True, exist_ok=True)
    found = next(filter(None, map(shutil.which, BROWSER_NAMES)))
    with tempfile.TemporaryDirectory() as folder:
        house = ServerProcess(given.home or Path(folder) / "house", name="chroma")
        try:
            house.start()
            run = copy_run(house, given.run) if given.run else train_run(house, given.steps)
            with sync_playwright() as player:
                expect.set_options(timeout=1000 * TIMEOUT_S)
                browser = player.chromium.launch(executable_path=found, args=["--no-sandbox"])
                save_all_screenshots(browser, house, run, given.only)
                if given.only in (None, "first-visit"):
                    save_first_visit(browser, Path(folder))
                browser.close()
        finally:
            house.close()


if __name__ == "__main__":
    main()
