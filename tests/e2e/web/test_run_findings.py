"""The page of a run: its verdict in words, its resumes, and prompts that are edited while it trains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from simpletuner.events.event_types import PromptsChosen, VerdictReached
from simpletuner.server.workspace import run_id
from simpletuner.training.run_folder import EDITED_PROMPTS
from tests.e2e.web.server_process import ServerProcess, wait_until
from tests.server.run_folder_writer import RunFolderWriter

TITLES = {"en-US": "Overfitting", "es-ES": "Sobreajuste", "hi-IN": "Overfitting"}


@pytest.fixture
def run(server: ServerProcess, request: pytest.FixtureRequest) -> RunFolderWriter:
    """A run that was resumed at step 20 and now overfits."""
    written = RunFolderWriter(server.workspace / "output" / re.sub(r"\W", "-", request.node.name))
    (written.path / "config.json").write_text('{"validation_prompt": "a cat"}')
    written.write_start().write_steps(1, 25).write_checkpoint(20)
    written.write_start(resumed=20).write_steps(21, 60)
    prompts = PromptsChosen(0, (("cat", "a cat", "", None),), False)
    verdict = VerdictReached(60, "overfitting", 20, 20, 8, 0.0314, 0.0042)
    written.write_events(prompts, verdict)
    path = f"runs/{run_id(written.path)}"
    wait_until(lambda: server.request("GET", path)[0] == 200, "the server has found the run")
    return written


@pytest.mark.parametrize("locale", TITLES)
def test_the_verdict_is_worded_in_the_language_of_the_page(
    server: ServerProcess, open_page: Callable[..., Page], run: RunFolderWriter, locale: str
) -> None:
    with run.hold_lock():
        page = open_page(server, f"#/runs/{run_id(run.path)}", locale=locale)
        verdict = page.get_by_role("region", name=TITLES[locale])
        expect(verdict).to_contain_text("checkpoint-20")
        expect(verdict).to_contain_text(re.compile(r"\+0[.,]0314 ± 0[.,]0042"))
        expect(verdict).not_to_contain_text("{")
        cells = page.locator("section:has(#resumes-title) tbody td")
        expect(cells).to_have_count(4)
        expect(cells.nth(1)).to_have_text("checkpoint-20")
        expect(cells.nth(3)).to_have_text("5")


def test_a_prompt_is_edited_in_the_run(
    server: ServerProcess, open_page: Callable[..., Page], run: RunFolderWriter
) -> None:
    with run.hold_lock():
        page = open_page(server, f"#/runs/{run_id(run.path)}/pictures")
        page.get_by_role("heading", name="Validation prompts").click()
        expect(page.get_by_label("Prompt 1", exact=True)).to_have_value("a cat")
        page.get_by_label("Prompt 1", exact=True).fill("a fox in snow")
        page.get_by_role("button", name="Use from the next validation on").click()
        expect(page.get_by_text("Waiting for the next validation.")).to_be_visible()
        edited = json.loads((run.path / EDITED_PROMPTS).read_text())
        assert edited == {"cat": {"prompt": "a fox in snow"}}
        run.write_events(PromptsChosen(60, (("cat", "a fox in snow", "", None),), True))
        expect(page.get_by_text("Waiting for the next validation.")).to_be_hidden()
        expect(page.get_by_label("Prompt 1", exact=True)).to_have_value("a fox in snow")
