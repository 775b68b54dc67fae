"""No sequence of moves leaves the table; what has ended goes back through the queue only."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.server.states import (
    ACTIVE,
    ENDED,
    ENDS,
    PHASES,
    Facts,
    IllegalMove,
    Move,
    moved,
    state_of,
)
from simpletuner.server.wire.base import State

STATES = get_args(State)
MOVES = get_args(Move)
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
def test_no_sequence_reaches_an_illegal_state(moves: list[Move]) -> None:
    state: State = "draft"
    for move in moves:
        try:
            after = moved(state, move)
        except IllegalMove:
            continue
        assert after in LEGAL[state], f"{state} -{move}-> {after}"
        state = after


def test_every_legal_change_has_a_move() -> None:
    found: dict[str, set[str]] = {state: set() for state in STATES}
    for state, move in product(STATES, MOVES):
        try:
            found[state].add(moved(state, move))
        except IllegalMove:
            continue
    assert found == LEGAL


@given(
    st.builds(
        Facts, st.booleans(), st.booleans(), st.sampled_from([*PHASES]), st.booleans(),
        st.sampled_from([None, *ENDS]),
    )
)  # fmt: skip
def test_whatever_the_folder_says_has_a_state(facts: Facts) -> None:
    state = state_of(facts)
    expected = ("queued",) if not facts.launched else ACTIVE if facts.alive else ENDED
    assert state in expected
    if facts.launched and not facts.alive:
        assert (state == "lost") == (facts.end is None and not facts.asked)


def test_a_refusal_says_what_is_needed() -> None:
    with pytest.raises(IllegalMove, match="launch: the job is done; this needs one that is queued"):
        moved("done", "launch")
