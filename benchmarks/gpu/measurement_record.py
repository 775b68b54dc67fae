"""What was measured, on disk after every case, so that the same command goes on where it was."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.cases import Case

from simpletuner.training.run_folder import write_atomically

STARTED, MEASURED, CRASHED = "begun", "measured", "died"
LIBRARIES = ("torch", "triton", "diffusers", "peft", "transformers")


def installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def describe_environment(device: str, command: str) -> dict[str, Any]:
    """What the figures depend on besides this program."""
    found: dict[str, Any] = {
        "command": command, "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": platform.machine(), "python": platform.python_version(),
        **{library: installed_version(library) for library in LIBRARIES},
    }  # fmt: skip
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_bytes": about.total_memory, "cuda": torch.version.cuda,
                  "capability": list(torch.cuda.get_device_capability(0))}  # fmt: skip
    return found


class MeasurementRecord:
    """rows: by the case's name, in the order in which they were begun."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.environment: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        if file.exists():
            told = json.loads(file.read_text(encoding="utf-8"))
            self.environment = told["environment"]
            self.rows = {row["name"]: row for row in told["rows"]}

    def update_row(self, case: Case, state: str, **facts: Any) -> None:
        self.rows[case.name] = {**asdict(case), "state": state, **facts}
        self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        told = {"environment": self.environment, "rows": list(self.rows.values())}
        write_atomically(self.file, json.dumps(told, indent=1) + "\n")

    def mark_crashed(self) -> None:
        """A case that was begun and never ended took its process along."""
        for row in self.rows.values():
            if row["state"] == STARTED:
                row |= {"state": CRASHED, "why": "the process ended or was ended within this case"}
        self.save()

    def drop_started(self) -> None:
        """The clock ended it: the next run begins it again."""
        self.rows = {name: row for name, row in self.rows.items() if row["state"] != STARTED}
        self.save()

    def pending_cases(self, cases: list[Case]) -> list[Case]:
        return [case for case in cases if case.name not in self.rows]
