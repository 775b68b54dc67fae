"""Pixels to raw posterior moments and back, by diffusers' AutoencoderKL (16 channels, stride 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.fingerprints import vae_dtype
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.chroma.weights import read_vae_config
from simpletuner.models.encoders import Vae
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights.components import component_tensors
from simpletuner.models.weights.tensor_loading import check_tensors


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
    vae = empty_vae(config, options)
    dtype = vae_dtype(options, device)
    tensors = component_tensors(source.vae, "vae", CHROMA_FORMAT, source.variant)
    state = {name: tensor.load().to(dtype) for name, tensor in tensors.items()}
    if any(name.startswith("encoder.down.") for name in state):
        state = convert_ldm_vae_checkpoint(state, config)
    check_tensors(vae.state_dict(), state, source.vae)
    vae.load_state_dict(state, assign=True)
    return ChromaVae(vae.to(device).requires_grad_(False).eval())


def empty_vae(config: Mapping[str, object], options: ModelOptions) -> Any:
    """Build the VAE on the meta device. Any, because type checkers see a stub without methods."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(dict(config))
    if options.vae_enable_tiling:
        vae.enable_tiling()
    if options.vae_enable_slicing:
        vae.enable_slicing()
    return vae.requires_grad_(False).eval()
