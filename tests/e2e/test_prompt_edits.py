"""Validation prompts that a user edits while a run trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.events.event_types import ImageSaved, PromptsChosen, WarningIssued
from simpletuner.training import prompt_edits
from simpletuner.training.run_folder import EDITED_PROMPTS, RunFolder
from tests.e2e.training_project import TrainingProject, read_events

OPTIONS = {
    "validation_disable": False, "validation_prompt": "a red square", "validation_resolution": "64",
    "validation_num_inference_steps": 1, "validation_step_interval": 1, "eval_loss_disable": True,
    "max_train_steps": 3, "use_ema": False, "gradient_accumulation_steps": 1,
}  # fmt: skip
EDITED = {"fox": {"prompt": "a fox in snow", "seed": 7}, "owl": "an owl"}


def edit_before(monkeypatch: pytest.MonkeyPatch, folder: Path, edits: dict[int, str]) -> None:
    """Write the n-th text before the n-th validation of the next process, as the server does."""
    real, calls = RunFolder.read_edited_prompts, []

    def read(self: RunFolder) -> str | None:
        calls.append(1)
        if len(calls) in edits:
            (folder / EDITED_PROMPTS).write_text(edits[len(calls)])
        return real(self)

    monkeypatch.setattr(RunFolder, "read_edited_prompts", read)


def prompts_by_step(folder: Path) -> dict[int, set[tuple[str, int]]]:
    found: dict[int, set[tuple[str, int]]] = {}
    for event in read_events(folder):
        if isinstance(event, ImageSaved) and event.weights in ("base", "trained"):
            found.setdefault(event.step, set()).add((event.prompt, event.seed))
    return found


def test_edits_are_used_from_the_next_validation_on_and_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, folder = TrainingProject(tmp_path, **OPTIONS), tmp_path / "run"
    seed = project.load_config().config.training.seed
    edit_before(monkeypatch, folder, {2: '{"a": 5}', 4: json.dumps(EDITED)})
    project.train()
    usual, edited = {("a red square", seed)}, {("a fox in snow", 7), ("an owl", seed)}
    assert prompts_by_step(folder) == {0: usual, 1: usual, 2: usual, 3: edited}
    events = read_events(folder)
    chosen = [event for event in events if isinstance(event, PromptsChosen)]
    assert [(event.step, event.edited) for event in chosen] == [(0, False), (3, True)]
    assert chosen[1].prompts == (("fox", "a fox in snow", "", 7), ("owl", "an owl", "", None))
    warned = [event.message for event in events if isinstance(event, WarningIssued)]
    (refused,) = [message for message in warned if "edited validation prompts" in message]
    assert "control/prompts.json" in refused

    project.train(max_train_steps=4, resume_with_changes=True)
    assert prompts_by_step(folder)[4] == edited

    def refuse(*arguments: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(prompt_edits, "encode_captions", refuse)
    edit_before(monkeypatch, folder, {2: json.dumps(EDITED)})
    project.train(max_train_steps=1, resume_from_checkpoint="never")
    assert prompts_by_step(folder) == {0: usual, 1: usual}, "another run begins with its own"
    warned = [event.message for event in read_events(folder) if isinstance(event, WarningIssued)]
    assert any("does not fit next to the network" in message for message in warned)
