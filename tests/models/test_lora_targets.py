from __future__ import annotations

import pytest
import torch

from simpletuner.config.model_families import LYCORIS_CLASSES
from simpletuner.errors import ConfigError
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.registry import get_family
from tests.models.tiny_checkpoint import transformer_fields


@pytest.fixture(scope="module")
def full() -> ChromaTransformer:
    with torch.device("meta"):
        return ChromaTransformer(TransformerConfig())


def test_the_full_model_has_chromas_parameters(full: ChromaTransformer) -> None:
    assert sum(parameter.numel() for parameter in full.parameters()) == 8_899_983_424
    assert full.config.modulation_count == 344


@pytest.mark.parametrize(
    ("preset", "count", "rank16"),
    [
        ("all", 266, 26.1e6), ("context", 76, 7.5e6), ("context+ffs", 114, 16.8e6), ("all+ffs", 418, 65.4e6),
        ("tiny", 2, None), ("nano", 1, None),
    ],
)  # fmt: skip
def test_presets_count_what_they_promise(
    full: ChromaTransformer, preset: str, count: int, rank16: float | None
) -> None:
    names = ChromaFamily().lora_targets(full, preset)
    assert len(set(names)) == len(names) == count
    modules = [full.get_submodule(name) for name in names]
    assert all(isinstance(module, torch.nn.Linear) for module in modules)
    assert "proj_out" not in names
    assert not any(
        name.startswith(("distilled", "x_embedder", "context_embedder")) for name in names
    )
    if rank16 is not None:
        assert sum(16 * (m.in_features + m.out_features) for m in modules) == pytest.approx(
            rank16, rel=5e-3
        )


@pytest.mark.parametrize("preset", ["tiny", "nano"])
def test_a_block_that_a_small_model_lacks_is_named(preset: str) -> None:
    small = ChromaTransformer(TransformerConfig.from_dict(transformer_fields(), "fields"))
    with pytest.raises(ConfigError, match=r"single_transformer_blocks\.7\.proj_out"):
        ChromaFamily().lora_targets(small, preset)
    assert len(ChromaFamily().lora_targets(small, "all")) == 2 * 8 + 3 * 3


def test_full_rank_trains_everything_but_the_approximator(full: ChromaTransformer) -> None:
    trained = ChromaFamily().full_finetune_parameters(full)
    assert sum(parameter.numel() for _, parameter in trained) == 8_899_983_424 - 278_285_312
    assert not any("distilled_guidance_layer" in name for name, _ in trained)


def test_an_unknown_family_lists_the_known() -> None:
    assert get_family("chroma").name == "chroma"
    with pytest.raises(ConfigError, match=r'"flux" is unknown; the known families are: chroma'):
        get_family("flux")


def test_every_class_of_a_lycoris_preset_is_found(full: ChromaTransformer) -> None:
    """As in diffusers: the feed-forward layers of single blocks belong to no FeedForward."""
    classes = ChromaFamily().linear_classes(full)
    assert set(LYCORIS_CLASSES["chroma"]) == set().union(*classes.values())
    assert not any(name.startswith("distilled_guidance_layer") for name in classes)
    attention = [name for name, kinds in classes.items() if "Attention" in kinds]
    assert attention == ChromaFamily().lora_targets(full, "all")
    feed_forward = [name for name, kinds in classes.items() if "FeedForward" in kinds]
    assert len(feed_forward) == 19 * 4
    assert classes["single_transformer_blocks.0.proj_mlp"] == ("ChromaSingleTransformerBlock",)
    assert classes["x_embedder"] == ()
