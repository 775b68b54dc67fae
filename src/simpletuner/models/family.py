"""The contract between the trainer and an architecture. The trainer knows nothing beyond this page.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit


@dataclass(frozen=True)
class ArchitectureConstants:
    """Constants of an architecture as loaded. alignment_px: bucket sides are multiples of it.
    token_px: side of the square of pixels that is one image token.
    """

    latent_channels: int
    stride_px: int
    alignment_px: int
    token_px: int
    max_tokens: int
    text_width: int
    latent_shift: float
    latent_scale: float


@dataclass(frozen=True)
class ModelFiles:
    """Where each part lies: a folder of diffusers' or a single file for each, all existing.

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


@dataclass(frozen=True)
class BlockMemoryPolicy:
    """Where a network's blocks keep what the backward pass needs. Changes no bit of any result.

    checkpointed: the first so many of every `interval`-th block keep only their inputs, and are run again.
    swapped: so many of these, evenly spread, have their frozen weights in host memory; at most two of them
    are on the device. offload_activations: what recomputed blocks start from waits in host memory too.
    approximator_on_host: Chroma's modulations are computed on the CPU; they differ by rounding there.
    """

    checkpointed: int = 0
    interval: int = 1
    swapped: int = 0
    offload_activations: bool = False
    approximator_on_host: bool = False

    def checkpointed_block_numbers(self, blocks: int) -> tuple[int, ...]:
        """The first ones: what the others keep is gone by the time these are run again."""
        return tuple(range(0, blocks, self.interval)[: self.checkpointed])

    def swapped_block_numbers(self, blocks: int) -> tuple[int, ...]:
        """Evenly spread, so that one is on its way while the blocks between compute."""
        among = self.checkpointed_block_numbers(blocks)
        if self.swapped > len(among):
            raise ConfigError(
                f"musubi_blocks_to_swap asks for {self.swapped} of {blocks} blocks, and"
                f" {len(among)} are recomputed; blocks that are swapped must be (gradient_checkpointing)"
            )
        return tuple(
            among[(2 * n + 1) * len(among) // (2 * self.swapped)] for n in range(self.swapped)
        )


@dataclass(frozen=True)
class ModelSpec:
    """A model before its weights are there: what a memory plan asks for.

    transformer: on the meta device, frozen, in the dtypes that training holds it in. blocks: its repeated
    parts in order. assumed: its shape is the published one, since no config file is at hand.
    text_dtype: of the cached rows. text_encoder_bytes, vae_bytes: as they are loaded.
    hosted_bytes: of the part that may stay on the CPU. missing_bytes: what is yet to be downloaded.
    guessed: assumed of a repository that may hold another size.
    """

    transformer: nn.Module
    blocks: tuple[nn.Module, ...]
    width: int
    constants: ArchitectureConstants
    uses_published_shape: bool
    text_dtype: torch.dtype
    text_encoder_bytes: int
    vae_bytes: int
    cpu_offloadable_bytes: int
    download_bytes: int
    may_differ_from_published: bool = False


class TextEncoder(ABC):
    """Captions to rows."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One (L_i, D) tensor per caption on the CPU in the cache dtype: its tokens and one pad row."""

    @abstractmethod
    def token_count(self, caption: str) -> int:
        """Tokens of the whole caption, end token included, before any limit."""


class Vae(ABC):
    """Pixels to raw posterior moments and back."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H * stride, W * stride) in [-1, 1] -> raw (B, 2C, H, W) in the VAE's dtype on the CPU:
        mean, then log variance.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) -> pixels (B, 3, H * stride, W * stride) in [-1, 1], float32, CPU."""


class ModelFamily(ABC):
    """One architecture. Stateless: everything loaded is handed back to the caller."""

    name: str

    @abstractmethod
    def locate_files(self, options: ModelOptions, emit: Emit = null_emit) -> ModelFiles:
        """Find (or download) the parts. Refuses with ModelError or DownloadError, never loads a weight."""

    def notices(self, options: ModelOptions) -> list[str]:
        """What a person should hear about this choice before training; empty when there is nothing."""
        return []

    @abstractmethod
    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        """Without weights, network or download; dtype: of what is not quantised. A fresh one at each call."""

    @abstractmethod
    def read_constants(self, source: ModelFiles) -> ArchitectureConstants:
        """Read from the parts' config files; no weights."""

    @abstractmethod
    def text_fingerprint(self, source: ModelFiles, options: ModelOptions) -> str:
        """Changes whenever the same caption would give other rows; nothing is loaded for it."""

    @abstractmethod
    def vae_fingerprint(self, source: ModelFiles, options: ModelOptions) -> str:
        """Changes whenever the same pixels would give other moments; nothing is loaded for it."""

    @abstractmethod
    def transformer_fingerprint(self, source: ModelFiles) -> str:
        """Recognises the base's weights, so that a run is resumed on the base it began with."""

    @abstractmethod
    def write_quantized_files(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> list[Path]:
        """Convert ahead of time what the options want quantised: the files in the cache, if any.

        Loading does the same to the part it loads. A conversion that was killed goes on.
        """

    @abstractmethod
    def load_text_encoder(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> TextEncoder:
        """In text_encoder_1_precision, converted first where it never was; emit hears of that."""

    @abstractmethod
    def load_vae(self, source: ModelFiles, options: ModelOptions, device: torch.device) -> Vae: ...

    @abstractmethod
    def load_transformer(
        self,
        source: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        emit: Emit = null_emit,
    ) -> nn.Module:
        """The network in eval mode, every parameter frozen; dtype: of everything that is not quantised.

        options: base_model_precision and how it is come by; None is as the files are. emit hears of a
        conversion.
        """

    @abstractmethod
    def predict_velocity(
        self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch
    ) -> Tensor:
        """Velocity (B, C, H, W) float32 at x_sigma (B, C, H, W) float32, sigma (B,) float32 in [0, 1]."""

    @abstractmethod
    def block_count(self, transformer: nn.Module) -> int:
        """How many blocks BlockMemory has to do with."""

    @abstractmethod
    def place_blocks(
        self, transformer: nn.Module, memory: BlockMemoryPolicy, device: torch.device | None = None
    ) -> None:
        """Put everything on `device` but what `memory` keeps on the host, and run the blocks so from now on.

        After adapters are attached, so that theirs stay on the device; undoes an earlier arrangement. Without
        a device nothing is moved, and nothing may be swapped.
        """

    @abstractmethod
    def compile_blocks(self, transformer: nn.Module, options: ModelOptions) -> None:
        """Have the blocks compiled at their first call, as dynamo_backend says."""

    @abstractmethod
    def full_finetune_parameters(self, transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that model_type "full" trains."""

    @abstractmethod
    def lora_targets(
        self, transformer: nn.Module, preset: str, chosen: str | Sequence[str] | None = None
    ) -> list[str]:
        """Full names of the linears that are adapted; ConfigError with the list when nothing is meant.

        chosen, instead of the preset: a regular expression for whole names, or names and their ends.
        """

    @abstractmethod
    def save_transformer(self, transformer: nn.Module, folder: Path) -> None:
        """Write a diffusers `transformer` folder (config.json + safetensors) that load_transformer reads."""

    @abstractmethod
    def save_native_file(self, folder: Path, file: Path, metadata: Mapping[str, str]) -> None:
        """The same weights as one file with the author's own names, as ComfyUI and Forge read it.

        folder: what save_transformer wrote. Tensor by tensor; an older file is replaced at the end.
        """
