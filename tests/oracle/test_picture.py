"""One LoRA, one prompt, one noise: the picture drawn here and the one that diffusers' own pipeline
draws.

On the bundled base in float32, 128 px, 4 steps. diffusers gets our file by `load_lora_weights`, our
trimmed text rows with a mask of ones, the same noise and the same sigmas, into its own network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from simpletuner.adapters.safetensors_reader import LORA_WEIGHTS_NAME
from simpletuner.cli.generation import GenerationRequest, generate_images
from simpletuner.config.schema import AdapterOptions, ModelOptions
from simpletuner.flow.solvers import sigma_grid
from simpletuner.models.chroma import weights
from simpletuner.models.chroma.family import pack_latents
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.models.chroma.merge_loras import merge_loras
from simpletuner.models.registry import get_family as family_named
from simpletuner.models.weights.merge_loras import MergeOutput
from simpletuner.validation.prompts import Prompt
from simpletuner.validation.sampler import initial_noise
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import perturb

PROMPT, STEPS, SEED, SIDE_PX = "a red star on a blue ground", 4, 7, 128
CPU = torch.device("cpu")
NANO = ModelOptions(model_flavour="nano", mixed_precision="no", device="cpu", torch_num_threads=1)
FAMILY = family_named("chroma")
SOURCE = FAMILY.locate_files(NANO)
# Levels of 255: what rounding to eight bits may do to two pictures that differ by float32's
# rounding.
LARGEST = 1


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    network = FAMILY.load_transformer(SOURCE, CPU, torch.float32)
    names = FAMILY.lora_targets(network, "all+ffs")
    perturb(
        attach_adapter(
            network, AdapterOptions(lora_rank=4, lora_alpha=2.0), names, seed=1
        ).trainable,
        0.3,
    )
    chroma_lora.save_adapter(network, folder / LORA_WEIGHTS_NAME)
    return folder / LORA_WEIGHTS_NAME


def ours(out: Path, lora: Path | None, model: ModelOptions = NANO) -> np.ndarray:
    prompts = (Prompt("star", PROMPT),)
    request = GenerationRequest(
        prompts, model, lora, (1.0,), STEPS, 1.0, SEED, str(SIDE_PX), 1, out
    )
    (path,) = generate_images(request, lambda event: None)
    return np.asarray(Image.open(path)).astype(int)


def theirs(lora: Path) -> np.ndarray:
    pipe = ChromaPipeline(
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
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    (embedding,) = FAMILY.load_text_encoder(SOURCE, NANO, CPU).encode([PROMPT])
    rows = embedding[T5_TENSOR][None].float()
    noise: Tensor = initial_noise(FAMILY.read_constants(SOURCE), SEED, (SIDE_PX, SIDE_PX))[None]
    drawn = pipe(
        prompt_embeds=rows, prompt_attention_mask=torch.ones(rows.shape[:2]), latents=pack_latents(noise),
        sigmas=np.asarray(sigma_grid(STEPS)[:-1]), num_inference_steps=STEPS, guidance_scale=1.0,
        height=SIDE_PX, width=SIDE_PX, output_type="pil",
    ).images[0]  # fmt: skip
    return np.asarray(drawn).astype(int)


def test_diffusers_draws_the_same_picture_with_our_file(lora: Path, tmp_path: Path) -> None:
    mine, base = ours(tmp_path, lora), ours(tmp_path, None)
    assert np.abs(mine - base).max() > 20, "the LoRA is to be seen"
    assert mine.std() > 10, "and it is a picture"
    difference = np.abs(mine - theirs(lora))
    assert difference.max() <= LARGEST
    assert (difference > 0).mean() < 1e-3, "2 in 100,000 values at the time of writing"


def test_merged_weights_draw_the_same_picture_as_base_and_lora(lora: Path, tmp_path: Path) -> None:
    factors = chroma_lora.read_lora_file(lora).to_deltas()
    mine = ours(tmp_path, lora)
    for native, name in ((False, "folder"), (True, "file.safetensors")):
        target = MergeOutput(tmp_path / name, native_format=native, dtype=torch.float32)
        merge_loras(SOURCE.transformer, [(factors, 1.0)], target, {})
        model = NANO.model_copy(
            update={"pretrained_transformer_model_name_or_path": str(target.path)}
        )
        difference = np.abs(ours(tmp_path, None, model) - mine)
        assert difference.max() <= LARGEST
    assert weights.read_transformer_config(
        tmp_path / "file.safetensors"
    ) == weights.read_transformer_config(SOURCE.transformer)
