"""Training on a sharded network (FSDP2) equals training on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from simpletuner.config.load import config_from_resolved
from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Event
from simpletuner.training.parameter_shards import assign_owners, row_ranges
from simpletuner.training.sharding import Sharding, require_equal_passes
from simpletuner.training.world import World
from tests.distributed.harness import run_ranks
from tests.distributed.test_replicated import Trainings, train_project
from tests.e2e.training_project import read_checkpoint_files, read_events, read_losses

STEPS = 2


def slow(*values: str) -> list[Any]:
    """Return values whose cases run with -m slow only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


BF16 = {"mixed_precision": "bf16"}
FULL = {
    **BF16, "model_type": "full", "lr_scheduler": "constant", "lr_warmup_steps": 0, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    made = Trainings(tmp_path_factory.mktemp("sharded"))
    datasets = made.root / "multidatabackend.json"
    datasets.write_text(datasets.read_text().replace('"eval"', '"image"'))
    made.options |= {"max_train_steps": STEPS, "caption_dropout_probability": 0.0}
    return made


def train(
    trainings: Trainings, name: str, processes: int, micro_batches: int, **options: Any
) -> Path:
    """Train sharded on that many processes; on one process that is ordinary training."""
    accumulation = micro_batches // processes
    return trainings.train(
        name, processes, gradient_accumulation_steps=accumulation, fsdp_enable=True, **options
    )


def outcome(run_dir: Path, step: int = STEPS) -> tuple[Any, ...]:
    return read_losses(run_dir)[step], read_checkpoint_files(run_dir / f"checkpoint-{step}")


def largest_difference(run_dir: Path, other: Path) -> float:
    mine, theirs = (
        load_file(folder / f"checkpoint-{STEPS}" / "weights.safetensors")
        for folder in (run_dir, other)
    )
    assert mine.keys() == theirs.keys()
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine)


def base_bytes(run_dir: Path) -> tuple[str, int]:
    (started,) = (event for event in read_events(run_dir) if event.kind == "run_started")
    return started.world.mode, started.world.base_bytes_per_rank


@pytest.mark.parametrize("precision", ["no_change", "int8", "nf4", *slow("fp8", "int4")])
def test_a_lora_on_a_sharded_base_has_the_bits_of_one_process(
    precision: str, trainings: Trainings
) -> None:
    options = {**BF16, "base_model_precision": precision, "gradient_checkpointing": True}
    one, two = (train(trainings, f"{precision}-{count}", count, 2, **options) for count in (1, 2))
    assert read_losses(two) == read_losses(one)
    assert outcome(two) == outcome(one)
    whole = trainings.train(f"{precision}-whole", 2, gradient_accumulation_steps=1, max_train_steps=1, **options)  # fmt: skip # noqa: E501
    (replicated, all_bytes), (sharded, own_bytes) = base_bytes(whole), base_bytes(two)
    assert (replicated, sharded) == ("replicated", "sharded")
    assert own_bytes < 0.6 * all_bytes


@pytest.mark.slow
def test_compiled_dequantising_of_a_sharded_base_has_the_same_bits(trainings: Trainings) -> None:
    options = {**BF16, "base_model_precision": "int8", "gradient_checkpointing": True}
    one = train(trainings, "eager", 1, 2, **options)
    two = train(trainings, "compiled", 2, 2, **options, dynamo_backend="dequantize")
    assert read_losses(two) == read_losses(one)
    assert outcome(two) == outcome(one)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw_bf16",
        "adamw_8bit",
        *slow("adafactor", "muon", "adamw", "lion", "adamw_schedulefree"),
    ],
)
def test_full_fine_tuning_has_the_bits_of_one_process(optimizer: str, trainings: Trainings) -> None:
    """Also the exported weights and those of the average."""
    options = {**FULL, "optimizer": optimizer, "max_grad_norm": 0.5}
    one, two = (train(trainings, f"{optimizer}-{count}", count, 2, **options) for count in (1, 2))
    assert read_losses(two) == read_losses(one)
    assert outcome(two) == outcome(one)
    for name in ("transformer", "transformer_ema"):
        files = sorted(path.name for path in (one / name).iterdir())
        assert sorted(path.name for path in (two / name).iterdir()) == files
        assert all(
            (one / name / file).read_bytes() == (two / name / file).read_bytes() for file in files
        )


def test_evaluations_on_averaged_weights_change_nothing(tmp_path: Path) -> None:
    """They leave no gathered weights behind for the next training pass."""
    evaluated = Trainings(tmp_path)
    evaluated.options |= {"max_train_steps": STEPS}
    one = train(evaluated, "one", 1, 2, **FULL)
    for reshards in (True, False):
        name = f"reshards-{reshards}"
        two = train(evaluated, name, 2, 2, **FULL, fsdp_reshard_after_forward=reshards)
        assert outcome(two) == outcome(one)
        assert evaluations(two) == evaluations(one)


def evaluations(run_dir: Path) -> list[Event]:
    found = [event for event in read_events(run_dir) if event.kind == "evaluated"]
    assert found
    return found


@pytest.mark.parametrize("optimizer", ["muon", *slow("adamw_8bit", "adamw_bf16")])
def test_any_number_of_processes_resumes_any_checkpoint(
    optimizer: str, trainings: Trainings
) -> None:
    """1 -> 2 and 2 -> 1 have the bits of one process. Three sum their gradients in another order."""
    options = {**FULL, "optimizer": optimizer}
    name = f"resume-{optimizer}"
    one = train(trainings, f"{name}-1", 1, 2, **options)
    trainings.copy_checkpoint(one, 1, f"{name}-12")
    resumed = train(trainings, f"{name}-12", 2, 2, **options)
    assert outcome(resumed) == outcome(one)
    shutil.rmtree(resumed / f"checkpoint-{STEPS}")
    back = trainings.root / f"{name}-121"
    shutil.copytree(resumed / "checkpoint-1", back / "checkpoint-1")
    assert outcome(train(trainings, back.name, 1, 2, **options)) == outcome(one)


@pytest.mark.parametrize("optimizer", ["adamw", *slow("adafactor")])
def test_three_processes_go_on_where_one_has_stopped(optimizer: str, trainings: Trainings) -> None:
    """Rows do not divide evenly, and three processes sum gradients in another order than one."""
    options = {**FULL, "mixed_precision": "no", "optimizer": optimizer, "learning_rate": 1e-4}
    one = train(trainings, f"uneven-{optimizer}-1", 1, 3, **options)
    trainings.copy_checkpoint(one, 1, f"uneven-{optimizer}-3")
    three = train(trainings, f"uneven-{optimizer}-3", 3, 3, **options)
    assert largest_difference(three, one) < 1e-6
    assert read_losses(three)[STEPS] == pytest.approx(read_losses(one)[STEPS], rel=1e-6)


def test_several_passes_of_each_process_add_up(trainings: Trainings) -> None:
    options = {**FULL, "mixed_precision": "no", "learning_rate": 1e-4}
    one, two = (train(trainings, f"passes-{count}", count, 4, **options) for count in (1, 2))
    assert largest_difference(two, one) < 1e-6
    assert read_losses(two)[STEPS] == pytest.approx(read_losses(one)[STEPS], rel=1e-6)


def test_unequal_shares_are_refused_with_the_numbers_that_work(trainings: Trainings) -> None:
    options = {
        **trainings.options, **BF16, "fsdp_enable": True, "output_dir": str(trainings.root / "unequal"),
        "gradient_accumulation_steps": 3,
    }  # fmt: skip
    one = train(trainings, "unequal-1", 1, 3, max_train_steps=1, **BF16)
    trainings.copy_checkpoint(one, 1, "unequal")
    results = run_ranks(2, train_project, str(trainings.root), options)
    for result in results:
        assert result.error is not None
        assert result.error[0] == "ConfigError"
        assert "3 micro-batches" in result.error[1]
        assert "1 or 3 processes" in result.error[1]


def test_equal_shares_are_required_of_sharded_networks_only() -> None:
    class Sharded(Sharding):
        is_sharded = True

    world = World(0, 3)
    for cls, refused in ((Sharding, False), (Sharded, True)):
        sharding = cls(world, True, OptimizerOptions())
        require_equal_passes(sharding, 6)
        if refused:
            with pytest.raises(ConfigError, match="1 or 2 or 4 processes"):
                require_equal_passes(sharding, 4)
        else:
            require_equal_passes(sharding, 4)


def test_rows_are_divided_as_by_torch() -> None:
    import torch

    for rows in (1, 2, 3, 5, 64):
        for ranks in (1, 2, 3, 4, 7):
            parts = [part.tolist() for part in torch.arange(rows).chunk(ranks)]
            expected = parts + [[]] * (ranks - len(parts))
            assert [list(part) for part in row_ranges(rows, ranks)] == expected


def test_owners_share_out_what_must_be_whole() -> None:
    shapes = {"a": (64, 64), "b": (64,), "c": (32, 64), "d": (32, 64), "e": (6, 256), "f": (128,)}
    assert set(assign_owners(shapes, 2, "adamw").values()) == {None}
    muon = assign_owners(shapes, 2, "muon")
    assert muon == {"a": 0, "b": None, "c": 1, "d": 1, "e": 0, "f": None}
    # A boundary after 64 or 32 numbers is inside a block of 256; one after 3 rows of 256 is not.
    eight_bit = assign_owners(shapes, 2, "adamw_8bit")
    assert eight_bit["b"] is not None
    assert eight_bit["f"] is not None
    assert {eight_bit[name] for name in ("a", "c", "d", "e")} == {None}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model_type": "full", "optimizer": "prodigy"}, "prodigy"),
        ({"chroma_approximator_device": "cpu"}, "approximator"),
        ({"dynamo_backend": "eager"}, "dynamo_backend"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options: dict[str, Any], word: str) -> None:
    from simpletuner.config.distributed_constraints import find_distributed_errors

    run = config_from_resolved({"fsdp_enable": True, **options})
    assert any(word in f"{name} {reason}" for name, reason in find_distributed_errors(run))
    run = config_from_resolved({**options})
    assert not list(find_distributed_errors(run))
