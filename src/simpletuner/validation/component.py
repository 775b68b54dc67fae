"""Validation as one object: the training loop says when, everything else is decided here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.events.progress import Stage
from simpletuner.events.types import Emit, ImageSaved, SheetSaved, Warned
from simpletuner.events.wording import spread
from simpletuner.validation.images import Settings, describe, is_drawn, path_of, save_png, to_image
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import Picture
from simpletuner.validation.sampler import latents_of
from simpletuner.validation.sheet import MOST_COLUMNS, Row, draw_sheet

BASE_STEP = 0


@dataclass
class Validator:
    """Draws a run's pictures and keeps its sheets up to date.

    pictures: as `prompts.pictures` lists them. rows: a text to its (L, D) rows, from the text cache.
    decoder: makes the function from latents (1, C, H, W) to pixels (1, 3, H px, W px). The VAE behind it
    is held only while pictures are drawn: between them its memory is training's.
    strengths: others of the LoRA than its own, at which the last step's pictures are drawn too.
    """

    inference: Inference
    pictures: Sequence[Picture]
    settings: Settings
    rows: Callable[[str], Tensor]
    decoder: Callable[[], Callable[[Tensor], Tensor]]
    run_dir: Path
    emit: Emit
    strengths: Sequence[float] = ()
    _verified: set[Path] = field(default_factory=set, init=False, repr=False)

    def run(self, step: int, transformer: nn.Module, weights: str = "trained") -> None:
        """Draw every picture with the weights that are in the transformer now; then the sheets.

        weights: "base" (step is 0), "trained", "ema" or `at(strength)`; the caller has seen to it.
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
            decode = self.decoder()
            for picture, latents in drawn:
                path = path_of(self.run_dir, picture, step, weights)
                if not torch.isfinite(latents).all():
                    what = f"step {step}: {path.name} is not finite: broken weights or number format"
                    self.emit(Warned(what))
                image = to_image(decode(torch.nan_to_num(latents)))
                save_png(image, path, describe(picture, self.settings, step=str(step), weights=weights))
                self._tell_picture(picture, step, weights)
                stage.advance()

    def _tell_picture(self, picture: Picture, step: int, weights: str) -> None:
        name = path_of(self.run_dir, picture, step, weights).relative_to(self.run_dir).as_posix()
        prompt = picture.prompt
        self.emit(ImageSaved(step, prompt.id, prompt.text, name, picture.seed, *picture.size_px, weights))

    def _draw_sheets(self, step: int) -> None:
        """One row per picture, one more where there is an average; before_after is base above newest."""
        images = self.run_dir / "images"
        found = [folder.name[5:] for folder in images.glob("step-*")]
        numbers = [number for number in sorted(map(int, filter(str.isdigit, found))) if number <= step]
        rows = {
            (picture.stem, weights): {
                number: path for number in numbers if (path := self._shown(picture, number, weights))
            }
            for picture in self.pictures
            for weights in ("trained", "ema")
        }
        steps = sorted({number for cells in rows.values() for number in cells})
        titles = {number: _title(number) for number in spread(steps, MOST_COLUMNS)}
        prompts = {picture.stem: picture.prompt.text for picture in self.pictures}
        table = [
            Row(stem + " (average)" * (weights == "ema"), prompts[stem], cells)
            for (stem, weights), cells in rows.items()
            if cells.keys() - {BASE_STEP} or (weights == "trained" and steps == [BASE_STEP])
        ]
        self._tell_sheet(step, draw_sheet(table, titles, images / "sheet.png"))
        if len(steps) < 2 or steps[0] != BASE_STEP:
            return
        columns = {
            picture.stem: picture.prompt.text or picture.stem for picture in self.pictures[:MOST_COLUMNS]
        }
        last, model = steps[-1], self.settings.model
        compared = [
            Row(
                label,
                f"{model}, {_title(number)}",
                {stem: cells[number] for (stem, _), cells in reversed(rows.items()) if number in cells},
            )
            for label, number in (("before", BASE_STEP), ("after", last))
        ]
        for strength in self.strengths:
            shown = {picture.stem: self._shown(picture, last, at(strength)) for picture in self.pictures}
            cells = {stem: path for stem, path in shown.items() if path}
            if cells:
                compared.append(Row(f"after, {at(strength)}", f"{model}, {_title(last)}", cells))
        self._tell_sheet(step, draw_sheet(compared, columns, images / "before_after.png"))

    def _shown(self, picture: Picture, step: int, weights: str) -> Path | None:
        """The file of the picture if this run drew it; every weights' first column is the base."""
        kind = "base" if step == BASE_STEP else weights
        path = path_of(self.run_dir, picture, step, kind)
        if path not in self._verified and is_drawn(self.run_dir, picture, self.settings, step, kind):
            self._verified.add(path)
        return path if path in self._verified else None

    def _tell_sheet(self, step: int, path: Path) -> None:
        self.emit(SheetSaved(step, path.relative_to(self.run_dir).as_posix()))


def at(strength: float) -> str:
    """What the weights are called when the LoRA acts at another strength than its own."""
    return f"strength {strength:g}"


def _title(step: int) -> str:
    return "base" if step == BASE_STEP else f"step {step}"
