"""The life of a job: every legal move in one function, and the state that the facts of its folder add up to.

    draft -> queued -> starting -> caching -> running -> stopping -> stopped | failed | done | lost -> queued

A state is never stored: it follows from what lies on the disk, so no crash can leave a wrong one behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from simpletuner.errors import SimpleTunerError
from simpletuner.server.wire.base import State

Move = Literal[
    "queue", "withdraw", "launch", "prepare", "step", "ask to stop", "stop", "finish", "fail", "vanish"
]
Phase = Literal["starting", "caching", "running"]
End = Literal["done", "stopped", "failed"]

ACTIVE: tuple[State, ...] = ("starting", "caching", "running", "stopping")
ENDED: tuple[State, ...] = ("stopped", "failed", "done", "lost")

# move -> (from where, to where)
MOVES: Mapping[Move, tuple[tuple[State, ...], State]] = {
    "queue": (("draft", *ENDED), "queued"),
    "withdraw": (("queued",), "draft"),
    "launch": (("queued",), "starting"),
    "prepare": (("starting", "caching"), "caching"),
    "step": (("starting", "caching", "running"), "running"),
    "ask to stop": (ACTIVE, "stopping"),
    "stop": (ACTIVE, "stopped"),
    "finish": (ACTIVE, "done"),
    "fail": (ACTIVE, "failed"),
    "vanish": (ACTIVE, "lost"),
}
PHASES: Mapping[Phase, tuple[Move, ...]] = {"starting": (), "caching": ("prepare",), "running": ("step",)}
ENDS: Mapping[End, Move] = {"done": "finish", "stopped": "stop", "failed": "fail"}


class IllegalMove(SimpleTunerError):
    """Asked of a job whose state does not allow it."""


def moved(state: State, move: Move) -> State:
    """The state after a move. Raises IllegalMove where the state does not allow it."""
    sources, target = MOVES[move]
    if state not in sources:
        raise IllegalMove(f"{move}: the job is {state}; this needs one that is {' or '.join(sources)}")
    return target


@dataclass(frozen=True)
class Facts:
    """What is seen of a queued job from outside. launched: its lock was once taken. alive: it is held now.

    end: how it ended, None while nobody has said so.
    """

    launched: bool = False
    alive: bool = False
    phase: Phase = "starting"
    asked: bool = False
    end: End | None = None


def state_of(facts: Facts) -> State:
    """The moves that lead to these facts, made one after the other."""
    moves: list[Move] = ["queue"]
    if facts.launched:
        moves += ["launch", *PHASES[facts.phase]]
        if facts.asked:
            moves.append("ask to stop")
        if not facts.alive:
            moves.append(ENDS[facts.end] if facts.end else "stop" if facts.asked else "vanish")
    state: State = "draft"
    for move in moves:
        state = moved(state, move)
    return state
