"""What a run saves, and how it goes on from what it saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.compare import training_difference
from simpletuner.config.schema import CheckpointOptions
from simpletuner.errors import CheckpointError
from simpletuner.events.types import Emit, Saved, Warned
from simpletuner.training import checkpoint
from simpletuner.training.ema import Ema
from simpletuner.training.optimizers import optimizer_mode
from simpletuner.training.rundir import RunFolder

Export = Callable[[Path], None]


@dataclass
class Keeper:
    """Saves and restores one run.

    trained: name -> parameter, exactly what is trained. identity: what must be the same for a resumed run
    to be the same run (base weights, data), besides the config. companions: JSON-able state of others
    (held-out loss), as (name -> (get, set)).
    """

    folder: RunFolder
    options: CheckpointOptions
    trained: dict[str, nn.Parameter]
    optimizer: Optimizer
    ema: Ema | None
    config: dict[str, object]
    identity: Mapping[str, str]
    companions: Mapping[str, tuple[Callable[[], object], Callable[[Mapping[str, object]], None]]]
    export: Export
    best_step: Callable[[], int | None]
    emit: Emit

    def save(self, step: int) -> None:
        started = time.perf_counter()
        optimizer_mode(self.optimizer, training=True)
        tensors: dict[str, dict[str, Tensor]] = {"weights": {n: p.data for n, p in self.trained.items()}}
        tensors["optimizer"], rest = checkpoint.flatten_optimizer(self.optimizer.state_dict())
        state: dict[str, object] = {"optimizer": rest, "config": self.config, "identity": dict(self.identity)}
        if self.ema is not None:
            shadow = self.ema.state_dict()
            tensors["ema"] = shadow["shadow"]
            state["ema"] = {key: value for key, value in shadow.items() if key != "shadow"}
        state["companions"] = {name: get() for name, (get, _) in self.companions.items()}
        snapshot = checkpoint.Snapshot(step, tensors, state)
        best = self.best_step()
        keep = self.options.checkpoints_total_limit
        path = checkpoint.save(self.folder.path, snapshot, self._export, keep, best)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self.emit(Saved(step, path.name, time.perf_counter() - started, size))

    def _export(self, folder: Path) -> None:
        optimizer_mode(self.optimizer, training=False)
        self.export(folder)
        optimizer_mode(self.optimizer, training=True)

    def resume(self) -> int:
        """Restore the checkpoint the options name; returns its step, 0 for a fresh start."""
        found = self._find()
        if found is None:
            return 0
        snapshot = checkpoint.load(found)
        self._compare(found, snapshot.state)
        self._restore(found, snapshot)
        return snapshot.step

    def _find(self) -> Path | None:
        wanted = self.options.resume_from_checkpoint
        if wanted == "never":  # run.py has moved earlier results aside before any file was opened
            return None
        if wanted in ("latest", "must"):
            found = checkpoint.newest_sound(self.folder.path, self.emit)
            if found is None and wanted == "must":
                raise CheckpointError(
                    f"resume_from_checkpoint = must, and {self.folder.path} has no checkpoint"
                )
            return found
        for candidate in (Path(wanted), self.folder.path / wanted):
            if candidate.is_dir():
                return candidate
        known = ", ".join(path.name for path in checkpoint.existing(self.folder.path)) or "none"
        raise CheckpointError(f"resume_from_checkpoint = {wanted!r} does not exist; here: {known}")

    def _compare(self, found: Path, state: Mapping[str, object]) -> None:
        old: dict[str, object] = state["config"]  # type: ignore[assignment]
        differences = training_difference(old, self.config)
        saved: Mapping[str, str] = state["identity"]  # type: ignore[assignment]
        differences += [
            f"{what}: the checkpoint was made with {saved.get(what)!r}, now it is {value!r}"
            for what, value in self.identity.items()
            if saved.get(what) != value
        ]
        if not differences:
            return
        listed = "".join(f"\n  {line}" for line in differences)
        if self.options.resume_from_checkpoint in ("latest", "must"):
            raise CheckpointError(
                f"{found} was made by another training:{listed}\n"
                "To begin anew keep it and choose another output_dir, or say --resume_from_checkpoint=never "
                f"(earlier results are moved aside); to go on in spite of it say "
                f"--resume_from_checkpoint={found.name}"
            )
        self.emit(Warned(f"going on from {found} although it was made by another training:{listed}"))

    def _restore(self, found: Path, snapshot: checkpoint.Snapshot) -> None:
        weights = snapshot.tensors["weights"]
        unlike = sorted(
            name
            for name in weights.keys() | self.trained.keys()
            if name not in weights
            or name not in self.trained
            or weights[name].shape != self.trained[name].shape
        )
        if unlike:
            raise CheckpointError(
                f"{found} does not hold these weights: {len(unlike)} tensors differ in name or shape "
                f"(first: {unlike[0]}); choose another output_dir or the options it was made with"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        rest: Mapping[str, object] = snapshot.state["optimizer"]  # type: ignore[assignment]
        tensors = snapshot.tensors.get("optimizer", {})
        try:
            restored = checkpoint.unflatten_optimizer(tensors, rest, self.optimizer.state_dict())
            self.optimizer.load_state_dict(restored)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{found} holds the state of another optimizer ({error})") from error
        if self.ema is not None and "ema" in snapshot.tensors:
            counters: dict[str, object] = snapshot.state["ema"]  # type: ignore[assignment]
            self.ema.load_state_dict({**counters, "shadow": snapshot.tensors["ema"]})
        companions: Mapping[str, Mapping[str, object]] = snapshot.state["companions"]  # type: ignore[assignment]
        for name, (_, put) in self.companions.items():
            if name in companions:
                put(companions[name])
