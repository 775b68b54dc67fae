"""The usual training step for comparison: diffusers' transformer with PEFT's float32 adapters.

It runs under bf16 autocast with clipped gradients, on the same shapes and adapted modules as ours.
Text is padded to 512 rows with a boolean mask, as trainers do, or trimmed like ours without a mask.

diffusers 0.42 drops the mask in checkpointed single blocks: those padded steps are faster than
correct ones would be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.random_weights import RandomChroma
from benchmarks.gpu.simpletuner_step import LORA
from benchmarks.gpu.timing import empty_compile_cache, measure_steps
from benchmarks.gpu.workload import Workload
from diffusers import ChromaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.models.chroma.family import pack_latents
from simpletuner.models.chroma.weights import empty_transformer

MAX_GRAD_NORM = 1.0  # our default
SIGMA = 0.6543


@dataclasses.dataclass(frozen=True)
class DiffusersCase:
    """One way to train. px: side of the square image. trimmed: no padding and no mask."""

    px: int
    trimmed: bool
    checkpointing: bool = True
    compiled: bool = False


@contextmanager
def default_dtype_and_device(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Create modules in this dtype on this device: in float32, 8.9 B parameters take 36 GB."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(former)


def build_network(case: DiffusersCase, workload: Workload) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return the network in training mode, and the parameters of its adapters."""
    config = dataclasses.asdict(workload.config)
    config = {name: value for name, value in config.items() if value is not None}
    empty = empty_transformer(workload.config)
    names = RandomChroma(workload.config).lora_targets(empty, str(LORA["flux_lora_target"]))
    rank = int(LORA["lora_rank"])
    with default_dtype_and_device(torch.bfloat16, workload.device):
        network = ChromaTransformer2DModel(**config).requires_grad_(False)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        inject_adapter_in_model(lora, network)
    adapters = [parameter for name, parameter in network.named_parameters() if "lora_" in name]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    if case.checkpointing:
        network.enable_gradient_checkpointing()
    if case.compiled:
        network.compile_repeated_blocks(backend=workload.backend, dynamic=True)
    return network.train(), adapters


def position_ids(side: int, device: torch.device) -> Tensor:
    """Return the (row, column) positions of the image tokens, (side * side, 3)."""
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)
    return ids.view(-1, 3)


def make_step(
    network: nn.Module, adapters: list[nn.Parameter], case: DiffusersCase, workload: Workload
) -> Callable[[], float]:
    """Return a function that runs one optimizer step on a fixed batch and returns its loss."""
    device = workload.device
    side = workload.scaled_px(case.px) // 8
    rows = workload.text_rows if case.trimmed else workload.padded_rows
    image_ids = position_ids(side // 2, device)
    text_ids = torch.zeros(rows, 3, device=device)
    mask = None
    if not case.trimmed:
        mask = torch.ones(1, rows + len(image_ids), dtype=torch.bool, device=device)
        mask[:, workload.text_rows : rows] = False
    width = workload.config.joint_attention_dim
    text = torch.randn(1, rows, width, device=device).bfloat16()
    target = pack_latents(torch.randn(1, 16, side, side, device=device))
    inputs = (target.bfloat16(), text, torch.tensor([SIGMA], device=device))
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            output = network(*inputs, image_ids, text_ids, mask, return_dict=False)[0]
        loss = (output.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(workload: Workload, **fields: Any) -> Outcome:
    """Measure time, memory and kernels of a step at full size. fields: of DiffusersCase."""
    torch.manual_seed(0)
    case = DiffusersCase(**fields)
    network, adapters = build_network(case, workload)
    step = make_step(network, adapters, case, workload)
    with empty_compile_cache(workload, case.compiled):
        figures = measure_steps(step, workload)
    trained = sum(parameter.numel() for parameter in adapters)
    figures |= {"trained": trained, "px": case.px, "batch": 1}
    if not case.compiled:  # counting operations would bypass the compiled blocks
        with FlopCounterMode(display=False) as counter:
            step()
        figures["flops"] = counter.get_total_flops()
    return Outcome(figures)
