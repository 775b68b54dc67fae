"""The services that routes depend on: `def route(services: ServicesDep)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.draft_store import DraftStore
from simpletuner.server.job_service import JobService
from simpletuner.server.live_broadcaster import LiveBroadcaster
from simpletuner.server.plan_service import PlanService
from simpletuner.server.run_service import RunService
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace


@dataclass(frozen=True)
class Services:
    """All services of one server, built once by create_app.

    Lasting state is in the workspace's files.
    """

    workspace: Workspace
    settings: ServerSettings
    runs: RunService
    jobs: JobService
    drafts: DraftStore
    plans: PlanService
    datasets: DatasetService
    broadcaster: LiveBroadcaster

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Services:
        workspace = settings.workspace
        runs = RunService(workspace)
        drafts = DraftStore(workspace)
        jobs = JobService(workspace, runs, drafts, settings.train_command)
        return cls(
            workspace=workspace,
            settings=settings,
            runs=runs,
            jobs=jobs,
            drafts=drafts,
            plans=PlanService(workspace),
            datasets=DatasetService(workspace),
            broadcaster=LiveBroadcaster(runs, jobs.get_queue, settings.max_sockets),
        )


def get_services(request: HTTPConnection) -> Services:
    """Return the services of the application, for HTTP and WebSocket routes."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
