"""The work of `simpletuner caption`: a model of transformers writes captions next to images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.atomic_io import write_atomically
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.image_files import ImageFile, find_image_files
from simpletuner.data.image_plugins import IMAGE_FORMATS
from simpletuner.errors import MissingExtra, ModelError
from simpletuner.image_decoding import UndecodableImage, decoder_errors

if TYPE_CHECKING:
    from PIL.Image import Image

FLORENCE_TASK = "<MORE_DETAILED_CAPTION>"  # Florence-2 knows tasks instead of free requests
MAX_SIDE_PX = 1024  # larger images are shrunk first; no model of this kind sees more


@dataclass(frozen=True)
class CaptioningRequest:
    """A request to caption a folder.

    names: the images to caption, None for all. excluded: images that are left alone in any case.
    record: JSON lines of the captions so far, None for no record.
    """

    folder: Path
    model: str
    prompt: str
    max_tokens: int
    overwrite: bool
    names: tuple[str, ...] | None
    excluded: frozenset[str]
    record: Path | None


def caption_images(request: CaptioningRequest, report: Callable[[str], None]) -> int:
    """Caption the images; return the number of captions written.

    An image that cannot be decoded is reported and left out. Raises ModelError if the model cannot
    be loaded.
    """
    chosen = list(images_to_caption(request))
    waiting = [image for image in chosen if image.relative_path not in request.excluded]
    report(f"images to caption in {request.folder}: {len(waiting)}")
    if excluded := len(chosen) - len(waiting):
        report(f"images that are excluded from the dataset and left out: {excluded}")
    if not waiting:
        return 0
    captioner = Captioner(request.model, request.prompt, request.max_tokens)
    written = 0
    for number, image in enumerate(waiting, 1):
        try:
            caption = captioner.caption(load_image(image.path))
        except UndecodableImage as error:
            report(f"{number}/{len(waiting)} {image.relative_path}: left out: {error}")
            continue
        if not caption:
            report(f"{number}/{len(waiting)} {image.relative_path}: left out: an empty caption")
            continue
        path = image.caption_path or image.path.with_suffix(".txt")
        before = path.read_text("utf-8", errors="replace") if path.is_file() else None
        if before is not None and before.strip() and not request.overwrite:
            continue  # a person has written it in the meantime
        write_atomically(path, caption + "\n")
        _append_record(request.record, image.relative_path, caption, before)
        written += 1
        report(f"{number}/{len(waiting)} {image.relative_path}: {caption}")
    return written


def images_to_caption(request: CaptioningRequest) -> Iterator[ImageFile]:
    """Yield the images that the request asks for and that are not done, sorted by name.

    Excluded ones are among them.
    """
    images = find_image_files(DatasetConfig("images", "image", request.folder))[0]
    done = _recorded_names(request.record)
    wanted = None if request.names is None else set(request.names)
    for image in sorted(images, key=lambda image: image.relative_path):
        if image.relative_path in done or not (wanted is None or image.relative_path in wanted):
            continue
        path = image.caption_path
        has_caption = path is not None and bool(path.read_text("utf-8", errors="replace").strip())
        if request.overwrite or not has_caption:
            yield image


def load_image(path: Path) -> Image:
    """Return an image as upright RGB, at most MAX_SIDE_PX per side. Raises UndecodableImage."""
    from PIL import Image, ImageOps

    limit = DataOptions().max_image_megapixels * 1e6
    with decoder_errors(), Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > limit:
            raise ValueError(f"{image.width}x{image.height} is more than the allowed pixels")
        image.draft("RGB", (MAX_SIDE_PX, MAX_SIDE_PX))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        upright.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        return upright


class Captioner:
    """A vision-language model on the fastest device."""

    def __init__(self, model: str, prompt: str, max_tokens: int) -> None:
        """Load the model: safetensors only, and no code of its repository.

        Raises ModelError, and MissingExtra if its image processor needs a missing package.
        """
        import torch

        from simpletuner.config.schema import ModelOptions
        from simpletuner.training.device import select_device

        device = select_device(ModelOptions()).device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._prompt = prompt
        self._max_tokens = max_tokens
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            processors: Any = AutoProcessor
            self._processor: Any = processors.from_pretrained(model, trust_remote_code=False)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model, trust_remote_code=False, use_safetensors=True, dtype=dtype
            )
        except ImportError as error:
            raise MissingExtra(
                f"{model} needs more packages: pip install 'simpletuner[caption]' ({error})"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{model} is not a vision-language model with safetensors files that this version "
                f"of transformers knows: {error}"
            ) from error
        self._model = loaded.to(device).eval()
        self._device, self._dtype = device, dtype

    def caption(self, image: Image) -> str:
        """Return the caption of an RGB image as one line."""
        import torch

        text = self._request_text()
        inputs = self._processor(images=image, text=text, return_tensors="pt")
        inputs = inputs.to(self._device, self._dtype)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs, max_new_tokens=self._max_tokens, do_sample=False
            )[0]
        given = inputs["input_ids"][0] if "input_ids" in inputs else tokens[:0]
        if len(tokens) > len(given) and torch.equal(tokens[: len(given)], given):
            tokens = tokens[len(given) :]  # a decoder repeats the request first
        answer = self._processor.decode(tokens, skip_special_tokens=True)
        return " ".join(answer.removeprefix(self._prompt).split())

    def _request_text(self) -> str:
        """Return the request in the form that the model was trained with."""
        if self._model.config.model_type == "florence2":
            return FLORENCE_TASK
        if self._processor.chat_template is None:
            return self._prompt
        content = [{"type": "image"}, {"type": "text", "text": self._prompt}]
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=True))


def _recorded_names(path: Path | None) -> set[str]:
    if path is None or not path.is_file():
        return set()
    names = set()
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            names.add(str(json.loads(line)["file"]))
        except (ValueError, KeyError, TypeError):
            continue  # the line was being written when the process ended
    return names


def _append_record(path: Path | None, name: str, caption: str, before: str | None) -> None:
    if path is None:
        return
    line = json.dumps({"file": name, "caption": caption, "before": before}, ensure_ascii=False)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(line + "\n")
