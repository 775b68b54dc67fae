"""A memory plan of the wizard's current options, computed by a process in the background."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpletuner.server.plan_service import PlanProcess

PLAN_TIMEOUT_S = 3.0
GB = 1e9


class BackgroundPlan:
    """Keep at most one planning process, and the last finished plan."""

    def __init__(self, cwd: Path) -> None:
        self._cwd = cwd
        self._running: tuple[dict[str, Any], PlanProcess] | None = None
        self._finished: tuple[dict[str, Any], float] | None = None

    def start(self, options: Mapping[str, Any], device: str) -> None:
        """Plan these options, unless that is running or done. device: "cuda", "mps" or "cpu"."""
        from simpletuner.server.plan_service import PlanProcess, plan_relevant_options

        config = plan_relevant_options(options)
        if self._running is not None and self._running[0] != config:
            self.close()
        finished = self._finished is not None and self._finished[0] == config
        if self._running is None and not finished:
            process = PlanProcess(config, ["--device", device], self._cwd)
            self._running = config, process

    def wait_gb(self) -> float | None:
        """Return the planned GB of the options of the last start.

        None if no plan is ready within PLAN_TIMEOUT_S.
        """
        if self._running is not None and self._running[1].has_ended(PLAN_TIMEOUT_S):
            config, process = self._running
            plan = process.result()[0]
            self._finished = None if plan is None else (config, plan["peak"] / GB)
            self._running = None
        return self._finished[1] if self._finished is not None and self._running is None else None

    def finished_gb(self, option: str, value: Any, default: Any) -> float | None:
        """Return the GB of the last finished plan if `option` had this value in it."""
        if self._finished is None or self._finished[0].get(option, default) != value:
            return None
        return self._finished[1]

    def close(self) -> None:
        """Stop the running process."""
        if self._running is not None:
            self._running[1].terminate()
            self._running = None
