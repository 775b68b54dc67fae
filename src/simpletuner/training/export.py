"""The weights people take away: a LoRA that other programs load, or a transformer folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simpletuner.adapters import files
from simpletuner.config.schema import RunConfig
from simpletuner.events.types import Emit, Saved
from simpletuner.models.family import ModelFamily
from simpletuner.training.rundir import RunFolder, replace_folder
from simpletuner.training.trainee import Trainee

LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass
class Exporter:
    """Writes finished weights; with an EMA, the average beside them (ema/, transformer_ema/).

    describe: step and weights ("trained", "average") -> what a file's header tells.
    """

    family: ModelFamily
    net: Trainee
    run: RunConfig
    folder: RunFolder
    emit: Emit
    describe: Callable[[int, str], dict[str, str]]

    def into_checkpoint(self, folder: Path, step: int) -> None:
        """A LoRA is small enough to stand in every checkpoint, ready to be tried elsewhere."""
        if self.net.uses_lora:
            self._lora(folder, step)

    def finish(self, step: int) -> None:
        """The weights at the top of the run folder."""
        started = time.perf_counter()
        written = self._lora(self.folder.path, step) if self.net.uses_lora else self._transformers(step)
        for path in written:
            size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
            name = path.relative_to(self.folder.path).as_posix()
            self.emit(Saved(step, name, time.perf_counter() - started, size))

    def _lora(self, folder: Path, step: int) -> list[Path]:
        written = self._layouts(folder / LORA_NAME, self.describe(step, "trained"))
        if self.net.average is not None:
            (folder / "ema").mkdir(exist_ok=True)
            with self.net.average():
                written += self._layouts(folder / "ema" / LORA_NAME, self.describe(step, "average"))
        return written

    def _layouts(self, path: Path, metadata: dict[str, str]) -> list[Path]:
        """The file that is always written, and the one of another layout beside it."""
        layout = self.run.adapter.lora_format
        files.save(self.net.transformer, path, metadata)
        if layout == "diffusers":
            return [path]
        files.save(self.net.transformer, files.beside(path, layout), metadata, layout)
        return [path, files.beside(path, layout)]

    def _transformers(self, step: int) -> list[Path]:
        written = []
        for name, weights in (("transformer", nullcontext), ("transformer_ema", self.net.average)):
            if weights is not None:
                folder = self.folder.path / name
                with weights():
                    replace_folder(folder, partial(self.family.save_transformer, self.net.transformer))
                written.append(folder)
                if self.run.publishing.save_native_file:
                    written.append(folder.with_name(f"{name}_native.safetensors"))
                    described = self.describe(step, "trained" if name == "transformer" else "average")
                    self.family.save_native(folder, written[-1], described)
        return written
