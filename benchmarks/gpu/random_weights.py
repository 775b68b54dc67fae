"""Chroma with random weights that are generated on the device: no file, no hub."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.models.chroma.model_spec import CHROMA_CONSTANTS
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.models.family import ModelSpec, TextTensor
from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import get_scheme

WEIGHT_STD = 0.02  # keeps the activations of 57 blocks finite in bf16


class RandomChroma(ChromaFamily):
    """The family at the size of `config`, whatever model files are present."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config

    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        network = empty_transformer(self.config, options.base_model_precision, dtype)
        width = self.config.joint_attention_dim
        approximator = network.distilled_guidance_layer
        return ModelSpec(
            transformer=network,
            blocks=(*network.transformer_blocks, *network.single_transformer_blocks),
            width=self.config.width,
            heads=self.config.num_attention_heads,
            constants=dataclasses.replace(
                CHROMA_CONSTANTS, text_tensors={T5_TENSOR: TextTensor(width)}
            ),
            uses_published_shape=False,
            text_dtype=torch.bfloat16,
            text_encoder_bytes=0,
            vae_bytes=0,
            cpu_offloadable_bytes=sum(tensor.nbytes for tensor in approximator.parameters()),
            download_bytes=0,
        )


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers that bf16 holds exactly, so that networks of all dtypes get the same ones.

    Norm weights are 1 and biases 0, so that a random network is as well-behaved as a trained one.
    """
    if len(shape) > 1:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return tensor.normal_(std=WEIGHT_STD).to(dtype)
    return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)


@torch.no_grad()
def fill_with_random_weights(
    network: nn.Module, device: torch.device, storage: torch.device
) -> None:
    """Replace every parameter on the meta device by one generated on `device`, kept on `storage`.

    Quantised linears get what quantising random weights gives. One tensor is generated at a time.
    """
    for module in network.modules():
        quantized = set(module.buffer_shapes()) if isinstance(module, QuantizedLinear) else ()
        for name, tensor in list(module._parameters.items()):
            if tensor is not None and name not in quantized:
                value = random_tensor(name, tensor.shape, tensor.dtype, device).to(storage)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        if isinstance(module, QuantizedLinear):
            shape = torch.Size((module.out_features, module.in_features))
            weight = random_tensor("weight", shape, module.weight_dtype, device)
            for name, buffer in get_scheme(module.scheme).quantize(weight).items():
                module._parameters[name] = nn.Parameter(buffer.to(storage), requires_grad=False)
