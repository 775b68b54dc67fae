"""The one object that routes work with: `def route(home: Here)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.draft_service import DraftService
from simpletuner.server.job_service import JobService
from simpletuner.server.live_broadcaster import LiveBroadcaster
from simpletuner.server.plan_service import PlanService
from simpletuner.server.run_service import RunService
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace


@dataclass(frozen=True)
class Services:
    """Made once by `create_app`; what changes is in the folders. live: one for all pages."""

    workspace: Workspace
    settings: ServerSettings
    runs: RunService
    jobs: JobService
    drafts: DraftService
    plans: PlanService
    datasets: DatasetService
    broadcaster: LiveBroadcaster

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Services:
        place = settings.workspace
        runs, drafts = RunService(place), DraftService(place)
        jobs = JobService(place, runs, drafts, settings.train_command)
        live = LiveBroadcaster(runs, jobs.get_queue, settings.max_sockets)
        return cls(
            place, settings, runs, jobs, drafts, PlanService(place), DatasetService(place), live
        )


def get_services(request: HTTPConnection) -> Services:
    """The dependency of routes, for HTTP and WebSocket."""
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(get_services)]
