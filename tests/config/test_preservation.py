"""What the options that keep the base's knowledge cannot be combined with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.constraints import find_errors, find_warnings
from simpletuner.config.load import config_from_resolved
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.regularisation import regularisation_problems

DOP = {"diff_output_preservation": True, "diff_output_preservation_class": "dog"}
ZERO = {"deepspeed_config": {"zero_optimization": {"stage": 3}}}
LOHA = {
    "lora_type": "lycoris",
    "lycoris_config": {"algo": "loha", "linear_dim": 4, "linear_alpha": 4},
}
LOKR = {
    "lora_type": "lycoris",
    "lycoris_config": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4},
}


def errors(**options: Any) -> dict[str, str]:
    return dict(find_errors(config_from_resolved(options), {}))


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        (
            {**DOP, "blank_prompt_preservation": True},
            "blank_prompt_preservation",
            "use one of them",
        ),
        ({"diff_output_preservation": True}, "diff_output_preservation_class", "is missing"),
        (
            {**DOP, "diff_output_preservation_class": " "},
            "diff_output_preservation_class",
            "is missing",
        ),
        ({**DOP, "model_type": "full"}, "diff_output_preservation", "no adapter to switch off"),
        (
            {"blank_prompt_preservation": True, "model_type": "full"},
            "blank_prompt_preservation",
            "no adapter",
        ),
        ({"delta_weight_penalty": 0.1, "model_type": "full"}, "delta_weight_penalty", "no adapter"),
        (
            {"masked_prior_preservation_weight": 0.1, "model_type": "full"},
            "masked_prior_preservation_weight",
            "no adapter to switch off",
        ),
        (
            {"delta_weight_penalty": 0.1, "use_dora": True},
            "delta_weight_penalty",
            "turn use_dora off",
        ),
        ({"delta_weight_penalty": 0.1, **LOHA}, "delta_weight_penalty", "use algo lokr"),
        ({"delta_weight_penalty": 0.1, **ZERO}, "delta_weight_penalty", "use stage 2"),
    ],
)
def test_what_cannot_be_combined_says_why(options: dict[str, Any], name: str, reason: str) -> None:
    assert reason in errors(**options)[name]


@pytest.mark.parametrize(
    "options",
    [
        DOP,
        {"blank_prompt_preservation": True, "use_dora": True},
        {"delta_weight_penalty": 0.1},
        {"delta_weight_penalty": 0.1, **LOKR},
        {**DOP, "delta_weight_penalty": 0.1, "masked_prior_preservation_weight": 0.5},
        {"prior_loss_weight": 0.5, "model_type": "full"},
    ],
)
def test_what_can_be_combined(options: dict[str, Any]) -> None:
    assert errors(**options) == {}


def test_what_has_no_effect_is_named() -> None:
    run = config_from_resolved({"diff_output_preservation_multiplier": 0.5})
    (warning,) = find_warnings(run, {"diff_output_preservation_multiplier": "here"})
    assert "diff_output_preservation_multiplier has no effect" in warning


def test_regularisation_towards_the_base_needs_an_adapter() -> None:
    reg = DatasetConfig("reg", "image", Path(), regularisation_target="base")
    images = DatasetConfig("images", "image", Path(), regularisation_target="images")
    taught = DatasetConfig("taught", "image", Path())
    assert regularisation_problems("lora", [reg, taught, images]) == []
    assert regularisation_problems("full", [taught, images]) == []
    (problem,) = regularisation_problems("full", [taught, reg])
    assert problem.location == "reg.is_regularisation_data"
    assert "full-rank training changes the base" in problem.message
    (problem,) = regularisation_problems("lora", [reg, images])
    assert "nothing is taught" in problem.message
