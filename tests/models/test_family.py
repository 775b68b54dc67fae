from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.models.chroma.family import ChromaFamily, pack_latents, unpack_latents
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.family import BlockMemoryPolicy, ModelFiles
from tests.models.tiny_checkpoint import TEXT_WIDTH

CPU = torch.device("cpu")


def test_packing_is_channel_major_inside_a_patch() -> None:
    latents = torch.randn(2, 16, 6, 10)
    tokens = latents.view(2, 16, 3, 2, 5, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 15, 64)
    assert torch.equal(pack_latents(latents), tokens)
    assert torch.equal(unpack_latents(tokens, (3, 5)), latents)


def test_facts_of_a_checkpoint(source: ModelFiles) -> None:
    facts = ChromaFamily().read_constants(source)
    assert (facts.latent_channels, facts.stride_px, facts.alignment_px) == (16, 8, 64)
    assert (facts.max_tokens, facts.text_tensors["rows"].width) == (512, TEXT_WIDTH)


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("vae", "latent_channels", 4, "expects 16"),
        ("text_encoder", "d_model", 64, "has width 64"),
        ("vae", "scaling_factor", None, "missing or invalid"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    checkpoint: Path, tmp_path: Path, part: str, field: str, value: object, said: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "mixed"))
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    options = ModelOptions(pretrained_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match=said):
        ChromaFamily().read_constants(ChromaFamily().locate_files(options))


def test_a_vae_that_names_no_shift_has_none(source: ModelFiles, tmp_path: Path) -> None:
    config = json.loads((source.vae / "config.json").read_text())
    del config["shift_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        ChromaFamily().read_constants(ModelFiles(**{**vars(source), "vae": tmp_path})).latent_shift
        == 0.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_takes_and_gives_float32(source: ModelFiles, dtype: torch.dtype) -> None:
    transformer = ChromaFamily().load_transformer(source, CPU, dtype)
    x, sigma = torch.randn(2, 16, 8, 6), torch.tensor([0.2, 0.8])
    text = TextBatch.stack([{"rows": torch.randn(length, TEXT_WIDTH)} for length in (4, 9)])
    velocity = ChromaFamily().predict_velocity(transformer, x, sigma, text)
    assert velocity.shape == x.shape
    assert velocity.dtype == torch.float32
    for number in range(2):
        one = slice(number, number + 1)
        rows = text.tensors["rows"][one, : text.lengths["rows"][number]]
        alone = ChromaFamily().predict_velocity(
            transformer, x[one], sigma[one], TextBatch({"rows": rows}, {"rows": (rows.shape[1],)})
        )
        torch.testing.assert_close(
            velocity[one], alone, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0
        )


def test_float32_masters_run_under_autocast(source: ModelFiles) -> None:
    transformer = ChromaFamily().load_transformer(source, CPU, torch.float32)
    x, sigma = torch.randn(1, 16, 8, 8), torch.tensor([0.4])
    text = TextBatch.stack([{"rows": torch.randn(4, TEXT_WIDTH)}])
    exact = ChromaFamily().predict_velocity(transformer, x, sigma, text)
    for _, parameter in ChromaFamily().full_finetune_parameters(transformer):
        parameter.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = ChromaFamily().predict_velocity(transformer, x, sigma, text)
    velocity.square().mean().backward()
    torch.testing.assert_close(velocity.detach(), exact, atol=0.05, rtol=0.05)
    assert all(
        parameter.grad is not None
        for _, parameter in ChromaFamily().full_finetune_parameters(transformer)
    )


def test_checkpointing_is_set_by_the_family(source: ModelFiles) -> None:
    transformer = ChromaFamily().load_transformer(source, CPU, torch.float32)
    assert isinstance(transformer, ChromaTransformer)
    assert ChromaFamily().block_count(transformer) == 5
    ChromaFamily().place_blocks(transformer, BlockMemoryPolicy(4, interval=3))
    assert transformer.run_block.checkpointed == {0, 3}


def test_flash_comes_with_a_warning() -> None:
    assert ChromaFamily().notices(ModelOptions()) == []
    assert "flash" in ChromaFamily().notices(ModelOptions(model_flavour="flash"))[0]


@pytest.mark.parametrize(
    ("options", "guessed"),
    [
        ({"model_flavour": "nano"}, False),
        ({}, False),
        ({"pretrained_model_name_or_path": "lodestones/Chroma1-HD"}, False),
        ({"pretrained_model_name_or_path": "somebody/small-chroma"}, True),
        ({"pretrained_transformer_model_name_or_path": "somebody/small-chroma"}, True),
    ],
)
def test_only_a_repository_that_was_never_read_is_guessed(
    options: dict[str, str], guessed: bool
) -> None:
    """Nothing is refused for the size of what is not known."""
    assert (
        ChromaFamily().build_spec(ModelOptions(**options), torch.bfloat16).may_differ_from_published
        is guessed
    )
