"""config.env, env=default and config_backend: SimpleTuner's other ways to a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.load import LoadedConfig, load_config
from simpletuner.errors import ConfigError

TEXT = """# a run
export MODEL_TYPE='lora'
MODEL_FAMILY=chroma
LEARNING_RATE=2e-4   # higher
MAX_NUM_STEPS=30
NUM_EPOCHS=0
TRAINING_SEED=7
VALIDATION_PROMPT="a cat, it's # one"
VALIDATION_GUIDANCE=3.0
CAPTION_DROPOUT_PROBABILITY=
HF_HOME=/somewhere
TRAINER_EXTRA_ARGS="--use_ema --lora_rank=8 --optimizer adamw_8bit"
"""


def load(folder: Path, *flags: tuple[str, str], **variables: str) -> LoadedConfig:
    return load_config(flags, environ=variables, cwd=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/multidatabackend.json").write_text("[]", encoding="utf-8")
    (tmp_path / "config/config.env").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_every_line_arrives(folder: Path) -> None:
    loaded = load(folder)
    run = loaded.config
    assert loaded.config_path == folder / "config/config.env"
    assert (run.training.seed, run.training.max_train_steps) == (7, 30)
    assert run.optimizer.learning_rate == 2e-4
    assert run.validation.validation_prompt == "a cat, it's # one"
    assert run.validation.validation_guidance_real == 3.0
    assert (run.adapter.lora_rank, run.optimizer.use_ema) == (8, True)
    assert run.optimizer.optimizer == "adamw_8bit"
    assert loaded.origins["seed"] == "config/config.env:7:1"
    assert loaded.origins["model_type"] == "config/config.env:2:8"
    assert any("HF_HOME is a variable of another program" in note for note in loaded.notices)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("LEARNING_RATE 1e-4", "config.env:1: is not a line such as LEARNING_RATE=1e-4"),
        ("VALIDATION_PROMPT=a cat", "config.env:1: is not a line such as"),
        ('VALIDATION_PROMPT="a cat', "config.env:1: No closing quotation"),
        ("LEARNING_RAT=1", "config.env:1:1: learning_rat: unknown option; did you mean"),
        ('TRAINER_EXTRA_ARGS="--lora_rank 0"', "config.env:1:1: lora_rank = 0: must be at least 1"),
        ('TRAINER_EXTRA_ARGS="lora"', "'lora' is not the value of an option"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(folder: Path, line: str, words: str) -> None:
    (folder / "config/config.env").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert words in str(caught.value)


def test_the_default_environment_is_the_folder_config(folder: Path) -> None:
    found = load_config((), environ={}, cwd=folder, env_name="default")
    assert found.config_path == folder / "config/config.env"
    own = folder / "config/default"
    own.mkdir()
    (own / "config.json").write_text("{}", encoding="utf-8")
    (own / "multidatabackend.json").write_text("[]", encoding="utf-8")
    found = load_config((), environ={}, cwd=folder, env_name="default")
    assert found.config_path == own / "config.json"
    with pytest.raises(ConfigError, match="--env other: not found"):
        load_config((), environ={}, cwd=folder, env_name="other")


def test_the_backend_chooses_the_file(folder: Path) -> None:
    (folder / "config/config.json").write_text(json.dumps({"seed": 1}), encoding="utf-8")
    (folder / "config/config.toml").write_text("seed = 2\n", encoding="utf-8")
    assert load(folder).config.training.seed == 1
    assert load(folder, ("config_backend", "toml")).config.training.seed == 2
    for name in ("CONFIG_BACKEND", "SIMPLETUNER_CONFIG_BACKEND"):
        loaded = load(folder, **{name: "env"})
        assert loaded.config.training.seed == 7
        assert not any("CONFIG_BACKEND" in note for note in loaded.notices)
    assert load(folder, ("config_backend", "json"), CONFIG_BACKEND="env").config.training.seed == 1
    dataset = ("data_backend_config", "config/multidatabackend.json")
    bare = load(folder, ("config_backend", "cmd"), dataset, ("seed", "9"))
    assert (bare.config_path, bare.config.training.seed) == (None, 9)
    with pytest.raises(ConfigError, match="config_backend = 'yaml': allowed: json, toml, env, cmd"):
        load(folder, ("config_backend", "yaml"))
