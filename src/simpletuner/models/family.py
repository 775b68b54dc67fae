"""The contract between the trainer and an architecture. The trainer knows nothing beyond this page.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.cache.types import TextBatch
from simpletuner.config.schema import ModelOptions


@dataclass(frozen=True)
class Facts:
    """Constants of an architecture as loaded. alignment_px: bucket sides are multiples of it.
    token_px: side of the square of pixels that is one image token."""

    latent_channels: int
    stride_px: int
    alignment_px: int
    token_px: int
    max_tokens: int
    text_width: int
    latent_shift: float
    latent_scale: float


@dataclass(frozen=True)
class Source:
    """Where each part lies: local diffusers folders, one per part, all existing.

    name: what a person calls it ("lodestones/Chroma1-Base", "nano", "./my-chroma").
    revision: commit of a hub snapshot, "" for local folders. variant: "fp16" in model.fp16.safetensors.
    """

    name: str
    revision: str
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    variant: str = ""


class TextEncoder(ABC):
    """Captions to rows. fingerprint: changes whenever the same caption would give other rows."""

    fingerprint: str

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L_i, D) tensor per caption on the CPU in the cache dtype: its tokens and one pad row."""

    @abstractmethod
    def token_count(self, caption: str) -> int:
        """Tokens of the whole caption, end token included, before any limit."""


class Vae(ABC):
    """Pixels to raw posterior moments and back. fingerprint: as in TextEncoder."""

    fingerprint: str

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H * stride, W * stride) in [-1, 1] -> raw (B, 2C, H, W) in the VAE's dtype on the CPU:
        mean, then log variance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) -> pixels (B, 3, H * stride, W * stride) in [-1, 1], float32, CPU."""


class ModelFamily(ABC):
    """One architecture. Stateless: everything loaded is handed back to the caller."""

    name: str

    @abstractmethod
    def locate(self, options: ModelOptions) -> Source:
        """Find (or download) the parts. Refuses with ModelError or DownloadError, never loads a weight."""

    def notes(self, options: ModelOptions) -> list[str]:
        """What a person should hear about this choice before training; empty when there is nothing."""
        return []

    @abstractmethod
    def facts(self, source: Source) -> Facts:
        """Read from the parts' config files; no weights."""

    @abstractmethod
    def text_fingerprint(self, source: Source, options: ModelOptions) -> str:
        """What TextEncoder.fingerprint will be, without loading it (so a warm start loads nothing)."""

    @abstractmethod
    def vae_fingerprint(self, source: Source, options: ModelOptions) -> str:
        """What Vae.fingerprint will be, without loading it."""

    @abstractmethod
    def transformer_fingerprint(self, source: Source) -> str:
        """Recognises the base's weights, so that a run is resumed on the base it began with."""

    @abstractmethod
    def load_text_encoder(
        self, source: Source, options: ModelOptions, device: torch.device
    ) -> TextEncoder: ...

    @abstractmethod
    def load_vae(self, source: Source, options: ModelOptions, device: torch.device) -> Vae: ...

    @abstractmethod
    def load_transformer(self, source: Source, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network in eval mode, every parameter frozen."""

    @abstractmethod
    def predict(self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch) -> Tensor:
        """Velocity (B, C, H, W) float32 at x_sigma (B, C, H, W) float32, sigma (B,) float32 in [0, 1]."""

    @abstractmethod
    def set_gradient_checkpointing(self, transformer: nn.Module, every: int) -> None:
        """Recompute every n-th block in the backward pass; 0 switches it off."""

    @abstractmethod
    def trainable_at_full_rank(self, transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that model_type "full" trains."""

    @abstractmethod
    def lora_targets(
        self, transformer: nn.Module, preset: str, chosen: str | Sequence[str] | None = None
    ) -> list[str]:
        """Full names of the linears that are adapted; ConfigError with the list when nothing is meant.

        chosen, instead of the preset: a regular expression for whole names, or names and their ends.
        """

    @abstractmethod
    def save_transformer(self, transformer: nn.Module, source: Source, folder: Path) -> None:
        """Write a diffusers `transformer` folder (config.json + safetensors) that load_transformer reads."""
