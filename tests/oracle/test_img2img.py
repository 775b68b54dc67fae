"""Starting from an image, with and without a mask: our latents and those of diffusers' pipelines.

On the bundled base in float32, 128 px. diffusers gets the same noise, and the mean of the image's
posterior where it would sample it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.chroma import pipeline_chroma_img2img, pipeline_chroma_inpainting
from PIL import Image
from torch import Tensor

from simpletuner.data.start_image import StartImageRequest, place_start_image
from simpletuner.flow.solvers import sigma_grid
from simpletuner.models.chroma.family import unpack_latents
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.validation.inference import Inference
from simpletuner.validation.sampler import denoise, initial_noise
from simpletuner.validation.start_latents import encode_start
from tests.oracle.test_picture import CPU, FAMILY, NANO, PROMPT, SEED, SIDE_PX, SOURCE

STEPS, DENOISE = 6, 0.5
CONSTANTS = FAMILY.read_constants(SOURCE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    levels = np.linspace(0, 255, SIDE_PX, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(levels[:, None], levels[None, ::-1], 90), axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "image.png")
    mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    mask[:, :48] = 255  # kept by us; on the edges of latents, so that no latent is in between
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "image.png", folder / "mask.png"


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    (embedding,) = FAMILY.load_text_encoder(SOURCE, NANO, CPU).encode([PROMPT])
    return dict(embedding)


def noise() -> Tensor:
    return initial_noise(CONSTANTS, SEED, (SIDE_PX, SIDE_PX))[None]


def ours(image: Path, mask: Path | None, rows: dict[str, Tensor]) -> Tensor:
    request = StartImageRequest(image, DENOISE, mask)
    placed = place_start_image(image, (SIDE_PX, SIDE_PX), CONSTANTS.alignment_px)
    start = encode_start(request, placed, FAMILY.load_vae(SOURCE, NANO, CPU), CONSTANTS)
    network = FAMILY.load_transformer(SOURCE, CPU, torch.float32)
    inference = Inference(FAMILY, CONSTANTS, CPU, torch.float32)
    return denoise(inference, network, [rows], noise(), steps=STEPS, starts=[start])


def theirs(
    pipeline: Any,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    rows: dict[str, Tensor],
    **more: Any,
) -> Tensor:
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: noise())
    monkeypatch.setattr(module, "retrieve_latents", lambda out, **options: out.latent_dist.mode())
    pipe = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
            SOURCE.transformer.parent / "scheduler"
        ),
        vae=AutoencoderKL.from_pretrained(SOURCE.vae),
        text_encoder=None,
        tokenizer=None,
        transformer=ChromaTransformer2DModel.from_pretrained(
            SOURCE.transformer, torch_dtype=torch.float32
        ),
    )
    # The pipeline with a mask reads a field that Chroma's transformer does not have.
    pipe.transformer.register_to_config(guidance_embeds=False)
    pipe.set_progress_bar_config(disable=True)
    text = rows[T5_TENSOR][None].float()
    latents = pipe(
        prompt_embeds=text, prompt_attention_mask=torch.ones(text.shape[:2]), strength=DENOISE,
        sigmas=np.asarray(sigma_grid(STEPS)[:-1]), num_inference_steps=STEPS, guidance_scale=1.0,
        height=SIDE_PX, width=SIDE_PX, output_type="latent", **more,
    ).images  # fmt: skip
    return unpack_latents(latents, (SIDE_PX // 16, SIDE_PX // 16))


def test_img2img_is_that_of_diffusers(
    files: tuple[Path, Path], rows: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.open(files[0])
    expected = theirs(
        ChromaImg2ImgPipeline, pipeline_chroma_img2img, monkeypatch, rows, image=image
    )
    found = ours(files[0], None, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_inpainting_is_that_of_diffusers(
    files: tuple[Path, Path], rows: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = Image.open(files[0]), Image.open(files[1])
    repainted = Image.fromarray(255 - np.asarray(mask))  # what is white is generated there
    expected = theirs(
        ChromaInpaintPipeline,
        pipeline_chroma_inpainting,
        monkeypatch,
        rows,
        image=image,
        mask_image=repainted,
    )
    found = ours(files[0], files[1], rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - ours(files[0], None, rows)).abs().max()) > 0.1, "the mask has an effect"
