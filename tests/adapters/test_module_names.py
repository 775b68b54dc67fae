"""The table of names against diffusers' own converter of base weights, by value."""

from __future__ import annotations

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers

from simpletuner.adapters.module_names import dots_to_underscores
from simpletuner.models.chroma.module_names import CHROMA_MODULE_NAMES as NAMES

QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"


def full_width() -> ChromaTransformer2DModel:
    """One block of each kind at the width that diffusers' converter has built in; no memory."""
    with torch.device("meta"):
        return ChromaTransformer2DModel(num_layers=1, num_single_layers=1, approximator_layers=1)


def test_every_linear_of_the_blocks_has_one_place():
    model = full_width()
    linears = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    ours = [name for name in linears if not name.startswith("distilled_guidance_layer.")]
    places = [NAMES.locate_in_native(name) for name in ours]
    assert None not in places
    assert len(set(places)) == len(ours) == 12 + 5 + 3
    for name, place in zip(ours, places):
        assert NAMES.diffusers_names(place[0])[place[1]] == name
        assert NAMES.underscores_to_dots(dots_to_underscores(name), native=False) == name
        assert NAMES.underscores_to_dots(dots_to_underscores(place[0]), native=True) == place[0]
    assert NAMES.locate_in_native("distilled_guidance_layer.in_proj") is None
    assert NAMES.diffusers_names("double_blocks.0.img_mod.lin") == ()
    assert NAMES.underscores_to_dots("double_blocks_0_img_mod_lin", native=True) is None


def test_rows_are_where_diffusers_finds_them():
    """Every row holds its own number; diffusers' converter says where it goes."""
    model = full_width()
    width, columns = 3072, 2
    natives: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (place := NAMES.locate_in_native(name)):
            natives.setdefault(place[0], []).append(name)
    checkpoint, rows = {}, {}
    for number, (native, parts) in enumerate(natives.items()):
        total = sum(model.get_submodule(part).out_features for part in parts)
        rows[native] = torch.arange(total, dtype=torch.float32)[:, None] * columns + number * 1e6
        checkpoint[f"{native}.weight"] = rows[native].clone()
        checkpoint[f"{native}.bias"] = rows[native][:, 0].clone()
    one = torch.zeros(1)
    for norm in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        checkpoint[f"{norm}.norm.query_norm.scale"] = checkpoint[f"{norm}.norm.key_norm.scale"] = (
            one
        )
    guidance = "distilled_guidance_layer"
    for end in ("in_proj", "out_proj", "layers.0.in_layer", "layers.0.out_layer"):
        checkpoint[f"{guidance}.{end}.weight"] = checkpoint[f"{guidance}.{end}.bias"] = one
    checkpoint[f"{guidance}.norms.0.scale"] = one
    converted = convert_chroma_transformer_checkpoint_to_diffusers(checkpoint)
    for native, whole in rows.items():
        parts = NAMES.diffusers_names(native)
        for part, where in zip(
            parts, NAMES.fused_row_slices(native, len(whole), width), strict=True
        ):
            assert torch.equal(converted[f"{part}.weight"], whole[where])
            assert torch.equal(converted[f"{part}.bias"], whole[where, 0])


@pytest.mark.parametrize(("native", "total"), [(QKV, 97), (QKV, 95), (LINEAR1, 96), (LINEAR1, 64)])
def test_sizes_that_cannot_be(native, total):
    with pytest.raises(ValueError, match="cannot hold"):
        NAMES.fused_row_slices(native, total, 32)


def test_any_width():
    assert NAMES.fused_row_slices("img_in", 7, 99) == [slice(0, 7)]
    assert NAMES.fused_row_slices("single_blocks.0.linear1", 3 * 8 + 5, 8) == [
        slice(0, 8),
        slice(8, 16),
        slice(16, 24),
        slice(24, 29),
    ]
