"""LoRA on a quantised base, from the option to the file: resumed bit for bit, checkpointed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from simpletuner.cli.trained_weights import resolve_model_options
from simpletuner.errors import CheckpointError, ConfigError
from simpletuner.events.event_types import CheckpointSetAside, StageStarted
from simpletuner.quantization.schemes import SCHEMES
from tests.e2e.test_resume import interrupted
from tests.e2e.training_project import (
    TrainingProject,
    read_checkpoint_files,
    read_events,
    read_losses,
)

LORA = "pytorch_lora_weights.safetensors"
SHORT = {
    "max_train_steps": 3, "checkpoint_step_interval": 1, "eval_steps_interval": 3,
    "lora_dropout": 0.0, "lr_warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    root = tmp_path_factory.mktemp("quantised")
    return TrainingProject(root, quantized_cache_dir=str(root / "quantized"), **SHORT)


def on(scheme: str) -> dict[str, object]:
    return {"base_model_precision": scheme, "text_encoder_1_precision": "int8"}


@pytest.fixture(scope="module")
def trained(workspace: TrainingProject) -> Callable[[str], Path]:
    """Return the folder of a run on a base of that precision; it runs once for all tests."""

    @cache
    def train(scheme: str) -> Path:
        return workspace.train(output_dir=str(workspace.root / scheme), **on(scheme))

    return train


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(name, marks=() if name in ("int8", "nf4") else pytest.mark.slow)
        for name in SCHEMES
    ],
)
def test_a_run_on_each(
    workspace: TrainingProject, trained: Callable[[str], Path], scheme: str
) -> None:
    same, run_dir = on(scheme), trained(scheme)
    converted = [event.stage for event in read_events(run_dir) if isinstance(event, StageStarted)]
    assert f"quantize to {scheme}" in converted
    assert len(read_losses(run_dir)) == 3
    assert len({loss for loss, _, _ in read_losses(run_dir).values()}) == 3
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(run_dir / LORA).items()
        if "lora_B" in name
    )
    assert resolve_model_options(None, [run_dir], {}).base_model_precision == scheme

    resumed = interrupted(workspace, 2, f"{scheme}-stopped", **same)
    assert read_losses(resumed) == read_losses(run_dir)
    assert read_checkpoint_files(resumed / "checkpoint-3") == read_checkpoint_files(
        run_dir / "checkpoint-3"
    )
    assert f"quantize to {scheme}" not in [
        event.stage for event in read_events(resumed) if isinstance(event, StageStarted)
    ]

    kept = workspace.train(
        output_dir=str(workspace.root / f"{scheme}-kept"), gradient_checkpointing=False, **same
    )
    assert read_losses(kept) == read_losses(run_dir)
    assert read_checkpoint_files(kept / "checkpoint-3") == read_checkpoint_files(
        run_dir / "checkpoint-3"
    )


PRODUCTS = ({"algo": "lokr", "linear_dim": 2, "factor": 4}, {"algo": "loha"})


@pytest.mark.parametrize("config", PRODUCTS, ids=str)
def test_a_product_on_a_quantised_base(
    workspace: TrainingProject, config: dict[str, object]
) -> None:
    """LoKr and LoHa: an average beside them, resumed bit for bit, recomputed or not, and generated
    from.
    """
    algo = str(config["algo"])
    same = {"base_model_precision": "int8", "lora_type": "lycoris", "lycoris_config": config}
    same |= {"lora_rank": None, "use_ema": True}
    same["quantized_cache_dir"] = str(workspace.root / f"{algo}-base")
    run_dir = workspace.train(output_dir=str(workspace.root / algo), **same)
    names = load_file(run_dir / LORA)
    assert all(name.startswith("lycoris_") for name in names)
    assert load_file(run_dir / "ema" / LORA).keys() == names.keys()
    resumed = interrupted(workspace, 2, f"{algo}-stopped", **same)
    assert read_losses(resumed) == read_losses(run_dir)
    assert read_checkpoint_files(resumed / "checkpoint-3") == read_checkpoint_files(
        run_dir / "checkpoint-3"
    )
    kept = workspace.train(
        output_dir=str(workspace.root / f"{algo}-kept"), gradient_checkpointing=False, **same
    )
    assert read_checkpoint_files(kept / "checkpoint-3") == read_checkpoint_files(
        run_dir / "checkpoint-3"
    )
    card = (run_dir / "README.md").read_text()
    assert {"lokr": "LoKr", "loha": "LoHa"}[algo] in card
    assert "--format diffusers --rank 64" in card


def test_the_precision_is_part_of_what_a_run_is(
    workspace: TrainingProject, trained: Callable[[str], Path]
) -> None:
    """Each base gives other losses; a checkpoint does not go on with another one unasked."""
    first = {scheme: read_losses(trained(scheme))[1][0] for scheme in SCHEMES}
    assert len(set(first.values())) == len(SCHEMES)
    error = workspace.train_and_expect_error(
        output_dir=str(trained("nf4")), base_model_precision="int8"
    )
    assert isinstance(error, CheckpointError)
    assert 'base_model_precision was "nf4", is "int8"' in str(error)


def test_full_rank_needs_the_weights_themselves(workspace: TrainingProject) -> None:
    with pytest.raises(ConfigError, match="use no_change"):
        workspace.load_config(model_type="full", base_model_precision="nf4")


def test_an_unreadable_cache_place_is_told_before_the_weights_are_read(
    workspace: TrainingProject,
) -> None:
    blocked = workspace.root / "blocked"
    blocked.write_text("")
    error = workspace.train_and_expect_error(
        output_dir=str(workspace.root / "nowhere"),
        base_model_precision="int8",
        quantized_cache_dir=str(Path(blocked) / "inside"),
    )
    assert "quantized_cache_dir" in str(error)


def test_what_was_fitted_is_recorded_and_kept(
    workspace: TrainingProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the plain base, and a checkpoint says what the run began with; a bad one is
    told.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace.root / "plans"))
    folder = workspace.root / "fitted"
    same: dict[str, object] = {"output_dir": str(folder), "max_train_steps": 2}
    same["quantized_cache_dir"] = str(workspace.root / "converted when fitted")
    workspace.train(base_model_precision="nf4", text_encoder_1_precision="int8", **same)
    (folder / "checkpoint-2" / "weights.safetensors").write_bytes(b"")
    workspace.train("", **{**same, "max_train_steps": 3})
    assert any(isinstance(event, CheckpointSetAside) for event in read_events(folder))
    now = json.loads((folder / "config.json").read_text())
    assert (now["base_model_precision"], now["text_encoder_1_precision"]) == ("nf4", "int8")
    assert now["gradient_checkpointing"] is False
    assert len(read_losses(folder)) == 3
    fresh = json.loads(
        (workspace.train("", output_dir=f"{folder}-anew") / "config.json").read_text()
    )
    assert (fresh["base_model_precision"], fresh["gradient_checkpointing"]) == ("no_change", False)
