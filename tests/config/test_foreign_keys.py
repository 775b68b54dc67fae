"""Configurations written for SimpleTuner are read as they are, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import ConfigLoadResult, resolved_options, try_load_config
from simpletuner.config.optimizer_names import OPTIMIZER_ALIASES, REFUSED_OPTIMIZERS
from simpletuner.config.option_catalog import all_options, option_aliases
from tests.config.foreign_keys import COMPLETE, CONFIG_KEYS

# Every optimizer that SimpleTuner's parser knows on a machine with CUDA.
OPTIMIZERS = """
torch-adam torch-adamw torch-sgd torch-radam torch-nadam torch-rmsprop torch-adagrad torch-adadelta
torch-adafactor torch-adamax torch-asgd torch-sparseadam adamw_bf16 ao-adamw8bit ao-adamw4bit ao-adamfp8
ao-adamwfp8 adamw_schedulefree adamw_schedulefree+aggressive adamw_schedulefree+no_kahan
optimi-stableadamw optimi-adamw optimi-lion optimi-radam optimi-ranger optimi-adan optimi-adam
optimi-sgd soap muon prodigy bnb-adagrad bnb-adagrad8bit bnb-adam bnb-adam8bit bnb-adamw bnb-adamw8bit
bnb-adamw-paged bnb-adamw8bit-paged bnb-lion bnb-lion8bit bnb-lion-paged bnb-lion8bit-paged
bnb-ademamix bnb-ademamix8bit bnb-ademamix-paged bnb-ademamix8bit-paged sdnq-adamw sdnq-adamw+no_quant
sdnq-adafactor sdnq-came sdnq-lion sdnq-muon sdnq-muon+quantized_matmul
"""


def load(folder: Path, **config: Any) -> ConfigLoadResult:
    (folder / "multidatabackend.json").write_text("[]", encoding="utf-8")
    text = json.dumps({**COMPLETE, **config}, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return try_load_config(environ={}, cwd=folder)


def test_a_complete_configuration_is_read(tmp_path: Path) -> None:
    result = load(tmp_path)
    assert result.problems == ()
    assert result.loaded is not None
    run = result.loaded.config
    assert run.validation.validation_guidance_real == 4.0
    assert (run.training.max_train_steps, run.training.num_train_epochs) == (100, None)
    assert run.model.base_model_precision == "int8"


@pytest.mark.parametrize(("key", "value", "outcome"), CONFIG_KEYS)
def test_every_key_has_its_outcome(key: str, value: Any, outcome: str, tmp_path: Path) -> None:
    needed = {
        "deepspeed_config": {
            "model_type": "full",
            "base_model_precision": "no_change",
            "optimizer": "adamw",
            "grad_clip_method": "norm",
        },
        "dynamo_mode": {"dynamo_backend": "inductor"},
        "lycoris_config": {"lora_type": "lycoris", "lora_rank": None, "lora_alpha": None},
    }
    result = load(tmp_path, **{key: value}, **needed.get(key, {}))
    messages = [problem.message for problem in result.problems]
    if outcome in ("works", "noted", "skipped"):
        assert messages == []
        assert result.loaded is not None
        is_option = option_aliases().get(key, key) in all_options()
        assert is_option == (outcome == "works") or key == "pretrained_vae_model_name_or_path"
        if not is_option:
            assert any(key in notice for notice in result.loaded.notices)
    else:
        assert any(outcome in message and "unknown" not in message for message in messages), (
            messages
        )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"validation_guidance": 4}, {"validation_guidance_real": 4.0}),
        # A form saves both: the default of one yields to the value of the other.
        (
            {"validation_guidance": 4, "validation_guidance_real": 1},
            {"validation_guidance_real": 4.0},
        ),
        (
            {"validation_guidance": 1, "validation_guidance_real": 3},
            {"validation_guidance_real": 3.0},
        ),
        (
            {"validation_guidance": 4, "validation_guidance_real": 3},
            {"validation_guidance_real": 4.0},
        ),
        (
            {"validation_guidance": None, "validation_guidance_real": 3},
            {"validation_guidance_real": 3.0},
        ),
        ({"optimizer_beta1": 0.8, "adam_beta1": 0.9}, {"adam_beta1": 0.8}),
        ({"optimizer_beta2": 0.95}, {"adam_beta2": 0.95}),
        ({"optimizer_weight_decay": 0}, {"adam_weight_decay": 0.0}),
        ({"report_to": "simpletuner"}, {"report_to": "none"}),
        ({"report_to": "wandb, simpletuner"}, {"report_to": "wandb"}),
        ({"flux_lora_target": "mmdit"}, {"flux_lora_target": "all"}),
        ({"flux_lora_target": "ai-toolkit"}, {"flux_lora_target": "all+ffs"}),
        (
            {"gradient_checkpointing_backend": "unsloth-ffn"},
            {"gradient_checkpointing_backend": "offload"},
        ),
        ({"hub_model_name": "mine"}, {"hub_model_id": "mine"}),
        (
            {"pretrained_vae_model_name_or_path": "a/sdxl"},
            {"pretrained_vae_model_name_or_path": None},
        ),
        ({"optimizer": "bnb-lion8bit"}, {"optimizer": "lion"}),
        ({"resume_from_checkpoint": ""}, {"resume_from_checkpoint": "latest"}),
        ({"validation_steps": 0}, {"validation_step_interval": 0}),
        (
            {"validation_steps": 250, "validation_step_interval": 250},
            {"validation_step_interval": 250},
        ),
        ({"tokenizer_max_length": 4096}, {"tokenizer_max_length": 512}),
        (
            {"optimizer_config": "weight_decay=0.0, eps=1e-6,amsgrad=true", "optimizer": "adamw"},
            {"adam_weight_decay": 0.0, "adam_epsilon": 1e-6, "optimizer_config": "amsgrad=true"},
        ),
    ],
)
def test_the_value_arrives(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    result = load(tmp_path, **config)
    assert result.loaded is not None, result.problems
    options = resolved_options(result.loaded.config)
    assert {name: options[name] for name in expected} == expected


def test_a_value_that_is_not_read_is_named(tmp_path: Path) -> None:
    result = load(tmp_path, validation_guidance=4, validation_guidance_real=3)
    assert result.loaded is not None
    assert any(
        "validation_guidance_real is not read, because validation_guidance is given" in notice
        for notice in result.loaded.notices
    )


def test_a_flag_counts_before_an_argument_of_the_file(tmp_path: Path) -> None:
    load(tmp_path, optimizer_config="weight_decay=0.0,eps=1e-6")
    flags = [("adam_weight_decay", "0.1")]
    loaded = try_load_config(flags, environ={}, cwd=tmp_path).loaded
    assert loaded is not None
    optimizer = loaded.config.optimizer
    assert (optimizer.adam_weight_decay, optimizer.adam_epsilon) == (0.1, 1e-6)
    assert any("is not read, because adam_weight_decay is given" in n for n in loaded.notices)


@pytest.mark.parametrize("name", OPTIMIZERS.split())
def test_every_optimizer_is_read_or_refused_with_the_nearest(name: str, tmp_path: Path) -> None:
    own = all_options()["optimizer"].choices
    messages = [problem.message for problem in load(tmp_path, optimizer=name).problems]
    if name in own or name in OPTIMIZER_ALIASES:
        assert messages == []
    else:
        assert REFUSED_OPTIMIZERS[name] in messages[0]
        assert any(near in REFUSED_OPTIMIZERS[name] for near in own)
