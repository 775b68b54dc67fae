"""DeepSpeed's engine on two processes against one process without it, and its checkpoints."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.events.event_types import NoticeIssued, RunStarted, WarningIssued
from tests.distributed.harness import RankResult, run_ranks, values
from tests.distributed.test_replicated import train_project
from tests.e2e.training_project import TrainingProject, read_events, read_losses

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs pip install 'simpletuner[deepspeed]'"
)
Train = Callable[[str, dict[str, Any]], None]  # root of a project, options
STEPS = 3
MICRO_BATCHES = 2  # of a step, over all processes
TOLERANCE = 5e-7
FULL = {
    "model_type": "full",
    "learning_rate": 1e-3,
    "use_ema": False,
    "gradient_checkpointing": True,
}
LORA = {"model_type": "lora", "gradient_checkpointing": True}


CPU = {"device": "cpu", "pin_memory": False}
BAD_STEP = 2


def train_with_a_bad_gradient(root: str, options: dict[str, Any]) -> None:
    """Train, with a gradient that is not finite in the second process at one step."""
    from simpletuner.training.deepspeed_engine import ZeroOptimizerStep

    backward, passes = ZeroOptimizerStep.backward, itertools.count(1)

    def bad_backward(self: ZeroOptimizerStep, loss: Tensor, place: int) -> None:
        is_bad = next(passes) == BAD_STEP and os.environ["RANK"] == "1"
        backward(self, loss * math.inf if is_bad else loss, place)

    ZeroOptimizerStep.backward = bad_backward  # type: ignore[method-assign]
    train_project(root, options)


def train_with_float32_copies(root: str, options: dict[str, Any]) -> None:
    """Train without the engine, but step float32 copies of the weights and round these."""
    from simpletuner.training.optimizer_step import StandardOptimizerStep

    copies: list[torch.nn.Parameter] = []
    optimizers: list[torch.optim.Optimizer] = []

    def apply(self: StandardOptimizerStep) -> None:
        group = self.optimizer.param_groups[0]
        if not copies:
            copies.extend(torch.nn.Parameter(param.detach().float()) for param in self.params)
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            optimizers.append(torch.optim.AdamW(copies, **settings, fused=True))
        (optimizer,) = optimizers
        optimizer.param_groups[0]["lr"] = group["lr"]
        for param, copy in zip(self.params, copies, strict=True):
            assert param.grad is not None
            copy.grad = param.grad.float()
        optimizer.step()
        with torch.no_grad():
            for param, copy in zip(self.params, copies, strict=True):
                param.copy_(copy)

    StandardOptimizerStep.apply = apply  # type: ignore[method-assign]
    train_project(root, options)


def zero(stage: int, **section: Any) -> dict[str, Any]:
    return {"deepspeed_config": {"zero_optimization": {"stage": stage, **section}}}


class Trainings:
    """Runs of one project, each in a folder of its own, with a shared cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.options = TrainingProject(
            root, max_train_steps=STEPS, checkpoint_step_interval=2, lora_dropout=0.0,
            cache_dir=str(root / "cache"), max_grad_norm=0.5, eval_sigma_count=1, lora_format="none",
        ).options  # fmt: skip
        self._finished: dict[str, Path] = {}

    def try_train(
        self, name: str, processes: int, train: Train = train_project, **options: Any
    ) -> list[RankResult]:
        accumulation = {"gradient_accumulation_steps": MICRO_BATCHES // processes}
        chosen = {**self.options, "output_dir": str(self.root / name), **accumulation, **options}
        return run_ranks(processes, train, str(self.root), chosen)

    def train(self, name: str, processes: int, **options: Any) -> Path:
        values(self.try_train(name, processes, **options))
        return self.root / name

    def alone(self, kind: dict[str, Any]) -> Path:
        """Return the run of one process without DeepSpeed."""
        return self._once(f"{kind['model_type']}-alone", 1, kind)

    def sharded(self, kind: dict[str, Any], stage: int) -> Path:
        """Return the run of two processes with DeepSpeed."""
        # By default stage 3 keeps small weights whole, and this network has no others.
        section = {"stage3_param_persistence_threshold": 0} if (kind, stage) == (LORA, 3) else {}
        options = {**kind, **zero(stage, **section)}
        return self._once(f"{kind['model_type']}-{stage}", 2, options)

    def _once(self, name: str, processes: int, options: dict[str, Any]) -> Path:
        if name not in self._finished:
            self._finished[name] = self.train(name, processes, **options)
        return self._finished[name]

    def copy_checkpoint(self, source: Path, name: str, step: int = 2) -> None:
        shutil.copytree(source / f"checkpoint-{step}", self.root / name / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("deepspeed"))


def assert_equal_runs(run_dir: Path, expected: Path, tolerance: float = TOLERANCE) -> None:
    """Compare losses, norms and rates, and every tensor of the last checkpoint."""
    found, wanted = read_losses(run_dir), read_losses(expected)
    assert found[STEPS] == pytest.approx(wanted[STEPS], rel=tolerance, abs=0)
    for step in found:
        assert found[step] == pytest.approx(wanted[step], rel=tolerance, abs=0), step
    folders = [folder / f"checkpoint-{STEPS}" for folder in (run_dir, expected)]
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        ours, theirs = (load_file(folder / name) for folder in folders)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.shape == theirs[key].shape
            assert tensor.dtype == theirs[key].dtype
            difference = (tensor.double() - theirs[key].double()).abs().max()
            assert difference <= tolerance, (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_by_module_and_weights_by_noise_level(stage: int, trainings: Trainings) -> None:
    options = {
        **LORA,
        "lora_rank_by_module": {r".*to_q": 2},
        "loss_weight_by_sigma": "0:0.5, 1:2",
    }
    one = trainings.train(f"ranks-alone-{stage}", 1, **options)
    two = trainings.train(f"ranks-{stage}", 2, **options, **zero(stage))
    assert_equal_runs(two, one)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        (LORA, 2),
        (LORA, 3),
        (FULL, 3),
        pytest.param(LORA, 1, marks=pytest.mark.slow),
        pytest.param(FULL, 2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_without_deepspeed(
    kind: dict[str, Any], stage: int, trainings: Trainings
) -> None:
    assert_equal_runs(trainings.sharded(kind, stage), trainings.alone(kind))


@pytest.mark.parametrize(
    ("kind", "stage"), [(LORA, 3), pytest.param(FULL, 2, marks=pytest.mark.slow)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    kind: dict[str, Any], stage: int, trainings: Trainings
) -> None:
    whole = trainings.sharded(kind, stage)
    name = f"resumed-{whole.name}"
    trainings.copy_checkpoint(whole, name)
    run_dir = trainings.train(name, 2, **kind, **zero(stage))
    assert_equal_runs(run_dir, whole, tolerance=0)


@pytest.mark.parametrize(
    "kind", [pytest.param(LORA, id="lora", marks=pytest.mark.slow), pytest.param(FULL, id="full")]
)
def test_a_checkpoint_goes_on_with_another_stage_and_without_deepspeed(
    kind: dict[str, Any], trainings: Trainings
) -> None:
    """2 processes with stage 3 -> 1 process without DeepSpeed, and back with stage 2."""
    alone, name = trainings.alone(kind), kind["model_type"]
    trainings.copy_checkpoint(trainings.sharded(kind, 3), f"{name}-3-to-1")
    run_dir = trainings.train(f"{name}-3-to-1", 1, **kind, gradient_accumulation_steps=1)
    assert_equal_runs(run_dir, alone)
    trainings.copy_checkpoint(alone, f"{name}-1-to-2")
    options = {**kind, **zero(2), "gradient_accumulation_steps": 2}
    assert_equal_runs(trainings.train(f"{name}-1-to-2", 2, **options), alone)


def test_stage_3_divides_the_base(trainings: Trainings) -> None:
    worlds = [
        next(
            event.world
            for event in read_events(trainings.sharded(LORA, stage))
            if isinstance(event, RunStarted)
        )
        for stage in (2, 3)
    ]
    assert [world.mode for world in worlds if world] == ["zero2", "zero3"]
    whole, part = (world.base_bytes_per_rank for world in worlds if world)
    assert 0.5 * whole <= part < 0.6 * whole


def test_the_exported_transformer_is_whole(trainings: Trainings) -> None:
    runs = [trainings.sharded(FULL, 3), trainings.alone(FULL)]
    file = "transformer/diffusion_pytorch_model.safetensors"
    sharded, alone = (load_file(run_dir / file) for run_dir in runs)
    assert {key: tensor.shape for key, tensor in sharded.items()} == {
        key: tensor.shape for key, tensor in alone.items()
    }
    assert all((sharded[key] - alone[key]).abs().max() <= TOLERANCE for key in alone)
    trained = load_file(runs[0] / f"checkpoint-{STEPS}" / "weights.safetensors")
    assert all(tensor.equal(sharded[key]) for key, tensor in trained.items())


def messages(run_dir: Path) -> str:
    events = read_events(run_dir)
    return "\n".join(e.message for e in events if isinstance(e, (NoticeIssued, WarningIssued)))


@pytest.mark.slow
def test_bf16_weights_have_float32_copies_which_only_deepspeed_resumes(
    trainings: Trainings,
) -> None:
    kind = {**FULL, "mixed_precision": "bf16"}
    whole = trainings.train("bf16", 2, **kind, **zero(3))
    optimizer, weights = (
        load_file(whole / f"checkpoint-{STEPS}" / f"{name}.safetensors")
        for name in ("optimizer", "weights")
    )
    copies = [tensor for name, tensor in optimizer.items() if name.endswith(".master_weight")]
    assert len(copies) == len(weights)
    for tensor in copies:
        assert tensor.dtype == torch.float32
        assert any(tensor.bfloat16().equal(weight) for weight in weights.values())
    trainings.copy_checkpoint(whole, "bf16-resumed")
    run_dir = trainings.train("bf16-resumed", 2, **kind, **zero(2))
    assert read_losses(run_dir)[STEPS] == pytest.approx(read_losses(whole)[STEPS], rel=TOLERANCE)
    trainings.copy_checkpoint(whole, "bf16-alone")
    alone = trainings.train("bf16-alone", 1, **kind, gradient_accumulation_steps=1)
    assert "without deepspeed_config the optimizer starts from scratch" in messages(alone)


# Unclipped: norms round differently, and without the engine clipping rounds bf16 gradients.
BF16 = {**FULL, "mixed_precision": "bf16", "learning_rate": 1e-4, "max_grad_norm": 0.0}
BF16_SUMS = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}


def different_weights(run_dir: Path, other: Path) -> float:
    """Return the fraction of the trained numbers that differ in the last checkpoint."""
    mine, theirs = (
        load_file(folder / f"checkpoint-{STEPS}" / "weights.safetensors")
        for folder in (run_dir, other)
    )
    different = sum(int((mine[name] != theirs[name]).sum()) for name in mine)
    return different / sum(tensor.numel() for tensor in mine.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sums", "low", "high"),
    [(2, {}, 0.0, 1e-5), (3, {}, 0.0, 1e-5), (2, BF16_SUMS, 1e-4, 1.0)],
    ids=["ZeRO-2", "ZeRO-3", "in bf16"],
)
def test_bf16_gradients_are_added_in_float32(
    stage: int, sums: dict[str, Any], low: float, high: float, trainings: Trainings
) -> None:
    """So four micro-batches have nearly the same sum on one process and on two."""
    config = {"zero_optimization": {"stage": stage}, **sums}
    one, two = (
        trainings.train(
            f"sums-{stage}-{len(sums)}-{count}", count, **BF16, deepspeed_config=config,
            gradient_accumulation_steps=4 // count,
        )
        for count in (1, 2)
    )  # fmt: skip
    assert low <= different_weights(two, one) <= high


@pytest.mark.slow
def test_bf16_weights_differ_by_their_float32_copies(trainings: Trainings) -> None:
    """Of two bf16 gradients the sum is the same in any order, so that nothing else differs."""
    config = {"zero_optimization": {"stage": 2}, **BF16_SUMS}
    engine = trainings.train("copies-engine", 2, **BF16, deepspeed_config=config)
    values(trainings.try_train("copies", 1, train=train_with_float32_copies, **BF16))
    assert different_weights(engine, trainings.root / "copies") == 0
    plain = trainings.train("copies-plain", 1, **BF16)
    assert different_weights(engine, plain) > 0.01


@pytest.mark.slow
def test_offloaded_weights_and_states_train_the_same(trainings: Trainings) -> None:
    section = {"offload_optimizer": CPU, "offload_param": CPU}
    run_dir = trainings.train("offloaded", 2, **FULL, **zero(3, **section))
    assert_equal_runs(run_dir, trainings.alone(FULL))


def test_one_process_may_use_the_engine(trainings: Trainings) -> None:
    run_dir = trainings.train("one", 1, **LORA, **zero(2))
    assert_equal_runs(run_dir, trainings.alone(LORA))


def test_a_bad_step_is_skipped_on_every_process(trainings: Trainings) -> None:
    """The gradient is infinite in one process alone."""
    options = {**LORA, **zero(3), "nonfinite_loss_patience": 1, "checkpoint_step_interval": 1}
    values(trainings.try_train("skipped", 2, train=train_with_a_bad_gradient, **options))
    run_dir = trainings.root / "skipped"
    assert "the update of this step was skipped" in messages(run_dir)
    weights = [
        load_file(run_dir / f"checkpoint-{step}" / "weights.safetensors")
        for step in (BAD_STEP - 1, BAD_STEP)
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_processes_that_cannot_share_a_step_are_told(trainings: Trainings) -> None:
    trainings.copy_checkpoint(trainings.sharded(LORA, 2), "three")
    options = {**LORA, **zero(2), "gradient_accumulation_steps": 1}
    for result in trainings.try_train("three", 3, **options):
        assert result.error is not None
        assert result.error[0] == "ConfigError"
        assert "deepspeed_config: an optimizer step has 2 micro-batches" in result.error[1]
