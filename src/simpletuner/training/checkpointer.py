"""Save the state of a run, and restore it.

What resuming needs, and what it does not: the trainable weights exactly as they are in memory, the
optimizer's state with its dtypes, the EMA, and what the evaluators compare with (the losses at step
0). Nothing random is saved, because order, noise, sigmas, dropout and rounding are functions of
(seed, step); the learning rate is a function of the step too. That is why a resumed run equals an
uninterrupted one bit for bit.

Before anything is restored, the options and the inputs (base weights, text encoder, VAE, images and
captions) are compared with those of the checkpoint; see resume.py.
"""

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
from simpletuner.models.weights.tensor_files import FileTensors, send_tensors
from simpletuner.training import checkpoint
from simpletuner.training.optimizers import set_optimizer_mode
from simpletuner.training.resume import ResumePoint, TrainingInputs
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.train_state import TrainState
from simpletuner.training.world import World
from simpletuner.validation.held_out_loss import HeldOutEvaluator
from simpletuner.validation.image_scoring import MetricEvaluator

ExportToCheckpoint = Callable[[Path, int], None]  # folder, step


@dataclass
class Checkpointer:
    """Saves and restores one run.

    micro_batches_per_step: over all processes; a resumed run keeps it. inputs: what must not
    change when a run is resumed, besides the options: base weights and data. stateful_evaluators:
    evaluators whose state is saved too, by their key in state.json. best_step: the step whose
    checkpoint is not deleted.
    """

    folder: RunFolder
    world: World
    options: CheckpointOptions
    train_state: TrainState
    config: dict[str, object]
    micro_batches_per_step: int
    inputs: TrainingInputs
    stateful_evaluators: Mapping[str, HeldOutEvaluator | MetricEvaluator]
    export_to_checkpoint: ExportToCheckpoint
    best_step: Callable[[], int | None]
    emit: Emit
    _saved_step: int | None = field(default=None, init=False)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`; does nothing if it was the last one saved or restored.

        Every process calls it, and the main one writes. A schedule-free optimizer is switched to
        the training weights, because these are the state.
        """
        if step != self._saved_step:
            with self.train_state.sharding.whole_adapter():
                self._write(step)
            self._saved_step = step

    def _write(self, step: int) -> None:
        set_optimizer_mode(self.train_state.optimizer, training=True)
        if self.train_state.sharding.is_sharded and self._all_know_it_is_saved(step):
            return
        self._warn_if_replicas_differ()
        if not self.world.is_main:
            if self.train_state.sharding.is_sharded:
                for tensors in self._collect(step).tensors.values():
                    send_tensors(tensors)
            return
        started = time.perf_counter()
        path = checkpoint.save_checkpoint(
            self.folder.path,
            self._collect(step),
            partial(self._export_in_eval_mode, step=step),
            self.options.checkpoints_total_limit,
            self.best_step(),
        )
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self.emit(WeightsSaved(step, path.name, time.perf_counter() - started, size))

    def _warn_if_replicas_differ(self) -> None:
        """Warn where the processes no longer have the same weights, which each computes by itself.

        The same sums give the same weights on equal hardware; GPUs of different kinds may round
        differently.
        """
        if self.world.size == 1 or self.train_state.sharding.is_sharded:
            return
        parameters = self.train_state.trainable_parameters.values()
        digest = [str(torch.hash_tensor(param.detach()).tolist()) for param in parameters]
        for rank, other in enumerate(self.world.gather_json(digest)):
            if self.world.is_main and other != digest:
                self.emit(
                    WarningIssued(
                        f"the weights of process {rank} differ from those of process 0, which are "
                        "saved: do all processes run on the same kind of device?"
                    )
                )

    def _all_know_it_is_saved(self, step: int) -> bool:
        """Return on every process what the main one finds, because all take part in writing."""
        is_saved = self.world.is_main and checkpoint.is_saved(self.folder.path, step)
        return bool(self.world.broadcast_json(is_saved))

    def _collect(self, step: int) -> checkpoint.CheckpointData:
        """Return all state; every process of a sharded network must call it."""
        train_state, sharding = self.train_state, self.train_state.sharding
        parameters = train_state.trainable_parameters
        tensors: dict[str, FileTensors] = {
            "weights": sharding.whole_tensors(
                {name: param.data for name, param in parameters.items()}
            )
        }
        tensors["optimizer"], rest = sharding.whole_optimizer_state(train_state.optimizer)
        state: dict[str, object] = {
            "optimizer": rest,
            "config": self.config,
            "micro_batches_per_step": self.micro_batches_per_step,
            "identity": dict(self.inputs.identity),
            "samples": dict(self.inputs.sample_hashes),
            "held_out": list(self.inputs.held_out),
        }
        if train_state.ema is not None:
            shadow = train_state.ema.state_dict()
            tensors["ema"] = sharding.whole_tensors(shadow["shadow"])
            state["ema"] = {key: value for key, value in shadow.items() if key != "shadow"}
        state["companions"] = {
            name: evaluator.state_dict() for name, evaluator in self.stateful_evaluators.items()
        }
        return checkpoint.CheckpointData(step, tensors, state)

    def _export_in_eval_mode(self, folder: Path, step: int) -> None:
        set_optimizer_mode(self.train_state.optimizer, training=False)
        self.export_to_checkpoint(folder, step)
        set_optimizer_mode(self.train_state.optimizer, training=True)

    def restore(self, resume_point: ResumePoint) -> None:
        """Load a checkpoint.

        Later checkpoints in this run folder belong to steps that will be trained again; they are
        moved to earlier-N/.
        """
        resume_point.require_same_inputs(self.inputs, self.emit)
        folder = resume_point.folder
        tensors = checkpoint.read_tensors(folder, self.train_state.sharding.pick_stored)
        self._load_state(folder, resume_point.state, tensors)
        is_own = resume_point.folder.parent == self.folder.path.resolve()
        self._saved_step = resume_point.step if is_own else None
        self.world.wait_for_all("restore")  # nothing is moved while another process reads it
        later = [
            folder
            for folder in checkpoint.list_checkpoints(self.folder.path)
            if checkpoint.checkpoint_step(folder) >= resume_point.step + is_own
        ]
        if later and self.world.is_main:
            names = ", ".join(folder.name for folder in later)
            self.emit(
                WarningIssued(
                    f"{names} will be trained again; the old folders were moved to "
                    f"{self.folder.set_aside(later)}"
                )
            )

    def load_weights(self, step: int) -> bool:
        """Load weights, average and optimizer state of a checkpoint of this run, for an export.

        The evaluators keep their state. Returns False, on every process, where it is missing or
        damaged. The weights are those that are evaluated: of a schedule-free optimizer the average.
        """
        is_there = self.world.is_main and checkpoint.is_saved(self.folder.path, step)
        if not self.world.broadcast_json(is_there):
            return False
        folder = self.folder.path / f"checkpoint-{step}"
        tensors = checkpoint.read_tensors(folder, self.train_state.sharding.pick_stored)
        set_optimizer_mode(self.train_state.optimizer, training=True)
        state = {**checkpoint.read_state(folder), "companions": {}}
        self._load_state(folder, state, tensors)
        set_optimizer_mode(self.train_state.optimizer, training=False)
        return True

    def _load_state(
        self, folder: Path, state: Mapping[str, Any], tensors: dict[str, dict[str, Tensor]]
    ) -> None:
        train_state, weights = self.train_state, tensors["weights"]
        parameters, sharding = train_state.trainable_parameters, train_state.sharding
        shapes = {name: sharding.stored_shape(param) for name, param in parameters.items()}
        require_same_tensors(folder, weights, shapes)
        sharding.load_weights(parameters, weights)
        fresh = train_state.optimizer.state_dict()
        try:
            saved = checkpoint.unflatten_optimizer(
                tensors.get("optimizer", {}), state["optimizer"], fresh
            )
            sharding.load_optimizer_state(train_state.optimizer, saved, self.emit)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} has the state of another optimizer ({error})"
            ) from error
        if train_state.ema is not None:
            # Where use_ema was switched on later, the average starts from the weights of this step.
            shadow = tensors.get("ema", {name: weight.float() for name, weight in weights.items()})
            train_state.ema.load_state_dict({**state.get("ema", {"updates": 0}), "shadow": shadow})
        for name, evaluator in self.stateful_evaluators.items():
            if name in state["companions"]:
                evaluator.load_state_dict(state["companions"][name])


def require_same_tensors(
    folder: Path, weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    """Raise CheckpointError if the saved weights differ from the parameters in name or shape."""
    different = sorted(
        name
        for name in weights.keys() | shapes.keys()
        if name not in weights or name not in shapes or weights[name].shape != shapes[name]
    )
    if different:
        count = "1 tensor differs" if len(different) == 1 else f"{len(different)} tensors differ"
        raise CheckpointError(
            f"{folder} does not match this training: {count} in name or shape "
            f"(first: {different[0]}). Choose another output_dir, or the options that the "
            "checkpoint was trained with"
        )
