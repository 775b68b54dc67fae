from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.family import ModelFiles

CPU = torch.device("cpu")


def pixels(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_raw_and_make_diffusers_own_posterior(
    source: ModelFiles, options: ModelOptions, checkpoint: Path
) -> None:
    moments = ChromaFamily().load_vae(source, options, CPU).encode(pixels())
    assert moments.shape == (2, 32, 8, 12)
    assert moments.dtype == torch.float32
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(checkpoint / "vae").encode(pixels()).latent_dist
    mean, log_variance = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance.clamp(-30, 20), posterior.logvar)


def test_decode_undoes_scale_and_shift(
    source: ModelFiles, options: ModelOptions, checkpoint: Path
) -> None:
    raw = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    facts = ChromaFamily().read_constants(source)
    decoded = (
        ChromaFamily()
        .load_vae(source, options, CPU)
        .decode((raw - facts.latent_shift) * facts.latent_scale)
    )
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(checkpoint / "vae").decode(raw).sample
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    assert (facts.latent_shift, facts.latent_scale) == (0.1159, 0.3611)


def test_moments_keep_the_dtype_of_the_vae(source: ModelFiles, options: ModelOptions) -> None:
    half = options.model_copy(update={"vae_dtype": "bf16"})
    assert ChromaFamily().load_vae(source, half, CPU).encode(pixels()).dtype == torch.bfloat16


def test_slicing_changes_no_number(source: ModelFiles, options: ModelOptions) -> None:
    plain = ChromaFamily().load_vae(source, options, CPU).encode(pixels())
    sliced = options.model_copy(update={"vae_enable_slicing": True})
    torch.testing.assert_close(ChromaFamily().load_vae(source, sliced, CPU).encode(pixels()), plain)


def test_quant_conv_is_respected(source: ModelFiles, options: ModelOptions, tmp_path: Path) -> None:
    config = json.loads((source.vae / "config.json").read_text())
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    other = AutoencoderKL(**fields | {"use_quant_conv": True, "use_post_quant_conv": True})
    other.save_pretrained(tmp_path)
    moments = (
        ChromaFamily()
        .load_vae(ModelFiles(**{**vars(source), "vae": tmp_path}), options, CPU)
        .encode(pixels())
    )
    with torch.no_grad():
        torch.testing.assert_close(moments, other.encode(pixels()).latent_dist.parameters)


def test_a_vae_with_missing_weights_is_refused(
    source: ModelFiles, options: ModelOptions, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source.vae, tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(ModelError, match="missing"):
        ChromaFamily().load_vae(ModelFiles(**{**vars(source), "vae": folder}), options, CPU)
