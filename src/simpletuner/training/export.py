"""The weights people take away: a LoRA that other programs load, or a transformer folder."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simpletuner import __version__
from simpletuner.adapters import files
from simpletuner.config.schema import RunConfig
from simpletuner.events.types import Emit, Saved
from simpletuner.models.family import ModelFamily, Source
from simpletuner.training.rundir import RunFolder, replace_folder
from simpletuner.training.trainee import Trainee

LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass
class Exporter:
    """Writes finished weights; with an EMA, the average beside them (ema/, transformer_ema/)."""

    family: ModelFamily
    source: Source
    net: Trainee
    run: RunConfig
    folder: RunFolder
    emit: Emit

    def into_checkpoint(self, folder: Path) -> None:
        """A LoRA is small enough to stand in every checkpoint, ready to be tried elsewhere."""
        if self.net.uses_lora:
            self._lora(folder)

    def finish(self, step: int) -> None:
        """The weights at the top of the run folder."""
        started = time.perf_counter()
        written = self._lora(self.folder.path) if self.net.uses_lora else self._transformers()
        for path in written:
            size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
            name = path.relative_to(self.folder.path).as_posix()
            self.emit(Saved(step, name, time.perf_counter() - started, size))

    def _lora(self, folder: Path) -> list[Path]:
        written = self._layouts(folder / LORA_NAME, "trained")
        if self.net.average is not None:
            (folder / "ema").mkdir(exist_ok=True)
            with self.net.average():
                written += self._layouts(folder / "ema" / LORA_NAME, "average")
        return written

    def _layouts(self, path: Path, weights: str) -> list[Path]:
        """The file that is always written, and the one of another layout beside it."""
        layout, metadata = self.run.adapter.lora_format, self._metadata(weights)
        files.save(self.net.transformer, path, metadata)
        if layout == "diffusers":
            return [path]
        files.save(self.net.transformer, files.beside(path, layout), metadata, layout)
        return [path, files.beside(path, layout)]

    def _transformers(self) -> list[Path]:
        written = []
        for name, weights in (("transformer", nullcontext), ("transformer_ema", self.net.average)):
            if weights is not None:
                written.append(self.folder.path / name)
                with weights():
                    replace_folder(
                        written[-1], partial(self.family.save_transformer, self.net.transformer, self.source)
                    )
        return written

    def _metadata(self, weights: str) -> dict[str, str]:
        adapter, optimizer, base = self.run.adapter, self.run.optimizer, self.source.name
        return {
            "software": f"simpletuner {__version__}",
            "base_model": Path(base).name if Path(base).is_absolute() else base,
            "base_model_precision": self.run.model.base_model_precision,
            "model_family": self.family.name,
            "weights": weights,
            "rank": str(adapter.lora_rank),
            "alpha": str(adapter.lora_alpha or adapter.lora_rank),
            "learning_rate": str(optimizer.learning_rate),
            "optimizer": optimizer.optimizer,
        }
