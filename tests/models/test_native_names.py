from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers

from simpletuner.errors import ModelError
from simpletuner.models.chroma import native_names, weights
from simpletuner.models.chroma.transformer_config import TransformerConfig
from tests.models import single_files
from tests.models.tiny_checkpoint import transformer_fields


def test_diffusers_converter_agrees_at_its_one_width() -> None:
    """One double and one single block, 3072 wide; equal numbers say equal rows."""
    with torch.device("meta"):
        shapes = ChromaTransformer2DModel(
            num_layers=1, num_single_layers=1, approximator_layers=1, approximator_hidden_dim=8,
            joint_attention_dim=8,
        ).state_dict()  # fmt: skip
    width = 3072
    count = itertools.count()

    def numbered(name: str, shape: torch.Size) -> torch.Tensor:
        """Each row its own number, one column: the rest would be gigabytes."""
        return torch.tensor([next(count) for _ in range(shape[0])]).view(
            -1, *[1] * (len(shape) - 1)
        )

    theirs = {name: numbered(name, tensor.shape) for name, tensor in shapes.items()}
    file = single_files.native_state(theirs)
    again = {
        name: file[key][rows]
        for key, tensor in file.items()
        for name, rows in native_names.split_native_tensor(key, len(tensor), width)
    }
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    converted = convert_chroma_transformer_checkpoint_to_diffusers(dict(file))
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[name], theirs[name]) for name in theirs)


def test_the_whole_model_there_and_back_by_name_and_shape() -> None:
    config = TransformerConfig()
    ours = {
        name: tuple(t.shape) for name, t in weights.empty_transformer(config).state_dict().items()
    }
    files = native_names.group_by_native_name(ours)
    assert len(files) == 19 * 2 * 10 + 38 * 6 + 4 + 5 * 5 + 4 + 2
    shapes = {
        name: (sum(ours[part][0] for part in parts), *ours[parts[0]][1:])
        for name, parts in files.items()
    }
    assert shapes["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert shapes["double_blocks.18.txt_attn.qkv.bias"] == (9216,)
    back = {
        name: (rows.stop - rows.start, *shape[1:])
        for key, shape in shapes.items()
        for name, rows in native_names.split_native_tensor(key, shape[0], config.width)
    }
    assert back == ours
    assert native_names.infer_config(ours, {}, "file") == config


def test_a_part_without_its_neighbours_is_told() -> None:
    with pytest.raises(ModelError, match=r"transformer_blocks\.0\.attn\.to_k\.weight, .*missing"):
        native_names.group_by_native_name(["transformer_blocks.0.attn.to_q.weight"])
    with pytest.raises(ModelError, match="not a tensor of Chroma"):
        native_names.group_by_native_name(["transformer_blocks.0.norm1.linear.weight"])
    assert native_names.split_native_tensor("double_blocks.0.img_mod.lin.weight", 4, 4) == []
    with pytest.raises(ModelError, match=r"linear1\.weight: 12 rows cannot hold"):
        native_names.split_native_tensor("single_blocks.0.linear1.weight", 12, 4)


def test_the_header_says_what_shapes_cannot(checkpoint: Path) -> None:
    config = weights.read_transformer_config(checkpoint / "transformer")
    shapes = {name: tuple(t.shape) for name, t in single_files.diffusers_state(checkpoint).items()}
    assert native_names.infer_config(shapes, native_names.config_metadata(config), "file") == config
    assert config.axes_dims_rope == tuple(transformer_fields()["axes_dims_rope"])
    guessed = native_names.infer_config(shapes, {}, "file")
    assert guessed.axes_dims_rope == (4, 14, 14)  # as 16, 56, 56 of 128
    with pytest.raises(ModelError, match="not a JSON object"):
        native_names.infer_config(shapes, {native_names.CONFIG_METADATA_KEY: "["}, "file")
