"""The one object that routes work with: `def route(home: Here)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.server.datasets import Datasets
from simpletuner.server.drafts import Drafts
from simpletuner.server.jobs import Jobs
from simpletuner.server.live import Watcher
from simpletuner.server.place import Place
from simpletuner.server.planning import Plans
from simpletuner.server.runs import Runs
from simpletuner.server.settings import Settings


@dataclass(frozen=True)
class Home:
    """Made once by `create_app`; what changes is in the folders. live: one for all pages."""

    place: Place
    settings: Settings
    runs: Runs
    jobs: Jobs
    drafts: Drafts
    plans: Plans
    datasets: Datasets
    live: Watcher

    @classmethod
    def of(cls, settings: Settings) -> Home:
        place = settings.place
        runs, drafts = Runs(place), Drafts(place)
        jobs = Jobs(place, runs, drafts, settings.trainer)
        live = Watcher(runs, jobs.queue, settings.max_sockets)
        return cls(place, settings, runs, jobs, drafts, Plans(place), Datasets(place), live)


def home(request: HTTPConnection) -> Home:
    """The dependency of routes, for HTTP and WebSocket."""
    found: Home = request.app.state.home
    return found


Here = Annotated[Home, Depends(home)]
