"""Validation as one object: the training loop says when, everything else is decided here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.events.event_types import ContactSheetSaved, Emit, ImageSaved, WarningIssued
from simpletuner.events.formatting import pick_evenly
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.validation.contact_sheet import MAX_COLUMNS, SheetRow, write_contact_sheet
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import ImageSpec
from simpletuner.validation.sampler import generate_latents
from simpletuner.validation.validation_images import (
    GenerationSettings,
    image_metadata,
    image_path,
    is_generated,
    pixels_to_image,
    save_png,
)

BASE_STEP = 0


@dataclass
class ImageValidator:
    """Draws a run's pictures and keeps its sheets up to date.

    pictures: as `prompts.pictures` lists them. rows: a text to its (L, D) rows, from the text cache.
    decoder: makes the function from latents (1, C, H, W) to pixels (1, 3, H px, W px). The VAE behind it
    is held only while pictures are drawn: between them its memory is training's.
    strengths: others of the LoRA than its own, at which the last step's pictures are drawn too.
    """

    inference: Inference
    image_specs: Sequence[ImageSpec]
    settings: GenerationSettings
    text_embedding: Callable[[str], Tensor]
    load_decoder: Callable[[], Callable[[Tensor], Tensor]]
    run_dir: Path
    emit: Emit
    extra_strengths: Sequence[float] = ()
    _verified: set[Path] = field(default_factory=set, init=False, repr=False)

    def generate_images(self, step: int, transformer: nn.Module, weights: str = "trained") -> None:
        """Draw every picture with the weights that are in the transformer now; then the sheets.

        weights: "base" (step is 0), "trained", "ema" or `at(strength)`; the caller has seen to it.
        Pictures that are there already, whole and made the same way, are not drawn again.
        """
        if not self.image_specs:
            return
        missing = []
        for picture in self.image_specs:
            if is_generated(self.run_dir, picture, self.settings, step, weights):
                self._emit_image(picture, step, weights)
            else:
                missing.append(picture)
        if missing:
            self._generate_missing(missing, transformer, step, weights)
        self._update_sheets(step)

    def _generate_missing(
        self, missing: Sequence[ImageSpec], transformer: nn.Module, step: int, weights: str
    ) -> None:
        """Decoded one by one, which bounds the memory of the VAE."""
        steps, guidance = self.settings.steps, self.settings.guidance
        drawn = generate_latents(
            self.inference,
            transformer,
            missing,
            self.text_embedding,
            steps=steps,
            guidance=guidance,
        )
        with StageReporter(self.emit, "draw", len(missing), "pictures") as stage:
            decode = self.load_decoder()
            for picture, latents in drawn:
                path = image_path(self.run_dir, picture, step, weights)
                if not torch.isfinite(latents).all():
                    what = (
                        f"step {step}: {path.name} is not finite: broken weights or number format"
                    )
                    self.emit(WarningIssued(what))
                image = pixels_to_image(decode(torch.nan_to_num(latents)))
                save_png(
                    image,
                    path,
                    image_metadata(picture, self.settings, step=str(step), weights=weights),
                )
                self._emit_image(picture, step, weights)
                stage.advance()

    def _emit_image(self, picture: ImageSpec, step: int, weights: str) -> None:
        name = image_path(self.run_dir, picture, step, weights).relative_to(self.run_dir).as_posix()
        prompt = picture.prompt
        self.emit(
            ImageSaved(step, prompt.id, prompt.text, name, picture.seed, *picture.size_px, weights)
        )

    def _update_sheets(self, step: int) -> None:
        """One row per picture, one more where there is an average; before_after is base above newest."""
        images = self.run_dir / "images"
        found = [folder.name[5:] for folder in images.glob("step-*")]
        numbers = [
            number for number in sorted(map(int, filter(str.isdigit, found))) if number <= step
        ]
        rows = {
            (picture.stem, weights): {
                number: path
                for number in numbers
                if (path := self._existing_image(picture, number, weights))
            }
            for picture in self.image_specs
            for weights in ("trained", "ema")
        }
        steps = sorted({number for cells in rows.values() for number in cells})
        titles = {number: _step_title(number) for number in pick_evenly(steps, MAX_COLUMNS)}
        prompts = {picture.stem: picture.prompt.text for picture in self.image_specs}
        table = [
            SheetRow(stem + " (average)" * (weights == "ema"), prompts[stem], cells)
            for (stem, weights), cells in rows.items()
            if cells.keys() - {BASE_STEP} or (weights == "trained" and steps == [BASE_STEP])
        ]
        self._emit_sheet(step, write_contact_sheet(table, titles, images / "sheet.png"))
        if len(steps) < 2 or steps[0] != BASE_STEP:
            return
        columns = {
            picture.stem: picture.prompt.text or picture.stem
            for picture in self.image_specs[:MAX_COLUMNS]
        }
        last, model = steps[-1], self.settings.model
        compared = [
            SheetRow(
                label,
                f"{model}, {_step_title(number)}",
                {
                    stem: cells[number]
                    for (stem, _), cells in reversed(rows.items())
                    if number in cells
                },
            )
            for label, number in (("before", BASE_STEP), ("after", last))
        ]
        for strength in self.extra_strengths:
            shown = {
                picture.stem: self._existing_image(picture, last, strength_label(strength))
                for picture in self.image_specs
            }
            cells = {stem: path for stem, path in shown.items() if path}
            if cells:
                compared.append(
                    SheetRow(
                        f"after, {strength_label(strength)}", f"{model}, {_step_title(last)}", cells
                    )
                )
        self._emit_sheet(step, write_contact_sheet(compared, columns, images / "before_after.png"))

    def _existing_image(self, picture: ImageSpec, step: int, weights: str) -> Path | None:
        """The file of the picture if this run drew it; every weights' first column is the base."""
        kind = "base" if step == BASE_STEP else weights
        path = image_path(self.run_dir, picture, step, kind)
        if path not in self._verified and is_generated(
            self.run_dir, picture, self.settings, step, kind
        ):
            self._verified.add(path)
        return path if path in self._verified else None

    def _emit_sheet(self, step: int, path: Path) -> None:
        self.emit(ContactSheetSaved(step, path.relative_to(self.run_dir).as_posix()))


def strength_label(strength: float) -> str:
    """What the weights are called when the LoRA acts at another strength than its own."""
    return f"strength {strength:g}"


def _step_title(step: int) -> str:
    return "base" if step == BASE_STEP else f"step {step}"
