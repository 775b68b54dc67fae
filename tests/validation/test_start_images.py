"""Generating from an image: geometry, noise levels, masks, and what the command refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from simpletuner.cli.generate import command
from simpletuner.config.schema import ModelOptions
from simpletuner.data.start_image import StartImageRequest, load_mask, place_start_image
from simpletuner.errors import ConfigError
from simpletuner.flow.objective import add_noise
from simpletuner.flow.solvers import sigma_grid
from simpletuner.models.registry import get_family
from simpletuner.validation.prompts import Prompt, make_image_specs
from simpletuner.validation.sampler import denoise, generate_latents, initial_noise
from simpletuner.validation.start_latents import StartLatents, encode_start
from simpletuner.validation.validation_images import pixels_to_image, read_image_metadata
from tests.models.tiny_checkpoint import make_checkpoint
from tests.validation.toy_family import FACTS, INFERENCE, ToyNetwork, embed_text, mean_embedding


def save_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    levels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((width, height)).save(path)
    return path


def save_mask(path: Path, width: int, height: int, kept: int) -> Path:
    levels = np.zeros((height, width), np.uint8)
    levels[:, :kept] = 255
    Image.fromarray(levels).save(path)
    return path


def test_noise_levels_begin_at_denoise_and_are_those_of_the_whole_grid() -> None:
    assert sigma_grid(4, 1.0) == sigma_grid(4)
    assert sigma_grid(4, 0.5) == [0.5, 0.25, 0.0]
    assert sigma_grid(4, 0.6) == [0.6, 0.5, 0.25, 0.0]
    assert sigma_grid(10, 0.3) == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert len(sigma_grid(10, 0.3)) == 4
    assert sigma_grid(4, 0.001) == [0.001, 0.0]


def start(seed: int, level: float, keep: torch.Tensor | None = None) -> StartLatents:
    generator = torch.Generator().manual_seed(seed)
    return StartLatents(torch.randn(4, 2, 2, generator=generator), level, keep)


def test_sampling_from_an_image_in_closed_form() -> None:
    """v = gain x + word from sigma 0.5 in two steps of 1/4."""
    noise, origin, gain = initial_noise(FACTS, 3, (16, 16)), start(1, 0.5), 0.5
    text = embed_text("a")
    (found,) = denoise(INFERENCE, ToyNetwork(gain), [text], noise[None], steps=4, starts=[origin])
    x = 0.5 * origin.latents + 0.5 * noise
    for _ in range(2):
        x = x - 0.25 * (gain * x + mean_embedding(text)[:, None, None])
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


def test_denoise_1_is_text_to_image_to_the_last_bit() -> None:
    noise = torch.stack([initial_noise(FACTS, seed, (16, 16)) for seed in (1, 2)])
    rows = [embed_text("a"), embed_text("bb")]
    plain = denoise(INFERENCE, ToyNetwork(), rows, noise, steps=3)
    starts = [start(seed, 1.0) for seed in (8, 9)]
    assert torch.equal(denoise(INFERENCE, ToyNetwork(), rows, noise, steps=3, starts=starts), plain)


def test_a_mask_keeps_the_image_and_its_noise_at_every_step() -> None:
    keep = torch.tensor([[[1.0, 0.0], [0.25, 0.0]]])
    noise, origin = initial_noise(FACTS, 3, (16, 16)), start(1, 0.5, keep)
    text, gain = embed_text("a"), 0.5
    (found,) = denoise(INFERENCE, ToyNetwork(gain), [text], noise[None], steps=4, starts=[origin])
    x = 0.5 * origin.latents + 0.5 * noise
    for sigma in (0.25, 0.0):
        x = x - 0.25 * (gain * x + mean_embedding(text)[:, None, None])
        level = torch.tensor([sigma])
        x = keep * add_noise(origin.latents[None], noise[None], level)[0] + (1 - keep) * x
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, 0, 0], origin.latents[:, 0, 0])


def test_images_of_other_noise_levels_do_not_share_a_batch() -> None:
    specs = make_image_specs([Prompt("a", "a"), Prompt("b", "b")], [(16, 16)], 2, 42)
    starts = {specs[0]: start(1, 0.5), specs[1]: start(2, 0.5), specs[2]: start(3, 0.25)}
    network = ToyNetwork()
    found = list(
        generate_latents(
            INFERENCE, network, specs, embed_text, steps=4, guidance=1.0, start_of=starts.get
        )
    )
    assert network.calls == [2, 2, 1, 1, 1, 1, 1]
    for spec, latents in found:
        ((_, alone),) = generate_latents(
            INFERENCE, network, [spec], embed_text, steps=4, guidance=1.0, start_of=starts.get
        )
        torch.testing.assert_close(latents, alone, rtol=1e-5, atol=1e-6)


def test_a_square_size_is_an_area_and_another_one_is_met(tmp_path: Path) -> None:
    path = save_image(tmp_path / "wide.png", 300, 100)
    placed = place_start_image(path, (128, 128), 16)
    assert placed.bucket_px == (224, 80)
    assert placed.resize_px[0] >= 224
    exact = place_start_image(path, (64, 128), 16)
    assert exact.bucket_px == (64, 128)
    assert exact.resize_px == (384, 128)
    assert exact.crop_px == (160, 0), "the centre"


def test_a_mask_follows_the_geometry_of_its_image(tmp_path: Path) -> None:
    image = save_image(tmp_path / "image.png", 200, 100)
    mask = save_mask(tmp_path / "mask.png", 400, 200, kept=200)
    request = StartImageRequest(image, 0.5, mask)
    placed = place_start_image(image, (64, 64), 16)
    found = load_mask(request, placed)
    assert found is not None
    assert found.size == placed.bucket_px
    levels = np.asarray(found)
    half = placed.bucket_px[0] // 2
    assert (levels[:, : half - 4] == 255).all()
    assert (levels[:, half + 4 :] == 0).all()
    inverted = load_mask(StartImageRequest(image, 0.5, mask, invert_mask=True), placed)
    assert (np.asarray(inverted) == 255 - levels).all()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


def generate(base: Path, out: Path, *more: str) -> Path:
    # One dtype for all: what is compared are images, to the last bit.
    (out.parent / "config.json").write_text(
        f'{{"pretrained_model_name_or_path": "{base}", "mixed_precision": "no", "device": "cpu"}}'
    )
    config = ["--config", str(out.parent / "config.json")]
    arguments = [*config, "--prompt", "a cat", "--out", str(out), "--steps", "2", *more]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.splitlines()[-1])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_the_command_from_text_to_the_vaes_reconstruction(base: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "image.png", 64, 64)
    size = ("--size", "64")
    text = pixels(generate(base, tmp_path / "text", *size))
    full = generate(base, tmp_path / "full", *size, "--image", str(image), "--denoise", "1")
    assert (pixels(full) == text).all()
    half = pixels(generate(base, tmp_path / "half", *size, "--image", str(image)))
    near = generate(base, tmp_path / "near", *size, "--image", str(image), "--denoise", "1e-6")
    options = ModelOptions(
        pretrained_model_name_or_path=str(base), mixed_precision="no", device="cpu"
    )
    family = get_family("chroma")
    files = family.locate_files(options)
    constants, cpu = family.read_constants(files), torch.device("cpu")
    vae = family.load_vae(files, options, cpu)
    placed = place_start_image(image, (64, 64), constants.alignment_px)
    latents = encode_start(StartImageRequest(image, 0.5), placed, vae, constants).latents
    reconstruction = np.asarray(pixels_to_image(vae.decode(latents[None]))).astype(int)
    assert abs(pixels(near) - reconstruction).max() <= 1
    assert abs(half - reconstruction).max() > 1
    assert abs(half - text).max() > 1
    found = read_image_metadata(near)
    assert (found["image"], found["denoise"]) == ("image.png", "1e-06")
    assert "Denoising strength: 1e-06" in found["parameters"]
    assert str(tmp_path) not in " ".join(found.values())


def test_the_command_keeps_what_the_mask_covers(base: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "image.png", 128, 64)
    mask = save_mask(tmp_path / "mask.png", 128, 64, kept=64)
    given = ("--size", "128x64", "--image", str(image), "--denoise", "1", "--mask", str(mask))
    kept = pixels(generate(base, tmp_path / "kept", *given))
    original = pixels(image)
    assert (kept[:, :44] == original[:, :44]).all(), "exact beyond the feathered edge"
    text = pixels(generate(base, tmp_path / "text", "--size", "128x64"))
    assert abs(kept[:, 84:] - original[:, 84:]).mean() > 20
    assert abs(kept[:, 84:] - text[:, 84:]).mean() < abs(original[:, 84:] - text[:, 84:]).mean()
    other = pixels(generate(base, tmp_path / "other", *given, "--invert_mask"))
    assert (other[:, 84:] == original[:, 84:]).all()
    assert abs(other[:, :44] - original[:, :44]).mean() > 20


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = str(save_image(tmp_path / "image.png", 64, 64))
    wide = str(save_mask(tmp_path / "wide.png", 128, 64, kept=10))
    text = tmp_path / "note.png"
    text.write_text("no image")
    cases = {
        ("--denoise", "0.5"): "--denoise: needs --image",
        ("--mask", wide): "--mask: needs --image",
        ("--image", image, "--invert_mask"): "--invert_mask: needs --mask",
        ("--image", "nowhere.png"): "--image: nowhere.png: cannot be read: No such file",
        ("--image", str(text)): "not an image that can be read",
        ("--image", image, "--mask", wide): "wide.png is 128x64 px and the image is 64x64",
        ("--image", image, "--mask", str(tmp_path)): "is not a regular file",
    }
    for arguments, expected in cases.items():
        with pytest.raises(ConfigError) as caught:
            CliRunner().invoke(command, ["--prompt", "x", *arguments], catch_exceptions=False)
        assert expected in str(caught.value)
    result = CliRunner().invoke(command, ["--prompt", "x", "--image", image, "--denoise", "0"])
    assert result.exit_code == 2
