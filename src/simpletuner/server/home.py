"""The one object that routes work with: `def route(home: Here)`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.server.live import Watcher
from simpletuner.server.place import Place
from simpletuner.server.settings import Settings

if TYPE_CHECKING:
    from simpletuner.server.datasets import Datasets
    from simpletuner.server.drafts import Drafts
    from simpletuner.server.jobs import Jobs
    from simpletuner.server.planning import Plans
    from simpletuner.server.runs import Runs


@dataclass(frozen=True)
class Home:
    """Made once by `create_app`; what changes is in the folders."""

    place: Place
    settings: Settings
    runs: Runs
    jobs: Jobs
    drafts: Drafts
    plans: Plans
    datasets: Datasets

    @cached_property
    def live(self) -> Watcher:
        """One for all pages."""
        return Watcher(self.runs, self.jobs.queue, self.settings.max_sockets)


def home(request: HTTPConnection) -> Home:
    """The dependency of routes, for HTTP and WebSocket."""
    found: Home = request.app.state.home
    return found


Here = Annotated[Home, Depends(home)]
