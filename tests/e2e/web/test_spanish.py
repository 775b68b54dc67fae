"""The pages in Spanish, on a phone: problems, warnings and notes too, and libraries of prompts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.web.page_actions import expect_saved
from tests.e2e.web.server_process import ServerProcess

PHONE = {"viewport": {"width": 390, "height": 844}, "locale": "es-ES"}


@pytest.fixture
def page(server: ServerProcess, open_page: Callable[..., Page]) -> Page:
    draft = server.create_draft("zorro", lora_rank=0, lr_warmup_steps=9, max_train_steps=5)
    return open_page(server, f"#/new/{draft['id']}", **PHONE)


def fill(page: Page, option: str, value: str) -> None:
    page.locator(f'[data-option="{option}"] input').first.fill(value)


def test_problems_and_notes_are_in_the_language_of_the_page(page: Page) -> None:
    field = page.locator('[data-option="lora_rank"]').first
    problem = "lora_rank = 0: debe ser como mínimo 1 y como máximo 1024"
    expect(field.get_by_text(problem)).to_be_visible()
    expect(field.get_by_text("como mínimo 1 y como máximo 1024")).to_have_count(2)  # and its bounds
    # Another language on the same page, without loading it again.
    page.get_by_role("combobox", name="Idioma").select_option("en")
    expect(field.get_by_text("lora_rank = 0: must be at least 1, at most 1024")).to_be_visible()
    page.get_by_role("combobox", name="Language").select_option("es")
    fill(page, "lora_rank", "4")
    expect(field.get_by_text(problem)).to_have_count(0)
    warning = "no hay ningún prompt, así que no se generan imágenes de validación"
    expect(page.get_by_text(warning).first).to_be_visible()
    page.get_by_text("Notas").first.click()
    note = (
        "lr_warmup_steps (9) >= max_train_steps (5): la tasa de aprendizaje nunca llega a su valor"
    )
    expect(page.get_by_text(note)).to_be_visible()


def test_a_library_of_prompts_is_saved_and_used_again(page: Page, server: ServerProcess) -> None:
    page.get_by_role("button", name="Añadir un prompt").click()
    page.get_by_label("Prompt 1", exact=True).fill("un zorro en la nieve")
    page.get_by_label("Tamaño del prompt 1").fill("128x192")
    page.get_by_label("Intensidad del adaptador para el prompt 1").fill("0,5")
    page.get_by_label("Semilla del prompt 1").fill("7")
    page.get_by_label("Prompt negativo 1").fill("borroso")
    page.get_by_role("button", name="Bibliotecas de prompts").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Nombre de la biblioteca").fill("zorros")
    dialog.get_by_role("button", name="Guardar esta lista").click()
    entry = dialog.get_by_role("listitem").filter(has_text="zorros")
    expect(entry).to_contain_text("1 prompt")
    entry.get_by_role("button", name="Añadir a la lista").click()
    expect(page.get_by_label("Prompt 2", exact=True)).to_have_value("un zorro en la nieve")
    expect_saved(page)
    [library] = server.request_ok("GET", "prompt-libraries")
    assert library["prompts"] == [
        {
            "name": "prompt-1",
            "prompt": "un zorro en la nieve",
            "negative_prompt": "borroso",
            "seed": 7,
            "size": "128x192",
            "adapter_strength": 0.5,
        }
    ]


def test_the_load_of_the_machine_is_shown(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/system", **PHONE)
    chart = page.get_by_role("img", name="Memoria en uso")
    expect(chart).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # the navigation is wider than the screen, and shows the page that is open
    expect(page.get_by_role("link", name="Sistema", exact=True)).to_be_in_viewport(ratio=1)
