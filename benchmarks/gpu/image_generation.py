"""Validation images at full size: the sampler's steps, and Flux's VAE with random weights."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights
from benchmarks.gpu.timing import count_kernels, peak_memory, reset_peak_memory, time_call
from benchmarks.gpu.workload import Workload
from torch import Tensor

from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.models.chroma.model_spec import CHROMA_CONSTANTS
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.validation.inference import Inference
from simpletuner.validation.sampler import denoise

GUIDANCE = 3.0
TIMED_STEPS = 4
FLUX_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
TOY_WIDTHS = (32, 32, 32, 32)


def measure_sampler(workload: Workload, px: int) -> Outcome:
    """Time a sampler step with guidance, which computes a batch of two."""
    torch.manual_seed(0)
    device = workload.device
    config = workload.config
    network = empty_transformer(config)
    fill_with_random_weights(network, device, device)
    network.mod_proj = network.mod_proj.to(device)
    inference = Inference(RandomChroma(config), CHROMA_CONSTANTS, device, torch.bfloat16)
    embeddings = [
        {T5_TENSOR: torch.randn(workload.text_rows, config.joint_attention_dim)} for _ in range(2)
    ]
    side = workload.scaled_px(px) // 8
    noise = torch.randn(1, 16, side, side)

    def run_steps(count: int) -> Tensor:
        return denoise(
            inference,
            network,
            embeddings[:1],
            noise,
            steps=count,
            guidance=GUIDANCE,
            negative_embeddings=embeddings[1:],
        )

    first_s = time_call(lambda: run_steps(1), device)
    reset_peak_memory(device)
    step_s = time_call(lambda: run_steps(TIMED_STEPS), device) / TIMED_STEPS
    figures = {"first_s": first_s, "step_s": step_s, "peak": peak_memory(device)}
    figures |= count_kernels(lambda: run_steps(1), device, step_s)
    finite = bool(torch.isfinite(run_steps(1)).all())
    return Outcome(figures, () if finite else ("the latents are not finite",))


def measure_vae(workload: Workload, px: int, batch: int) -> Outcome:
    """Measure seconds and peak memory of encoding one image and a batch, and of decoding one."""
    from diffusers import AutoencoderKL

    from simpletuner.models.chroma.vae import ChromaVae

    torch.manual_seed(0)
    device = workload.device
    side = workload.scaled_px(px)
    fields = {**FLUX_VAE, **({"block_out_channels": TOY_WIDTHS} if workload.toy else {})}
    dtype = torch.bfloat16 if workload.on_gpu else torch.float32
    model = AutoencoderKL(**fields).to(device, dtype).eval()
    vae = ChromaVae(model)
    images = torch.rand(batch, 3, side, side) * 2 - 1
    latents = torch.randn(1, 16, side // 8, side // 8)
    calls = {
        f"encode_{batch}": lambda: vae.encode(images),
        "encode_1": lambda: vae.encode(images[:1]),
        "decode_1": lambda: vae.decode(latents),
    }
    figures: dict[str, Any] = {"weights": sum(tensor.nbytes for tensor in model.parameters())}
    for name, call in calls.items():
        reset_peak_memory(device)
        first_s = time_call(call, device)
        seconds = time_call(call, device)
        figures[name] = {"first_s": first_s, "seconds": seconds, "peak": peak_memory(device)}
    return Outcome(figures)
