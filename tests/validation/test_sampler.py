from __future__ import annotations

import pytest
import torch

from simpletuner.validation.inference import eval_mode
from simpletuner.validation.prompts import Prompt, make_image_specs
from simpletuner.validation.sampler import denoise, generate_latents, initial_noise
from tests.validation.toy_family import (
    FACTS,
    INFERENCE,
    ToyNetwork,
    embed_text,
    exact_euler_result,
    mean_embedding,
)


def test_the_solver_gives_the_closed_form() -> None:
    noise = torch.stack([initial_noise(FACTS, seed, (16, 32)) for seed in (1, 2)])
    rows = [embed_text("a"), embed_text("four")]
    drawn = denoise(INFERENCE, ToyNetwork(0.5), rows, noise, steps=7)
    for one, start, text in zip(drawn, noise, rows, strict=True):
        torch.testing.assert_close(
            one, exact_euler_result(start, 0.5, mean_embedding(text), 7), rtol=1e-5, atol=1e-6
        )


def test_guidance_is_two_separate_passes_mixed() -> None:
    """The toy is linear in the word, so guidance of the velocity is guidance of the word."""
    noise = initial_noise(FACTS, 3, (16, 16))[None]
    text, negative = embed_text("a cat"), embed_text("no dogs")
    network = ToyNetwork(0.5)
    drawn = denoise(
        INFERENCE, network, [text], noise, steps=5, guidance=2.5, negative_embeddings=[negative]
    )
    mixed = mean_embedding(negative) + 2.5 * (mean_embedding(text) - mean_embedding(negative))
    torch.testing.assert_close(
        drawn[0], exact_euler_result(noise[0], 0.5, mixed, 5), rtol=1e-5, atol=1e-6
    )
    assert network.calls == [2] * 5


def test_without_guidance_the_negative_is_not_looked_at() -> None:
    noise = initial_noise(FACTS, 3, (16, 16))[None]
    network = ToyNetwork()
    plain = denoise(INFERENCE, network, [embed_text("a")], noise, steps=3)
    same = denoise(
        INFERENCE,
        network,
        [embed_text("a")],
        noise,
        steps=3,
        guidance=1.0,
        negative_embeddings=[embed_text("b c")],
    )
    assert torch.equal(plain, same)
    assert network.calls == [1] * 6
    with pytest.raises(ValueError, match="negative"):
        denoise(INFERENCE, network, [embed_text("a")], noise, steps=3, guidance=2.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_in_a_batch_is_the_picture_alone(guidance: float) -> None:
    prompts = [
        Prompt("a", "a", "no"),
        Prompt("b", "a longer text"),
        Prompt("c", "cc", "none of it"),
    ]
    listed = make_image_specs(prompts, [(16, 16), (32, 16)], 2, 42)
    network = ToyNetwork()
    together = list(
        generate_latents(INFERENCE, network, listed, embed_text, steps=4, guidance=guidance)
    )
    assert max(network.calls) > 2
    assert [picture for picture, _ in together] == list(listed)
    for picture, latents in together:
        ((_, alone),) = generate_latents(
            INFERENCE, network, [picture], embed_text, steps=4, guidance=guidance
        )
        assert latents.shape == (1, 4, picture.size_px[1] // 8, picture.size_px[0] // 8)
        torch.testing.assert_close(latents, alone, rtol=1e-5, atol=1e-6)


def test_a_batch_holds_no_more_pixels_than_one_large_picture() -> None:
    network = ToyNetwork()
    listed = make_image_specs([Prompt("a", "a")], [(1024, 512)], 3, 42)
    list(generate_latents(INFERENCE, network, listed, embed_text, steps=1, guidance=1.0))
    assert network.calls == [2, 1]
    network.calls.clear()
    list(generate_latents(INFERENCE, network, listed, embed_text, steps=1, guidance=2.0))
    assert network.calls == [2, 2, 2]


def test_noise_is_a_function_of_seed_and_size() -> None:
    noise = initial_noise(FACTS, 5, (64, 128))
    assert noise.shape == (4, 16, 8)
    torch.manual_seed(0)
    assert torch.equal(noise, initial_noise(FACTS, 5, (64, 128)))
    assert not torch.equal(noise, initial_noise(FACTS, 6, (64, 128)))
    assert abs(float(noise.mean())) < 0.2
    assert abs(float(noise.std()) - 1) < 0.2


def test_sampling_leaves_modes_and_gradients_alone() -> None:
    network = ToyNetwork()
    network.train()
    network.frozen = torch.nn.Dropout(0.5).eval()
    before = torch.random.get_rng_state()
    denoise(INFERENCE, network, [embed_text("a")], initial_noise(FACTS, 1, (16, 16))[None], steps=2)
    assert torch.equal(before, torch.random.get_rng_state()), (
        "dropout or noise drew from the ambient generator"
    )
    assert network.training
    assert network.dropout.training
    assert not network.frozen.training
    assert not network.grad_seen
    with pytest.raises(ZeroDivisionError), eval_mode(network):
        raise ZeroDivisionError
    assert network.training
