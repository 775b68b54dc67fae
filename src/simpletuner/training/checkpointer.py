"""What a run saves, and how it goes on from what it saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner.config.schema import CheckpointOptions
from simpletuner.errors import CheckpointError
from simpletuner.events.event_types import Emit, WarningIssued, WeightsSaved
from simpletuner.training import checkpoint
from simpletuner.training.optimizers import set_optimizer_mode
from simpletuner.training.resume import ResumePoint
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.train_state import TrainState
from simpletuner.validation.held_out_loss import HeldOutEvaluator
from simpletuner.validation.image_scoring import Scorer

ExportToCheckpoint = Callable[[Path, int], None]  # folder, step


@dataclass
class Checkpointer:
    """Saves and restores one run.

    identity: what must be the same for a resumed run to be the same run (base weights, data),
    besides the config. companions: by name, others who remember (held-out loss).
    """

    folder: RunFolder
    options: CheckpointOptions
    train_state: TrainState
    config: dict[str, object]
    identity: Mapping[str, str]
    stateful_evaluators: Mapping[str, HeldOutEvaluator | Scorer]
    export_to_checkpoint: ExportToCheckpoint
    best_step: Callable[[], int | None]
    emit: Emit
    _saved_step: int | None = field(default=None, init=False)

    def save(self, step: int) -> None:
        if step == self._saved_step:
            return
        started = time.perf_counter()
        set_optimizer_mode(self.train_state.optimizer, training=True)
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": {n: p.data for n, p in self.train_state.trainable_parameters.items()}
        }
        tensors["optimizer"], rest = checkpoint.flatten_optimizer(
            self.train_state.optimizer.state_dict()
        )
        state: dict[str, object] = {
            "optimizer": rest,
            "config": self.config,
            "identity": dict(self.identity),
        }
        if self.train_state.ema is not None:
            shadow = self.train_state.ema.state_dict()
            tensors["ema"] = shadow["shadow"]
            state["ema"] = {key: value for key, value in shadow.items() if key != "shadow"}
        state["companions"] = {
            name: one.state_dict() for name, one in self.stateful_evaluators.items()
        }
        snapshot = checkpoint.CheckpointData(step, tensors, state)
        best = self.best_step()
        keep = self.options.checkpoints_total_limit
        path = checkpoint.save_checkpoint(
            self.folder.path, snapshot, partial(self._export_in_eval_mode, step=step), keep, best
        )
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self._saved_step = step
        self.emit(WeightsSaved(step, path.name, time.perf_counter() - started, size))

    def _export_in_eval_mode(self, folder: Path, step: int) -> None:
        set_optimizer_mode(self.train_state.optimizer, training=False)
        self.export_to_checkpoint(folder, step)
        set_optimizer_mode(self.train_state.optimizer, training=True)

    def restore(self, origin: ResumePoint) -> None:
        """Go on from a checkpoint. Later ones here belong to steps that are done anew: moved aside."""
        origin.require_same_identity(self.identity, self.emit)
        self._load_state(origin.folder, origin.state, checkpoint.read_tensors(origin.folder))
        here = origin.folder.parent == self.folder.path.resolve()
        self._saved_step = origin.step if here else None
        later = [
            folder
            for folder in checkpoint.list_checkpoints(self.folder.path)
            if checkpoint.checkpoint_step(folder) >= origin.step + here
        ]
        if later:
            names = ", ".join(folder.name for folder in later)
            self.emit(
                WarningIssued(
                    f"{names} will be made anew; until now's are in {self.folder.set_aside(later)}"
                )
            )

    def _load_state(
        self, found: Path, state: Mapping[str, Any], tensors: dict[str, dict[str, Tensor]]
    ) -> None:
        weights = tensors["weights"]
        unlike = sorted(
            name
            for name in weights.keys() | self.train_state.trainable_parameters.keys()
            if name not in weights
            or name not in self.train_state.trainable_parameters
            or weights[name].shape != self.train_state.trainable_parameters[name].shape
        )
        if unlike:
            raise CheckpointError(
                f"{found} does not hold these weights: {len(unlike)} tensors differ in name or shape "
                f"(first: {unlike[0]}); choose another output_dir or the options it was made with"
            )
        with torch.no_grad():
            for name, parameter in self.train_state.trainable_parameters.items():
                parameter.copy_(weights[name])
        try:
            self.train_state.optimizer.load_state_dict(
                checkpoint.unflatten_optimizer(
                    tensors.get("optimizer", {}),
                    state["optimizer"],
                    self.train_state.optimizer.state_dict(),
                )
            )
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{found} holds the state of another optimizer ({error})"
            ) from error
        if (
            self.train_state.ema is not None
        ):  # begun late, the average begins at the weights of that moment
            shadow = tensors.get("ema", {name: weight.float() for name, weight in weights.items()})
            self.train_state.ema.load_state_dict(
                {**state.get("ema", {"updates": 0}), "shadow": shadow}
            )
        for name, one in self.stateful_evaluators.items():
            if name in state["companions"]:
                one.load_state_dict(state["companions"][name])
