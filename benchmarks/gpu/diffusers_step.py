"""The usual step for comparison: diffusers' ChromaTransformer2DModel, PEFT's float32 adapters, 512 text rows
and a boolean mask, over the same shapes and the same adapted modules.

diffusers 0.42 leaves the mask out when it recomputes its blocks, so that these rows are quicker than right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.gpu.cases import LORA_OPTIONS, Case, SuiteSize
from benchmarks.gpu.random_weights import RandomChroma
from benchmarks.gpu.step_meter import measure_step
from diffusers import ChromaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.models.chroma.family import pack_latents
from simpletuner.models.chroma.weights import empty_transformer


@contextmanager
def default_dtype_and_device(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Modules are born there: the float32 copy of 8.9 B would be 36 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(case: Case, world: SuiteSize, device: torch.device) -> tuple[nn.Module, list[nn.Parameter]]:
    shape = {name: value for name, value in dataclasses.asdict(world.config).items() if value is not None}
    with default_dtype_and_device(torch.bfloat16, device):
        model = ChromaTransformer2DModel(**shape).requires_grad_(False)
        names = RandomChroma(world).lora_targets(
            empty_transformer(world.config), str(LORA_OPTIONS["flux_lora_target"])
        )
        rank = int(LORA_OPTIONS["lora_rank"])
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    if case.recomputed:
        model.enable_gradient_checkpointing()
    if case.compiled:
        model.compile_repeated_blocks(backend=world.backend, dynamic=True)
    return model.train(), adapters


def make_step(
    model: nn.Module, adapters: list[nn.Parameter], case: Case, world: SuiteSize, device: torch.device
) -> Callable[[], float]:
    side, rows = world.scaled_px(case) // 8, world.padded_rows
    ids = torch.zeros(side // 2, side // 2, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side // 2)[:, None], torch.arange(side // 2)
    image_ids, text_ids = ids.view(-1, 3).to(device), torch.zeros(rows, 3, device=device)
    mask = torch.ones(1, rows + len(image_ids), dtype=torch.bool, device=device)
    mask[:, world.text_rows : rows] = False
    text = torch.randn(1, rows, world.config.joint_attention_dim, device=device).bfloat16()
    target = pack_latents(torch.randn(1, 16, side, side, device=device))
    sigma = torch.tensor([0.6543], device=device)
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)

    def step() -> float:
        output = model(target.bfloat16(), text, sigma, image_ids, text_ids, mask, return_dict=False)[0]
        loss = (output.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(case: Case, world: SuiteSize) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(world.device)
    model, adapters = build_model(case, world, device)
    step = make_step(model, adapters, case, world, device)
    measured = measure_step(step, world, device)
    trained = sum(parameter.numel() for parameter in adapters)
    if case.compiled:  # counting operations would go around the compiled blocks
        return {**measured, "trained": trained}
    with FlopCounterMode(display=False) as counter:
        step()
    return {**measured, "trained": trained, "flops": counter.get_total_flops()}
