"""The life of a job: every legal move in one function, and the state that the facts of its folder add up to.

    draft -> queued -> starting -> caching -> running -> stopping -> stopped | failed | done | lost -> queued

A state is never stored: it follows from what lies on the disk, so no crash can leave a wrong one behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from simpletuner.errors import SimpleTunerError
from simpletuner.server.schemas.base import JobState

Transition = Literal[
    "queue",
    "withdraw",
    "launch",
    "prepare",
    "step",
    "ask to stop",
    "stop",
    "finish",
    "fail",
    "vanish",
]
Phase = Literal["starting", "caching", "running"]
Outcome = Literal["done", "stopped", "failed"]

ACTIVE_STATES: tuple[JobState, ...] = ("starting", "caching", "running", "stopping")
ENDED_STATES: tuple[JobState, ...] = ("stopped", "failed", "done", "lost")

# move -> (from where, to where)
TRANSITIONS: Mapping[Transition, tuple[tuple[JobState, ...], JobState]] = {
    "queue": (("draft", *ENDED_STATES), "queued"),
    "withdraw": (("queued",), "draft"),
    "launch": (("queued",), "starting"),
    "prepare": (("starting", "caching"), "caching"),
    "step": (("starting", "caching", "running"), "running"),
    "ask to stop": (ACTIVE_STATES, "stopping"),
    "stop": (ACTIVE_STATES, "stopped"),
    "finish": (ACTIVE_STATES, "done"),
    "fail": (ACTIVE_STATES, "failed"),
    "vanish": (ACTIVE_STATES, "lost"),
}
PHASE_TRANSITIONS: Mapping[Phase, tuple[Transition, ...]] = {
    "starting": (),
    "caching": ("prepare",),
    "running": ("step",),
}
OUTCOME_TRANSITIONS: Mapping[Outcome, Transition] = {
    "done": "finish",
    "stopped": "stop",
    "failed": "fail",
}


class IllegalTransition(SimpleTunerError):
    """Asked of a job whose state does not allow it."""


def apply_transition(state: JobState, move: Transition) -> JobState:
    """The state after a move. Raises IllegalMove where the state does not allow it."""
    sources, target = TRANSITIONS[move]
    if state not in sources:
        raise IllegalTransition(
            f"{move}: the job is {state}; this needs one that is {' or '.join(sources)}"
        )
    return target


@dataclass(frozen=True)
class ObservedJob:
    """What is seen of a queued job from outside. launched: its lock was once taken. alive: it is held now.

    end: how it ended, None while nobody has said so.
    """

    launched: bool = False
    alive: bool = False
    phase: Phase = "starting"
    stop_requested: bool = False
    outcome: Outcome | None = None


def derive_state(facts: ObservedJob) -> JobState:
    """The moves that lead to these facts, made one after the other."""
    moves: list[Transition] = ["queue"]
    if facts.launched:
        moves += ["launch", *PHASE_TRANSITIONS[facts.phase]]
        if facts.stop_requested:
            moves.append("ask to stop")
        if not facts.alive:
            moves.append(
                OUTCOME_TRANSITIONS[facts.outcome]
                if facts.outcome
                else "stop"
                if facts.stop_requested
                else "vanish"
            )
    state: JobState = "draft"
    for move in moves:
        state = apply_transition(state, move)
    return state
