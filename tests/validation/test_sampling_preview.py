"""Previews: the right colours, small and seldom, and no bit of a finished image depends on them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from simpletuner.config.schema import ModelOptions
from simpletuner.events.event_types import Event
from simpletuner.models.registry import get_family
from simpletuner.validation.sampler import denoise, initial_noise
from simpletuner.validation.sampling_preview import (
    RgbProjection,
    SamplingPreview,
    encode_tiles,
    fit_projection,
)
from tests.validation.test_image_validator import validator
from tests.validation.toy_family import FACTS, INFERENCE, ToyNetwork, embed_text

FIRST_CHANNELS = RgbProjection(torch.eye(4, 3), torch.zeros(3))
SHAPES = Path(__file__).parents[2] / "src/simpletuner/examples/chroma-nano.peft-lora/shapes"


def test_the_projection_shows_what_the_decoder_would() -> None:
    family, options = get_family("chroma"), ModelOptions(model_flavour="nano")
    source = family.locate_files(options)
    vae = family.load_vae(source, options, torch.device("cpu"))
    constants = family.read_constants(source)
    projection = fit_projection(vae, constants)
    again = fit_projection(vae, constants)
    assert torch.equal(projection.weight, again.weight)
    for name in ("00003.png", "00030.png", "00045.png"):
        with Image.open(SHAPES / name) as image:
            levels = np.asarray(image.convert("RGB").resize((64, 64)))
        pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        raw = vae.encode(pixels).float()[:, : constants.latent_channels]
        latents = (raw - constants.latent_shift) * constants.latent_scale
        decoded = avg_pool2d(vae.decode(latents), constants.stride_px)
        shown = projection.to_pixels(latents)
        assert shown.shape == (1, 3, 8, 8)
        assert torch.corrcoef(torch.stack([shown.flatten(), decoded.flatten()]))[0, 1] > 0.95
        assert (shown - decoded).abs().mean() < 0.06  # of a range of 2


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_step_predicts_the_clean_latents(guidance: float) -> None:
    noise = torch.stack([initial_noise(FACTS, seed, (32, 16)) for seed in (1, 2)])
    rows = [embed_text("a"), embed_text("four")]
    steps: list[int] = []
    predicted: list[Tensor] = []

    def observe(step: int, predict_clean: Callable[[], Tensor]) -> None:
        steps.append(step)
        predicted.append(predict_clean())

    def draw(observer: Callable[[int, Callable[[], Tensor]], None] | None) -> Tensor:
        return denoise(
            INFERENCE,
            ToyNetwork(0.0),
            rows,
            noise,
            steps=5,
            guidance=guidance,
            negative_embeddings=rows[::-1],
            observe=observer,
        )

    drawn = draw(observe)
    assert torch.equal(drawn, draw(None))
    assert steps == [1, 2, 3, 4, 5]
    # The velocity of this network is the same everywhere, so each step predicts the end of the path.
    for latents in predicted:
        torch.testing.assert_close(latents, drawn, rtol=1e-5, atol=1e-5)


def test_validation_images_are_the_same_and_the_preview_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    seconds = count()
    preview = SamplingPreview(
        tmp_path / "b/images/preview.jpg", 2, lambda: FIRST_CHANNELS, lambda: next(seconds)
    )
    observe = preview.observe

    def recorded(step: int, predict_clean: Callable[[], Tensor]) -> None:
        preview.path.unlink(missing_ok=True)
        observe(step, predict_clean)
        written.append(preview.path.read_bytes() if preview.path.exists() else b"")

    monkeypatch.setattr(preview, "observe", recorded)
    events: list[Event] = []
    validator(tmp_path / "a", events).generate_images(5, ToyNetwork())
    with_preview = replace(validator(tmp_path / "b", events), preview=preview)
    with_preview.generate_images(5, ToyNetwork())
    assert [bool(data) for data in written] == [False, True, False, True]
    with Image.open(io.BytesIO(written[1])) as image:
        assert (image.format, image.size) == ("JPEG", (2 * 4, 2))  # two images of 32 x 16 px
    assert not preview.path.exists()
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_previews_are_at_most_two_a_second(tmp_path: Path) -> None:
    now = [0.0]
    shown: list[int] = []
    preview = SamplingPreview(tmp_path / "p.jpg", 1, lambda: FIRST_CHANNELS, lambda: now[0])

    def predict(step: int) -> Tensor:
        shown.append(step)
        return torch.zeros(1, 4, 2, 2)

    with preview.session():
        for step in range(1, 13):
            preview.observe(step, lambda step=step: predict(step))
            now[0] += 0.125
    assert shown == [1, 5, 9]


def test_a_preview_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    fitted: list[int] = []

    def fit() -> RgbProjection:
        fitted.append(1)
        return FIRST_CHANNELS

    preview = SamplingPreview(tmp_path / "images/preview.jpg", 1, fit)
    preview.path.parent.mkdir()
    preview.path.write_bytes(b"old")
    with preview.session():
        assert not preview.path.exists()

    def fail_while_sampling() -> None:
        with preview.session():
            preview.observe(1, lambda: torch.zeros(1, 4, 2, 2))
            assert preview.path.exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_sampling()
    assert not preview.path.exists()
    assert len(fitted) == 1


def test_a_folder_that_was_deleted_meanwhile_stays_deleted(tmp_path: Path) -> None:
    preview = SamplingPreview(tmp_path / "gone/preview.jpg", 1, lambda: FIRST_CHANNELS)
    with preview.session():
        preview.path.parent.rmdir()
        preview.observe(1, lambda: torch.zeros(1, 4, 2, 2))
    assert not preview.path.parent.exists()


@pytest.mark.parametrize(
    ("shape", "size"),
    [((16, 3, 8, 8), (32, 32)), ((1, 3, 512, 256), (64, 128)), ((3, 3, 128, 200), (256, 164))],
)
def test_a_preview_is_small(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    data = encode_tiles(noise)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == size
    assert len(data) < 128 * 1024
