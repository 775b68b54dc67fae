"""From the options to what the blocks keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.flags import parse_flags
from simpletuner.config.load import config_from_resolved, try_load_config
from simpletuner.config.schema import ModelOptions
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.family import BlockMemoryPolicy
from simpletuner.training.train_state import streams_approximator


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, BlockMemoryPolicy(57)),
        ({"gradient_checkpointing": False}, BlockMemoryPolicy(0)),
        ({"gradient_checkpointing": 20}, BlockMemoryPolicy(20)),
        ({"gradient_checkpointing": 999}, BlockMemoryPolicy(57)),
        ({"gradient_checkpointing": "auto"}, BlockMemoryPolicy(57)),
        ({"gradient_checkpointing": 12}, BlockMemoryPolicy(12)),
        ({"gradient_checkpointing": 12, "musubi_blocks_to_swap": 30}, BlockMemoryPolicy(30, 1, 30)),
        ({"gradient_checkpointing_interval": 2}, BlockMemoryPolicy(57, 2)),
        ({"musubi_blocks_to_swap": 0.5}, BlockMemoryPolicy(57, 1, 28)),
        ({"musubi_blocks_to_swap": 14}, BlockMemoryPolicy(57, 1, 14)),
        ({"gradient_checkpointing_backend": "offload"}, BlockMemoryPolicy(57, 1, 0, True)),
        (
            {"chroma_approximator_device": "cpu"},
            BlockMemoryPolicy(57, approximator_on_host=True, approximator_computes_on_host=True),
        ),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], expected: BlockMemoryPolicy) -> None:
    assert block_memory_policy(ModelOptions(**options), 57) == expected


@pytest.mark.parametrize(
    ("device", "streamed", "on_host"),
    [("auto", True, True), ("auto", False, False), ("accelerator", True, False), ("cpu", False, True)],
)  # fmt: skip
def test_the_approximator_is_away_where_it_saves_memory(
    device: str, streamed: bool, on_host: bool
) -> None:
    policy = block_memory_policy(ModelOptions(chroma_approximator_device=device), 57, streamed)
    assert policy.approximator_on_host == on_host


@pytest.mark.parametrize(
    ("kind", "is_sharded", "options", "streamed"),
    [("cuda", False, {}, True), ("cuda", True, {}, False), ("mps", False, {}, False),
     ("cpu", False, {}, False), ("cuda", False, {"scheduled_sampling_probability": 0.5}, False)],
)  # fmt: skip
def test_where_the_approximator_is_streamed(
    kind: str, is_sharded: bool, options: dict[str, Any], streamed: bool
) -> None:
    assert streams_approximator(config_from_resolved(options), kind, is_sharded) == streamed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("gradient_checkpointing=true", True),
        ("gradient_checkpointing=no", False),
        ("gradient_checkpointing=1", True),
        ("gradient_checkpointing=AUTO", "auto"),
        ("--gradient_checkpointing 12", 12),
        ("--gradient_checkpointing auto", "auto"),
        ("--gradient_checkpointing --seed 3", True),
        ("--gradient_checkpointing seed=3", True),
        ("--gradient_checkpointing", True),
        ("gradient_checkpointing=perhaps", "must be true | false | auto | integer"),
        ("gradient_checkpointing=-3", "must"),
        ("gradient_checkpointing=2.5", "must be true | false | auto | integer"),
    ],
)
def test_how_much_is_recomputed_is_read(argv: str, expected: Any, tmp_path: Path) -> None:
    given = [("max_train_steps", "5"), *parse_flags(argv.split())]
    tried = try_load_config(given, environ={}, cwd=tmp_path, needs_data=False)
    if tried.loaded is None:
        assert str(expected) in tried.problems[0].message
    else:
        assert tried.loaded.config.model.gradient_checkpointing == expected
        assert type(tried.loaded.config.model.gradient_checkpointing) is type(expected)
