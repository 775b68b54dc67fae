"""The adapter in our own transformer, and its file in diffusers' pipeline around diffusers'
transformer.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor

from simpletuner.adapters.attachment import set_strength
from simpletuner.adapters.safetensors_reader import LORA_WEIGHTS_NAME
from simpletuner.config.schema import AdapterOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.lora_targets import preset_targets
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.family import BlockMemoryPolicy
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import make_pipeline, perturb
from tests.models.tiny_checkpoint import TEXT_WIDTH, transformer_fields

ROWS, COLUMNS, TEXT = 3, 4, 6


def both() -> tuple[ChromaTransformer2DModel, ChromaTransformer]:
    torch.manual_seed(0)
    theirs = ChromaTransformer2DModel(**transformer_fields()).requires_grad_(False)
    ours = ChromaTransformer(
        TransformerConfig.from_dict(transformer_fields(), "fields")
    ).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, ROWS * COLUMNS, 64, generator=generator)
    return tokens, torch.tensor([0.3, 0.8]), torch.randn(2, TEXT, TEXT_WIDTH, generator=generator)


def run_theirs(model: ChromaTransformer2DModel) -> Tensor:
    tokens, sigma, text = inputs()
    ids = torch.zeros(ROWS, COLUMNS, 3)
    ids[..., 1] = torch.arange(ROWS)[:, None]
    ids[..., 2] = torch.arange(COLUMNS)
    return model(tokens, text, sigma, ids.reshape(-1, 3), torch.zeros(TEXT, 3), return_dict=False)[
        0
    ]


def run_ours(model: ChromaTransformer) -> Tensor:
    tokens, sigma, text = inputs()
    return model(tokens, sigma, text, (ROWS, COLUMNS))


@pytest.mark.parametrize("preset", ["all", "all+ffs", "context+ffs"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_trained_here_is_the_same_delta_in_the_diffusers_pipeline(preset, dora, tmp_path):
    theirs, ours = both()
    base, base_theirs = run_ours(ours), run_theirs(theirs)
    options = AdapterOptions(lora_rank=4, lora_alpha=3.0, use_dora=dora)
    result = attach_adapter(ours, options, preset_targets(ours, preset), seed=1)
    perturb(result.trainable)
    chroma_lora.save_adapter(ours, tmp_path / LORA_WEIGHTS_NAME)
    loaded = make_pipeline(theirs)
    loaded.load_lora_weights(tmp_path)
    delta, delta_theirs = run_ours(ours) - base, run_theirs(theirs) - base_theirs
    assert delta.abs().max() > 0.05
    assert (
        delta - delta_theirs
    ).abs().max() < 2e-6 * base.abs().max()  # rounding of float32 outputs
    set_strength(ours, 0.0)
    assert torch.equal(run_ours(ours), base)


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_init_type": "pissa"}]
)
def test_recomputing_blocks_changes_no_bit(options):
    gradients = []
    for every in (0, 1, 2):
        _, ours = both()
        ChromaFamily().place_blocks(ours, BlockMemoryPolicy(5 if every else 0, every or 1))
        result = attach_adapter(
            ours, AdapterOptions(lora_rank=4, **options), preset_targets(ours, "all+ffs"), seed=1
        )
        perturb(result.trainable)
        ours.train()
        torch.manual_seed(9)
        run_ours(ours).square().sum().backward()
        gradients.append([parameter.grad for _, parameter in result.trainable])
    assert all(gradient is not None and gradient.any() for gradient in gradients[0])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_bf16_base_trains_towards_the_float32_gradient():
    """A whole network in bf16 with float32 masters: the gradient's direction is the exact one's."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        _, ours = both()
        ours.to(dtype)
        result = attach_adapter(
            ours, AdapterOptions(lora_rank=4), preset_targets(ours, "all+ffs"), seed=1
        )
        perturb(result.trainable)
        tokens, sigma, text = inputs()
        output = ours(tokens.to(dtype), sigma, text.to(dtype), (ROWS, COLUMNS))
        output.float().square().mean().backward()
        assert {parameter.grad.dtype for _, parameter in result.trainable} == {torch.float32}
        found.append(torch.cat([parameter.grad.flatten() for _, parameter in result.trainable]))
    assert torch.nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.99
