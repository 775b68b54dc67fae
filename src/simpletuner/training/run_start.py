"""Start a run: restore its checkpoint, and emit what was built."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner import __version__
from simpletuner.config.deepspeed_config import parse_zero_config, uses_deepspeed
from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.events.event_types import Emit, NoticeIssued, RunResumed, RunStarted, RunWorld
from simpletuner.training.checkpointer import Checkpointer
from simpletuner.training.device import ComputeDevice, describe_attention
from simpletuner.training.loop import TrainSchedule
from simpletuner.training.prepare import PreparedInputs
from simpletuner.training.resume import ResumePoint
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.target_summary import describe_targets
from simpletuner.training.train_state import TrainState
from simpletuner.training.world import World


def start_run(
    run: RunConfig,
    prepared: PreparedInputs,
    resume_point: ResumePoint | None,
    checkpointer: Checkpointer,
    state: TrainState,
    folder: RunFolder,
    device: ComputeDevice,
    schedule: TrainSchedule,
    world: World,
    emit: Emit,
) -> int:
    """Restore the checkpoint, if there is one, and return the number of completed steps."""
    if resume_point is not None:
        checkpointer.restore(resume_point)
        folder.write_config(resolved_options(run))
    model = f"{run.model.model_family} {prepared.model_files.name}"
    described = describe_world(run, state, world)
    targets = describe_targets(run, prepared.rules, prepared.train.placed_samples)
    return emit_run_start(resume_point, folder, model, device, schedule, described, targets, emit)


def emit_run_start(
    resume_point: ResumePoint | None,
    folder: RunFolder,
    model: str,
    device: ComputeDevice,
    schedule: TrainSchedule,
    world: RunWorld | None,
    targets: Sequence[str],
    emit: Emit,
) -> int:
    """Emit where the run begins, and return the number of steps that are already complete."""
    step = 0 if resume_point is None else resume_point.step
    total = schedule.total_steps
    device.hardware.reset_peak()  # encoding the datasets and loading were phases of their own
    path, name = str(folder.path), str(device)
    emit(RunStarted(__version__, path, model, name, total, step, world, tuple(targets)))
    for target in targets:
        emit(NoticeIssued(target))
    if attention := describe_attention(device):
        emit(NoticeIssued(attention))
    if resume_point is not None:
        emit(RunResumed(step, resume_point.folder.name))
        if step >= total:
            steps = "the one step is" if total == 1 else f"all {total} steps are"
            emit(NoticeIssued(f"{steps} complete; to train further, raise max_train_steps"))
    return step


def describe_world(run: RunConfig, state: TrainState, world: World) -> RunWorld | None:
    """Return what the processes really hold, counted from their tensors; None for one process."""
    if world.size == 1:
        return None
    mode = "sharded" if run.distributed.fsdp_enable else "replicated"
    if uses_deepspeed(run):
        mode = f"zero{parse_zero_config(run).stage}"
    return RunWorld(world.size, mode, max(world.gather_json(base_bytes(state))))


def base_bytes(state: TrainState) -> int:
    """Return the bytes of the network's weights that this process holds, without adapters."""
    network = state.transformer
    adapters = set(map(id, state.trainable_parameters.values())) if state.uses_lora else set()
    tensors = [*network.parameters(), *network.buffers()]
    held = {id(tensor): tensor for tensor in tensors if id(tensor) not in adapters}
    return sum(state.sharding.local_part(tensor).nbytes for tensor in held.values())
