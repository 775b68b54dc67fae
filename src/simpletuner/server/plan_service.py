"""What a configuration would need: `simpletuner plan --json` as a process, because only that knows torch."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config import environment
from simpletuner.config.option_catalog import all_options
from simpletuner.server.api_errors import abort
from simpletuner.server.config_validation import changed_options, validate_options
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import PlanRequest, PlanResponse
from simpletuner.server.workspace import Workspace

PLAN_COMMAND = (sys.executable, "-m", "simpletuner", "plan")
PLAN_TIMEOUT_S = 300.0
ABANDONED_AFTER_S = 3.0  # pages ask again every second while they wait
MAX_CACHED_PLANS = 64
MAX_USER_ERROR_EXIT_CODE = 11  # of errors.py: what a person can mend, told in sentences
SIZE_PATTERN = re.compile(r"\d{1,5}(\.\d{1,3})?\s*[GM]i?B?", re.IGNORECASE)


def plan_relevant_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a plan depends on, as they declare it; others would repeat the same plan."""
    return {
        name: value
        for name, value in config.items()
        if name in all_options() and all_options()[name].affects
    }


class PlanProcess:
    """One running process. Its files are gone with it; it ends by itself after LIMIT_S."""

    def __init__(
        self,
        config: Mapping[str, Any],
        words: Sequence[str],
        cwd: Path,
        planner: Sequence[str] = PLAN_COMMAND,
    ) -> None:
        """config: options, written to a file of its own, so that none of a person's is read. words: flags."""
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
        environ["PYTHONSAFEPATH"] = "1"  # modules that lie in the workspace are none of ours
        argv = [*planner, "--config", str(path), "--json", *words]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                argv, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self._timer = threading.Timer(PLAN_TIMEOUT_S, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def has_ended(self, patience_s: float = 0.0) -> bool:
        """Whether it has ended, after waiting for that long at most."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def result(self) -> tuple[dict[str, Any] | None, list[ErrorDetail]]:
        """Of an ended one: the plan, or what it said instead."""
        code = self._process.returncode
        said = (
            self._out.read_bytes(),
            self._err.read_text("utf-8", errors="replace").strip().splitlines(),
        )
        self.terminate()
        if code == 0:
            try:
                return json.loads(said[0]), []
            except ValueError:
                return None, [ErrorDetail(loc="", message="the plan is not readable")]
        if (
            code is not None
            and 1 <= code <= MAX_USER_ERROR_EXIT_CODE
            and said[1]
            and "Traceback" not in said[1][0]
        ):
            return None, [ErrorDetail(loc="", message=line) for line in said[1][-12:]]
        ended = "took too long" if code is not None and code < 0 else "failed"
        return None, [
            ErrorDetail(
                loc="", message=f"the plan {ended}; `simpletuner plan` in a terminal says more"
            )
        ]

    def terminate(self) -> None:
        """Kill it if it runs, and remove its files."""
        self._timer.cancel()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


class PlanService:
    """At most one process. Another question ends it once nobody has asked for its answer for ABANDONED_S."""

    def __init__(self, place: Workspace, planner: Sequence[str] = PLAN_COMMAND) -> None:
        self._workspace = place
        self._command = tuple(planner)
        self._lock = threading.Lock()
        self._cached: dict[str, PlanResponse] = {}
        self._running: tuple[str, PlanProcess] | None = None
        self._last_request_t = 0.0  # when one last asked for what runs

    def get_or_start(self, asked: PlanRequest) -> PlanResponse:
        """Ready, failed, or pending: ask again then. A failure is told once; the next question tries anew."""
        if asked.fit is not None and not SIZE_PATTERN.fullmatch(asked.fit.strip()):
            abort(422, "write a size such as 12GB", "fit")
        problems, tried = validate_options(self._workspace, asked.config)
        config = (
            plan_relevant_options(changed_options(tried.loaded)) if tried.loaded is not None else {}
        )
        words = [] if asked.fit is None else ["--fit", asked.fit.strip()]
        key = hashlib.sha256(json.dumps([config, words], sort_keys=True).encode()).hexdigest()[:16]
        if problems or tried.loaded is None:
            return PlanResponse(state="failed", key=key, problems=problems)
        with self._lock:
            self._collect_result()
            known = self._cached.pop(key, None)
            if known is None:
                self._ensure_running(key, config, words)
                return PlanResponse(state="pending", key=key)
            if known.state == "ready":
                self._cached[key] = known  # as the newest
            return known

    def close(self) -> None:
        """End what runs; the server does, before it goes."""
        with self._lock:
            if self._running is not None:
                self._running[1].terminate()
                self._running = None

    def _ensure_running(self, key: str, config: Mapping[str, Any], words: Sequence[str]) -> None:
        now = time.monotonic()
        if self._running is not None and self._running[0] != key:
            if now - self._last_request_t < ABANDONED_AFTER_S:
                return
            self._running[1].terminate()
            self._running = None
        if self._running is None:
            self._running = key, PlanProcess(config, words, self._workspace.root, self._command)
        self._last_request_t = now

    def _collect_result(self) -> None:
        if self._running is None or not self._running[1].has_ended():
            return
        key, planning = self._running
        plan, problems = planning.result()
        self._running = None
        state: Any = "ready" if plan is not None else "failed"
        self._cached[key] = PlanResponse(state=state, key=key, plan=plan, problems=problems)
        if len(self._cached) > MAX_CACHED_PLANS:
            del self._cached[next(iter(self._cached))]
