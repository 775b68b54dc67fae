"""From an empty workspace over captions and trainings to an averaged LoRA, a deleted run and back.

Everything is real: `simpletuner server`, a model that writes captions (of random weights), and
trainings of chroma-nano. The images are photographs of scikit-image in five formats, without captions,
as a person brings them. Two runs are compared with the keyboard alone; images are generated, and
checkpoints averaged and downloaded, with the keyboard alone and in Spanish; a run is deleted and taken
back on a phone.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.cli.tiny_captioner import write_tiny_captioner
from tests.e2e.web.page_actions import (
    create_dataset,
    expect_connection,
    expect_state,
    fill_options,
    tab_to,
    type_into,
    upload_files,
)
from tests.e2e.web.server_process import SERVER_DOWN, ServerProcess, wait_until

PHONE = {"viewport": {"width": 390, "height": 844}}
FORMATS = ("png", "jpg", "webp", "bmp", "tiff")
COUNT, EVERY = 20, 10
FIXED = "an astronaut in an orange suit"
PROMPT, EDITED = "a red disc on navy", "a green disc on white"
TRAINING = {
    "max_train_steps": "2000",  # it is stopped before
    "train_batch_size": "1",
    "resolution": "64",
    "checkpoint_step_interval": str(EVERY),
    "validation_step_interval": str(EVERY),
    "validation_num_inference_steps": "2",
    "validation_prompt": PROMPT,
    "validation_preview": "true",
}
SECOND_RATE = "0.0003"


@pytest.mark.slow
def test_the_story(
    real_server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(real_server)
    # The last of them: a response that was cut off when the server was killed.
    page.watch.allowed += [SERVER_DOWN, "ERR_CONTENT_LENGTH_MISMATCH"]
    uploads_images(page, tmp_path / "images")
    captions_them(page, real_server)
    run = trains_and_watches(page, real_server)
    compares_two_runs(page, real_server)
    spanish = open_page(real_server, "#/playground", locale="es-ES")
    generates_a_grid(spanish)
    averages_and_downloads(spanish, tmp_path / "average.safetensors")
    phone = open_page(real_server, f"#/runs/{run}", **PHONE)
    deletes_and_takes_back(phone, real_server, run)


def find_photographs() -> list[Path]:
    """Return COUNT images that scikit-image ships; nothing of it is imported."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        pytest.skip("it uploads photographs of scikit-image: pip install --no-deps scikit-image")
    folder = Path(package.origin).parent / "data"
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))[:COUNT]


def uploads_images(page: Page, folder: Path) -> None:
    folder.mkdir()
    for at, path in enumerate(find_photographs()):
        with Image.open(path) as image:
            image.convert("RGB").save(folder / f"{path.stem}.{FORMATS[at % len(FORMATS)]}")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.goto("/#/datasets")
    create_dataset(page, "strangers")
    upload_files(page, *sorted(str(path) for path in folder.iterdir()))
    expect(
        page.get_by_text(f"The dataset now has {COUNT} images, 0 with a caption.")
    ).to_be_visible()


def captions_them(page: Page, real: ServerProcess) -> None:
    write_tiny_captioner(real.workspace / "models" / "blip")
    page.locator("summary").filter(has_text="All captions").click()
    page.get_by_role("button", name=f"Caption {COUNT} images automatically").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Model", exact=True).fill("models/blip")
    dialog.get_by_role("button", name="Start").click()
    folder = real.workspace / "datasets" / "strangers"
    wait_until(lambda: len(list(folder.glob("*.txt"))) == COUNT, "each image has a caption")
    page.reload()
    caption = page.get_by_role("textbox", name="Caption of astronaut.png")
    caption.fill(FIXED)
    caption.blur()
    wait_until(lambda: (folder / "astronaut.txt").read_text().strip() == FIXED, "it is fixed")


def trains_and_watches(page: Page, real: ServerProcess) -> str:
    """The prompt is edited while the run trains, and the server dies in the middle of it."""
    page.get_by_role("link", name="New run with this dataset").click()
    page.get_by_role("button", name="chroma-nano").click()
    page.get_by_role("textbox", name="Name", exact=True).fill("strangers")
    fill_options(page, **TRAINING)
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name="strangers")).to_be_visible()
    page.get_by_role("tab", name="Images").click()
    expect(page.get_by_role("columnheader", name="Step 10", exact=True)).to_be_visible()
    run = page.url.rpartition("#/runs/")[2].partition("/")[0]
    page.locator("summary").filter(has_text="Validation prompts").click()
    page.get_by_label("Prompt 1", exact=True).fill(EDITED)
    page.get_by_role("button", name="Use from the next validation on").click()
    expect(page.get_by_text("The prompts are used from the next validation on.")).to_be_visible()
    real.kill()
    expect_connection(page, "No connection")
    real.start()
    expect_connection(page, "Live")
    expect(page.get_by_role("rowheader", name=EDITED).first).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect_state(page, "Stopped")
    kinds = [event["kind"] for event in real.read_events(run)]
    assert kinds.count("run_started") == 1, "the training went on while the server was down"
    return run


def compares_two_runs(page: Page, real: ServerProcess) -> None:
    page.get_by_role("button", name="Duplicate as new run").click()
    page.get_by_role("textbox", name="Name", exact=True).fill("again")
    fill_options(page, learning_rate=SECOND_RATE, max_train_steps=str(EVERY))
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name="again")).to_be_visible()
    expect_state(page, "Done")
    page.goto("/#/runs")
    for name in ("again", "strangers"):
        tab_to(page, page.get_by_role("checkbox", name=f"Select {name}"))
        page.keyboard.press("Space")
    tab_to(page, page.get_by_role("button", name="Compare"), "Shift+Tab")
    page.keyboard.press("Enter")
    settings = page.get_by_role("region", name="Differing settings")
    expect(
        settings.get_by_role("row", name=re.compile(f"learning_rate .*{SECOND_RATE}"))
    ).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Loss: "))).to_be_visible()


def generates_a_grid(page: Page) -> None:
    expect(page.locator("html")).to_have_attribute("lang", "es")
    type_into(page, page.get_by_label("Prompts", exact=True), PROMPT)
    for name in ("again", "strangers"):
        tab_to(page, page.get_by_role("checkbox", name=re.compile(f"^{name}")).first)
        page.keyboard.press("Space")
    type_into(page, page.get_by_label("Intensidades"), "0.5, 1")
    type_into(page, page.get_by_label("Pasos", exact=True), "2")
    type_into(page, page.get_by_label("Tamaño, px"), "64")
    tab_to(page, page.get_by_role("button", name="Generar 4 imágenes"))
    page.keyboard.press("Enter")
    grids = page.get_by_role("region", name="Resultados")
    expect(grids.get_by_role("img")).to_have_count(4)
    expect(grids.get_by_role("columnheader", name="intensidad 0,5")).to_be_visible()


def averages_and_downloads(page: Page, target: Path) -> None:
    page.goto("/#/playground/library")
    for name in ("again", "strangers"):
        tab_to(page, page.get_by_role("checkbox", name=re.compile(f"^{name}")).first)
        page.keyboard.press("Space")
    tab_to(page, page.get_by_role("button", name="Promediar"), "Shift+Tab")
    page.keyboard.press("Enter")
    type_into(page, page.get_by_role("dialog").get_by_label("Nombre del archivo nuevo"), "media")
    tab_to(page, page.get_by_role("dialog").get_by_role("button", name="Escribir"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("link", name="Descargar media"))
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(target)
    header_bytes = int.from_bytes(target.read_bytes()[:8], "little")
    header = json.loads(target.read_bytes()[8 : 8 + header_bytes])
    assert any("lora_A" in name for name in header)


def deletes_and_takes_back(page: Page, real: ServerProcess, run: str) -> None:
    page.watch.allowed.append(r"404 .*/files/images/")  # asked for just before it was deleted
    page.get_by_role("button", name="Delete").click()
    wait_until(lambda: run not in json.dumps(real.request_ok("GET", "runs")), "it is in the trash")
    page.get_by_role("button", name="Undo").click()
    expect(
        page.get_by_role("list", name="Runs").get_by_text("strangers", exact=True)
    ).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
