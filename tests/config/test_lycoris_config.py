"""lycoris_config: from a file or as an object, kept with the run, refused with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from simpletuner.adapters.lycoris_targets import choose_lycoris_modules
from simpletuner.config.load import (
    LoadedConfig,
    config_from_resolved,
    resolved_options,
    try_load_config,
)
from simpletuner.config.lycoris_config import (
    LycorisConfig,
    parse_lycoris_config,
    require_lycoris_config,
)
from simpletuner.errors import ConfigError

LOKR = {"algo": "lokr", "linear_dim": 8, "linear_alpha": 4, "factor": 16}


def judged(folder: Path, **options: object) -> tuple[list[str], object]:
    (folder / "config.json").write_text(json.dumps(options), encoding="utf-8")
    tried = try_load_config((), folder / "config.json", environ={}, cwd=folder, needs_data=False)
    return [problem.message for problem in tried.problems], tried.loaded


def test_a_run_keeps_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(LOKR), encoding="utf-8")
    for given in ("mine.json", LOKR):
        problems, loaded = judged(tmp_path, lora_type="lycoris", lycoris_config=given)
        assert not problems
        assert loaded.config.adapter.lycoris_config == LOKR
        again = config_from_resolved(resolved_options(loaded.config))
        assert require_lycoris_config(again.adapter) == LycorisConfig("lokr", 8, 4.0, 16)
    os.mkfifo(tmp_path / "pipe")
    for name in ("lycoris_config", "init_lora"):
        problems, _ = judged(
            tmp_path, lora_type="lycoris", **{"lycoris_config": LOKR, name: "pipe"}
        )
        assert name == "init_lora" or "cannot be read as JSON" in problems[0]
    file.write_text("[1", encoding="utf-8")
    problems, _ = judged(tmp_path, lora_type="lycoris", lycoris_config="mine.json")
    assert "cannot be read as JSON" in problems[0]


def test_what_simpletuner_users_write_is_read() -> None:
    """With its fields for convolutions, and dim 10000 for whole matrices."""
    common = {
        "algo": "lokr", "multiplier": 1.0, "full_matrix": True, "use_scalar": False, "linear_dim": 10000,
        "linear_alpha": 1, "factor": 16, "conv_dim": 8, "conv_alpha": 1, "use_tucker": True, "dropout": 0,
    }  # fmt: skip
    assert parse_lycoris_config(common) == LycorisConfig("lokr", 10_000, 1.0, 16, full_matrix=True)
    assert parse_lycoris_config({"algo": "loha"}) == LycorisConfig("loha", 16, 16.0)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"algo": "lora"}, 'use lora_type "standard"'),
        ({"algo": "boft", "block_size": 4}, "the nearest is algo"),
        ({"algo": "full"}, "full_matrix true"),
        ({"algo": ["lokr"]}, "allowed: lokr, loha"),
        ({}, "allowed: lokr, loha"),
        ({**LOKR, "multiplier": 0.5}, "strength is linear_alpha"),
        ({**LOKR, "apply_preset": "attn-mlp"}, "must be an object such as"),
        ({**LOKR, "apply_preset": {"target_modules": ["Attention"]}}, "target_modules: unknown"),
        ({**LOKR, "apply_preset": {"target_module": "Attention"}}, "must be a list of names"),
        ({**LOKR, "apply_preset": {"target_name": ["(a"]}}, "is not a regular expression"),
        ({**LOKR, "apply_preset": {"module_algo_map": ["Attention"]}}, "must be an object of name"),
        (
            {**LOKR, "apply_preset": {"module_algo_map": {"Attention": 4}}},
            "must be an object of set",
        ),
        (
            {**LOKR, "apply_preset": {"module_algo_map": {"Attention": {"algo": "ia3"}}}},
            "module_algo_map.Attention: algo 'ia3' is not supported; the nearest",
        ),
        ({**LOKR, "weight_decompose": True}, "magnitudes"),
        ({**LOKR, "linear_dims": 4}, "linear_dims: unknown"),
        ({**LOKR, "linear_dim": 0}, "linear_dim"),
        ({**LOKR, "linear_dim": True}, "linear_dim"),
        ({**LOKR, "factor": 0}, "factor"),
        ({**LOKR, "linear_alpha": -1}, "linear_alpha"),
        ({**LOKR, "full_matrix": 1}, "true or false"),
        ({"algo": "loha", "factor": 4}, "the other keys are for lokr"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(config: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_lycoris_config(config)


PRESET = {
    "target_module": ["Attention", "FeedForward"],
    "module_algo_map": {
        "Attention": {"factor": 16},
        "FeedForward": {"factor": 8, "dim": 4, "alpha": 2},
    },
    "name_algo_map": {"single_.*to_q": {"algo": "loha", "dim": 8}},
}


BASES = [
    {"linear_dim": 10000, "linear_alpha": 1, "factor": 16},
    {"linear_dim": 16, "linear_alpha": 16, "factor": 10, "full_matrix": True},
    {"linear_dim": 64, "linear_alpha": 32, "factor": 4, "use_scalar": False, "bypass_mode": True},
    {"linear_dim": 1000000, "linear_alpha": 1, "factor": 12, "use_tucker": True, "conv_dim": 8},
    {"linear_dim": 32, "linear_alpha": 1, "decompose_both": True, "dropout": 0.0, "rs_lora": False},
]
PRESETS: list[dict[str, object]] = [
    {"target_module": ["Attention"]},
    {"target_module": ["Attention", "FeedForward"]},
    PRESET,
    {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 6}}},
    {
        "target_module": ["FeedForward"],
        "module_algo_map": {"FeedForward": {"algo": "loha", "dim": 8}},
    },
    {"target_module": ["Attention", "JointTransformerBlock"], "module_algo_map": {}},
    {"target_name": ["transformer_blocks.*attn.*"], "use_fnmatch": True, "enable_conv": False},
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", BASES)
def test_objects_of_the_usual_forms_are_read(
    base: dict[str, object], preset: dict[str, object], tmp_path: Path
) -> None:
    written = {"algo": "lokr", "multiplier": 1.0, **base, "apply_preset": preset}
    problems, loaded = judged(tmp_path, lora_type="lycoris", lycoris_config=written)
    assert not problems
    assert loaded is not None


def test_a_preset_replaces_single_settings() -> None:
    preset = parse_lycoris_config({**LOKR, "factor": 10, "apply_preset": PRESET}).preset
    assert preset is not None
    assert preset.classes == ("Attention", "FeedForward")
    assert dict(preset.by_class) == {
        "Attention": LycorisConfig("lokr", 8, 4.0, 16),
        "FeedForward": LycorisConfig("lokr", 4, 2.0, 8),
    }
    assert dict(preset.by_name) == {"single_.*to_q": LycorisConfig("loha", 8, 4.0)}
    assert parse_lycoris_config({**LOKR, "apply_preset": {}}).preset is None


def test_the_settings_of_a_name_count_before_those_of_a_class() -> None:
    linears = {
        "blocks.0.attn.to_q": ("Attention", "Block"),
        "blocks.0.ff.net.2": ("FeedForward", "Block"),
        "single_blocks.0.attn.to_q": ("Attention", "Single"),
        "single_blocks.0.proj_mlp": ("Single",),
        "proj_out": (),
    }

    def choose(**preset: object) -> dict[str, LycorisConfig]:
        config = parse_lycoris_config({**LOKR, "apply_preset": preset})
        assert config.preset is not None
        return choose_lycoris_modules(config, config.preset, linears)

    whole = choose(**PRESET)
    assert {name: (config.algo, config.factor) for name, config in whole.items()} == {
        "blocks.0.attn.to_q": ("lokr", 16),
        "blocks.0.ff.net.2": ("lokr", 8),
        "single_blocks.0.attn.to_q": ("loha", -1),
    }
    assert list(choose(module_algo_map={"FeedForward": {"factor": 4}})) == [
        "blocks.0.attn.to_q",
        "single_blocks.0.attn.to_q",
    ]
    assert list(choose(target_module=["Block", "Single"], exclude_name=["single_blocks"])) == [
        "blocks.0.attn.to_q",
        "blocks.0.ff.net.2",
    ]
    assert list(choose(target_name=["*proj*"], use_fnmatch=True)) == [
        "single_blocks.0.proj_mlp",
        "proj_out",
    ]
    inner = choose(target_module=["Block"], module_algo_map={"Block": {"factor": 2}})
    assert [config.factor for config in inner.values()] == [2, 2]
    with pytest.raises(ConfigError, match=r"target_name 'nothing' matches no linear"):
        choose(target_name=["nothing"])
    with pytest.raises(ConfigError, match="chooses no linear"):
        choose(target_module=["Block"], exclude_name=["blocks"])


def test_classes_of_other_models_are_named(tmp_path: Path) -> None:
    def with_classes(*classes: str, **options: object) -> tuple[list[str], object]:
        config = {**LOKR, "apply_preset": {"target_module": classes}}
        return judged(tmp_path, lora_type="lycoris", lycoris_config=config, **options)

    problems, _ = with_classes("WanRotaryEmbedding")
    assert "names classes of other models; chroma has Attention, FeedForward" in problems[0]
    problems, loaded = with_classes("Attention", "WanAttention", flux_lora_target="tiny")
    assert not problems
    assert "lycoris_config: chroma has no module of class WanAttention" in loaded.notices
    assert any("flux_lora_target has no effect" in notice for notice in loaded.notices)
    problems, _ = with_classes("Attention", lora_target_modules=["to_q"])
    assert "use one of them" in problems[0]


BLOCKS = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")
# Classes in target_module of another model's object, with a factor of their own each, and what they
# are read as.
FOREIGN_CLASSES = [
    (("CosmosAttention",), ("Attention",)),
    (("Kandinsky5Attention", "Kandinsky5FeedForward"), ("Attention", "FeedForward")),
    (("MMDiTAttention", "SwiGLUFFN"), ("Attention", "FeedForward")),
    (
        ("Flux2Attention", "Flux2FeedForward", "Flux2ParallelSelfAttention"),
        ("Attention", "FeedForward", "ChromaSingleTransformerBlock"),
    ),
    (("BriaTransformer2DModel",), BLOCKS),
    (("LongCatTransformerBlock",), BLOCKS),
]


@pytest.mark.parametrize(("foreign", "own"), FOREIGN_CLASSES)
def test_an_object_for_another_model_is_read(
    foreign: tuple[str, ...], own: tuple[str, ...], tmp_path: Path
) -> None:
    factors = {name: {"factor": 2 + number} for number, name in enumerate(foreign)}
    preset = {"target_module": list(foreign), "module_algo_map": factors}
    written = {**LOKR, "bypass_mode": True, "apply_preset": preset}
    problems, loaded = judged(tmp_path, lora_type="lycoris", lycoris_config=written)
    assert not problems
    assert isinstance(loaded, LoadedConfig)
    parsed = require_lycoris_config(loaded.config.adapter).preset
    assert parsed is not None
    assert parsed.classes == own
    assert tuple(parsed.by_class) == own
    assert parsed.by_class[own[-1]].factor == 1 + len(foreign)
    for name in foreign:
        assert any(f"{name} is a class of another model and is" in text for text in loaded.notices)


def test_options_of_a_lora_are_refused_beside_it(tmp_path: Path) -> None:
    problems, _ = judged(
        tmp_path,
        lora_type="lycoris",
        lycoris_config=LOKR,
        use_dora=True,
    )
    assert [problem.split(":")[0] for problem in problems] == ["use_dora"]
    # SimpleTuner's forms save these two with every run.
    problems, loaded = judged(
        tmp_path, lora_type="lycoris", lycoris_config=LOKR, lora_rank=8, lora_alpha=4
    )
    assert not problems
    assert any("lora_rank, lora_alpha have no effect with lora_type" in n for n in loaded.notices)
    problems, _ = judged(tmp_path, lycoris_config=LOKR)
    assert 'lora_type "lycoris" only' in problems[0]
    problems, _ = judged(tmp_path, lora_type="lycoris")
    assert "needs a file or an object such as" in problems[0]
    problems, loaded = judged(
        tmp_path, lora_type="standard", lycoris_config="config/lycoris_config.json"
    )
    assert not problems
    assert loaded.config.adapter.lycoris_config is None
