"""Export the result of a run: a LoRA that other programs load, or a transformer folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simpletuner.adapters import lora_io
from simpletuner.config.schema import RunConfig
from simpletuner.events.event_types import Emit, WeightsSaved
from simpletuner.models.family import ModelFamily
from simpletuner.training.run_folder import RunFolder, replace_folder
from simpletuner.training.train_state import TrainState
from simpletuner.training.world import World

LORA_FILENAME = "pytorch_lora_weights.safetensors"


@dataclass
class Exporter:
    """Writes the trained weights and, with an EMA, also the average (ema/, transformer_ema/).

    file_metadata: step and weights ("trained" or "average") -> the header of the file.
    """

    family: ModelFamily
    train_state: TrainState
    run: RunConfig
    folder: RunFolder
    world: World
    emit: Emit
    file_metadata: Callable[[int, str], dict[str, str]]

    def export_to_checkpoint(self, folder: Path, step: int) -> None:
        """Write the LoRA into a checkpoint, so that it can be tried in other programs.

        The weights of a full fine-tuning are too large for that.
        """
        if self.train_state.uses_lora:
            self._export_lora(folder, step)

    def export_final(self, step: int) -> None:
        """Write the weights into the run folder itself; only the main process does."""
        if not self.world.is_main:
            return
        started = time.perf_counter()
        written = (
            self._export_lora(self.folder.path, step)
            if self.train_state.uses_lora
            else self._export_transformers(step)
        )
        for path in written:
            size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
            name = path.relative_to(self.folder.path).as_posix()
            self.emit(WeightsSaved(step, name, time.perf_counter() - started, size))

    def _export_lora(self, folder: Path, step: int) -> list[Path]:
        written = self._save_lora_layouts(
            folder / LORA_FILENAME, self.file_metadata(step, "trained")
        )
        if self.train_state.averaged_weights is not None:
            (folder / "ema").mkdir(exist_ok=True)
            with self.train_state.averaged_weights():
                written += self._save_lora_layouts(
                    folder / "ema" / LORA_FILENAME, self.file_metadata(step, "average")
                )
        return written

    def _save_lora_layouts(self, path: Path, metadata: dict[str, str]) -> list[Path]:
        """Write the LoRA in diffusers' layout and, with lora_format, in another one too."""
        layout = self.run.adapter.lora_format
        conventions = self.family.lora_conventions
        lora_io.save_adapter(self.train_state.transformer, path, conventions, metadata)
        if layout == "diffusers":
            return [path]
        second_path = lora_io.path_with_layout(path, layout)
        lora_io.save_adapter(
            self.train_state.transformer, second_path, conventions, metadata, layout
        )
        return [path, second_path]

    def _export_transformers(self, step: int) -> list[Path]:
        written = []
        for name, weights in (
            ("transformer", nullcontext),
            ("transformer_ema", self.train_state.averaged_weights),
        ):
            if weights is not None:
                folder = self.folder.path / name
                with weights():
                    replace_folder(
                        folder, partial(self.family.save_transformer, self.train_state.transformer)
                    )
                written.append(folder)
                if self.run.publishing.save_native_file:
                    written.append(folder.with_name(f"{name}_native.safetensors"))
                    described = self.file_metadata(
                        step, "trained" if name == "transformer" else "average"
                    )
                    self.family.save_native_file(folder, written[-1], described)
        return written
