"""What arrives by itself: eight tabs, a server that dies, the queue, failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from simpletuner.events.event_log import EventLog
from simpletuner.events.event_types import ImageSaved
from simpletuner.server.workspace import run_id
from tests.e2e.web.page_actions import expect_connection, expect_state
from tests.e2e.web.server_process import SERVER_DOWN, ServerProcess, wait_until
from tests.server.run_folder_writer import RunFolderWriter

SLOW = {"FAKE_STEP_S": "0.25", "FAKE_STEPS": "4000"}
LIVES = ("queued", "starting", "caching", "running", "stopping")
QUICK = {"FAKE_STEP_S": "0.01", "FAKE_STEPS": "8"}
LOSS = re.compile(r"^Loss: [\d.]+ at the end, Step [\d,.]+$")


@pytest.fixture(autouse=True)
def _quiet(server: ServerProcess) -> Iterator[None]:
    """What a test left running or waiting is in nobody's way."""
    yield
    server.request_ok("PUT", "queue", {"paused": True})  # so that none begins that was seen waiting
    wait_until(
        lambda: (
            not [
                end(server, job)
                for job in server.request_ok("GET", "queue")["jobs"]
                if job["state"] in LIVES
            ]
        ),
        "all end",
    )
    server.request_ok("PUT", "queue", {"paused": False, "continue_on_error": False})


def end(house: ServerProcess, job: dict[str, Any]) -> None:
    if job["state"] == "queued":
        house.request("DELETE", f"jobs/{job['id']}")
    else:
        house.request("POST", f"runs/{job['run']}/stop", {"insist": True})


def move_on(pages: list[Page]) -> None:
    """The step that each of them shows becomes another one."""
    told = [page.locator(".progress > span").first for page in pages]
    for one in told:
        expect(one).to_have_text(re.compile(r"^Step [1-9]"))
    for one, before in [(one, one.inner_text()) for one in told]:
        expect(one).not_to_have_text(before)


def test_eight_tabs_are_all_live_and_catch_up_after_a_crash(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.configure_fake_trainer(**SLOW)
    run = server.enqueue("eight")["run"]
    server.wait_for_state(run, "running")
    first = open_page(server, f"#/runs/{run}")
    tabs = [first, *(open_page(server, f"#/runs/{run}/log", beside=first) for _ in range(7))]
    for tab in tabs:
        expect_connection(tab, "Live")
    expect(first.get_by_role("img", name=LOSS)).to_be_visible()
    move_on(tabs)
    for tab in tabs:
        tab.watch.allowed.append(SERVER_DOWN)
    server.kill()
    expect_connection(first, "No connection")
    server.start()
    for tab in tabs:
        expect_connection(tab, "Live")
    move_on(tabs)
    first.get_by_role("button", name="Stop", exact=True).click()
    for tab in tabs:
        expect_state(tab, "Stopped")
    steps = [event["step"] for event in server.read_events(run) if event["kind"] == "step"]
    assert steps
    assert steps == list(range(1, len(steps) + 1)), "the training noticed"


def test_a_question_without_an_answer_is_asked_again(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """The page asks anew when a run goes on, and the server may be gone just then."""
    server.configure_fake_trainer(FAKE_STEP_S="0.01")
    run = server.enqueue("asks", max_train_steps=8)["run"]
    server.wait_for_state(run, "done")
    page = open_page(server, f"#/runs/{run}")
    chart = page.get_by_role("img", name=LOSS)
    expect(chart).to_have_accessible_name(re.compile("Step 8$"))
    lost: list[str] = []

    def lose(route: Route) -> None:
        lost.append(route.request.url)
        route.abort()

    page.watch.allowed.append("ERR_FAILED")
    page.route("**/metrics?*", lose, times=2)
    server.request_ok("POST", f"runs/{run}/resume", {"max_train_steps": 16})
    expect(chart).to_have_accessible_name(re.compile("Step 16$"))
    assert len(lost) == 2


def test_a_picture_at_another_strength_says_so_where_it_is_compared(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.configure_fake_trainer(**QUICK)
    run = server.enqueue("weaker")["run"]
    server.wait_for_state(run, "done")
    page = open_page(server, f"#/runs/{run}/pictures")
    expect(page.get_by_role("columnheader", name="Step 8")).to_be_visible()
    drawn = server.run_folder(run) / "images" / "step-000008" / "fake-0-1-128x128.png"
    weaker = drawn.with_name("fake-0-1-128x128-strength-0.5.png")
    weaker.write_bytes(drawn.read_bytes())
    path = weaker.relative_to(server.run_folder(run)).as_posix()
    emit = EventLog(server.run_folder(run) / "events.jsonl")
    emit(ImageSaved(8, "fake-0", "fake prompt 0", path, 42, 128, 128, "strength 0.5"))
    emit.close()
    compare = page.get_by_role("button", name="Compare")
    for name in ("8", "8 · LoRA at strength 0.5"):
        page.get_by_role("button", name=f"Open: fake prompt 0, step {name}", exact=True).click()
        if (
            compare.get_attribute("aria-pressed") == "false"
        ):  # else it is as the last one was looked at
            compare.click()
        divider = page.get_by_role(
            "slider", name=f"Divider between Before and Step {name}", exact=True
        )
        expect(divider).to_be_visible()
        page.keyboard.press("Escape")


def test_save_and_sample_now_and_keep_a_checkpoint(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.configure_fake_trainer(**SLOW)
    every = {"checkpoint_step_interval": 800, "validation_step_interval": 800}
    run = server.enqueue("asked", validation_prompt="a disc", **every)["run"]
    server.wait_for_state(run, "running")
    page = open_page(server, f"#/runs/{run}/files")
    page.get_by_role("button", name="Save now").click()
    keep = page.get_by_role("button", name=re.compile("^Keep checkpoint-"))
    expect(keep).to_have_attribute("aria-pressed", "false")
    keep.click()
    expect(keep).to_have_attribute("aria-pressed", "true")
    page.get_by_role("tab", name="Images").click()
    expect(page.get_by_role("columnheader")).to_have_count(
        2
    )  # the prompt and what was there before
    page.get_by_role("button", name="Generate samples now").click()
    expect(page.get_by_role("columnheader")).to_have_count(3)
    page.get_by_role("button", name="Name and notes").click()
    page.get_by_role("textbox", name="Name").fill("Written while it trains")
    move_on([page])
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("heading", name="Written while it trains")).to_be_visible()


def waiting(page: Page) -> list[str]:
    return page.get_by_role("region", name="Queue").locator("li .name").all_inner_texts()


def test_the_queue_has_an_order_a_pause_and_a_rule_after_failures(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server)
    server.request_ok("PUT", "queue", {"paused": True})
    server.configure_fake_trainer(**QUICK, FAKE_FAIL="4")
    jobs = {name: server.enqueue(name) for name in ("q-one", "q-two", "q-three", "q-four")}
    wait_until(
        lambda: waiting(page) == ["q-one", "q-two", "q-three", "q-four"], "all wait, in their order"
    )
    page.get_by_role("button", name="Move q-three up").click()
    wait_until(lambda: waiting(page) == ["q-one", "q-three", "q-two", "q-four"], "one goes up")
    page.get_by_role("button", name="Move q-one down").click()
    wait_until(lambda: waiting(page) == ["q-three", "q-one", "q-two", "q-four"], "one goes down")
    page.get_by_role("button", name="Remove q-four").click()
    wait_until(lambda: waiting(page) == ["q-three", "q-one", "q-two"], "one is withdrawn")
    expect(page.get_by_text("The queue is paused")).to_be_visible()
    page.get_by_role("button", name="Resume queue").click()
    server.wait_for_state(jobs["q-three"]["run"], "failed")
    wait_until(lambda: waiting(page) == ["q-one", "q-two"], "the failed one waits no more")
    expect(
        page.get_by_text("The queue is paused")
    ).to_be_visible()  # a failure holds those that wait
    page.get_by_label("Continue after a failed run").check()
    wait_until(lambda: server.request_ok("GET", "queue")["continue_on_error"], "the rule is kept")
    page.get_by_role("button", name="Resume queue").click()
    for name in ("q-one", "q-two"):
        server.wait_for_state(jobs[name]["run"], "failed")


def test_a_failure_shows_its_last_lines_and_what_to_change(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    server.configure_fake_trainer(**QUICK, FAKE_FAIL="4")
    run = server.enqueue("diverges")["run"]
    server.wait_for_state(run, "failed")
    page = open_page(server, f"#/runs/{run}")
    expect_state(page, "Failed")
    told = page.get_by_role("region", name="The run failed")
    expect(told).to_contain_text("failed on request")
    expect(told).to_contain_text("Lower learning_rate to a third")
    page.locator("summary").filter(has_text="Last lines of the log").click()
    expect(page.get_by_role("region", name="Last lines of the log")).to_contain_text(
        "step 4/8 loss"
    )


def test_a_kill_for_memory_is_told_as_one(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    for kind, advice in (
        ("host", "The computer ran out of memory"),
        ("cuda", "The GPU ran out of memory"),
    ):
        server.configure_fake_trainer(**QUICK, FAKE_OOM=kind)
        run = server.enqueue(f"oom-{kind}")["run"]
        server.wait_for_state(run, "failed")
        page = open_page(server, f"#/runs/{run}")
        told = page.get_by_role("region", name="The run failed")
        expect(told).to_contain_text(re.compile("out of memory", re.IGNORECASE))
        expect(told).to_contain_text(advice)


def test_what_happens_while_one_looks_at_the_list(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(server)
    server.configure_fake_trainer(**QUICK)
    server.enqueue("watched")
    row = page.get_by_role("listitem").filter(has_text="watched")
    expect(row).to_contain_text("Done")
    expect(row).to_contain_text("8 of 8 steps")
    expect(row.locator("img")).to_be_visible()


def test_what_was_stopped_before_it_began_goes_on_or_goes_away(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """There is no run folder yet, so nothing but the two is offered."""
    server.configure_fake_trainer(**QUICK, FAKE_LATE="it-may-begin")
    for name in ("withdrawn", "resumed"):
        run = server.enqueue(name)["run"]
        server.wait_for_state(run, "starting")
        server.request_ok("POST", f"runs/{run}/stop", {"insist": True})
        server.wait_for_state(run, "stopped")
        page = open_page(server, f"#/runs/{run}")
        expect_state(page, "Stopped")
        if name == "withdrawn":
            page.get_by_role("button", name="Remove").click()
            expect(page.get_by_role("heading", name="Runs")).to_be_visible()
            assert server.request("GET", f"runs/{run}")[0] == 404
        else:
            (server.workspace / "it-may-begin").touch()
            page.get_by_role("button", name="Start again").click()
            page.get_by_role("dialog").get_by_role("button", name="Start again").click()
            expect_state(page, "Done")


def test_a_preview_of_what_is_sampled_comes_and_goes(
    server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """The page is opened before there is a run, as when the server has not found it yet."""
    path = server.workspace / "output" / "previews"
    page = open_page(server, f"#/runs/{run_id(path)}")
    page.watch.allowed.append("404")
    expect(page.get_by_text("there is no such run")).to_be_visible()
    run = RunFolderWriter(path).write_start()
    preview = run.path / "images" / "preview.jpg"
    preview.parent.mkdir()
    with run.hold_lock():
        watch_a_preview(page, preview)


def watch_a_preview(page: Page, preview: Path) -> None:
    expect_connection(page, "Live")
    Image.new("RGB", (16, 8), (200, 40, 40)).save(preview)
    shown = page.get_by_role("img", name="Rough preview of what is being sampled")
    expect(shown).to_have_js_property("naturalWidth", 16)
    Image.new("RGB", (24, 8), (40, 40, 200)).save(preview)
    expect(shown).to_have_js_property("naturalWidth", 24)
    page.get_by_role("tab", name="Images").click()
    expect(shown).to_be_visible()
    preview.unlink()
    expect(shown).to_have_count(0)
