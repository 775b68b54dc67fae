"""Chroma with random weights, made where they are computed with: no file, no hub."""

from __future__ import annotations

import dataclasses

import torch
from benchmarks.gpu.cases import World
from torch import Tensor, nn

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import Chroma
from simpletuner.models.chroma.sketch import FACTS
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.models.family import Sketch
from simpletuner.quantization.linear import QuantizedLinear
from simpletuner.quantization.schemes import named

SPREAD = 0.02  # keeps the streams of 57 blocks finite in bf16


class Shaped(Chroma):
    """The family at a world's size, whatever model files are at hand."""

    def __init__(self, world: World) -> None:
        self.world = world

    def sketch(self, options: ModelOptions, dtype: torch.dtype) -> Sketch:
        config = self.world.config
        network = empty_transformer(config, options.base_model_precision, dtype)
        facts = dataclasses.replace(FACTS, text_width=config.joint_attention_dim)
        blocks = (*network.transformer_blocks, *network.single_transformer_blocks)
        hosted = sum(parameter.nbytes for parameter in network.distilled_guidance_layer.parameters())
        return Sketch(network, blocks, config.width, facts, False, torch.bfloat16, 0, 0, hosted, 0)


def drawn(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Norms are 1 and biases 0, so that a random network is as tame as a trained one."""
    if len(shape) > 1:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=SPREAD)
    return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)


@torch.no_grad()
def fill(network: nn.Module, device: torch.device, at: torch.device) -> None:
    """Every tensor on the meta device gets numbers, drawn on `device` and laid down at `at`.

    Quantised linears get what quantising random weights gives. One tensor is drawn at a time.
    """
    for module in network.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                value = drawn(name, tensor.shape, tensor.dtype, device).to(at)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        if isinstance(module, QuantizedLinear):
            shape = torch.Size((module.out_features, module.in_features))
            parts = named(module.scheme).quantize(drawn("weight", shape, module.weight_dtype, device))
            for name, part in parts.items():
                module._buffers[name] = part.to(at)
