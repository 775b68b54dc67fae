"""What two processes really send each other in a step, beside what the plan says on paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from simpletuner.models import registry
from simpletuner.training import gradient_sum
from simpletuner.training.memory_plan.prediction import predict_memory
from tests.distributed.harness import run_ranks, values
from tests.distributed.test_deepspeed import zero
from tests.distributed.test_replicated import train_project
from tests.e2e.training_project import TrainingProject

PROCESSES = 2
SHARDED = {"fsdp_enable": True}
DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs pip install 'simpletuner[deepspeed]'"
)
# All weights of the bundled model are small enough for DeepSpeed to leave them whole.
SHARD_ALL = {"stage3_param_persistence_threshold": 0}
GATHER_TWICE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
SMALL_BYTES = 32  # of a message with losses, flags or sizes
# Operation of the plan -> the functions of torch.distributed that do it, and the argument that holds
# the message: its place and its names.
FUNCTIONS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "send": (("send",), 0, ("tensor",)),
    "broadcast": (("broadcast",), 0, ("tensor",)),
    "all_reduce": (("all_reduce",), 0, ("tensor",)),
    "all_gather": (
        ("all_gather_into_tensor", "all_gather_single"), 0, ("output_tensor", "output")
    ),
    "reduce_scatter": (
        ("reduce_scatter_tensor", "reduce_scatter_single"), 1, ("input_tensor", "input")
    ),
}  # fmt: skip
# What the profiler counts under gloo, which reduces and scatters by an all_reduce.
PROFILED = {
    "gloo:send": ("send",),
    "gloo:broadcast": ("broadcast",),
    "gloo:all_reduce": ("all_reduce", "reduce_scatter"),
    "gloo:all_gather": ("all_gather",),
}


def count_step(root: str, options: dict[str, Any], bucket_bytes: int) -> dict[str, Any]:
    """Train two steps; return the messages of the second one: operation -> bytes, and profiled."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from simpletuner.training import loop

    gradient_sum.BUCKET_BYTES = bucket_bytes
    sent: list[tuple[str, int]] = []
    profiled: Counter[str] = Counter()
    for operation, (functions, place, names) in FUNCTIONS.items():
        for function in functions:
            called = counting(getattr(dist, function), operation, place, names, sent)
            setattr(dist, function, called)
    train_step = loop.train_step

    def count(context: Any, step: int) -> Any:
        if step != 1:
            return train_step(context, step)
        sent.clear()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            completed = train_step(context, step)
        messages.extend(sent)
        for event in recorded.events() or ():
            profiled.update([event.name] if event.name.startswith("gloo:") else [])
        return completed

    messages: list[tuple[str, int]] = []
    loop.train_step = count
    train_project(root, options)
    return {"messages": messages, "profiled": dict(profiled)}


def counting(
    function: Any, operation: str, place: int, names: Sequence[str], sent: list[tuple[str, int]]
) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        given = [named[name] for name in names if name in named]
        message = given[0] if given else arguments[place]
        sent.append((operation, message.nbytes))
        return function(*arguments, **named)

    return call


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    root = tmp_path_factory.mktemp("communication")
    return TrainingProject(
        root, max_train_steps=2, checkpoint_step_interval=9, cache_dir=str(root / "cache"),
        use_ema=False, eval_steps_interval=9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "bucket_bytes"),
    [
        pytest.param(
            {"gradient_accumulation_steps": 1}, 64 << 20, marks=pytest.mark.slow, id="LoRA"
        ),
        pytest.param(
            {"gradient_accumulation_steps": 3}, 4096, id="LoRA, uneven tree, many buckets"
        ),
        pytest.param(
            {"model_type": "full"}, 4096, marks=pytest.mark.slow, id="full rank, many buckets"
        ),
        pytest.param({**SHARDED, "base_model_precision": "int8"}, 64 << 20, id="LoRA, sharded"),
        pytest.param({**SHARDED, "model_type": "full"}, 64 << 20, id="full rank, sharded"),
        pytest.param(
            {**SHARDED, "model_type": "full", "fsdp_reshard_after_forward": False},
            64 << 20,
            marks=pytest.mark.slow,
            id="full rank, sharded, gathered once",
        ),
        pytest.param(
            {**zero(1), "gradient_accumulation_steps": 2, "model_type": "full"},
            64 << 20,
            marks=[DEEPSPEED, pytest.mark.slow],
            id="full rank, ZeRO-1",
        ),
        pytest.param(
            {**zero(2), "gradient_accumulation_steps": 2},
            64 << 20,
            marks=DEEPSPEED,
            id="LoRA, ZeRO-2",
        ),
        *(
            pytest.param(
                {
                    **zero(stage, **(SHARD_ALL if stage == 3 else {})),
                    "gradient_accumulation_steps": 2,
                    "model_type": "full",
                    "mixed_precision": "bf16",
                },
                64 << 20,
                marks=[DEEPSPEED, pytest.mark.slow],
                id=f"full rank in bf16, ZeRO-{stage}",
            )
            for stage in (2, 3)
        ),
        pytest.param(
            {**zero(3, **SHARD_ALL), "gradient_accumulation_steps": 2, "model_type": "full"},
            64 << 20,
            marks=[DEEPSPEED, pytest.mark.slow],
            id="full rank, ZeRO-3, gathered once",
        ),
        pytest.param(
            {**zero(3, **SHARD_ALL, **GATHER_TWICE), "gradient_accumulation_steps": 2},
            64 << 20,
            marks=[DEEPSPEED, pytest.mark.slow],
            id="LoRA, ZeRO-3, gathered twice",
        ),
    ],
)
def test_the_plan_counts_what_is_sent(
    project: TrainingProject,
    options: dict[str, Any],
    bucket_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", bucket_bytes)
    chosen = {**project.options, **options, "output_dir": str(tmp_path), "num_processes": PROCESSES}
    run = project.load_config(**chosen).config
    plan = predict_memory(run, registry.get_family(run.model.model_family), kind="cpu")
    counted = values(run_ranks(PROCESSES, count_step, str(project.root), chosen, bucket_bytes))
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for rank, found in enumerate(counted):
        for operation, message in found["messages"]:
            if operation != "send" and rank > 0:
                continue  # the same call as on the first one
            if message > SMALL_BYTES or operation in ("send", "broadcast"):
                calls[operation] += 1
                size[operation] += message
    assert calls == {
        use.operation: calls[use.operation] if use.calls is None else use.calls
        for use in plan.communication
    }
    # FSDP2 pads matrices whose rows it cannot divide evenly, and DeepSpeed gathers module by module
    # what the backward pass needs.
    tolerance = 0.03 if run.distributed.fsdp_enable or plan.world.mode == "zero3" else 0
    assert size == pytest.approx(
        {use.operation: use.message_bytes for use in plan.communication}, rel=tolerance
    )
    for name, operations in PROFILED.items():
        for found in counted:
            seen = sum(operation in operations for operation, _ in found["messages"])
            assert found["profiled"].get(name, 0) == seen, name
