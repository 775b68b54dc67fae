"""Export the result of a run: a LoRA that other programs load, or a transformer folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from simpletuner.adapters import lora_io
from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.compatibility import LoraConventions
from simpletuner.config.schema import AdapterOptions, RunConfig
from simpletuner.events.event_types import Emit, WeightsSaved
from simpletuner.models.family import ModelFamily
from simpletuner.training.model_metadata import uses_bundled_base
from simpletuner.training.run_folder import RunFolder, replace_folder
from simpletuner.training.train_state import AveragedWeights, TrainState
from simpletuner.training.world import World

LORA_FILENAME = "pytorch_lora_weights.safetensors"
ONLY_THIS_PROGRAM = "this program alone (the bundled model has sizes that others do not support)"


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

        The weights of a full fine-tuning are too large for that, and so is the native file of a
        LoHa or LoKr, whose fused matrices are several times as large.
        """
        if self.train_state.uses_lora:
            is_lycoris = self.run.adapter.lora_type == "lycoris"
            self._export_lora(folder, step, with_second=not is_lycoris)

    def export_final(self, step: int) -> None:
        """Write the weights into the run folder itself; only the main process does.

        The others send it their parts of a sharded network.
        """
        with self.train_state.sharding.whole_adapter():
            self._export_final(step)

    def _export_final(self, step: int) -> None:
        if not self.world.is_main:
            # A LoRA is whole on every process here.
            if self.train_state.sharding.is_sharded and not self.train_state.uses_lora:
                self._send_transformers()
            return
        started = time.perf_counter()
        written = (
            self._export_lora(self.folder.path, step)
            if self.train_state.uses_lora
            else self._export_transformers(step)
        )
        for path, programs in written.items():
            size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
            name = path.relative_to(self.folder.path).as_posix()
            seconds = time.perf_counter() - started
            self.emit(WeightsSaved(step, name, seconds, size, programs))

    def _export_lora(self, folder: Path, step: int, with_second: bool = True) -> dict[Path, str]:
        written = self._save_lora_layouts(
            folder / LORA_FILENAME, self.file_metadata(step, "trained"), with_second
        )
        if self.train_state.averaged_weights is not None:
            (folder / "ema").mkdir(exist_ok=True)
            with self.train_state.averaged_weights():
                written |= self._save_lora_layouts(
                    folder / "ema" / LORA_FILENAME, self.file_metadata(step, "average"), with_second
                )
        return written

    def _save_lora_layouts(
        self, path: Path, metadata: dict[str, str], with_second: bool
    ) -> dict[Path, str]:
        """Write the default file and the second one; return path -> programs that load it."""
        conventions = self.family.lora_conventions
        layouts: dict[Path, str | None] = {path: None}
        second = second_layout(self.run.adapter, self.train_state.transformer, conventions)
        if second is not None and with_second:
            layouts[lora_io.path_with_layout(path, second)] = second
        written = {}
        for target, layout in layouts.items():
            summary = lora_io.save_adapter(
                self.train_state.transformer, target, conventions, metadata, layout
            )
            written[target] = programs_that_load(
                self.run, layout or lora_io.default_layout(summary.kind), summary.kind, conventions
            )
        return written

    def _kinds_of_weights(self) -> list[tuple[str, AveragedWeights]]:
        """Return folder name -> context in which the network has the weights to export."""
        average = self.train_state.averaged_weights
        kinds: list[tuple[str, AveragedWeights]] = [("transformer", nullcontext)]
        return kinds if average is None else [*kinds, ("transformer_ema", average)]

    def _save_transformer(self, folder: Path | None) -> None:
        state = self.train_state
        self.family.save_transformer(state.transformer, folder, state.sharding.whole)

    def _send_transformers(self) -> None:
        """Take part in _export_transformers of the main process."""
        for _, weights in self._kinds_of_weights():
            with weights():
                self._save_transformer(None)

    def _export_transformers(self, step: int) -> dict[Path, str]:
        bundled = uses_bundled_base(self.run)
        written = {}
        for name, weights in self._kinds_of_weights():
            folder = self.folder.path / name
            with weights():
                # A new export must not destroy the previous one before it is complete.
                replace_folder(folder, self._save_transformer)
            written[folder] = ONLY_THIS_PROGRAM if bundled else "diffusers"
            if self.run.publishing.save_native_file:
                native = folder.with_name(f"{name}_native.safetensors")
                written[native] = ONLY_THIS_PROGRAM if bundled else "ComfyUI and Forge"
                described = self.file_metadata(
                    step, "trained" if name == "transformer" else "average"
                )
                self.family.save_native_file(folder, native, described)
        return written


def second_layout(
    adapter: AdapterOptions, transformer: nn.Module, conventions: LoraConventions
) -> str | None:
    """Return the layout of the second LoRA file; None without one.

    "auto" is kohya, except for a DoRA and for modules outside the blocks, which it cannot hold, and
    for architectures that no program loads by it.
    """
    if adapter.lora_format in ("none", "diffusers"):
        return None
    if adapter.lora_format != "auto":
        return adapter.lora_format
    outside = conventions.names.modules_outside_blocks
    holds_all = not any(name in outside for name in adapted_modules(transformer))
    known = "kohya" in conventions.verified_programs
    return "kohya" if known and holds_all and not adapter.use_dora else None


def programs_that_load(run: RunConfig, layout: str, kind: str, conventions: LoraConventions) -> str:
    """Return the programs that apply such a file as it was trained: "diffusers and ComfyUI"."""
    if uses_bundled_base(run):
        return ONLY_THIS_PROGRAM
    # The others ignore the magnitudes of a DoRA, or divide by other norms.
    names = ("diffusers",) if kind == "DoRA" else conventions.verified_programs[layout]
    if kind not in ("LoRA", "DoRA"):
        names = tuple(name for name in names if name in conventions.lycoris_programs)
    titles = list(dict.fromkeys(conventions.programs[name].title for name in names))
    return " and ".join([", ".join(titles[:-1]), titles[-1]] if len(titles) > 1 else titles)
