"""The bundled chroma-nano: whole, small, readable by the libraries, and deaf to no string."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

import simpletuner.models

NANO = Path(simpletuner.models.__path__[0]) / "nano"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(NANO / "tokenizer")


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_it_fits_in_the_wheel() -> None:
    assert sum(file.stat().st_size for file in NANO.rglob("*") if file.is_file()) <= 25e6


def test_diffusers_and_transformers_read_it() -> None:
    transformer = ChromaTransformer2DModel.from_pretrained(NANO / "transformer")
    vae = AutoencoderKL.from_pretrained(NANO / "vae")
    encoder = T5EncoderModel.from_pretrained(NANO / "text_encoder")
    assert count(transformer) <= 12e6
    assert count(vae) <= 2e6
    assert count(encoder) <= 1.5e6
    assert vae.config.latent_channels == 16
    assert transformer.config.in_channels == 4 * vae.config.latent_channels
    assert transformer.config.joint_attention_dim == encoder.config.d_model


def test_latents_of_a_drawn_picture_are_scaled_to_one() -> None:
    import make_shapes_dataset as draw
    import numpy as np

    from simpletuner.validation.shapes.scenes import compose_scene

    vae = AutoencoderKL.from_pretrained(NANO / "vae").float()
    pictures = np.stack(
        [np.asarray(draw.render_scene(compose_scene(12, number))) for number in range(24)]
    )
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = (posterior.sample() - vae.config.shift_factor) * vae.config.scaling_factor
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
    assert latents.mean().abs() < 0.15
    assert abs(latents.std() - 1) < 0.15
    psnr = -10 * ((decoded - pixels) / 2).square().flatten(1).mean(1).log10()
    assert psnr.mean() >= 30


def test_known_words_are_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer("A Red circle on the left, navy background")["input_ids"]
    )
    assert tokens == [
        "▁a",
        "▁red",
        "▁circle",
        "▁on",
        "▁the",
        "▁left",
        ",",
        "▁navy",
        "▁background",
        "</s>",
    ]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_string_becomes_known_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id not in ids


def test_words_in_another_order_are_other_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Chroma's text tokens have no positions, so the encoder must tell which colour goes with which
    shape.
    """
    encoder = T5EncoderModel.from_pretrained(NANO / "text_encoder").float()
    one, other = (
        encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
        for text in ("a red circle and a blue star", "a blue circle and a red star")
    )
    circle = 2
    assert (one[circle] - other[circle]).square().mean() > 0.1
    assert torch.allclose(one.square().mean(-1), torch.ones(len(one)), atol=0.05)
