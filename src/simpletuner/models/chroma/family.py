"""Chroma 1 as a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit
from simpletuner.models import block_executor
from simpletuner.models.chroma import (
    encoder_passes,
    fingerprints,
    lora_targets,
    model_files,
    model_spec,
    quantized_cache,
    weights,
)
from simpletuner.models.chroma.fingerprints import T5_TENSOR, vae_dtype
from simpletuner.models.chroma.lora_programs import CHROMA_LORA
from simpletuner.models.chroma.modulations import PreparedModulations
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.encoders import EncoderPass, TextEncoder, Vae
from simpletuner.models.family import (
    ArchitectureConstants,
    BlockMemoryPolicy,
    Intercept,
    ModelFamily,
    ModelFiles,
    ModelSpec,
    TextTensor,
)
from simpletuner.models.weights.merge_loras import MergeOutput, WeightedLoras
from simpletuner.quantization.quantized_linear import compile_dequantize

PATCH_SIZE = 2
FROZEN_PREFIX = "distilled_guidance_layer."


def pack_latents(latents: Tensor) -> Tensor:
    """Pack (B, C, H, W) to (B, H/2 * W/2, 4 C): 2x2 patches by row, channel-major in a patch."""
    return nn.functional.pixel_unshuffle(latents, PATCH_SIZE).flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Unpack tokens to latents, the inverse of pack_latents. grid: patch rows and columns."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH_SIZE)


def _as_chroma(transformer: nn.Module) -> ChromaTransformer:
    if not isinstance(transformer, ChromaTransformer):
        raise TypeError(f"not Chroma's transformer: {type(transformer).__name__}")
    return transformer


class ChromaFamily(ModelFamily):
    """Chroma 1: diffusers' layout or single files, T5 text, Flux's VAE."""

    name = "chroma"
    alignment_px = BUCKET_ALIGNMENT_PX["chroma"]
    flavours = model_files.FLAVOURS
    lora_conventions = CHROMA_LORA
    locate_files = staticmethod(model_files.locate_files)
    text_fingerprint = staticmethod(fingerprints.text_fingerprint)
    vae_fingerprint = staticmethod(fingerprints.vae_fingerprint)
    transformer_fingerprint = staticmethod(fingerprints.transformer_fingerprint)
    save_transformer = staticmethod(weights.save_transformer)

    def notices(self, options: ModelOptions) -> list[str]:
        if options.model_flavour == "flash" and options.pretrained_model_name_or_path is None:
            return [
                "Chroma1-Flash is distilled to sample in few steps, and training it undoes that."
                " Train on base or hd and use the LoRA with flash."
            ]
        return []

    def read_constants(self, source: ModelFiles) -> ArchitectureConstants:
        transformer = weights.read_transformer_config(source.transformer)
        vae = weights.read_vae_config(source.vae)
        t5 = weights.read_t5_config(source.text_encoder)
        try:
            channels, sides = int(vae["latent_channels"]), len(vae["block_out_channels"])  # type: ignore[call-overload,arg-type]
            scale, shift = float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)  # type: ignore[arg-type]
            width = int(t5["d_model"])  # type: ignore[call-overload]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{source.name}: a field of the VAE's or T5's config is missing or invalid"
                f" ({error!r})."
            ) from None
        if transformer.in_channels != channels * PATCH_SIZE * PATCH_SIZE:
            raise ModelError(
                f"{source.name}: the VAE has {channels} channels, but the transformer expects"
                f" {transformer.in_channels // PATCH_SIZE**2}. They belong to different models."
            )
        if transformer.joint_attention_dim != width:
            raise ModelError(
                f"{source.name}: the text encoder has width {width}, but the transformer expects"
                f" {transformer.joint_attention_dim}. They belong to different models."
            )
        return ArchitectureConstants(
            latent_channels=channels,
            stride_px=2 ** (sides - 1),
            alignment_px=self.alignment_px,
            token_px=PATCH_SIZE * 2 ** (sides - 1),
            max_tokens=fingerprints.MAX_TOKENS,
            text_tensors={T5_TENSOR: TextTensor(width)},
            latent_shift=shift,
            latent_scale=scale,
        )

    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        return model_spec.build_model_spec(options, dtype, self.read_constants)

    def text_encoder_pass(
        self, options: ModelOptions, samples: int, rows: int
    ) -> EncoderPass | None:
        return encoder_passes.text_encoder_pass(options, samples, rows)

    def vae_pass(
        self,
        options: ModelOptions,
        device_kind: str,
        samples: int,
        size_px: tuple[int, int],
        decodes: bool,
    ) -> EncoderPass | None:
        dtype = vae_dtype(options, torch.device(device_kind))
        return encoder_passes.vae_pass(options, dtype, samples, size_px, decodes)

    def write_quantized_files(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> list[Path]:
        files = []
        if options.base_model_precision != "no_change":
            files.append(quantized_cache.quantized_transformer_file(source, options, device, emit))
        if options.text_encoder_1_precision != "no_change":
            from simpletuner.models.chroma.t5 import quantized_t5_file

            files.append(quantized_t5_file(source, options, device, emit))
        return files

    def load_text_encoder(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> TextEncoder:
        # Importing transformers takes seconds, and a run whose captions are cached does not need
        # it. The same holds for diffusers and the VAE.
        from simpletuner.models.chroma.text_encoder import load_text_encoder

        return load_text_encoder(source, options, device, emit)

    def load_vae(self, source: ModelFiles, options: ModelOptions, device: torch.device) -> Vae:
        from simpletuner.models.chroma.vae import load_vae

        return load_vae(source, options, device)

    def load_transformer(
        self,
        source: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        emit: Emit = null_emit,
        as_views: bool = False,
    ) -> nn.Module:
        if options is None or options.base_model_precision == "no_change":
            return weights.load_transformer(
                source.transformer, device, dtype, source.variant, as_views
            )
        file = quantized_cache.quantized_transformer_file(source, options, device, emit)
        config = weights.read_transformer_config(source.transformer)
        return weights.load_quantized_transformer(
            file, config, options.base_model_precision, device, dtype
        )

    def predict_velocity(
        self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch
    ) -> Tensor:
        dtype = _as_chroma(transformer).dtype
        grid = (x_sigma.shape[2] // PATCH_SIZE, x_sigma.shape[3] // PATCH_SIZE)
        rows = text.tensors[T5_TENSOR].to(device=x_sigma.device, dtype=dtype)
        lengths = None if text.has_equal_lengths(T5_TENSOR) else text.lengths[T5_TENSOR]
        velocity = transformer(pack_latents(x_sigma).to(dtype), sigma.float(), rows, grid, lengths)
        return unpack_latents(velocity, grid).float()

    def block_count(self, transformer: nn.Module) -> int:
        return len(_as_chroma(transformer).blocks)

    def shard_units(self, transformer: nn.Module) -> list[nn.Module]:
        chroma = _as_chroma(transformer)
        return [*chroma.blocks, chroma.distilled_guidance_layer]

    def place_blocks(
        self, transformer: nn.Module, memory: BlockMemoryPolicy, device: torch.device | None = None
    ) -> None:
        chroma = _as_chroma(transformer)
        approximator = chroma.distilled_guidance_layer
        on_host = [approximator] if memory.approximator_on_host else []
        chroma.run_block = block_executor.place_blocks(
            chroma, chroma.blocks, memory, device, chroma.run_block, on_host
        )
        chroma.prepared_modulations = None
        if memory.approximator_on_host and device is not None:
            chroma.prepared_modulations = PreparedModulations(
                approximator, chroma.modulations, device, not memory.approximator_computes_on_host
            )

    def prepare_sigmas(self, transformer: nn.Module, sigma: Tensor) -> None:
        prepared = _as_chroma(transformer).prepared_modulations
        if prepared is not None:
            prepared.prepare(sigma)

    def intercept_blocks(self, transformer: nn.Module, intercept: Intercept) -> None:
        chroma = _as_chroma(transformer)
        chroma.run_block = replace(chroma.run_block, intercept=intercept)

    def compile_blocks(self, transformer: nn.Module, options: ModelOptions) -> None:
        chroma = _as_chroma(transformer)
        chroma.use_padding_mask = options.compiles_blocks
        if options.dynamo_backend == "dequantize":
            compile_dequantize(chroma)
        chroma.run_block = block_executor.compile_blocks(chroma.blocks, options, chroma.run_block)

    def full_finetune_parameters(self, transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [
            item for item in transformer.named_parameters() if not item[0].startswith(FROZEN_PREFIX)
        ]

    def lora_targets(
        self, transformer: nn.Module, preset: str, chosen: str | Sequence[str] | None = None
    ) -> list[str]:
        if chosen is None:
            return lora_targets.preset_targets(transformer, preset)
        return lora_targets.matching_targets(transformer, chosen)

    def linear_classes(self, transformer: nn.Module) -> dict[str, tuple[str, ...]]:
        return lora_targets.linear_classes(transformer)

    def save_native_file(self, folder: Path, file: Path, metadata: Mapping[str, str]) -> None:
        from simpletuner.models.chroma.merge_loras import merge_loras

        output = MergeOutput(file, native_format=True, dtype=None, overwrite=True)
        merge_loras(folder, (), output, metadata)

    def merge_loras(
        self,
        source: ModelFiles,
        loras: WeightedLoras,
        output: MergeOutput,
        metadata: Mapping[str, str],
        emit: Emit = null_emit,
    ) -> None:
        from simpletuner.models.chroma.merge_loras import merge_loras

        merge_loras(source.transformer, loras, output, metadata, emit, source.variant)
