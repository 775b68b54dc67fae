"""Chroma 1 behind the family contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.cache.types import TextBatch
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.sinks import silent
from simpletuner.events.types import Emit
from simpletuner.models import blocks
from simpletuner.models.chroma import fingerprints, precision, sketch, sources, targets, weights
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.family import BlockMemory, Facts, ModelFamily, Sketch, Source, TextEncoder, Vae

PATCH = 2
ALIGNMENT_PX = 64
NEVER_TRAINED = "distilled_guidance_layer."


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C): 2x2 patches row by row, channel-major inside a patch."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of pack. grid: patch rows and columns."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def _chroma(transformer: nn.Module) -> ChromaTransformer:
    if not isinstance(transformer, ChromaTransformer):
        raise TypeError(f"not Chroma's transformer: {type(transformer).__name__}")
    return transformer


class Chroma(ModelFamily):
    name = "chroma"
    locate = staticmethod(sources.locate)
    text_fingerprint = staticmethod(fingerprints.text_fingerprint)
    vae_fingerprint = staticmethod(fingerprints.vae_fingerprint)
    transformer_fingerprint = staticmethod(fingerprints.transformer_fingerprint)
    save_transformer = staticmethod(weights.save_transformer)

    def notes(self, options: ModelOptions) -> list[str]:
        if options.model_flavour == "flash" and options.pretrained_model_name_or_path is None:
            return [
                "Chroma1-Flash is distilled for few steps: training it undoes that. Train on base or"
                " hd and use the LoRA on flash."
            ]
        return []

    def facts(self, source: Source) -> Facts:
        transformer = weights.read_config(source.transformer)
        vae, t5 = weights.vae_config(source.vae), weights.t5_config(source.text_encoder)
        try:
            channels, sides = int(vae["latent_channels"]), len(vae["block_out_channels"])  # type: ignore[call-overload,arg-type]
            scale, shift = float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)  # type: ignore[arg-type]
            width = int(t5["d_model"])  # type: ignore[call-overload]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{source.name}: its VAE or T5 config lacks a field ({error!r}).") from None
        if transformer.in_channels != channels * PATCH * PATCH:
            raise ModelError(
                f"{source.name}: the VAE has {channels} channels, the transformer expects"
                f" {transformer.in_channels // PATCH**2}. They do not belong together."
            )
        if transformer.joint_attention_dim != width:
            raise ModelError(
                f"{source.name}: the text encoder is {width} wide, the transformer expects"
                f" {transformer.joint_attention_dim}. They do not belong together."
            )
        return Facts(
            latent_channels=channels,
            stride_px=2 ** (sides - 1),
            alignment_px=ALIGNMENT_PX,
            token_px=PATCH * 2 ** (sides - 1),
            max_tokens=fingerprints.MAX_TOKENS,
            text_width=width,
            latent_shift=shift,
            latent_scale=scale,
        )

    def sketch(self, options: ModelOptions, dtype: torch.dtype) -> Sketch:
        return sketch.sketch(options, dtype, self.facts)

    def quantize(
        self, source: Source, options: ModelOptions, device: torch.device, emit: Emit = silent
    ) -> list[Path]:
        files = []
        if options.base_model_precision != "no_change":
            files.append(precision.transformer_file(source, options, device, emit))
        if options.text_encoder_1_precision != "no_change":
            from simpletuner.models.chroma.t5 import t5_file

            files.append(t5_file(source, options, device, emit))
        return files

    def load_text_encoder(
        self, source: Source, options: ModelOptions, device: torch.device, emit: Emit = silent
    ) -> TextEncoder:
        # transformers takes seconds to import; a warm start never needs it. The same holds for the VAE.
        from simpletuner.models.chroma.text import load_text_encoder

        return load_text_encoder(source, options, device, emit)

    def load_vae(self, source: Source, options: ModelOptions, device: torch.device) -> Vae:
        from simpletuner.models.chroma.vae import load_vae

        return load_vae(source, options, device)

    def load_transformer(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        emit: Emit = silent,
    ) -> nn.Module:
        if options is None or options.base_model_precision == "no_change":
            return weights.load_transformer(source.transformer, device, dtype, source.variant)
        file = precision.transformer_file(source, options, device, emit)
        config = weights.read_config(source.transformer)
        return weights.load_quantized(file, config, options.base_model_precision, device, dtype)

    def predict(self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch) -> Tensor:
        dtype = _chroma(transformer).dtype
        grid = (x_sigma.shape[2] // PATCH, x_sigma.shape[3] // PATCH)
        rows = text.rows.to(device=x_sigma.device, dtype=dtype)
        lengths = None if text.equal else text.lengths
        velocity = transformer(pack(x_sigma).to(dtype), sigma.float(), rows, grid, lengths)
        return unpack(velocity, grid).float()

    def block_count(self, transformer: nn.Module) -> int:
        return len(_chroma(transformer).blocks)

    def arrange(
        self, transformer: nn.Module, memory: BlockMemory, device: torch.device | None = None
    ) -> None:
        chroma = _chroma(transformer)
        stay = [chroma.distilled_guidance_layer] if memory.approximator_on_host else []
        chroma.run_block = blocks.arrange(chroma, chroma.blocks, memory, device, chroma.run_block, stay)

    def compile_blocks(self, transformer: nn.Module, options: ModelOptions) -> None:
        chroma = _chroma(transformer)
        chroma.masked = options.dynamo_backend != "no"
        blocks.compile_each(chroma.blocks, options)

    def trainable_at_full_rank(self, transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [item for item in transformer.named_parameters() if not item[0].startswith(NEVER_TRAINED)]

    def lora_targets(
        self, transformer: nn.Module, preset: str, chosen: str | Sequence[str] | None = None
    ) -> list[str]:
        if chosen is None:
            return targets.lora_targets(transformer, preset)
        return targets.chosen_targets(transformer, chosen)

    def save_native(self, folder: Path, file: Path, metadata: Mapping[str, str]) -> None:
        from simpletuner.models.chroma.merge import Target, merge

        merge(folder, (), Target(file, native=True, dtype=None, replace=True), metadata)
