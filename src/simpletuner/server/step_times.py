"""Correction of the estimated time of a step by the steps that runs have measured.

The plan knows the arithmetic of a step, but not how well this machine does it. The estimate is
stored with the job when a run is queued; after its first steps, measured / estimated is a factor
for later estimates.
"""

from __future__ import annotations

import json

from simpletuner.atomic_io import write_atomically
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.job_service import JobService
from simpletuner.server.run_service import RunService

ESTIMATE_FILE = "estimate.json"
MAX_JOBS_READ = 20  # the newest ones
FACTOR_BOUNDS = (0.02, 50.0)


class StepTimes:
    """The estimates and measurements of the jobs of a workspace."""

    def __init__(self, jobs: JobService, runs: RunService) -> None:
        self._jobs = jobs
        self._runs = runs

    def record_estimate(self, job: str, seconds: float) -> None:
        """Store the estimated time of a step with a job."""
        path = self._jobs.jobs_dir / job / ESTIMATE_FILE
        write_atomically(path, json.dumps({"seconds": seconds}) + "\n")

    def correction(self, flavour: str) -> tuple[float | None, str]:
        """Return measured / estimated time of a step, and the name of the run that measured it.

        The newest run of the flavour is taken; (None, "") if there is none.
        """
        newest = sorted(self._jobs.newest_by_run().values(), key=lambda job: -job.queued_t)
        for job in newest[:MAX_JOBS_READ]:
            folder = self._jobs.jobs_dir / job.id
            estimate = (read_json_object(folder / ESTIMATE_FILE) or {}).get("seconds")
            config = read_json_object(folder / "config" / "config.json") or {}
            if not isinstance(estimate, (int, float)) or estimate <= 0:
                continue
            if config.get("model_flavour", "base") != flavour:
                continue
            measured = self._runs.seconds_per_step(job.run)
            if measured is not None:
                low, high = FACTOR_BOUNDS
                return min(high, max(low, measured / estimate)), job.name
        return None, ""
