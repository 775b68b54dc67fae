"""Every combination of observations has one state, and it is the one that a person would name."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from simpletuner.server.job_states import (
    ACTIVE_STATES,
    ENDED_STATES,
    PHASES,
    ObservedJob,
    Outcome,
    derive_state,
)
from simpletuner.server.schemas.base import JobState

OUTCOMES: tuple[Outcome | None, ...] = (None, *get_args(Outcome))
OBSERVATIONS = [
    ObservedJob(*values)
    for values in product((False, True), (False, True), PHASES, (False, True), OUTCOMES)
]


def test_the_states_are_complete() -> None:
    assert {"draft", "queued", *ACTIVE_STATES, *ENDED_STATES} == set(get_args(JobState))


@pytest.mark.parametrize("job", OBSERVATIONS, ids=str)
def test_every_observation_has_a_state(job: ObservedJob) -> None:
    state = derive_state(job)
    if not job.launched:
        assert state == "queued"
    elif job.alive:
        assert state in ACTIVE_STATES
        assert (state == "stopping") == job.stop_requested
    else:
        assert state in ENDED_STATES
        assert (state == "lost") == (job.outcome is None and not job.stop_requested)


@pytest.mark.parametrize(
    ("job", "state"),
    [
        (ObservedJob(), "queued"),
        (ObservedJob(launched=True, alive=True), "starting"),
        (ObservedJob(launched=True, alive=True, phase="caching"), "caching"),
        (ObservedJob(launched=True, alive=True, phase="running"), "running"),
        (ObservedJob(launched=True, alive=True, phase="running", stop_requested=True), "stopping"),
        (ObservedJob(launched=True, phase="running", outcome="done"), "done"),
        (ObservedJob(launched=True, phase="running", outcome="failed"), "failed"),
        (ObservedJob(launched=True, outcome="done", stop_requested=True), "done"),
        (ObservedJob(launched=True, outcome="failed", stop_requested=True), "failed"),
        (ObservedJob(launched=True, stop_requested=True), "stopped"),
        (ObservedJob(launched=True), "lost"),
    ],
)
def test_states(job: ObservedJob, state: str) -> None:
    assert derive_state(job) == state
