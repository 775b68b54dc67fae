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
from simpletuner.events.types import Emit, Saved, Warned
from simpletuner.training import checkpoint
from simpletuner.training.optimizers import optimizer_mode
from simpletuner.training.resume import Origin
from simpletuner.training.rundir import RunFolder
from simpletuner.training.trainee import Trainee
from simpletuner.validation.heldout import HeldOut
from simpletuner.validation.scores import Scorer

Export = Callable[[Path, int], None]  # folder, step


@dataclass
class Keeper:
    """Saves and restores one run.

    identity: what must be the same for a resumed run to be the same run (base weights, data), besides the
    config. companions: by name, others who remember (held-out loss).
    """

    folder: RunFolder
    options: CheckpointOptions
    net: Trainee
    config: dict[str, object]
    identity: Mapping[str, str]
    companions: Mapping[str, HeldOut | Scorer]
    export: Export
    best_step: Callable[[], int | None]
    emit: Emit
    _saved_step: int | None = field(default=None, init=False)

    def save(self, step: int) -> None:
        if step == self._saved_step:
            return
        started = time.perf_counter()
        optimizer_mode(self.net.optimizer, training=True)
        tensors: dict[str, dict[str, Tensor]] = {"weights": {n: p.data for n, p in self.net.trained.items()}}
        tensors["optimizer"], rest = checkpoint.flatten_optimizer(self.net.optimizer.state_dict())
        state: dict[str, object] = {"optimizer": rest, "config": self.config, "identity": dict(self.identity)}
        if self.net.ema is not None:
            shadow = self.net.ema.state_dict()
            tensors["ema"] = shadow["shadow"]
            state["ema"] = {key: value for key, value in shadow.items() if key != "shadow"}
        state["companions"] = {name: one.state_dict() for name, one in self.companions.items()}
        snapshot = checkpoint.Snapshot(step, tensors, state)
        best = self.best_step()
        keep = self.options.checkpoints_total_limit
        path = checkpoint.save(self.folder.path, snapshot, partial(self._export, step=step), keep, best)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self._saved_step = step
        self.emit(Saved(step, path.name, time.perf_counter() - started, size))

    def _export(self, folder: Path, step: int) -> None:
        optimizer_mode(self.net.optimizer, training=False)
        self.export(folder, step)
        optimizer_mode(self.net.optimizer, training=True)

    def restore(self, origin: Origin) -> None:
        """Go on from a checkpoint. Later ones here belong to steps that are done anew: moved aside."""
        origin.compare_identity(self.identity, self.emit)
        self._restore(origin.folder, origin.state, checkpoint.read_tensors(origin.folder))
        here = origin.folder.parent == self.folder.path.resolve()
        self._saved_step = origin.step if here else None
        later = [
            folder
            for folder in checkpoint.existing(self.folder.path)
            if checkpoint.step_of(folder) >= origin.step + here
        ]
        if later:
            names = ", ".join(folder.name for folder in later)
            self.emit(Warned(f"{names} will be made anew; until now's are in {self.folder.set_aside(later)}"))

    def _restore(self, found: Path, state: Mapping[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        weights = tensors["weights"]
        unlike = sorted(
            name
            for name in weights.keys() | self.net.trained.keys()
            if name not in weights
            or name not in self.net.trained
            or weights[name].shape != self.net.trained[name].shape
        )
        if unlike:
            raise CheckpointError(
                f"{found} does not hold these weights: {len(unlike)} tensors differ in name or shape "
                f"(first: {unlike[0]}); choose another output_dir or the options it was made with"
            )
        with torch.no_grad():
            for name, parameter in self.net.trained.items():
                parameter.copy_(weights[name])
        try:
            self.net.optimizer.load_state_dict(
                checkpoint.unflatten_optimizer(
                    tensors.get("optimizer", {}), state["optimizer"], self.net.optimizer.state_dict()
                )
            )
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{found} holds the state of another optimizer ({error})") from error
        if self.net.ema is not None:  # begun late, the average begins at the weights of that moment
            shadow = tensors.get("ema", {name: weight.float() for name, weight in weights.items()})
            self.net.ema.load_state_dict({**state.get("ema", {"updates": 0}), "shadow": shadow})
        for name, one in self.companions.items():
            if name in state["companions"]:
                one.load_state_dict(state["companions"][name])
