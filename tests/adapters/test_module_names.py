"""The table of names against diffusers' own converter of base weights, by value."""

from __future__ import annotations

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers

from simpletuner.adapters import module_names


def full_width() -> ChromaTransformer2DModel:
    """One block of each kind at the width that diffusers' converter has built in; no memory."""
    with torch.device("meta"):
        return ChromaTransformer2DModel(num_layers=1, num_single_layers=1, approximator_layers=1)


def test_every_linear_of_the_blocks_has_one_place():
    model = full_width()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ours = [name for name in linears if not name.startswith("distilled_guidance_layer.")]
    places = [module_names.locate_in_native(name) for name in ours]
    assert None not in places
    assert len(set(places)) == len(ours) == 12 + 5 + 3
    for name, place in zip(ours, places):
        assert module_names.diffusers_names(place[0])[place[1]] == name
        assert module_names.underscores_to_dots(module_names.dots_to_underscores(name), native=False) == name
        assert (
            module_names.underscores_to_dots(module_names.dots_to_underscores(place[0]), native=True)
            == place[0]
        )
    assert module_names.locate_in_native("distilled_guidance_layer.in_proj") is None
    assert module_names.diffusers_names("double_blocks.0.img_mod.lin") == ()
    assert module_names.underscores_to_dots("double_blocks_0_img_mod_lin", native=True) is None


def test_rows_are_where_diffusers_finds_them():
    """Every row holds its own number; diffusers' converter says where it goes."""
    model = full_width()
    width, columns = 3072, 2
    natives: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (place := module_names.locate_in_native(name)):
            natives.setdefault(place[0], []).append(name)
    checkpoint, rows = {}, {}
    for number, (native, parts) in enumerate(natives.items()):
        total = sum(model.get_submodule(part).out_features for part in parts)
        rows[native] = torch.arange(total, dtype=torch.float32)[:, None] * columns + number * 1e6
        checkpoint[f"{native}.weight"] = rows[native].clone()
        checkpoint[f"{native}.bias"] = rows[native][:, 0].clone()
    one = torch.zeros(1)
    for norm in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        checkpoint[f"{norm}.norm.query_norm.scale"] = checkpoint[f"{norm}.norm.key_norm.scale"] = one
    guidance = "distilled_guidance_layer"
    for end in ("in_proj", "out_proj", "layers.0.in_layer", "layers.0.out_layer"):
        checkpoint[f"{guidance}.{end}.weight"] = checkpoint[f"{guidance}.{end}.bias"] = one
    checkpoint[f"{guidance}.norms.0.scale"] = one
    converted = convert_chroma_transformer_checkpoint_to_diffusers(checkpoint)
    for native, whole in rows.items():
        parts = module_names.diffusers_names(native)
        for part, where in zip(
            parts, module_names.fused_row_slices(len(parts), len(whole), width), strict=True
        ):
            assert torch.equal(converted[f"{part}.weight"], whole[where])
            assert torch.equal(converted[f"{part}.bias"], whole[where, 0])


@pytest.mark.parametrize(("parts", "total", "width"), [(3, 97, 32), (3, 95, 32), (4, 96, 32), (4, 64, 32)])
def test_sizes_that_cannot_be(parts, total, width):
    with pytest.raises(ValueError, match="cannot hold"):
        module_names.fused_row_slices(parts, total, width)


def test_any_width():
    assert module_names.fused_row_slices(1, 7, 99) == [slice(0, 7)]
    assert module_names.fused_row_slices(4, 3 * 8 + 5, 8) == [
        slice(0, 8),
        slice(8, 16),
        slice(16, 24),
        slice(24, 29),
    ]
