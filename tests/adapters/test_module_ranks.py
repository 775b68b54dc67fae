"""Ranks by module: shapes, strengths, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.adapters.adapted_linear import LowRankLinear, adapted_modules
from simpletuner.adapters.safetensors_reader import LORA_WEIGHTS_NAME
from simpletuner.config.load import try_load_mapping
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import (
    attention_names,
    make_pipeline,
    perturb,
    run_forward,
    tiny_chroma,
)

PATTERNS = {r".*\.0\.attn\.to_[qk]": 2, r"single_.*": 6}


def attach(**options: object):
    network = tiny_chroma()
    given = AdapterOptions(lora_rank=4, **options)
    return network, attach_adapter(network, given, attention_names(network), 5)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_rank_and_scale_are_those_of_the_module(alpha: float | None) -> None:
    network, _ = attach(lora_rank_by_module=PATTERNS, lora_alpha=alpha)
    ranks = {}
    for name, module in adapted_modules(network).items():
        assert isinstance(module, LowRankLinear)
        rank = ranks[name] = module.down.shape[0]
        assert module.up.shape[1] == rank
        assert module.scale == (1.0 if alpha is None else alpha / rank)
    assert ranks["transformer_blocks.0.attn.to_q"] == 2
    assert ranks["transformer_blocks.0.attn.to_v"] == 4
    assert ranks["transformer_blocks.1.attn.to_q"] == 4
    assert ranks["single_transformer_blocks.0.attn.to_q"] == 2  # the first pattern counts
    assert ranks["single_transformer_blocks.1.attn.to_q"] == 6


def test_other_modules_start_as_without_patterns() -> None:
    plain, mixed = attach()[0], attach(lora_rank_by_module=PATTERNS)[0]
    name = "transformer_blocks.1.attn.to_q"
    for one, other in zip(
        adapted_modules(plain)[name].parameters(), adapted_modules(mixed)[name].parameters()
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_files_of_both_layouts_hold_each_rank(alpha: float | None, tmp_path: Path) -> None:
    network, result = attach(lora_rank_by_module=PATTERNS, lora_alpha=alpha)
    perturb(result.trainable)
    goal, base = run_forward(network), run_forward(tiny_chroma())
    written = chroma_lora.save_adapter(network, tmp_path / LORA_WEIGHTS_NAME)
    assert written.ranks == (2, 4, 6)
    chroma_lora.save_adapter(network, tmp_path / "kohya.safetensors", layout="kohya")
    for name in (LORA_WEIGHTS_NAME, "kohya.safetensors"):
        other = tiny_chroma()
        chroma_lora.load_adapter(other, tmp_path / name)
        assert torch.allclose(run_forward(other), goal, rtol=0, atol=4e-6)
    loaded = make_pipeline(tiny_chroma())
    loaded.load_lora_weights(tmp_path, weight_name=LORA_WEIGHTS_NAME)
    difference = (run_forward(loaded.transformer) - goal).abs().max()
    assert difference < 2e-6 * base.abs().max().clamp(min=1)


def test_init_lora_must_fit_into_each_rank(tmp_path: Path) -> None:
    network, result = attach(lora_rank_by_module=PATTERNS)
    perturb(result.trainable)
    path = tmp_path / LORA_WEIGHTS_NAME
    chroma_lora.save_adapter(network, path)
    same, _ = attach(lora_rank_by_module=PATTERNS, init_lora=str(path))
    assert torch.allclose(run_forward(same), run_forward(network), rtol=0, atol=4e-6)
    with pytest.raises(ConfigError, match=r"has rank 6, but lora_rank is 4 for single_"):
        attach(init_lora=str(path), lora_rank_by_module={"transformer_blocks.*": 4})


def test_a_pattern_without_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no module of this LoRA is matched by 'to_q'"):
        attach(lora_rank_by_module={"to_q": 2})
    for value, part in (({"(": 2}, "is not a regular expression"), ({"a": 0}, "greater than")):
        (problem,) = try_load_mapping({"lora_rank_by_module": value}, tmp_path).problems
        assert part in str(problem)
