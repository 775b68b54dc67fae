"""The validation prompts of a run, and their edits while it trains.

The training reads the edits before its next validation: see training/prompt_edits.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.events.event_types import PromptsChosen
from simpletuner.server.api_errors import abort
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.job_config import write_prompts
from simpletuner.server.run_reader import RunReader
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.configs import PromptEntry
from simpletuner.server.schemas.runs import RunPrompt, RunPrompts
from simpletuner.server.workspace import Workspace

EDITED_PROMPTS = "control/prompts.json"  # as in training/run_folder.py
# A run that is starting may still remove the edits of an earlier run in its folder.
EDITABLE_STATES: tuple[JobState, ...] = ("caching", "running")
UNUSUAL_IN_NAME = re.compile(r"[^A-Za-z0-9_-]")


def read_run_prompts(workspace: Workspace, reader: RunReader, state: JobState) -> RunPrompts:
    """Return the edited prompts of a run, or else those that it uses."""
    event = reader.summary.history.prompts
    used = [] if event is None else _used_prompts(event)
    edited = _read_edits(workspace, reader)
    is_editable = event is not None and state in EDITABLE_STATES
    if edited is None or not is_editable:
        return RunPrompts(prompts=used, editable=is_editable, pending=False)
    return RunPrompts(prompts=edited, editable=True, pending=edited != used)


def write_run_prompts(
    workspace: Workspace, reader: RunReader, state: JobState, prompts: Sequence[PromptEntry]
) -> RunPrompts:
    """Write prompts for the next validation of a run, and return them.

    Raises ApiError: 409 for a run that is not training or generates no images, 422 for no prompts.
    """
    if state not in EDITABLE_STATES:
        abort(
            409, f"the run is {state}; prompts can be edited while it prepares its data or trains"
        )
    if reader.summary.history.prompts is None:
        abort(409, "this run has no validation prompts, so it generates no images")
    if not prompts:
        abort(422, "give at least one prompt", "prompts")
    write_prompts(workspace.resolve_below(reader.path, EDITED_PROMPTS), prompts)
    return read_run_prompts(workspace, reader, state)


def _read_edits(workspace: Workspace, reader: RunReader) -> list[RunPrompt] | None:
    """Return the edits in the run folder, None without any that can be read."""
    if not (reader.path / EDITED_PROMPTS).is_file():
        return None
    content = read_json_object(workspace.resolve_below(reader.path, EDITED_PROMPTS))
    if not content:
        return None
    return [_from_entry(name, fields) for name, fields in content.items()]


def _used_prompts(event: PromptsChosen) -> list[RunPrompt]:
    sizes = event.sizes or ("",) * len(event.prompts)
    strengths = event.strengths or (1.0,) * len(event.prompts)
    return [
        _to_message(*row, size, strength)
        for row, size, strength in zip(event.prompts, sizes, strengths)
    ]


def _from_entry(name: str, fields: Any) -> RunPrompt:
    values: Mapping[str, Any] = fields if isinstance(fields, dict) else {"prompt": fields}
    seed, strength = values.get("seed"), values.get("adapter_strength")
    return _to_message(
        name,
        str(values.get("prompt", "")),
        str(values.get("negative_prompt", "")),
        seed if isinstance(seed, int) else None,
        str(values.get("size", "")),
        float(strength) if isinstance(strength, (int, float)) else 1.0,
    )


def _to_message(
    name: str, prompt: str, negative: str, seed: int | None, size: str, strength: float
) -> RunPrompt:
    """Return a prompt under a name that can be edited; a library's may have other letters."""
    return RunPrompt(
        name=UNUSUAL_IN_NAME.sub("-", name),
        prompt=prompt,
        negative_prompt=negative,
        seed=seed,
        size=size,
        adapter_strength=strength,
    )
