"""Pixels to raw posterior moments and back, by diffusers' AutoencoderKL (16 channels, stride 8)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.chroma.weights import read_vae_config
from simpletuner.models.family import ModelFiles, Vae
from simpletuner.models.weights.components import component_tensors
from simpletuner.models.weights.tensor_loading import check_tensors

VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def vae_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """Return the dtype; "default" is bfloat16 on accelerators and float32 on the CPU."""
    if options.vae_dtype == "default":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return VAE_DTYPES[options.vae_dtype]


class ChromaVae(Vae):
    """Flux's VAE, which Chroma uses."""

    def __init__(self, vae: Any) -> None:
        """Wrap an AutoencoderKL, which type checkers see as a stub without methods."""
        self._vae = vae

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        moments: Tensor = self._vae.encode(
            pixels.to(self._vae.device, self._vae.dtype)
        ).latent_dist.parameters
        # Kept in the VAE's dtype: half the cache size in half precision, without any loss.
        return moments.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = latents / self._vae.config.scaling_factor + (self._vae.config.shift_factor or 0.0)
        result: Tensor = (
            self._vae.decode(raw.to(self._vae.device, self._vae.dtype)).sample.float().cpu()
        )
        return result


def load_vae(source: ModelFiles, options: ModelOptions, device: torch.device) -> ChromaVae:
    """Load the VAE. Tiling saves memory on large images but leaves seams of a few grey levels."""
    config = read_vae_config(source.vae)
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config)
    dtype = vae_dtype(options, device)
    tensors = component_tensors(source.vae, "vae", CHROMA_FORMAT, source.variant)
    state = {name: tensor.load().to(dtype) for name, tensor in tensors.items()}
    if any(name.startswith("encoder.down.") for name in state):
        state = convert_ldm_vae_checkpoint(state, config)
    check_tensors(vae.state_dict(), state, source.vae)
    vae.load_state_dict(state, assign=True)
    if options.vae_enable_tiling:
        vae.enable_tiling()
    if options.vae_enable_slicing:
        vae.enable_slicing()
    return ChromaVae(vae.to(device).requires_grad_(False).eval())
