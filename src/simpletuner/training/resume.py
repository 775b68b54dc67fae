"""Find the checkpoint to resume from, and decide whether it may be resumed.

A checkpoint continues the same run only if the options that change the result, the base weights and
the data are the same. Options whose resume_policy is "free" may change; a new length is allowed
with a warning, because it changes the learning-rate schedule from here on. Any other difference is
refused when the checkpoint was found automatically ("latest", "must"), so that an edited config
does not continue another run by accident. A checkpoint that the user names is resumed with a
warning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.compare_configs import training_differences
from simpletuner.config.option_layers import RUN_LENGTH_OPTIONS
from simpletuner.errors import CheckpointError
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.training import checkpoint
from simpletuner.training.own_files import list_results
from simpletuner.training.world import World

OLDER_DATA_KEY = "pictures and captions"  # in the identity of checkpoints of earlier versions
MAX_NAMED_SAMPLES = 5


@dataclass(frozen=True)
class TrainingInputs:
    """Inputs that a resumed run compares in addition to its options; see PreparedInputs.

    batch_sizes: value of each option in encoded_now. held_out: ids of the training images that are
    held out, which a resumed run keeps.
    """

    identity: Mapping[str, str]
    older_identity: Mapping[str, str]
    sample_hashes: Mapping[str, str]
    encoded_now: Mapping[str, int]
    batch_sizes: Mapping[str, int]
    held_out: Sequence[str] = ()


def _changed_samples(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return one line per kind of change with the first samples; none where nothing was stored."""
    if not saved or not now:
        return []
    common = [(name, saved[name].split(), now[name].split()) for name in saved if name in now]
    kinds = {
        "images that have changed": [name for name, old, new in common if old[0] != new[0]],
        "captions that have changed": [name for name, old, new in common if old[1] != new[1]],
        "samples that were added": sorted(now.keys() - saved.keys()),
        "samples that are missing": sorted(saved.keys() - now.keys()),
    }
    lines = []
    for kind, names in kinds.items():
        if names:
            more = len(names) - MAX_NAMED_SAMPLES
            listed = ", ".join(ascii(name)[1:-1] for name in names[:MAX_NAMED_SAMPLES])
            lines.append(f"{kind}: {listed}{f' and {more} more' if more > 0 else ''}")
    return lines


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint.

    chosen_explicitly: the user named it, or set resume_with_changes, so options may differ.
    """

    folder: Path
    state: Mapping[str, object]
    chosen_explicitly: bool

    @property
    def step(self) -> int:
        return int(str(self.state["step"]))

    def micro_batches_per_step(self, accumulation: int, processes: int, emit: Emit) -> int:
        """Return how many micro-batches a step has, over all processes: as many as before.

        accumulation: gradient_accumulation_steps, per process. Another number of processes keeps
        the step as it was and divides its micro-batches differently; only a changed
        gradient_accumulation_steps is a difference to the checkpoint.
        """
        old: Mapping[str, int] = self.state["config"]  # type: ignore[assignment]
        saved_accumulation = old["gradient_accumulation_steps"]
        saved = int(str(self.state.get("micro_batches_per_step", saved_accumulation)))
        wanted = accumulation * processes
        if wanted == saved:
            return saved
        # The user changed the number of processes only, so the training stays what it was.
        if accumulation == saved_accumulation:
            shares = ", ".join(str(len(share)) for share in World(size=processes).shares(saved))
            emit(
                NoticeIssued(
                    f"a step has {saved} micro-batches, as in the checkpoint, and not "
                    f"gradient_accumulation_steps x processes = {wanted}; the processes compute "
                    f"{shares} of them"
                )
            )
            return saved
        self._require_no_differences(
            [
                f"gradient_accumulation_steps x processes (micro-batches of a step) was {saved}, "
                f"is {accumulation} x {processes} = {wanted}"
            ],
            emit,
        )
        return wanted

    def require_same_config(self, config: Mapping[str, object], emit: Emit) -> None:
        """Refuse other options that change the result; warn where the length of the run changed."""
        old: Mapping[str, object] = self.state["config"]  # type: ignore[assignment]
        self._require_no_differences(training_differences(old, config), emit)
        lengths = [
            (name, old.get(name), config[name])
            for name in RUN_LENGTH_OPTIONS
            if old.get(name) != config[name]
        ]
        if lengths and config["lr_scheduler"] != "constant":
            changes = ", ".join(f"{name} was {was}, is {now}" for name, was, now in lengths)
            emit(
                WarningIssued(
                    f"{changes}: from here on lr_scheduler {config['lr_scheduler']} follows the "
                    "new length"
                )
            )

    def require_same_inputs(self, inputs: TrainingInputs, emit: Emit) -> None:
        """Refuse base weights, images or captions other than those of the checkpoint.

        A checkpoint of an earlier version is compared by what that version stored.
        """
        saved: Mapping[str, str] = self.state["identity"]  # type: ignore[assignment]
        identity = inputs.older_identity if OLDER_DATA_KEY in saved else inputs.identity
        differences = [
            f"{name}: {saved.get(name)!r} in the checkpoint, now {identity.get(name)!r}"
            for name in dict.fromkeys((*identity, *saved))
            if saved.get(name) != identity.get(name)
        ]
        if differences:
            samples: Mapping[str, str] = self.state.get("samples", {})  # type: ignore[assignment]
            differences += _changed_samples(samples, inputs.sample_hashes)
        config: Mapping[str, object] = self.state["config"]  # type: ignore[assignment]
        differences += [
            f"{name} was {config.get(name)}, is {inputs.batch_sizes[name]}, and {count} entries of "
            "the cache were encoded again with it"
            for name, count in inputs.encoded_now.items()
            if count and config.get(name) not in (None, inputs.batch_sizes[name])
        ]
        self._require_no_differences(differences, emit)

    def _require_no_differences(self, differences: Sequence[str], emit: Emit) -> None:
        if not differences:
            return
        listed = "".join(f"\n  {line}" for line in differences)
        if not self.chosen_explicitly:
            raise CheckpointError(
                f"{self.folder} was trained with different settings:{listed}\n"
                "Start over: choose another output_dir, or --resume_from_checkpoint=never (earlier "
                "results are moved to a subfolder). Resume with the new settings, which the "
                "history of the run records: --resume_with_changes, or "
                f"--resume_from_checkpoint={self.folder.name}"
            )
        emit(
            WarningIssued(
                f"resumed at step {self.step} with changes to {self.folder.name}:{listed}"
            )
        )


def _refuse_to_replace_results(run_dir: Path) -> None:
    """Raise CheckpointError where a start from step 0 would replace what an earlier run made."""
    damaged = sorted(run_dir.glob("damaged-checkpoint-*"))
    results = list_results(run_dir)
    if damaged:
        problem = f"all checkpoints are damaged ({', '.join(path.name for path in damaged)})"
    elif results:
        problem = f"there is no checkpoint, but the result of a finished run ({results[0].name})"
    else:
        return
    raise CheckpointError(
        f"{run_dir}: {problem}. To train from step 0, add --resume_from_checkpoint=never (earlier "
        "results are moved to a subfolder), or choose another output_dir; to continue, put a "
        "checkpoint from a backup back"
    )


def find_common_resume_point(
    run_dir: Path, wanted: str, world: World, emit: Emit
) -> ResumePoint | None:
    """Return the checkpoint that all processes resume from; the main one chooses and verifies it.

    Raises the errors of find_resume_point.
    """
    chosen_folder: tuple[str, bool] | None = None
    if world.is_main:
        chosen = find_resume_point(run_dir, wanted, emit)
        chosen_folder = None if chosen is None else (str(chosen.folder), chosen.chosen_explicitly)
    chosen_folder = world.broadcast_json(chosen_folder)
    if chosen_folder is None:
        return None
    folder = Path(chosen_folder[0])
    return ResumePoint(folder, checkpoint.read_state(folder), chosen_folder[1])


def find_resume_point(run_dir: Path, wanted: str, emit: Emit) -> ResumePoint | None:
    """Return the checkpoint to resume from; None to start from step 0.

    wanted: the value of resume_from_checkpoint: latest, must, never, the name of a checkpoint in
    the run folder, or a path.

    Raises CheckpointError when a checkpoint is required and is missing or damaged.
    """
    if wanted == "never":  # run.py has moved earlier results away before any file was opened
        return None
    if wanted in ("latest", "must"):
        newest = checkpoint.find_latest_valid(run_dir, emit)
        if newest is None and wanted == "must":
            raise CheckpointError(f"resume_from_checkpoint = must, and {run_dir} has no checkpoint")
        if newest is None:
            _refuse_to_replace_results(run_dir)
        return None if newest is None else ResumePoint(newest, checkpoint.read_state(newest), False)
    # A name in the run folder first, then a path.
    for folder in (run_dir / wanted, Path(os.path.expanduser(wanted))):
        if folder.is_dir():
            checkpoint.verify_checkpoint(folder)
            return ResumePoint(folder.resolve(), checkpoint.read_state(folder), True)
    existing = ", ".join(path.name for path in checkpoint.list_checkpoints(run_dir)) or "none"
    raise CheckpointError(
        f"resume_from_checkpoint = {wanted!r} does not exist; checkpoints of this run: {existing}"
    )
