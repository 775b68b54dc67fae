"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.compare_configs import training_differences
from simpletuner.config.option_layers import RUN_LENGTH_OPTIONS
from simpletuner.errors import CheckpointError
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.training import checkpoint


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint. by_name: asked for by the person, who may have a reason to change options."""

    folder: Path
    state: Mapping[str, object]
    chosen_explicitly: bool

    @property
    def step(self) -> int:
        return int(str(self.state["step"]))

    def require_same_config(self, config: Mapping[str, object], emit: Emit) -> None:
        """Refuses other options that matter; tells when a new length bends the learning rate."""
        old: Mapping[str, object] = self.state["config"]  # type: ignore[assignment]
        self._require_no_differences(training_differences(old, config), emit)
        lengths = [
            (name, old.get(name), config[name])
            for name in RUN_LENGTH_OPTIONS
            if old.get(name) != config[name]
        ]
        if lengths and config["lr_scheduler"] != "constant":
            said = ", ".join(f"{name} was {was}, is {now}" for name, was, now in lengths)
            emit(
                WarningIssued(
                    f"{said}: from here on lr_scheduler {config['lr_scheduler']} follows the new length"
                )
            )

    def require_same_identity(self, identity: Mapping[str, str], emit: Emit) -> None:
        """Refuses other weights, pictures or captions than the checkpoint was made with."""
        saved: Mapping[str, str] = self.state["identity"]  # type: ignore[assignment]
        differences = [
            f"{what}: the checkpoint was made with {saved.get(what)!r}, now it is {value!r}"
            for what, value in identity.items()
            if saved.get(what) != value
        ]
        self._require_no_differences(differences, emit)

    def _require_no_differences(self, differences: Sequence[str], emit: Emit) -> None:
        if not differences:
            return
        listed = "".join(f"\n  {line}" for line in differences)
        if not self.chosen_explicitly:
            raise CheckpointError(
                f"{self.folder} was made by another training:{listed}\n"
                "To begin anew keep it and choose another output_dir, or say --resume_from_checkpoint=never "
                f"(earlier results are moved aside); to go on in spite of it say "
                f"--resume_from_checkpoint={self.folder.name}"
            )
        emit(
            WarningIssued(
                f"going on from {self.folder} although it was made by another training:{listed}"
            )
        )


def find_resume_point(run_dir: Path, wanted: str, emit: Emit) -> ResumePoint | None:
    """wanted: resume_from_checkpoint: latest, must, never, a name in the run folder, or a path."""
    if wanted == "never":  # run.py has moved earlier results aside before any file was opened
        return None
    if wanted in ("latest", "must"):
        found = checkpoint.find_latest_valid(run_dir, emit)
        if found is None and wanted == "must":
            raise CheckpointError(f"resume_from_checkpoint = must, and {run_dir} has no checkpoint")
        return None if found is None else ResumePoint(found, checkpoint.read_state(found), False)
    for folder in (run_dir / wanted, Path(wanted).expanduser()):
        if folder.is_dir():
            checkpoint.verify_checkpoint(folder)
            return ResumePoint(folder.resolve(), checkpoint.read_state(folder), True)
    known = ", ".join(path.name for path in checkpoint.list_checkpoints(run_dir)) or "none"
    raise CheckpointError(f"resume_from_checkpoint = {wanted!r} does not exist; here: {known}")
