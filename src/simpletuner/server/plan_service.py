"""Memory plans, made by `simpletuner plan --json`, because the server never imports torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config import environment
from simpletuner.config.load import LoadedConfig
from simpletuner.config.option_catalog import all_options
from simpletuner.data.geometry import ImageSize
from simpletuner.server.api_errors import abort
from simpletuner.server.config_validation import changed_options, validate_options
from simpletuner.server.file_reader import read_log_part
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import PlanRequest, PlanResponse
from simpletuner.server.workspace import Workspace

PLAN_COMMAND = (sys.executable, "-m", "simpletuner", "plan")
PLAN_TIMEOUT_S = 300.0
ABANDONED_AFTER_S = 3.0  # while pages wait for a plan, they repeat the request every second
MAX_CACHED_PLANS = 64
MAX_PROGRESS_BYTES = 4096
MAX_PROGRESS_CHARS = 200
MAX_USER_ERROR_EXIT_CODE = 11  # exit codes of errors.py that come with a message for the user
LargestBucket = Callable[[Mapping[str, Any], Sequence[Any]], ImageSize | None]
SIZE_PATTERN = re.compile(r"\d{1,5}(\.\d{1,3})?\s*[GM]i?B?", re.IGNORECASE)


def plan_relevant_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a plan depends on, according to their declaration."""
    return {
        name: value
        for name, value in config.items()
        if name in all_options() and all_options()[name].affects
    }


def _plan_key(config: Mapping[str, Any], flags: Sequence[str]) -> str:
    text = json.dumps([config, list(flags)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PlanProcess:
    """One planning process with its temporary files. It is killed after PLAN_TIMEOUT_S."""

    def __init__(
        self,
        config: Mapping[str, Any],
        flags: Sequence[str],
        cwd: Path,
        command: Sequence[str] = PLAN_COMMAND,
    ) -> None:
        """Start the process.

        config: options, written to a temporary file. flags: further arguments.
        """
        self._folder = tempfile.TemporaryDirectory(
            prefix="simpletuner-plan-", ignore_cleanup_errors=True
        )
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        path = Path(self._folder.name, "config.json")
        path.write_text(json.dumps(dict(config)), encoding="utf-8")
        inherited = environment.copy_process_environment().items()
        environ = {
            name: value
            for name, value in inherited
            if not name.startswith(environment.VARIABLE_PREFIX)
        }
        environ["PYTHONSAFEPATH"] = "1"  # do not import modules from the workspace
        argv = [*command, "--config", str(path), "--json", *flags]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                argv, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self._started = time.monotonic()
        self._timer = threading.Timer(PLAN_TIMEOUT_S, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    @property
    def running_s(self) -> float:
        """The seconds since the process was started."""
        return time.monotonic() - self._started

    def last_line(self) -> str:
        """Return the last complete line that the process has printed to stderr, or ""."""
        part = read_log_part(self._err, -MAX_PROGRESS_BYTES, MAX_PROGRESS_BYTES).text
        lines = [line.strip() for line in part.rpartition("\n")[0].split("\n") if line.strip()]
        return lines[-1][-MAX_PROGRESS_CHARS:] if lines else ""

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Wait for at most `timeout_s`; return True if the process has ended."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def result(self) -> tuple[dict[str, Any] | None, list[ErrorDetail]]:
        """Return the plan of an ended process and its problems; the plan is None if it failed."""
        code = self._process.returncode
        output = self._out.read_bytes()
        errors = self._err.read_text("utf-8", errors="replace").strip().splitlines()
        self.terminate()
        if code == 0:
            try:
                return json.loads(output), []
            except ValueError:
                return None, [
                    ErrorDetail(
                        loc="", message="the output of `simpletuner plan` is not valid JSON"
                    )
                ]
        if (
            code is not None
            and 1 <= code <= MAX_USER_ERROR_EXIT_CODE
            and errors
            and "Traceback" not in errors[0]
        ):
            return None, [ErrorDetail(loc="", message=line) for line in errors[-12:]]
        outcome = "took too long" if code is not None and code < 0 else "failed"
        return None, [
            ErrorDetail(
                loc="",
                message=f"the plan {outcome}; run `simpletuner plan` in a terminal for details",
            )
        ]

    def terminate(self) -> None:
        """Kill the process if it is running, and remove its files."""
        self._timer.cancel()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


class PlanService:
    """Runs at most one planning process at a time.

    A request for another plan replaces it if no client has asked for its result for
    ABANDONED_AFTER_S.
    """

    def __init__(
        self,
        workspace: Workspace,
        command: Sequence[str] = PLAN_COMMAND,
        largest_bucket: LargestBucket | None = None,
    ) -> None:
        """Create the service.

        largest_bucket: returns the largest size that the images of a configuration and its datasets
        are trained at, or None; without it, the plan assumes the size that the options give.
        """
        self._workspace = workspace
        self._largest_bucket = largest_bucket
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._cached: dict[str, PlanResponse] = {}
        self._running: tuple[str, PlanProcess] | None = None
        self._last_request_t = 0.0  # time of the last request for the running plan

    def get_or_start(self, request: PlanRequest) -> PlanResponse:
        """Return a finished plan, or start planning and return "pending"; then request it again.

        A failure is returned once; the next request starts planning again.
        """
        if request.fit is not None and not SIZE_PATTERN.fullmatch(request.fit.strip()):
            abort(422, f"{request.fit!r} is not a size; use for example 12GB", "fit")
        problems, result = validate_options(self._workspace, request.config)
        loaded = result.loaded
        config = (
            self._planned_options(loaded, request.config, request.datasets)
            if loaded is not None
            else {}
        )
        flags = [] if request.fit is None else ["--fit", request.fit.strip()]
        key = _plan_key(config, flags)
        if problems or loaded is None:
            return PlanResponse(state="failed", key=key, problems=problems)
        with self._lock:
            self._collect_result()
            cached = self._cached.pop(key, None)
            if cached is None:
                self._ensure_running(key, config, flags)
                return self._pending_response(key)
            if cached.state == "ready":
                self._cached[key] = cached  # insert it again as the newest
            return cached

    def _pending_response(self, key: str) -> PlanResponse:
        if self._running is None or self._running[0] != key:
            return PlanResponse(state="pending", key=key)
        process = self._running[1]
        return PlanResponse(
            state="pending", key=key, progress=process.last_line(), running_s=process.running_s
        )

    def estimated_seconds(self, config: Mapping[str, Any], datasets: Sequence[Any]) -> float | None:
        """Return the estimated time of a step if the plan of this configuration is known."""
        _, result = validate_options(self._workspace, config)
        if result.loaded is None:
            return None
        key = _plan_key(self._planned_options(result.loaded, config, datasets), [])
        with self._lock:
            cached = self._cached.get(key)
        plan = cached.plan if cached is not None else None
        seconds = (plan or {}).get("seconds")
        return float(seconds) if isinstance(seconds, (int, float)) else None

    def _planned_options(
        self, loaded: LoadedConfig, config: Mapping[str, Any], datasets: Sequence[Any]
    ) -> dict[str, Any]:
        """Return the options for the planning process, with the size of the actual images."""
        options = plan_relevant_options(changed_options(loaded))
        bucket = self._largest_bucket(config, datasets) if self._largest_bucket else None
        if bucket is not None:
            edge = math.sqrt(bucket[0] * bucket[1])
            options |= {"resolution": round(edge, 3), "resolution_type": "pixel_area"}
        return options

    def cancel(self) -> None:
        """Kill the running process; its plan is not known then."""
        self.close()

    def close(self) -> None:
        """Kill the running process, when the server stops."""
        with self._lock:
            if self._running is not None:
                self._running[1].terminate()
                self._running = None

    def _ensure_running(self, key: str, config: Mapping[str, Any], flags: Sequence[str]) -> None:
        now = time.monotonic()
        if self._running is not None and self._running[0] != key:
            if now - self._last_request_t < ABANDONED_AFTER_S:
                return
            self._running[1].terminate()
            self._running = None
        if self._running is None:
            self._running = key, PlanProcess(config, flags, self._workspace.root, self._command)
        self._last_request_t = now

    def _collect_result(self) -> None:
        if self._running is None or not self._running[1].has_ended():
            return
        key, process = self._running
        plan, problems = process.result()
        self._running = None
        state: Any = "ready" if plan is not None else "failed"
        self._cached[key] = PlanResponse(state=state, key=key, plan=plan, problems=problems)
        if len(self._cached) > MAX_CACHED_PLANS:
            del self._cached[next(iter(self._cached))]
