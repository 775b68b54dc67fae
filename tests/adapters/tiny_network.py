"""A Chroma of a few thousand parameters, from diffusers: the names and the shapes are the real
ones.
"""

from __future__ import annotations

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor

ATTENTION_LINEARS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


def tiny_chroma(dtype: torch.dtype = torch.float32) -> ChromaTransformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    return network.to(dtype).requires_grad_(False)


def attention_names(network: torch.nn.Module) -> list[str]:
    return [
        name
        for name, _ in network.named_modules()
        if any(name.endswith(f"attn.{end}") for end in ATTENTION_LINEARS)
    ]


def run_forward(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return network(
        hidden_states=torch.randn(2, 12, 16, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(2, 5, 24, generator=generator).to(dtype),
        timestep=torch.tensor([0.3, 0.8], dtype=dtype),
        img_ids=torch.zeros(12, 3, dtype=dtype),
        txt_ids=torch.zeros(5, 3, dtype=dtype),
        return_dict=False,
    )[0]


def perturb(parameters: list[tuple[str, torch.nn.Parameter]], size: float = 0.1) -> None:
    """As if trained: no factor stays zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise.to(parameter.dtype))


def make_pipeline(transformer: ChromaTransformer2DModel) -> ChromaPipeline:
    """Nothing but the transformer and the loader of LoRA files."""
    parts = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor")
    )
    return ChromaPipeline(transformer=transformer, **parts)
