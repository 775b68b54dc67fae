"""Chroma with random weights, made where they are computed with: no file, no hub."""

from __future__ import annotations

import dataclasses

import torch
from benchmarks.gpu.cases import SuiteSize
from torch import Tensor, nn

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.model_spec import CHROMA_CONSTANTS
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.models.family import ModelSpec
from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import get_scheme

WEIGHT_STD = 0.02  # keeps the streams of 57 blocks finite in bf16


class RandomChroma(ChromaFamily):
    """The family at a world's size, whatever model files are at hand."""

    def __init__(self, world: SuiteSize) -> None:
        self.size = world

    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        config = self.size.config
        network = empty_transformer(config, options.base_model_precision, dtype)
        facts = dataclasses.replace(CHROMA_CONSTANTS, text_width=config.joint_attention_dim)
        blocks = (*network.transformer_blocks, *network.single_transformer_blocks)
        hosted = sum(parameter.nbytes for parameter in network.distilled_guidance_layer.parameters())
        return ModelSpec(network, blocks, config.width, facts, False, torch.bfloat16, 0, 0, hosted, 0)


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Norms are 1 and biases 0, so that a random network is as tame as a trained one."""
    if len(shape) > 1:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=WEIGHT_STD)
    return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)


@torch.no_grad()
def fill_with_random_weights(network: nn.Module, device: torch.device, at: torch.device) -> None:
    """Every tensor on the meta device gets numbers, drawn on `device` and laid down at `at`.

    Quantised linears get what quantising random weights gives. One tensor is drawn at a time.
    """
    for module in network.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                value = random_tensor(name, tensor.shape, tensor.dtype, device).to(at)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        if isinstance(module, QuantizedLinear):
            shape = torch.Size((module.out_features, module.in_features))
            parts = get_scheme(module.scheme).quantize(
                random_tensor("weight", shape, module.weight_dtype, device)
            )
            for name, part in parts.items():
                module._buffers[name] = part.to(at)
