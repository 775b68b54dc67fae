"""Pages of the list of runs: the filter, the order, and the part that a page shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from simpletuner.server.job_states import ACTIVE_STATES
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.runs import RunPage, RunQuery, RunSummary

STATES_OF_GROUP: Mapping[str, Sequence[JobState]] = {
    "active": ("queued", *ACTIVE_STATES),
    "done": ("done",),
    "ended": ("stopped", "failed", "lost"),
}
# The list is in the order "newest" already.
SORT_KEYS: Mapping[str, Callable[[RunSummary], Any]] = {
    "name": lambda run: _natural_key(run.name),
    "loss": lambda run: float("inf") if run.loss is None else run.loss,
    "progress": lambda run: -(run.step / run.total_steps if run.total_steps else 0.0),
}
SORTED_BY_EVENTS = ("loss", "progress")


def select_page(
    runs: Sequence[RunSummary], query: RunQuery, unread: Set[str] = frozenset()
) -> RunPage:
    """Return the part of the list that the query asks for.

    runs: all runs, in the order of RunService.summaries. unread: ids of runs whose summary is of a
    part of their events.
    """
    # A run that has only been queued is shown in the queue.
    begun = [run for run in runs if query.queued or run.state != "queued" or run.step > 0]
    words = query.words.casefold().split()
    matches = [run for run in begun if _matches(run, query, words)]
    if query.sort in SORT_KEYS:
        matches.sort(key=SORT_KEYS[query.sort])
    shown = matches[query.offset : query.offset + query.limit]
    depends_on = matches if query.sort in SORTED_BY_EVENTS else shown
    return RunPage(
        total=len(matches),
        offset=query.offset,
        runs=shown,
        all_runs=len(begun),
        archived=sum(run.archived for run in begun),
        unread=sum(run.id in unread for run in depends_on),
    )


def _matches(run: RunSummary, query: RunQuery, words: Sequence[str]) -> bool:
    """Return True if the run has the state, and its name, a tag or the note has every word."""
    if run.archived and not query.archived:
        return False
    if query.state != "any" and run.state not in STATES_OF_GROUP[query.state]:
        return False
    text = "\n".join((run.name, run.note, *run.tags)).casefold()
    return all(word in text for word in words)


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts "run-9" before "run-10", and digits before letters."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [
        (False, int(part), "") if part[0] in "0123456789" else (True, 0, part) for part in parts
    ]
