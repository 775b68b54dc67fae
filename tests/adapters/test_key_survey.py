"""`export --check` answers for files that are not read here, by the keys that programs look up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.adapters.key_survey import predict_from_keys, survey_keys
from simpletuner.cli import export
from simpletuner.errors import ModelError
from simpletuner.models.chroma.lora_programs import CHROMA_LORA
from tests.adapters.layout_files import DOWN_UP, make_all_layouts, make_native_file, underscored

COMFY, OLDER, FORGE, KOHYA = "comfyui", "comfyui-0.8.0", "forge", "kohya"
Tensors = dict[str, Tensor]


def kohya() -> Tensors:
    """Ten native modules of three keys each."""
    return dict(
        make_native_file(lambda n: f"lora_unet_{underscored(n)}", DOWN_UP, 2.0, 16, 4).tensors
    )


def renamed(layout: str, old: str, new: str) -> Tensors:
    tensors = make_all_layouts(16)[layout].tensors
    return {key.replace(old, new): value for key, value in tensors.items() if ".alpha" not in key}


def pair(module: str) -> Tensors:
    return {
        f"{module}.lora_down.weight": torch.ones(4, 16),
        f"{module}.lora_up.weight": torch.ones(16, 4),
        f"{module}.alpha": torch.tensor(4.0),
    }


def many(template: str, count: int = 5) -> Tensors:
    return {key: value for n in range(count) for key, value in pair(template.format(n)).items()}


QKV = "lora_unet_double_blocks_0_img_attn_proj"
# name -> (tensors, program -> (outcome, modules))
CASES: dict[str, tuple[Callable[[], Tensors], dict[str, tuple[str, int]]]] = {
    "text encoder": (
        lambda: kohya() | many("lora_te1_text_model_encoder_layers_{}_mlp_fc1"),
        {COMFY: ("in part", 10), FORGE: ("refused", 0), KOHYA: ("in part", 10)},
    ),
    "few text encoder keys": (
        lambda: kohya() | many("lora_te1_text_model_encoder_layers_{}_mlp_fc1", 4),
        {COMFY: ("in part", 10), FORGE: ("in part", 10)},
    ),
    "keys of Flux": (
        lambda: kohya() | many("lora_unet_double_blocks_{}_img_mod_lin"),
        {COMFY: ("in part", 10), FORGE: ("refused", 0), KOHYA: ("in part", 10)},
    ),
    "convolution shapes": (
        lambda: {
            key: value.reshape(*value.shape, 1, 1) if value.ndim == 2 else value
            for key, value in kohya().items()
        },
        {COMFY: ("applied", 10), FORGE: ("applied", 10), KOHYA: ("refused", 0)},
    ),
    "stray key": (
        lambda: kohya() | {"bundle_emb.x": torch.ones(3)},
        {COMFY: ("in part", 10), FORGE: ("in part", 10), KOHYA: ("in part", 10)},
    ),
    "mixed prefixes": (
        lambda: kohya() | pair("diffusion_model.double_blocks.1.img_attn.proj"),
        {COMFY: ("applied", 11), FORGE: ("applied", 11), KOHYA: ("in part", 10)},
    ),
    ".lora.up": (
        lambda: {
            key.replace(".lora_", ".lora."): value
            for key, value in renamed("comfyui", "", "").items()
        },
        {COMFY: ("applied", 10), FORGE: ("applied", 10), KOHYA: ("ignored", 0)},
    ),
    ".lora_linear_layer": (
        lambda: {
            key.replace(".lora_", ".lora_linear_layer."): value
            for key, value in renamed("comfyui", "", "").items()
        },
        {COMFY: ("applied", 10), FORGE: ("applied", 10), KOHYA: ("ignored", 0)},
    ),
    ".default": (
        lambda: renamed("comfyui-peft", ".weight", ".default.weight"),
        {COMFY: ("applied", 10), FORGE: ("refused", 0), KOHYA: ("ignored", 0)},
    ),
    "diff_b": (
        lambda: kohya() | {f"{QKV}.diff_b": torch.ones(16)},
        {COMFY: ("applied", 10), FORGE: ("applied", 10), KOHYA: ("in part", 10)},
    ),
    "full deltas": (
        lambda: {f"{QKV}.diff": torch.ones(16, 16)},
        {COMFY: ("applied", 1), FORGE: ("applied", 1), KOHYA: ("ignored", 0)},
    ),
    "orphan A": (
        lambda: kohya() | {"lora_unet_double_blocks_1_img_attn_proj.lora_down.weight": torch.ones(4, 16)},
        {COMFY: ("in part", 10), FORGE: ("in part", 10), KOHYA: ("refused", 0)},
    ),
    "orphan B": (
        lambda: kohya() | {"lora_unet_double_blocks_1_img_attn_proj.lora_up.weight": torch.ones(16, 4)},
        {COMFY: ("refused", 0), FORGE: ("refused", 0), KOHYA: ("in part", 10)},
    ),
    "OFT": (
        lambda: {f"{QKV}.oft_blocks": torch.ones(4, 4, 4), f"{QKV}.alpha": torch.tensor(1.0)},
        {COMFY: ("applied", 1), FORGE: ("ignored", 0), KOHYA: ("ignored", 0)},
    ),
    "approximator": (
        lambda: pair("lora_unet_distilled_guidance_layer_in_proj"),
        {COMFY: ("applied", 1), FORGE: ("applied", 1), KOHYA: ("ignored", 0)},
    ),
    "dora per input": (
        lambda: kohya() | {f"{QKV}.dora_scale": torch.ones(1, 16), "stray": torch.ones(1)},
        {COMFY: ("in part", 10), FORGE: ("in part", 10), KOHYA: ("wrong strength", 0)},
    ),
    "dora per output": (
        lambda: kohya() | {f"{QKV}.dora_scale": torch.ones(16, 1), "stray": torch.ones(1)},
        {COMFY: ("wrong strength", 0), FORGE: ("wrong strength", 0)},
    ),
    "rows of q, k and v": (
        lambda: kohya() | pair("diffusion_model.single_blocks.0.linear1_qkv"),
        {COMFY: ("applied", 11), OLDER: ("applied", 11), FORGE: ("in part", 10)},
    ),
    "whole weight": (
        lambda: kohya() | {"diffusion_model.double_blocks.1.img_attn.proj.set_weight": torch.ones(16, 16)},
        {COMFY: ("applied", 11), FORGE: ("applied", 11), KOHYA: ("in part", 10)},
    ),
    "bare": (
        lambda: renamed("bare", ".weight", ".default.weight"),
        {COMFY: ("applied", 17), OLDER: ("ignored", 0)},
    ),
    "integers": (
        lambda: {key: value.to(torch.int32) for key, value in kohya().items()},
        {COMFY: ("applied", 10)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_program_by_its_lookup(tmp_path: Path, name: str) -> None:
    make, expected = CASES[name]
    path = tmp_path / "x.safetensors"
    save_file({key: value.contiguous() for key, value in make().items()}, path)
    verdicts = dict(zip(CHROMA_LORA.programs, predict_from_keys(survey_keys(path), CHROMA_LORA)))
    assert {name: (verdicts[name].outcome, verdicts[name].modules) for name in expected} == expected
    assert all(one.why for one in verdicts.values() if one.outcome != "applied")
    assert verdicts["diffusers"].outcome == "unknown"
    shown = CliRunner().invoke(
        export.command, ["--check", str(path), "--json"], catch_exceptions=False
    )
    told = json.loads(shown.output)
    assert [one["outcome"] for one in told["programs"]] == [
        one.outcome for one in verdicts.values()
    ] or ("unread" not in told)
    assert CliRunner().invoke(export.command, ["--check", str(path)]).exit_code == 0


@pytest.mark.parametrize(
    "row", ["kohya", "comfyui", "comfyui-peft", "onetrainer", "lycoris", "diffusers", "bare"]
)
def test_the_lookup_agrees_with_the_rules(tmp_path: Path, row: str) -> None:
    """Where a file is read here, its rules were compared with the programs' own."""
    from simpletuner.adapters.compatibility_check import check_compatibility

    path = tmp_path / "x.safetensors"
    save_file(make_all_layouts(16)[row].tensors, path)
    by_rules = dict(zip(CHROMA_LORA.programs, check_compatibility(path, CHROMA_LORA)[1]))
    by_keys = dict(zip(CHROMA_LORA.programs, predict_from_keys(survey_keys(path), CHROMA_LORA)))
    for name in (COMFY, OLDER, FORGE, KOHYA):
        assert by_keys[name].outcome == by_rules[name].outcome, name


def test_a_file_without_any_delta_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds no LoRA weights"):
        predict_from_keys(survey_keys(tmp_path / "x.safetensors"), CHROMA_LORA)
