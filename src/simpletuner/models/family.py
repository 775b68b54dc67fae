"""The contract between the trainer and an architecture.

The trainer uses nothing of an architecture except this module.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters.compatibility import LoraConventions
from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit
from simpletuner.models.encoders import EncoderPass, TextEncoder, Vae
from simpletuner.models.weights.merge_loras import MergeOutput, WeightedLoras
from simpletuner.models.weights.tensor_files import WholeTensor

Streams = tuple[Tensor, ...]  # what one block gives to the next
# Number, module and inputs of a block, and what runs it -> its outputs.
Intercept = Callable[[int, nn.Module, Streams, Callable[[], Streams]], Streams]

PredictVelocity = Callable[[Tensor, Tensor, TextBatch], Tensor]  # x_sigma, sigma, text
WholeTensorOf = Callable[[Tensor], WholeTensor]


def as_it_is(tensor: Tensor) -> WholeTensor:
    """Describe a tensor that is whole already."""
    return WholeTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class TextTensor:
    """Shape of one text tensor: (L, width), or (width,) for a pooled vector."""

    width: int
    has_length: bool = True


@dataclass(frozen=True)
class ArchitectureConstants:
    """Constants of a loaded architecture.

    stride_px: pixels per latent row and column. alignment_px: bucket sides are multiples of it.
    token_px: side in pixels of the square that is one image token. text_tensors: the tensors of a
    caption, by name. latent_shift, latent_scale: the transformer works on (latent - shift) * scale.
    """

    latent_channels: int
    stride_px: int
    alignment_px: int
    token_px: int
    max_tokens: int
    text_tensors: Mapping[str, TextTensor]
    latent_shift: float
    latent_scale: float


@dataclass(frozen=True)
class ModelFiles:
    """Existing path of each component: a folder in diffusers' layout, or a single file.

    name: the model as the user wrote it ("lodestones/Chroma1-Base", "nano", "./my-chroma").
    revision: commit of a hub snapshot, "" for local files. variant: "fp16" in
    model.fp16.safetensors.
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
    """Memory saving of a network's blocks; it does not change any bit of the results.

    checkpointed: number of blocks that use gradient checkpointing, the first ones among every
    `interval`-th block. swapped: number of checkpointed blocks, evenly spread, whose frozen weights
    stay in host memory and are copied to the device for each pass; at most two of them are on the
    device at a time. offload_activations: the inputs of checkpointed blocks wait in host memory as
    well. approximator_on_host: Chroma's modulations are computed ahead, for several steps at once,
    and their network is on the device only meanwhile. approximator_computes_on_host: the CPU
    computes them; this one changes results, by rounding.
    """

    checkpointed: int = 0
    interval: int = 1
    swapped: int = 0
    offload_activations: bool = False
    approximator_on_host: bool = False
    approximator_computes_on_host: bool = False

    def checkpointed_block_numbers(self, blocks: int) -> tuple[int, ...]:
        """Return the numbers of the checkpointed blocks, the first ones of the network.

        The backward pass reaches the first blocks last, when the activations of the other blocks
        have already been freed.
        """
        return tuple(range(0, blocks, self.interval)[: self.checkpointed])

    def swapped_block_numbers(self, blocks: int) -> tuple[int, ...]:
        """Return the numbers of the swapped blocks, evenly spread over the checkpointed ones.

        Spreading them gives a copy the time of the blocks in between. Raises ConfigError when more
        blocks are to be swapped than checkpointed.
        """
        checkpointed = self.checkpointed_block_numbers(blocks)
        if self.swapped > len(checkpointed):
            raise ConfigError(
                f"musubi_blocks_to_swap is {self.swapped} of {blocks} blocks, but"
                " gradient_checkpointing"
                f" covers only {len(checkpointed)}; a swapped block must be checkpointed. Raise"
                " gradient_checkpointing or lower musubi_blocks_to_swap"
            )
        return tuple(
            checkpointed[(2 * n + 1) * len(checkpointed) // (2 * self.swapped)]
            for n in range(self.swapped)
        )


@dataclass(frozen=True)
class ModelSpec:
    """Description of a model before its weights are loaded; the memory plan is computed from it.

    transformer: on the meta device, frozen, in the dtypes that training uses. blocks: its repeated
    blocks in order. heads: of attention in each block. uses_published_shape: no config file is
    available locally, so the published shape is assumed. may_differ_from_published: the same, but
    for a repository that may hold another size. text_dtype: dtype of the cached text embeddings.
    text_encoder_bytes, vae_bytes: size of what is on the device at once. cpu_offloadable_bytes:
    size of the part that may stay on the CPU. download_bytes: size of the files that are not
    downloaded yet.
    """

    transformer: nn.Module
    blocks: tuple[nn.Module, ...]
    width: int
    heads: int
    constants: ArchitectureConstants
    uses_published_shape: bool
    text_dtype: torch.dtype
    text_encoder_bytes: int
    vae_bytes: int
    cpu_offloadable_bytes: int
    download_bytes: int
    may_differ_from_published: bool = False


class ModelFamily(ABC):
    """One architecture. Stateless: every loaded object is returned to the caller.

    alignment_px: bucket sides are multiples of it. flavours: model_flavour -> hub id or bundled
    model. lora_conventions: module names in LoRA files, and how other programs load such files.
    """

    name: str
    alignment_px: int
    flavours: Mapping[str, str]
    lora_conventions: LoraConventions

    @abstractmethod
    def locate_files(self, options: ModelOptions, emit: Emit = null_emit) -> ModelFiles:
        """Find or download the components, without loading weights.

        Raises ModelError when they are not of this family, DownloadError when the hub fails.
        """

    def notices(self, options: ModelOptions) -> list[str]:
        """Return notices about this choice of model, to be logged before training."""
        return []

    @abstractmethod
    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        """Describe the model without weights, network or download; each call builds a new one.

        dtype: of every weight that is not quantized.
        """

    def text_encoder_pass(
        self, options: ModelOptions, samples: int, rows: int
    ) -> EncoderPass | None:
        """Describe the text encoder with so many captions of `rows` tokens.

        None in a family whose encoder needs no memory besides its weights.
        """
        return None

    def vae_pass(
        self,
        options: ModelOptions,
        device_kind: str,
        samples: int,
        size_px: tuple[int, int],
        decodes: bool,
    ) -> EncoderPass | None:
        """Describe the VAE with so many images of (width, height), which it encodes or decodes."""
        return None

    @abstractmethod
    def read_constants(self, source: ModelFiles) -> ArchitectureConstants:
        """Read the constants from the components' config files; weights are not read."""

    @abstractmethod
    def text_fingerprint(self, source: ModelFiles, options: ModelOptions) -> str:
        """Return a string that changes whenever the same caption would be encoded differently.

        No weights are loaded for it.
        """

    @abstractmethod
    def vae_fingerprint(self, source: ModelFiles, options: ModelOptions) -> str:
        """Return a string that changes whenever the same pixels would be encoded differently.

        No weights are loaded for it.
        """

    @abstractmethod
    def transformer_fingerprint(self, source: ModelFiles) -> str:
        """Return a string that identifies the base weights; a run resumes on the same base."""

    @abstractmethod
    def write_quantized_files(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> list[Path]:
        """Quantize ahead of time and return the files in the cache; empty if nothing is quantized.

        The load_* methods do the same for the component they load. An interrupted conversion is
        resumed.
        """

    @abstractmethod
    def load_text_encoder(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> TextEncoder:
        """Load the text encoder in text_encoder_1_precision, quantizing it first if needed."""

    @abstractmethod
    def load_vae(self, source: ModelFiles, options: ModelOptions, device: torch.device) -> Vae:
        """Load the VAE in vae_dtype."""

    @abstractmethod
    def load_transformer(
        self,
        source: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        emit: Emit = null_emit,
        as_views: bool = False,
    ) -> nn.Module:
        """Load the transformer in eval mode with every parameter frozen.

        dtype: of every weight that is not quantized. options: base_model_precision and the options
        of the conversion; None loads the files as they are. as_views: weights on the CPU may be
        views of the files, which processes share; the caller moves them soon.
        """

    @abstractmethod
    def predict_velocity(
        self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch
    ) -> Tensor:
        """Predict the velocity (B, C, H, W) in float32.

        x_sigma: (B, C, H, W) float32, the noisy latents. sigma: (B,) float32 in [0, 1]; on the CPU
        it is read without waiting for the device.
        """

    def prepare_sigmas(self, transformer: nn.Module, sigma: Tensor) -> None:  # noqa: B027
        """Compute ahead what depends on sigma alone, for passes at sigma (B,) that follow soon.

        Results are the same without it; a family that computes nothing ahead does nothing.
        """

    @abstractmethod
    def block_count(self, transformer: nn.Module) -> int:
        """Return the number of transformer blocks."""

    @abstractmethod
    def shard_units(self, transformer: nn.Module) -> list[nn.Module]:
        """Return the modules that a sharded network gathers one at a time, such as its blocks."""

    @abstractmethod
    def place_blocks(
        self, transformer: nn.Module, memory: BlockMemoryPolicy, device: torch.device | None = None
    ) -> None:
        """Move tensors to the device or to host memory, as `memory` says, and run blocks that way.

        Call it after adapters are attached, so that their weights stay on the device. A second call
        replaces the first. Without a device nothing is moved, and no block may be swapped.
        """

    def intercept_blocks(  # noqa: B027
        self,
        transformer: nn.Module,
        intercept: Intercept,
    ) -> None:
        """Call `intercept` with the number, module and inputs of every block, and what runs it.

        The memory plan runs some of many equal blocks that way. A family that does nothing here is
        measured as a whole. `place_blocks` ends it.
        """

    @abstractmethod
    def compile_blocks(self, transformer: nn.Module, options: ModelOptions) -> None:
        """Compile the blocks at their first call, with the backend that dynamo_backend names."""

    @abstractmethod
    def full_finetune_parameters(self, transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the named parameters that model_type "full" trains."""

    @abstractmethod
    def lora_targets(
        self, transformer: nn.Module, preset: str, chosen: str | Sequence[str] | None = None
    ) -> list[str]:
        """Return the full names of the linears to adapt.

        preset: flux_lora_target. chosen: lora_target_modules, used instead of the preset: a regular
        expression for whole names, or a list of names and name endings. Raises ConfigError with the
        possible names when an entry matches nothing.
        """

    @abstractmethod
    def linear_classes(self, transformer: nn.Module) -> dict[str, tuple[str, ...]]:
        """Return every linear that may be adapted, with the classes of the modules around it.

        The innermost class comes first; the names are those in config/model_families.py.
        """

    @abstractmethod
    def save_transformer(
        self, transformer: nn.Module, folder: Path | None, whole: WholeTensorOf = as_it_is
    ) -> None:
        """Write a diffusers `transformer` folder (config.json and safetensors files).

        whole: describes a parameter or buffer of a sharded network as one tensor, which is loaded
        by every process together, one after the other. folder: None in a process that only takes
        part in that.
        """

    @abstractmethod
    def save_native_file(self, folder: Path, file: Path, metadata: Mapping[str, str]) -> None:
        """Write the same weights as one file with the author's names, as ComfyUI and Forge read it.

        folder: written by save_transformer. Tensors are copied one by one; an existing file is
        replaced at the end.
        """

    @abstractmethod
    def merge_loras(
        self,
        source: ModelFiles,
        loras: WeightedLoras,
        output: MergeOutput,
        metadata: Mapping[str, str],
        emit: Emit = null_emit,
    ) -> None:
        """Write the transformer of `source` with LoRAs merged into it.

        Raises DiskFull or ModelError before anything is written.
        """
