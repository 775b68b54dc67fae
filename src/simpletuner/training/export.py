"""The weights people take away: a LoRA that other programs load, or a transformer folder."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from simpletuner import __version__
from simpletuner.adapters import files
from simpletuner.config.schema import RunConfig
from simpletuner.events.types import Emit, Saved
from simpletuner.models.family import ModelFamily, Source
from simpletuner.training.rundir import RunFolder
from simpletuner.training.stages import Average

LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass
class Exporter:
    """Writes finished weights; with an EMA, the average beside them (ema/, transformer_ema/)."""

    family: ModelFamily
    source: Source
    transformer: nn.Module
    run: RunConfig
    average: Average | None
    folder: RunFolder
    uses_lora: bool
    emit: Emit

    def into_checkpoint(self, folder: Path) -> None:
        """A LoRA is small enough to stand in every checkpoint, ready to be tried elsewhere."""
        if self.uses_lora:
            self._lora(folder)

    def finish(self, step: int) -> None:
        """The weights at the top of the run folder."""
        started = time.perf_counter()
        if self.uses_lora:
            written = self._lora(self.folder.path)
        else:
            written = self._transformers()
        for path in written:
            size = (
                sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                if path.is_dir()
                else path.stat().st_size
            )
            name = path.relative_to(self.folder.path).as_posix()
            self.emit(Saved(step, name, time.perf_counter() - started, size))

    def _lora(self, folder: Path) -> list[Path]:
        written = [folder / LORA_NAME]
        files.save(self.transformer, written[0], self._metadata("trained"))
        if self.average is not None:
            (folder / "ema").mkdir(exist_ok=True)
            written.append(folder / "ema" / LORA_NAME)
            with self.average():
                files.save(self.transformer, written[1], self._metadata("average"))
        return written

    def _transformers(self) -> list[Path]:
        written = []
        for name, average in (("transformer", False), ("transformer_ema", True)):
            if average and self.average is None:
                continue
            target = self.folder.path / name
            work = target.with_name(f".writing-{name}-{os.getpid()}")
            shutil.rmtree(work, ignore_errors=True)
            with self.average() if self.average is not None and average else nullcontext():
                self.family.save_transformer(self.transformer, self.source, work)
            if target.exists():
                shutil.rmtree(target)
            work.rename(target)
            written.append(target)
        return written

    def _metadata(self, weights: str) -> dict[str, str]:
        adapter, optimizer = self.run.adapter, self.run.optimizer
        return {
            "software": f"simpletuner {__version__}",
            "base_model": Path(self.source.name).name
            if Path(self.source.name).is_absolute()
            else self.source.name,
            "model_family": self.family.name,
            "weights": weights,
            "rank": str(adapter.lora_rank),
            "alpha": str(adapter.lora_alpha or adapter.lora_rank),
            "learning_rate": str(optimizer.learning_rate),
            "optimizer": optimizer.optimizer,
        }
