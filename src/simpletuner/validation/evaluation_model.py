"""CLIP and DINOv2 as functions from images and texts to directions, which metrics compare.

N images or texts · D width of the embedding
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from simpletuner.config.evaluation_models import read_model_type
from simpletuner.errors import ModelError
from simpletuner.models.weights.model_folder import read_json

Result = TypeVar("Result")
BATCH = 16  # images or texts in a pass: the activations stay small next to the weights


@dataclass(frozen=True)
class ImagePreprocessing:
    """Values of preprocessor_config.json: resize the shorter edge, crop the centre, normalise."""

    shorter_edge_px: int
    crop_px: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, image: Image.Image) -> Tensor:
        """Return (3, H, W) float32 of the crop, by the arithmetic of transformers' processors."""
        short, long = sorted(image.size)
        edge = self.shorter_edge_px
        sides = (edge, int(edge * long / short))
        size = sides if image.width <= image.height else sides[::-1]
        resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        height, width = self.crop_px
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        cropped = resized.crop((left, top, left + width, top + height))
        levels = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
        pixels = levels.view(height, width, 3).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def read_preprocessing(folder: Path) -> ImagePreprocessing:
    """Read preprocessor_config.json. Raises ModelError with the file for missing values."""
    path = folder / "preprocessor_config.json"
    config: dict[str, Any] = read_json(path)
    try:
        size, crop = config["size"], config["crop_size"]
        edge = size if isinstance(size, int) else size["shortest_edge"]
        sides = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        return ImagePreprocessing(
            int(edge),
            (int(sides[0]), int(sides[1])),
            tuple(map(float, config["image_mean"])),
            tuple(map(float, config["image_std"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a value is missing or invalid ({error!r}).") from None


class EvaluationModel:
    """A loaded CLIP or DINOv2.

    max_tokens: how many tokens of a text are read; 0 where no text is read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load safetensors weights by one of two known classes; code in the folder is not run."""
        from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

        self._device = device
        self._preprocessing = read_preprocessing(folder)
        self._is_clip = read_model_type(folder) == "clip"
        loader: Any = CLIPModel if self._is_clip else Dinov2Model
        network: Any = loader.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
        self._network = network.to(device).eval().requires_grad_(False)
        self._tokenizer: Any = None
        self.max_tokens = 0
        if self._is_clip:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.max_tokens = int(network.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return (N, D) float32 of unit length on the CPU.

        CLIP: the projected embedding. DINOv2: the class token after the last norm.
        """
        parts = []
        for start in range(0, len(images), BATCH):
            batch = [self._preprocessing.pixels(image) for image in images[start : start + BATCH]]
            pixels = torch.stack(batch).to(self._device)
            if self._is_clip:
                pooled = self._network.vision_model(pixel_values=pixels).pooler_output
                parts.append(self._network.visual_projection(pooled))
            else:
                parts.append(self._network(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return (N, D) float32 of unit length on the CPU; the end of a longer text is cut off."""
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._device)
            pooled = self._network.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            parts.append(self._network.text_projection(pooled))
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=1).cpu()

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a whole text, with those of its start and end."""
        return len(self._tokenizer(text)["input_ids"])


def use_evaluation_model(
    folder: Path, device: torch.device, use: Callable[[EvaluationModel], Result]
) -> Result:
    """Load the model, return what `use` computes with it, and release its memory."""
    try:
        return use(EvaluationModel(folder, device))
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
