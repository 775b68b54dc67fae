"""What is minimised: the squared distance between predicted and true velocity on the straight path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import Batch
from simpletuner.config.schema import FlowOptions
from simpletuner.flow.loss import loss_per_sample
from simpletuner.flow.path import add_noise, velocity_target
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import seed_at


def sample_noise(
    visit_keys: tuple[str, ...], shape: torch.Size, seed: int, purpose: str = "noise"
) -> Tensor:
    """Standard normal (B, C, H, W) on the CPU; each sample's noise is addressed by its visit alone."""
    return torch.stack(
        [
            torch.randn(
                shape[1:], generator=torch.Generator().manual_seed(seed_at(seed, purpose, key))
            )
            for key in visit_keys
        ]
    )


def compute_losses(
    family: ModelFamily,
    transformer: nn.Module,
    batch: Batch,
    sigma: Tensor,
    options: FlowOptions,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Loss of every sample, (B,) float32 on the device. sigma: (B,) float32.

    With input_perturbation p the network's input is built from noise + p * other noise, while the target
    keeps the noise itself (Ning et al. 2023, Input Perturbation Reduces Exposure Bias).
    """
    noise = sample_noise(batch.visit_keys, batch.latents.shape, seed)
    seen = noise
    if options.input_perturbation > 0:
        other = sample_noise(batch.visit_keys, batch.latents.shape, seed, "perturbation")
        seen = noise + options.input_perturbation * other
    latents, noise, seen, sigma = (
        tensor.to(device, non_blocking=True) for tensor in (batch.latents, noise, seen, sigma)
    )
    text = batch.text.to(device, batch.text.embeddings.dtype)
    prediction = family.predict_velocity(transformer, add_noise(latents, seen, sigma), sigma, text)
    return loss_per_sample(prediction, velocity_target(latents, noise), sigma, options)
