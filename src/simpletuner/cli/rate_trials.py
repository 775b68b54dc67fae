"""The trials of a search for the learning rate: each is a training of its own, in its own folder.

A trial is `simpletuner train` with another rate and less to measure. It resumes by itself, and what
is finished is read from its event log, so that the search needs no state of its own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_text
from simpletuner.cli.rate_plan import SearchPlan, TrialResult
from simpletuner.config import environment
from simpletuner.config.launch_environment import PARENT_VARIABLE
from simpletuner.config.load import resolved_options
from simpletuner.config.option_catalog import all_options
from simpletuner.config.schema import RunConfig
from simpletuner.errors import SimpleTunerError, TrainingDiverged, TrainingStopped
from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import SampleLossesMeasured

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
LOG_TAIL_LINES = 15
# Options of the run that a trial leaves at their defaults: what it shows, publishes and averages.
DEFAULT_IN_TRIALS = (
    "num_train_epochs", "lr_end", "lr_power", "checkpoint_epoch_interval", "validation_prompt",
    "user_prompt_library", "validation_image", "validation_using_datasets", "evaluation_type",
    "pretrained_evaluation_model_name_or_path", "evaluation_prompts", "evaluation_step_interval",
    "eval_epoch_interval", "report_to", "webhook_config", "push_to_hub", "push_checkpoints_to_hub",
    "use_ema", "ema_decay", "ema_update_interval", "ema_device", "ema_validation",
    "early_stopping", "early_stopping_patience", "learning_rate_search", "resume_with_changes",
    "validation_prompt_library", "save_native_file",
)  # fmt: skip


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial. fold: from 1; 0 with held-out images."""

    root: Path
    rate: float
    fold: int = 0

    @property
    def path(self) -> Path:
        fold = f"-fold-{self.fold}" if self.fold else ""
        return self.root / f"rate-{self.rate:g}{fold}"

    def read_losses(self, steps: int) -> dict[str, float] | None:
        """Return the losses after `steps` by sample, None where they are not measured yet."""
        losses = None
        for record in read_events(self.path / "events.jsonl"):
            event = record.event
            if isinstance(event, SampleLossesMeasured) and (event.split, event.step) == (
                "eval",
                steps,
            ):
                losses = {name: last for name, (_, last) in event.losses.items()}
        return losses

    def diverged(self) -> bool:
        """Return whether the loss of the trial stopped being finite."""
        try:
            record = json.loads(read_bounded_text(self.path / "exit.json"))
            return bool(record["exit_code"] == TrainingDiverged.exit_code)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False


def trial_options(
    run: RunConfig, plan: SearchPlan, folder: TrialFolder, steps: int, cache_dir: Path
) -> dict[str, Any]:
    """Return the options of a trial that ends at `steps`."""
    options = {
        name: value
        for name, value in resolved_options(run).items()
        if value is not None and name not in DEFAULT_IN_TRIALS
        and value != all_options()[name].default
    }  # fmt: skip
    if folder.fold:
        options.pop("validation_split", None)
        options["validation_fold"] = f"{folder.fold}/{plan.folds}"
    warmup = min(run.optimizer.lr_warmup_steps, plan.rungs[0] // 2)
    return {
        **options,
        "learning_rate": folder.rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": warmup,
        "output_dir": str(folder.path),
        "cache_dir": str(cache_dir),
        "max_train_steps": steps,
        "checkpoint_step_interval": min(run.checkpoint.checkpoint_step_interval, steps),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "validation_disable": True,
        "eval_loss_disable": False,
        "eval_at_start": False,
        "eval_steps_interval": steps,
        "eval_sigma_count": plan.sigmas,
        "num_eval_images": plan.images,
        "num_train_loss_images": 0,
    }


def run_trial(
    run: RunConfig, plan: SearchPlan, root: Path, rate: float, steps: int, cache_dir: Path
) -> TrialResult:
    """Train one rate to `steps`, in every fold, and return its losses by sample.

    Raises TrainingStopped after a signal, and SimpleTunerError where a trial fails for another
    reason than its rate.
    """
    losses: dict[str, float] = {}
    for fold in range(1, plan.folds + 1) if plan.folds > 1 else (0,):
        folder = TrialFolder(root, rate, fold)
        measured = folder.read_losses(steps)
        if measured is None and not folder.diverged():
            options = trial_options(run, plan, folder, steps, cache_dir)
            config = root / f"{folder.path.name}.json"
            write_atomically(config, json.dumps(options, indent=2) + "\n")
            train_in_child(config, folder, root / f"{folder.path.name}.log")
            measured = folder.read_losses(steps)
        if measured is None or not all(_is_number(loss) for loss in measured.values()):
            return TrialResult(rate, steps, None)
        losses |= measured
    return TrialResult(rate, steps, losses)


def _is_number(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def train_in_child(config: Path, folder: TrialFolder, log: Path) -> None:
    """Run `simpletuner train`; signals are passed on, so that it saves a checkpoint first."""
    environ = {**environment.copy_process_environment(), PARENT_VARIABLE: str(os.getpid())}
    command = [sys.executable, "-m", "simpletuner", "train", "--config", str(config)]
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, env=environ, stdout=output, stderr=output, start_new_session=True
        )
        with _signals_passed_to(child):
            code = child.wait()
    if code == TrainingStopped.exit_code:
        raise TrainingStopped(
            f"stopped during the trial of {folder.rate:g}. Run the same command to continue"
        )
    if code and not (code == TrainingDiverged.exit_code and folder.diverged()):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise SimpleTunerError(
            f"the trial of learning rate {folder.rate:g} ended with exit code {code}; its log is "
            f"{log}:\n" + "\n".join(f"  {line}" for line in tail)
        )


@contextmanager
def _signals_passed_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    numbers = [signal.Signals[name] for name in SIGNALS if name in signal.Signals.__members__]
    before: Mapping[signal.Signals, Any] = {
        number: signal.signal(number, forward) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
