"""What arrives by itself: eight tabs, a server that dies, the queue, failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from simpletuner.events.log import EventLog
from simpletuner.events.types import ImageSaved
from tests.e2e.web.hands import badge, connection
from tests.e2e.web.house import House, until

SLOW = {"FAKE_STEP_S": "0.25", "FAKE_STEPS": "4000"}
LIVES = ("queued", "starting", "caching", "running", "stopping")
QUICK = {"FAKE_STEP_S": "0.01", "FAKE_STEPS": "8"}
LOSS = re.compile(r"^Loss: [\d.]+ at the end, Step [\d,.]+$")


@pytest.fixture(autouse=True)
def _quiet(house: House) -> Iterator[None]:
    """What a test left running or waiting is in nobody's way."""
    yield
    house.tell("PUT", "queue", {"paused": True})  # so that none begins that was seen waiting
    until(
        lambda: not [end(house, job) for job in house.tell("GET", "queue")["jobs"] if job["state"] in LIVES],
        "all end",
    )
    house.tell("PUT", "queue", {"paused": False, "continue_on_error": False})


def end(house: House, job: dict[str, Any]) -> None:
    if job["state"] == "queued":
        house.ask("DELETE", f"jobs/{job['id']}")
    else:
        house.ask("POST", f"runs/{job['run']}/stop", {"insist": True})


def move_on(pages: list[Page]) -> None:
    """The step that each of them shows becomes another one."""
    told = [page.locator(".progress > span").first for page in pages]
    for one in told:
        expect(one).to_have_text(re.compile(r"^Step [1-9]"))
    for one, before in [(one, one.inner_text()) for one in told]:
        expect(one).not_to_have_text(before)


def test_eight_tabs_are_all_live_and_catch_up_after_a_crash(house: House, visit: Callable[..., Page]) -> None:
    house.behave(**SLOW)
    run = house.enqueue("eight")["run"]
    house.reach(run, "running")
    first = visit(house, f"#/runs/{run}")
    tabs = [first, *(visit(house, f"#/runs/{run}/log", beside=first) for _ in range(7))]
    for tab in tabs:
        connection(tab, "Live")
    expect(first.get_by_role("img", name=LOSS)).to_be_visible()
    move_on(tabs)
    for tab in tabs:
        tab.watch.allowed.append(
            "ERR_CONNECTION_REFUSED|WebSocket|Failed to fetch|ERR_EMPTY|ERR_CONNECTION_RESET"
        )
    house.kill()
    connection(first, "No connection")
    house.start()
    for tab in tabs:
        connection(tab, "Live")
    move_on(tabs)
    first.get_by_role("button", name="Stop", exact=True).click()
    for tab in tabs:
        badge(tab, "Stopped")
    steps = [event["step"] for event in house.log(run) if event["kind"] == "stepped"]
    assert steps == list(range(1, len(steps) + 1)), "the training noticed"


def test_a_question_without_an_answer_is_asked_again(house: House, visit: Callable[..., Page]) -> None:
    """The page asks anew when a run goes on, and the server may be gone just then."""
    house.behave(FAKE_STEP_S="0.01")
    run = house.enqueue("asks", max_train_steps=8)["run"]
    house.reach(run, "done")
    page = visit(house, f"#/runs/{run}")
    chart = page.get_by_role("img", name=LOSS)
    expect(chart).to_have_accessible_name(re.compile("Step 8$"))
    lost: list[str] = []

    def lose(route: Route) -> None:
        lost.append(route.request.url)
        route.abort()

    page.watch.allowed.append("ERR_FAILED")
    page.route("**/metrics?*", lose, times=2)
    house.tell("POST", f"runs/{run}/resume", {"max_train_steps": 16})
    expect(chart).to_have_accessible_name(re.compile("Step 16$"))
    assert len(lost) == 2


def test_a_picture_at_another_strength_says_so_where_it_is_compared(
    house: House, visit: Callable[..., Page]
) -> None:
    house.behave(**QUICK)
    run = house.enqueue("weaker")["run"]
    house.reach(run, "done")
    page = visit(house, f"#/runs/{run}/pictures")
    expect(page.get_by_role("columnheader", name="Step 8")).to_be_visible()
    drawn = house.run_folder(run) / "images" / "step-000008" / "fake-0-1-128x128.png"
    weaker = drawn.with_name("fake-0-1-128x128-strength-0.5.png")
    weaker.write_bytes(drawn.read_bytes())
    path = weaker.relative_to(house.run_folder(run)).as_posix()
    emit = EventLog(house.run_folder(run) / "events.jsonl")
    emit(ImageSaved(8, "fake-0", "fake prompt 0", path, 42, 128, 128, "strength 0.5"))
    emit.close()
    compare = page.get_by_role("button", name="Compare")
    for name in ("8", "8 · LoRA at strength 0.5"):
        page.get_by_role("button", name=f"Open: fake prompt 0, step {name}", exact=True).click()
        if compare.get_attribute("aria-pressed") == "false":  # else it is as the last one was looked at
            compare.click()
        divider = page.get_by_role("slider", name=f"Divider between Before and Step {name}", exact=True)
        expect(divider).to_be_visible()
        page.keyboard.press("Escape")


def test_save_and_sample_now_and_keep_a_checkpoint(house: House, visit: Callable[..., Page]) -> None:
    house.behave(**SLOW)
    run = house.enqueue("asked", checkpoint_step_interval=800, validation_step_interval=800)["run"]
    house.reach(run, "running")
    page = visit(house, f"#/runs/{run}/files")
    page.get_by_role("button", name="Save now").click()
    keep = page.get_by_role("button", name=re.compile("^Keep checkpoint-"))
    expect(keep).to_have_attribute("aria-pressed", "false")
    keep.click()
    expect(keep).to_have_attribute("aria-pressed", "true")
    page.get_by_role("tab", name="Pictures").click()
    expect(page.get_by_role("columnheader")).to_have_count(2)  # the prompt and what was there before
    page.get_by_role("button", name="Draw pictures now").click()
    expect(page.get_by_role("columnheader")).to_have_count(3)


def waiting(page: Page) -> list[str]:
    return page.get_by_role("region", name="Queue").locator("li .name").all_inner_texts()


def test_the_queue_has_an_order_a_pause_and_a_rule_after_failures(
    house: House, visit: Callable[..., Page]
) -> None:
    page = visit(house)
    house.tell("PUT", "queue", {"paused": True})
    house.behave(**QUICK, FAKE_FAIL="4")
    jobs = {name: house.enqueue(name) for name in ("q-one", "q-two", "q-three", "q-four")}
    until(lambda: waiting(page) == ["q-one", "q-two", "q-three", "q-four"], "all wait, in their order")
    page.get_by_role("button", name="Start q-three earlier").click()
    until(lambda: waiting(page) == ["q-one", "q-three", "q-two", "q-four"], "one goes up")
    page.get_by_role("button", name="Start q-one later").click()
    until(lambda: waiting(page) == ["q-three", "q-one", "q-two", "q-four"], "one goes down")
    page.get_by_role("button", name="Withdraw q-four").click()
    until(lambda: waiting(page) == ["q-three", "q-one", "q-two"], "one is withdrawn")
    expect(page.get_by_text("The queue is paused")).to_be_visible()
    page.get_by_role("button", name="Let it go on").click()
    house.reach(jobs["q-three"]["run"], "failed")
    until(lambda: waiting(page) == ["q-one", "q-two"], "the failed one waits no more")
    expect(page.get_by_text("The queue is paused")).to_be_visible()  # a failure holds those that wait
    page.get_by_label("Go on when a run fails").check()
    until(lambda: house.tell("GET", "queue")["continue_on_error"], "the rule is kept")
    page.get_by_role("button", name="Let it go on").click()
    for name in ("q-one", "q-two"):
        house.reach(jobs[name]["run"], "failed")


def test_a_failure_shows_its_last_lines_and_what_to_change(house: House, visit: Callable[..., Page]) -> None:
    house.behave(**QUICK, FAKE_FAIL="4")
    run = house.enqueue("diverges")["run"]
    house.reach(run, "failed")
    page = visit(house, f"#/runs/{run}")
    badge(page, "Failed")
    told = page.get_by_role("region", name="The run failed")
    expect(told).to_contain_text("failed on request")
    expect(told).to_contain_text("Lower learning_rate to a third")
    expect(page.get_by_role("region", name="Last lines")).to_contain_text("step 4/8 loss")


def test_a_kill_for_memory_is_told_as_one(house: House, visit: Callable[..., Page]) -> None:
    for kind, advice in (("host", "The computer's own memory"), ("cuda", "The GPU's memory was too small")):
        house.behave(**QUICK, FAKE_OOM=kind)
        run = house.enqueue(f"oom-{kind}")["run"]
        house.reach(run, "failed")
        page = visit(house, f"#/runs/{run}")
        told = page.get_by_role("region", name="The run failed")
        expect(told).to_contain_text(re.compile("out of memory", re.IGNORECASE))
        expect(told).to_contain_text(advice)


def test_what_happens_while_one_looks_at_the_list(house: House, visit: Callable[..., Page]) -> None:
    page = visit(house)
    house.behave(**QUICK)
    house.enqueue("watched")
    row = page.get_by_role("listitem").filter(has_text="watched")
    expect(row).to_contain_text("Done")
    expect(row).to_contain_text("8 of 8 steps")
    expect(row.locator("img")).to_be_visible()


def test_what_was_stopped_before_it_began_goes_on_or_goes_away(
    house: House, visit: Callable[..., Page]
) -> None:
    """There is no run folder yet, so nothing but the two is offered."""
    house.behave(**QUICK, FAKE_LATE="it-may-begin")
    for name in ("withdrawn", "resumed"):
        run = house.enqueue(name)["run"]
        house.reach(run, "starting")
        house.tell("POST", f"runs/{run}/stop", {"insist": True})
        house.reach(run, "stopped")
        page = visit(house, f"#/runs/{run}")
        badge(page, "Stopped")
        if name == "withdrawn":
            page.get_by_role("button", name="Withdraw").click()
            expect(page.get_by_role("heading", name="Runs")).to_be_visible()
            assert house.ask("GET", f"runs/{run}")[0] == 404
        else:
            (house.workspace / "it-may-begin").touch()
            page.get_by_role("button", name="Resume", exact=True).click()
            page.get_by_role("dialog").get_by_role("button", name="Resume", exact=True).click()
            badge(page, "Done")
