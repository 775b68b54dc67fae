"""No sequence of moves leaves the table; what has ended goes back through the queue only."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.server.job_states import (
    ACTIVE_STATES,
    ENDED_STATES,
    OUTCOME_TRANSITIONS,
    PHASE_TRANSITIONS,
    IllegalTransition,
    ObservedJob,
    Transition,
    apply_transition,
    derive_state,
)
from simpletuner.server.schemas.base import JobState

STATES = get_args(JobState)
MOVES = get_args(Transition)
# Written down apart from the table: from -> where to, in one move.
LEGAL = {
    "draft": {"queued"},
    "queued": {"starting", "draft"},
    "starting": {"caching", "running", "stopping", "stopped", "failed", "done", "lost"},
    "caching": {"caching", "running", "stopping", "stopped", "failed", "done", "lost"},
    "running": {"running", "stopping", "stopped", "failed", "done", "lost"},
    "stopping": {"stopping", "stopped", "failed", "done", "lost"},
} | {ended: {"queued"} for ended in ("stopped", "failed", "done", "lost")}


@given(st.lists(st.sampled_from(MOVES), max_size=40))
def test_no_sequence_reaches_an_illegal_state(moves: list[Transition]) -> None:
    state: JobState = "draft"
    for move in moves:
        try:
            after = apply_transition(state, move)
        except IllegalTransition:
            continue
        assert after in LEGAL[state], f"{state} -{move}-> {after}"
        state = after


def test_every_legal_change_has_a_move() -> None:
    found: dict[str, set[str]] = {state: set() for state in STATES}
    for state, move in product(STATES, MOVES):
        try:
            found[state].add(apply_transition(state, move))
        except IllegalTransition:
            continue
    assert found == LEGAL


@given(
    st.builds(
        ObservedJob, st.booleans(), st.booleans(), st.sampled_from([*PHASE_TRANSITIONS]), st.booleans(),
        st.sampled_from([None, *OUTCOME_TRANSITIONS]),
    )
)  # fmt: skip
def test_whatever_the_folder_says_has_a_state(facts: ObservedJob) -> None:
    state = derive_state(facts)
    expected = ("queued",) if not facts.launched else ACTIVE_STATES if facts.alive else ENDED_STATES
    assert state in expected
    if facts.launched and not facts.alive:
        assert (state == "lost") == (facts.outcome is None and not facts.stop_requested)


def test_a_refusal_says_what_is_needed() -> None:
    with pytest.raises(IllegalTransition, match="launch: the job is done; this needs one that is queued"):
        apply_transition("done", "launch")
