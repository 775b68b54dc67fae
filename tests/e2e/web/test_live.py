"""What arrives by itself: eight tabs, a server that dies, the queue, failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.web.hands import badge, connection
from tests.e2e.web.house import House, until

pytestmark = pytest.mark.slow  # the browser: until every one is seen stable on two busy cores

SLOW = {"FAKE_STEP_S": "1", "FAKE_STEPS": "900"}
QUICK = {"FAKE_STEP_S": "0.01", "FAKE_STEPS": "8"}
LOSS = re.compile(r"^Loss: [\d.]+ at the end, Step [\d,.]+$")


@pytest.fixture(autouse=True)
def _quiet(house: House) -> Iterator[None]:
    """What a test left running or waiting is in nobody's way."""
    yield
    for job in house.tell("GET", "queue")["jobs"]:
        if job["state"] == "queued":
            house.ask("DELETE", f"jobs/{job['id']}")
        elif job["state"] in ("starting", "caching", "running", "stopping"):
            house.ask("POST", f"runs/{job['run']}/stop", {"insist": True})
    house.ask("PUT", "queue", {"paused": False, "continue_on_error": False})


def moves_on(page: Page) -> None:
    """The step that the page shows becomes another one."""
    told = page.locator(".progress > span").first
    expect(told).to_have_text(re.compile(r"^Step [1-9]"))
    expect(told).not_to_have_text(told.inner_text())


def test_eight_tabs_are_all_live_and_catch_up_after_a_crash(house: House, visit: Callable[..., Page]) -> None:
    house.behave(**SLOW)
    run = house.enqueue("eight")["run"]
    house.reach(run, "running")
    first = visit(house, f"#/runs/{run}")
    tabs = [first, *(visit(house, f"#/runs/{run}/log", beside=first) for _ in range(7))]
    for tab in tabs:
        connection(tab, "Live")
    expect(first.get_by_role("img", name=LOSS)).to_be_visible()
    for tab in tabs:
        moves_on(tab)
        tab.watch.allowed.append(
            "ERR_CONNECTION_REFUSED|WebSocket|Failed to fetch|ERR_EMPTY|ERR_CONNECTION_RESET"
        )
    house.kill()
    connection(first, "No connection")
    house.start()
    for tab in tabs:
        connection(tab, "Live")
        moves_on(tab)
    first.get_by_role("button", name="Stop", exact=True).click()
    for tab in tabs:
        badge(tab, "Stopped")
    steps = [event["step"] for event in house.log(run) if event["kind"] == "stepped"]
    assert steps == list(range(1, len(steps) + 1)), "the training noticed"


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
