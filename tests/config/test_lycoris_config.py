"""lycoris_config: from a file or as an object, kept with the run, refused with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from simpletuner.config.load import config_from_resolved, resolved_options, try_load_config
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
        ({"algo": "boft"}, "allowed: lokr, loha"),
        ({}, "allowed: lokr, loha"),
        ({**LOKR, "multiplier": 0.5}, "strength is linear_alpha"),
        ({**LOKR, "apply_preset": {"target_module": ["Attention"]}}, "flux_lora_target"),
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


def test_options_of_a_lora_are_refused_beside_it(tmp_path: Path) -> None:
    problems, _ = judged(
        tmp_path,
        lora_type="lycoris",
        lycoris_config=LOKR,
        lora_rank=8,
        use_dora=True,
    )
    assert [problem.split(":")[0] for problem in problems[:2]] == ["lora_rank", "use_dora"]
    assert "linear_dim" in problems[0]
    problems, _ = judged(tmp_path, lycoris_config=LOKR)
    assert 'lora_type "lycoris" only' in problems[0]
    problems, _ = judged(tmp_path, lora_type="lycoris")
    assert "needs a file or an object such as" in problems[0]
    problems, loaded = judged(
        tmp_path, lora_type="standard", lycoris_config="config/lycoris_config.json"
    )
    assert not problems
    assert loaded.config.adapter.lycoris_config is None
