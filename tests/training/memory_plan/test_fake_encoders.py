"""Which options an encoder is measured for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.training.memory_plan import fake_encoders, plan_cache
from tests.training.memory_plan.tiny_family import (
    BATCH_SHAPE,
    TinyChroma,
    make_model_spec,
    make_run_config,
)


def test_the_encoders_of_another_candidate_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--fit tries precisions and memory policies; none of them is an option of an encoder."""
    spec = dataclasses.replace(make_model_spec(make_run_config()), text_encoder_bytes=10**9)
    names = list[str]()

    def remember(name: str, measure: object) -> int:
        names.append(name)
        return 0

    monkeypatch.setattr(plan_cache, "get_or_count", remember)
    candidates: list[dict[str, Any]] = [
        {},
        {"base_model_precision": "nf4", "gradient_checkpointing": 3, "dynamo_backend": "no"},
        {"text_encoder_1_precision": "nf4", "vae_enable_tiling": True},
    ]
    for options in candidates:
        run = make_run_config(**options)
        fake_encoders.measure_encoders(run, TinyChroma(), spec, BATCH_SHAPE, "cuda", 512)
    assert names[:3] == names[3:6]
    assert not set(names[:3]) & set(names[6:])


class OtherOptions:
    """Model options without those that --fit changes."""

    def __init__(self, options: ModelOptions) -> None:
        self._options = options

    def __getattr__(self, name: str) -> object:
        assert name not in fake_encoders.TRANSFORMER_OPTIONS, name
        return getattr(self._options, name)


@pytest.mark.slow  # imports diffusers and transformers
def test_encoders_read_no_option_of_the_transformer() -> None:
    options: Any = OtherOptions(make_run_config().model)
    ChromaFamily().text_encoder_pass(options, 1, 8)
    ChromaFamily().vae_pass(options, "cuda", 1, (64, 64), decodes=True)
