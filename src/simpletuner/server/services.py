"""The services that routes depend on: `def route(services: ServicesDep)`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.server import hardware
from simpletuner.server.caption_desk import CaptionDesk
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.device_demand import require_devices
from simpletuner.server.draft_store import DraftStore
from simpletuner.server.generation_service import GenerationService
from simpletuner.server.inspection_service import InspectionService
from simpletuner.server.job_service import JobService
from simpletuner.server.live_broadcaster import LiveBroadcaster
from simpletuner.server.lora_library import LoraLibrary
from simpletuner.server.manager import Manager
from simpletuner.server.plan_service import PlanService
from simpletuner.server.preferences import Preferences
from simpletuner.server.prompt_libraries import PromptLibraries
from simpletuner.server.run_service import RunService
from simpletuner.server.settings import ServerSettings
from simpletuner.server.start_checks import StartChecks
from simpletuner.server.step_times import StepTimes
from simpletuner.server.trash import Trash
from simpletuner.server.usage import UsageRecorder, UsageSampler
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
    checks: StartChecks
    step_times: StepTimes
    trash: Trash
    generations: GenerationService
    caption_desk: CaptionDesk
    inspections: InspectionService
    loras: LoraLibrary
    preferences: Preferences
    prompt_libraries: PromptLibraries
    manager: Manager
    usage: UsageRecorder
    broadcaster: LiveBroadcaster

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Services:
        workspace = settings.workspace
        runs = RunService(workspace)
        drafts = DraftStore(workspace)
        datasets = DatasetService(workspace)
        checks = StartChecks(workspace, datasets, hardware.known_devices)
        trash, preferences = Trash(workspace), Preferences(workspace)
        require = partial(require_devices, devices=hardware.known_devices)
        jobs = JobService(workspace, runs, drafts, settings.train_command, checks.check, require)
        return cls(
            workspace=workspace,
            settings=settings,
            runs=runs,
            jobs=jobs,
            drafts=drafts,
            plans=PlanService(workspace, largest_bucket=checks.largest_bucket),
            step_times=StepTimes(jobs, runs),
            trash=trash,
            caption_desk=CaptionDesk(
                workspace, datasets, jobs, trash, settings.tool_command, hardware.known_devices
            ),
            generations=GenerationService(workspace, jobs, trash, settings.tool_command),
            inspections=InspectionService(workspace, datasets, jobs, settings.tool_command),
            loras=LoraLibrary(workspace, runs, jobs, trash, settings.tool_command),
            preferences=preferences,
            prompt_libraries=PromptLibraries(workspace, trash),
            manager=Manager(workspace, trash, runs, jobs, datasets, drafts),
            usage=UsageRecorder(
                UsageSampler(workspace.root), lambda: bool(jobs.unfinalized_folders())
            ),
            datasets=datasets,
            checks=checks,
            broadcaster=LiveBroadcaster(runs, jobs.get_queue, settings.max_sockets),
        )


def get_services(request: HTTPConnection) -> Services:
    """Return the services of the application, for HTTP and WebSocket routes."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
