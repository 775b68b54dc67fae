"""The form of a new run: saved drafts, errors at their field, import and export."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, Route, expect

from tests.e2e.web.page_actions import expect_saved, expect_state, fill_options, find_option
from tests.e2e.web.server_process import ServerProcess, wait_until


def drafted(house: ServerProcess, visit: Callable[..., Page], name: str) -> tuple[Page, str]:
    id = house.create_draft(name)["id"]
    page = visit(house, f"#/new/{id}")
    expect_saved(page)
    return page, id


def test_a_draft_survives_a_reload_and_another_tab(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page, id = drafted(server, open_page, "kept")
    fill_options(page, lora_rank="7")
    page.reload()
    expect(find_option(page, "lora_rank").get_by_role("textbox")).to_have_value("7")

    other = open_page(server, f"#/new/{id}", beside=page)
    fill_options(other, lora_rank="9")
    page.watch.allowed.append("409")
    rank = find_option(page, "lora_rank").get_by_role("textbox")
    rank.fill("11")
    conflict = page.get_by_role("alert").filter(has_text="changed in another tab")
    expect(conflict.get_by_role("row", name="lora_rank")).to_contain_text("9")
    conflict.get_by_role("button", name="Keep mine").click()
    expect_saved(page)
    assert server.request_ok("GET", f"drafts/{id}")["config"]["lora_rank"] == 11

    now = server.request_ok("GET", f"drafts/{id}")
    theirs = {name: now[name] for name in ("name", "datasets", "version")}
    server.request_ok("PUT", f"drafts/{id}", {**theirs, "config": {"lora_rank": 13}})
    rank.fill("15")
    conflict.get_by_role("button", name="Use the other tab's version").click()
    expect(rank).to_have_value("13")


def test_what_is_typed_while_the_page_goes_away_is_kept(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page, id = drafted(server, open_page, "closed")
    find_option(page, "max_train_steps").get_by_role("textbox").fill("123")
    page.close()
    wait_until(
        lambda: server.request_ok("GET", f"drafts/{id}")["config"].get("max_train_steps") == 123,
        "it is kept",
    )


def test_a_bad_value_is_told_at_its_field(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page, id = drafted(server, open_page, "bad")
    field = find_option(page, "learning_rate")
    rate = field.get_by_role("textbox")
    rate.fill("fast")
    expect(rate).to_have_attribute("aria-invalid", "true")
    expect(field.locator("p.bad")).to_contain_text("fast")
    start = page.get_by_role("button", name="Start training")
    expect(start).to_be_disabled()
    page.get_by_role("button", name="Fix 1 problem").click()
    expect(page.locator("[aria-invalid=true]").first).to_be_focused()
    kept = lambda: server.request_ok("GET", f"drafts/{id}")["config"].get("learning_rate")  # noqa: E731
    wait_until(lambda: kept() == "fast", "a draft is kept unfinished")
    rate.fill("1e-4")
    expect(rate).to_have_attribute("aria-invalid", "false")
    expect(rate).to_have_value("1e-4")
    expect(start).to_be_enabled()
    page.get_by_role("button", name="Remove: discs").click()
    expect(page.locator("#problems")).to_be_visible()
    expect(start).to_be_disabled()


def test_a_name_that_a_run_has_is_refused_at_its_field(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """Before anything starts, with the ways out; another name is one."""
    server.configure_fake_trainer(FAKE_STEPS="2")
    server.wait_for_state(server.enqueue("fox")["run"], "done")
    page, id = drafted(server, open_page, "fox")
    page.watch.allowed.append("422")
    held: list[Route] = []
    page.route("**/api/v1/validate", lambda route: held.append(route), times=1)
    page.goto("about:blank")
    page.goto(f"/#/new/{id}")
    name, start = page.get_by_role("textbox", name="Name", exact=True), "Start training"
    page.get_by_role("button", name=start).click()
    expect(page.locator("#problems")).to_contain_text("name: ")
    expect(page.locator("#problems")).to_contain_text("already holds the results of a run")
    wait_until(lambda: page.title() and held, "the form is being checked")
    held.pop().continue_()
    expect(
        page.get_by_text("No problems found")
    ).to_be_visible()  # the check knows of no other runs
    expect(name).to_have_attribute("aria-invalid", "true")
    name.fill("fox-2")
    expect(name).to_have_attribute("aria-invalid", "false")
    page.get_by_role("button", name=start).click()
    expect(page.get_by_role("heading", name="fox-2", level=1)).to_be_visible()


def test_options_that_need_others_and_a_preset_with_its_way_back(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page, id = drafted(server, open_page, "preset")
    find_option(page, "use_ema").get_by_role("checkbox").check()
    expect(find_option(page, "ema_decay").locator(".no-effect")).to_have_count(0)
    find_option(page, "use_ema").get_by_role("checkbox").uncheck()
    expect(find_option(page, "ema_decay").locator(".no-effect")).to_be_visible()
    expect_saved(page)
    before = server.request_ok("GET", f"drafts/{id}")["config"]
    page.get_by_label("Apply a preset").select_option("12gb")
    wait_until(
        lambda: "base_model_precision" in server.request_ok("GET", f"drafts/{id}")["config"],
        "the preset is kept",
    )
    page.get_by_role("button", name="Undo").click()
    wait_until(
        lambda: server.request_ok("GET", f"drafts/{id}")["config"] == before, "it is as before"
    )


def test_a_preset_s_size_is_written_as_the_language_does(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server, "#/new", locale="es-ES")
    expect(page.get_by_text(re.compile(r"; ~\d+,\d GB de VRAM")).first).to_be_visible()
    expect(page.get_by_text(re.compile(r"\d\.\d GB"))).to_have_count(0)


def test_export_and_import_are_each_other_s_way_back(
    server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page, id = drafted(server, open_page, "files")
    fill_options(page, lora_rank="5", max_train_steps="77")
    files = {}
    for name in ("config.json", "multidatabackend.json"):
        with page.expect_download() as coming:
            page.get_by_role("link", name=f"↓ {name}").click()
        coming.value.save_as(tmp_path / name)
        files[name] = json.loads((tmp_path / name).read_text())
    draft = server.request_ok("GET", f"drafts/{id}")
    assert files["config.json"] == draft["config"]
    assert files["multidatabackend.json"] == draft["datasets"]

    (tmp_path / "mine.jsonc").write_text(
        '{\n  // from a friend\n  "lora_rank": 6, "lora_rnk": 3,\n}\n'
    )
    page.get_by_role("button", name="Import").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Choose a file").set_input_files(tmp_path / "mine.jsonc")
    expect(dialog).to_contain_text("did you mean 'lora_rank'?")
    dialog.get_by_label("Content of the file").fill((tmp_path / "config.json").read_text())
    dialog.get_by_role("button", name="Check").click()
    expect(dialog).to_contain_text(f"Found {len(files['config.json'])} options")
    dialog.get_by_role("button", name="Import").click()
    expect(dialog).to_be_hidden()
    expect_saved(page)
    assert server.request_ok("GET", f"drafts/{id}")["config"] == files["config.json"]


def test_a_rehearsal(server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page, _ = drafted(server, open_page, "tried")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_text("Dry run: Done")).to_be_visible()
    expect(page.get_by_text("nothing stands in the way")).to_be_visible()


def test_start_to_finish_by_keyboard_alone(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """Tab, arrows, Enter and Escape; the pointer is never used."""
    server.configure_fake_trainer(FAKE_STEPS="40", FAKE_GATE="looked-at")
    server.create_draft("by-hand")  # makes the dataset
    page = open_page(server, "#/new?dataset=discs")
    expect(page.get_by_role("button", name="chroma-nano")).to_be_visible()
    tab_to(page, "button", re.compile("chroma-nano"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Name", exact=True)).to_be_visible()
    tab_to(page, "textbox", re.compile("^Name$"))
    page.keyboard.press("Control+a")
    page.keyboard.type("by-keyboard")
    expect(page.get_by_text("No problems found")).to_be_visible()
    tab_to(page, "button", re.compile("^Start training$"))
    page.keyboard.press("Enter")
    expect_state(page, "Running")
    tab_to(page, "tab", re.compile("^Progress$"))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Images")).to_be_focused()
    expect(page.get_by_role("columnheader", name="Before")).to_be_visible()
    tab_to(page, "button", re.compile("^Open: fake prompt 0, step 0$"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(
        page.get_by_role("button", name=re.compile("^Open: fake prompt 0, step 0$"))
    ).to_be_focused()
    (server.workspace / "looked-at").touch()
    expect_state(page, "Done")
    tab_to(page, "link", re.compile("^Download the LoRA$"), back=True)
    with page.expect_download() as coming:
        page.keyboard.press("Enter")
    assert coming.value.suggested_filename == "by-keyboard.safetensors"


def tab_to(page: Page, role: str, name: re.Pattern[str], back: bool = False) -> None:
    """Press Tab until that has the focus; it has to come within a hundred presses."""
    wanted = page.get_by_role(role, name=name).and_(page.locator(":focus"))  # type: ignore[arg-type]
    for _ in range(100):
        if wanted.count():
            return
        page.keyboard.press("Shift+Tab" if back else "Tab")
    raise AssertionError(f"{role} {name.pattern} is not reached by the keyboard")
