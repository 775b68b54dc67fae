"""Generate the validation images of a run, and update its contact sheets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.adapters.attachment import scaled_adapter
from simpletuner.cache.batch_types import TextEmbedding
from simpletuner.events.event_types import ContactSheetSaved, Emit, ImageSaved, WarningIssued
from simpletuner.events.formatting import pick_evenly
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.peers import ALONE, Peers
from simpletuner.validation.contact_sheet import MAX_COLUMNS, SheetRow, write_contact_sheet
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import ImageSpec
from simpletuner.validation.sampler import generate_latents
from simpletuner.validation.sampling_preview import SamplingPreview
from simpletuner.validation.start_latents import StartLatents
from simpletuner.validation.validation_images import (
    GenerationSettings,
    gather_images,
    image_metadata,
    image_path,
    is_generated,
    pixels_to_image,
    save_png,
)

BASE_STEP = 0


@dataclass
class ImageValidator:
    """Generates the images of a step, and updates the contact sheets.

    image_specs: from `prompts.make_image_specs`. text_embedding: a text to its named tensors, from
    the text cache. load_decoder: returns the function from latents (1, C, H, W) to pixels (1, 3, H
    px, W px). Its VAE is loaded only while images are generated, so that training has the memory in
    between. extra_strengths: strengths of the LoRA other than 1, at which the images of the last
    step are generated too. start_of: what an image starts from, None for pure noise. preview:
    shows the images while they are sampled; None shows nothing. Several processes share out the
    images; the main one writes all files.
    """

    inference: Inference
    image_specs: Sequence[ImageSpec]
    settings: GenerationSettings
    text_embedding: Callable[[str], TextEmbedding]
    load_decoder: Callable[[], Callable[[Tensor], Tensor]]
    run_dir: Path
    emit: Emit
    extra_strengths: Sequence[float] = ()
    peers: Peers = ALONE
    start_of: Callable[[ImageSpec], StartLatents | None] = lambda image_spec: None
    preview: SamplingPreview | None = None
    _verified: set[Path] = field(default_factory=set, init=False, repr=False)

    def generate_images(self, step: int, transformer: nn.Module, weights: str = "trained") -> None:
        """Generate every image with the weights that are in the transformer now; then the sheets.

        weights: the name of these weights: "base" (at step 0), "trained", "ema" or
        `strength_label(strength)`. Images that are complete on disk, generated with the same
        settings, are not generated again.
        """
        if not self.image_specs:
            return
        on_disk = [
            is_generated(self.run_dir, image_spec, self.settings, step, weights)
            for image_spec in self.image_specs
        ]
        on_disk = self.peers.broadcast_json(on_disk)
        missing = []
        for image_spec, exists in zip(self.image_specs, on_disk, strict=True):
            if exists:
                self._emit_image(image_spec, step, weights)
            else:
                missing.append(image_spec)
        if missing:
            with self.preview.session() if self.preview is not None else nullcontext():
                self._generate_missing(missing, transformer, step, weights)
        if self.peers.is_main:
            self._update_sheets(step)

    def _generate_missing(
        self, missing: Sequence[ImageSpec], transformer: nn.Module, step: int, weights: str
    ) -> None:
        """Generate the missing images; they are decoded one by one, to bound the VAE's memory."""
        generated = self._latents_by_strength(missing, transformer)
        own: list[tuple[ImageSpec, Image.Image, bool]] = []
        with StageReporter(self.emit, "draw", len(missing), "pictures") as stage:
            decode = self.load_decoder()
            for image_spec, latents in generated:
                image = pixels_to_image(decode(torch.nan_to_num(latents)))
                is_finite = bool(torch.isfinite(latents).all())
                if self.peers.is_main:  # written at once, so that it can be looked at meanwhile
                    self._save_image(image_spec, image, is_finite, step, weights)
                else:
                    own.append((image_spec, image, is_finite))
                stage.advance()
        self._save_images_of_others(own, step, weights)

    def _latents_by_strength(
        self, missing: Sequence[ImageSpec], transformer: nn.Module
    ) -> Iterator[tuple[ImageSpec, Tensor]]:
        """Yield images with their latents, those of the same adapter strength together."""
        for strength in dict.fromkeys(spec.prompt.strength for spec in missing):
            with scaled_adapter(transformer, strength):
                yield from generate_latents(
                    self.inference,
                    transformer,
                    [spec for spec in missing if spec.prompt.strength == strength],
                    self.text_embedding,
                    steps=self.settings.steps,
                    guidance=self.settings.guidance,
                    peers=self.peers,
                    start_of=self.start_of,
                    observe=None if self.preview is None else self.preview.observe,
                )

    def _save_images_of_others(
        self, own: Sequence[tuple[ImageSpec, Image.Image, bool]], step: int, weights: str
    ) -> None:
        """Send the images of this process to the main one, which writes them."""
        indices = {id(spec): index for index, spec in enumerate(self.image_specs)}
        described = [(indices[id(spec)], is_finite) for spec, _, is_finite in own]
        parts = self.peers.gather_json(described)
        images = gather_images([image for _, image, _ in own], self.peers)
        if self.peers.is_main:
            flat = [entry for part in parts for entry in part]
            for (index, is_finite), image in zip(flat, images, strict=True):
                self._save_image(self.image_specs[index], image, is_finite, step, weights)

    def _save_image(
        self, image_spec: ImageSpec, image: Image.Image, is_finite: bool, step: int, weights: str
    ) -> None:
        path = image_path(self.run_dir, image_spec, step, weights)
        if not is_finite:
            self.emit(
                WarningIssued(
                    f"step {step}: {path.name} has values that are not finite; the weights "
                    "are damaged, or the dtype has too small a range"
                )
            )
        description = image_metadata(image_spec, self.settings, step=str(step), weights=weights)
        save_png(image, path, description)
        self._emit_image(image_spec, step, weights)

    def _emit_image(self, image_spec: ImageSpec, step: int, weights: str) -> None:
        path = image_path(self.run_dir, image_spec, step, weights)
        self.emit(
            ImageSaved(
                step,
                image_spec.prompt.id,
                image_spec.prompt.text,
                path.relative_to(self.run_dir).as_posix(),
                image_spec.seed,
                *image_spec.size_px,
                weights,
            )
        )

    def _update_sheets(self, step: int) -> None:
        """Write sheet.png, and before_after.png as soon as there is something to compare.

        sheet.png has one row per image, and a second one where there is an average.
        """
        images = self.run_dir / "images"
        numbers = self._steps_on_disk(step)
        rows = {
            (image_spec.stem, weights): {
                number: path
                for number in numbers
                if (path := self._existing_image(image_spec, number, weights))
            }
            for image_spec in self.image_specs
            for weights in ("trained", "ema")
        }
        steps = sorted({number for cells in rows.values() for number in cells})
        titles = {number: _step_title(number) for number in pick_evenly(steps, MAX_COLUMNS)}
        prompts = {image_spec.stem: image_spec.prompt.text for image_spec in self.image_specs}
        table = [
            SheetRow(stem + " (average)" * (weights == "ema"), prompts[stem], cells)
            for (stem, weights), cells in rows.items()
            if cells.keys() - {BASE_STEP} or (weights == "trained" and steps == [BASE_STEP])
        ]
        self._emit_sheet(step, write_contact_sheet(table, titles, images / "sheet.png"))
        if len(steps) < 2 or steps[0] != BASE_STEP:
            return
        columns = {
            image_spec.stem: image_spec.prompt.text or image_spec.stem
            for image_spec in self.image_specs[:MAX_COLUMNS]
        }
        compared = self._comparison_rows(rows, steps[-1])
        self._emit_sheet(step, write_contact_sheet(compared, columns, images / "before_after.png"))

    def _steps_on_disk(self, last_step: int) -> list[int]:
        """Return the steps up to `last_step` that have a folder of images, in order."""
        names = [folder.name[5:] for folder in (self.run_dir / "images").glob("step-*")]
        numbers = sorted(map(int, filter(str.isdigit, names)))
        return [number for number in numbers if number <= last_step]

    def _comparison_rows(
        self, rows: dict[tuple[str, str], dict[int, Path]], last_step: int
    ) -> list[SheetRow]:
        """Return the rows of before_after.png: the base, the last step, and the other strengths."""
        model = self.settings.model
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
            for label, number in (("before", BASE_STEP), ("after", last_step))
        ]
        for strength in self.extra_strengths:
            label = strength_label(strength)
            paths = {
                image_spec.stem: self._existing_image(image_spec, last_step, label)
                for image_spec in self.image_specs
            }
            cells = {stem: path for stem, path in paths.items() if path}
            if cells:
                detail = f"{model}, {_step_title(last_step)}"
                compared.append(SheetRow(f"after, {label}", detail, cells))
        return compared

    def _existing_image(self, image_spec: ImageSpec, step: int, weights: str) -> Path | None:
        """Return the file of the image if this run generated it, else None.

        At step 0 it is the image of the base, whatever the weights.
        """
        kind = "base" if step == BASE_STEP else weights
        path = image_path(self.run_dir, image_spec, step, kind)
        if path not in self._verified and is_generated(
            self.run_dir, image_spec, self.settings, step, kind
        ):
            self._verified.add(path)
        return path if path in self._verified else None

    def _emit_sheet(self, step: int, path: Path) -> None:
        self.emit(ContactSheetSaved(step, path.relative_to(self.run_dir).as_posix()))


def strength_label(strength: float) -> str:
    """Return the name of the weights when the LoRA acts at a strength other than 1."""
    return f"strength {strength:g}"


def _step_title(step: int) -> str:
    return "base" if step == BASE_STEP else f"step {step}"
