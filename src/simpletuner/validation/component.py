"""Validation as one object: the training loop says when, everything else is decided here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.events.progress import Stage
from simpletuner.events.types import Emit, ImageSaved, SheetSaved, Warned
from simpletuner.validation.images import Settings, describe, is_drawn, path_of, save_png, to_image
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import Picture
from simpletuner.validation.sampler import latents_of
from simpletuner.validation.sheet import MOST_COLUMNS, Row, chosen, draw_sheet

BASE_STEP = 0


@dataclass
class Validator:
    """Draws a run's pictures and keeps its sheets up to date.

    pictures: as `prompts.pictures` lists them. rows: a text to its (L, D) rows, from the text cache.
    decode: latents (1, C, H, W) to pixels (1, 3, H px, W px); it may load the VAE on first use.
    """

    inference: Inference
    pictures: Sequence[Picture]
    settings: Settings
    rows: Callable[[str], Tensor]
    decode: Callable[[Tensor], Tensor]
    run_dir: Path
    emit: Emit
    _verified: set[Path] = field(default_factory=set, init=False, repr=False)

    def run(self, step: int, transformer: nn.Module, weights: str = "trained") -> None:
        """Draw every picture with the weights that are in the transformer now; then the sheets.

        weights: "base" (the caller has set adapters to strength 0; step is 0), "trained" or "ema".
        Pictures that are there already, whole and made the same way, are not drawn again.
        """
        if not self.pictures:
            return
        missing = []
        for picture in self.pictures:
            if is_drawn(self.run_dir, picture, self.settings, step, weights):
                self._tell_picture(picture, step, weights)
            else:
                missing.append(picture)
        if missing:
            self._draw(missing, transformer, step, weights)
        self._draw_sheets(step)

    def _draw(self, missing: Sequence[Picture], transformer: nn.Module, step: int, weights: str) -> None:
        """Decoded one by one, which bounds the memory of the VAE."""
        steps, guidance = self.settings.steps, self.settings.guidance
        drawn = latents_of(self.inference, transformer, missing, self.rows, steps=steps, guidance=guidance)
        with Stage(self.emit, "draw", len(missing), "pictures") as stage:
            for picture, latents in drawn:
                path = path_of(self.run_dir, picture, step, weights)
                if not torch.isfinite(latents).all():
                    what = f"step {step}: {path.name} is not finite: broken weights or number format"
                    self.emit(Warned(what))
                image = to_image(self.decode(torch.nan_to_num(latents)))
                save_png(image, path, describe(picture, self.settings, step=str(step), weights=weights))
                self._tell_picture(picture, step, weights)
                stage.advance()

    def _tell_picture(self, picture: Picture, step: int, weights: str) -> None:
        name = path_of(self.run_dir, picture, step, weights).relative_to(self.run_dir).as_posix()
        prompt = picture.prompt
        self.emit(ImageSaved(step, prompt.id, prompt.text, name, picture.seed, *picture.size_px, weights))

    def _draw_sheets(self, step: int) -> None:
        steps = [number for number in self._steps() if number <= step]
        columns = {_column(number): number for number in chosen(steps)}
        rows = [
            Row(
                picture.stem + (" (average)" if weights == "ema" else ""),
                picture.prompt.text,
                self._cells(picture, columns, weights),
            )
            for picture in self.pictures
            for weights in ("trained", "ema")
        ]
        images = self.run_dir / "images"
        shown = [row for row in rows if row.cells.keys() - {_column(BASE_STEP)}] or rows[::2]
        self._tell(step, draw_sheet(shown, {name: name for name in columns}, images / "sheet.png"))
        if BASE_STEP in steps and steps[-1] != BASE_STEP:
            self._tell(step, self._draw_before_after(steps[-1], images / "before_after.png"))

    def _draw_before_after(self, step: int, path: Path) -> Path:
        """Two rows, the base above and the newest weights below, one column per picture."""
        columns = {picture.stem: picture for picture in self.pictures[:MOST_COLUMNS]}
        rows = []
        for label, number in (("before", BASE_STEP), ("after", step)):
            cells = {}
            for stem, picture in columns.items():
                shown = self._cells(picture, {stem: number}, "trained")
                cells.update(shown or self._cells(picture, {stem: number}, "ema"))
            rows.append(Row(label, f"{self.settings.model}, {_column(number)}", cells))
        titles = {stem: picture.prompt.text or stem for stem, picture in columns.items()}
        return draw_sheet(rows, titles, path)

    def _steps(self) -> list[int]:
        folders = (self.run_dir / "images").glob("step-*")
        return sorted(int(digits) for folder in folders if (digits := folder.name[5:]).isdigit())

    def _cells(self, picture: Picture, columns: dict[str, int], weights: str) -> dict[str, Path]:
        """The files of this run that show the picture, by column."""
        cells = {}
        for name, step in columns.items():
            kind = "base" if step == BASE_STEP else weights
            path = path_of(self.run_dir, picture, step, kind)
            if path not in self._verified and is_drawn(self.run_dir, picture, self.settings, step, kind):
                self._verified.add(path)
            if path in self._verified:
                cells[name] = path
        return cells

    def _tell(self, step: int, path: Path) -> None:
        self.emit(SheetSaved(step, path.relative_to(self.run_dir).as_posix()))


def _column(step: int) -> str:
    return "base" if step == BASE_STEP else f"step {step}"
