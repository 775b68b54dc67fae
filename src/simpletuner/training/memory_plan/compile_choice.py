"""Resolve dynamo_backend "auto": compile on a CUDA GPU when the training is long enough to gain.

Compiled blocks round otherwise than eager ones, so the choice is stored in the run folder, and a
resumed run keeps it. Compiled dequantising gives the same bits. Nothing here was measured on a GPU:
the constants are estimates, and a training whose length or memory leaves a doubt is not compiled.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from simpletuner.config import environment
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError
from simpletuner.training.memory_plan import step_time
from simpletuner.training.memory_plan.fit import with_options
from simpletuner.training.memory_plan.machine_resources import MachineResources
from simpletuner.training.memory_plan.prediction import MemoryPrediction

OPTION = "dynamo_backend"
# Seconds until the programs of both kinds of blocks, or of one scheme, are compiled, and the part
# of a step that they save: fused elementwise work, which is a tenth of a step.
BLOCKS_COMPILE_S, BLOCKS_SAVED = 120.0, 0.10
DEQUANTIZE_COMPILE_S, DEQUANTIZE_SAVED = 15.0, 0.05
# The plan counts eager blocks; compiled ones may keep other tensors, so this must be free as well.
MEMORY_MARGIN = 1.1
LEAST_CAPABILITY = (7, 0)  # of a GPU that Triton writes programs for
C_COMPILERS = ("cc", "gcc", "clang", "cl")
# What torch, Triton and the C compiler raise when they do not fit each other.
BROKEN_COMPILER = (
    RuntimeError,
    OSError,
    ImportError,
    AttributeError,
    subprocess.SubprocessError,
)


@dataclass(frozen=True)
class CompileChoice:
    """A value of dynamo_backend and why."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{OPTION} auto: {self.value} ({self.reason})"


def choose_compilation(
    run: RunConfig,
    plan: MemoryPrediction | None,
    budget: MachineResources,
    run_dir: Path | None = None,
    find_obstacle: Callable[[], str | None] | None = None,
) -> CompileChoice:
    """Return the choice for a run whose option is "auto".

    plan: None for a base that is too small to be planned. run_dir: a folder whose former choice is
    kept. find_obstacle: returns why inductor does not work here, or None; called only where it
    would be used.
    """
    former = None if run_dir is None else read_former_choice(run, run_dir)
    if former is not None:
        return CompileChoice(former, "as in the run folder")
    if budget.kind != "cuda":
        return CompileChoice("no", f"blocks run as they are on {budget.kind}")
    if plan is None:
        return CompileChoice("no", "a small base")
    if plan.world.uses_deepspeed:
        return CompileChoice("no", "DeepSpeed runs the blocks")
    steps = run.training.max_train_steps
    if not steps:
        return CompileChoice("no", "the number of steps is not known before the datasets are read")
    seconds = steps * step_time.estimate_seconds(plan.flops, budget.peak_flops, plan.moved)
    choice = _choose_by_length(run, plan, budget, seconds)
    obstacle = None if choice.value == "no" else (find_obstacle or find_inductor_obstacle)()
    return choice if obstacle is None else CompileChoice("no", obstacle)


def _choose_by_length(
    run: RunConfig, plan: MemoryPrediction, budget: MachineResources, seconds: float
) -> CompileChoice:
    limit = budget.available_for_tensors
    has_room = limit is not None and plan.training * MEMORY_MARGIN <= limit
    # Code between the blocks that moves weights or activations is not part of a compiled block.
    moves = plan.memory.swapped or plan.memory.offload_activations or plan.world.mode == "sharded"
    if seconds * BLOCKS_SAVED >= BLOCKS_COMPILE_S and has_room and not moves:
        return CompileChoice("inductor", "the training is long enough to gain from it")
    is_quantized = run.model.base_model_precision != "no_change"
    if is_quantized and seconds * DEQUANTIZE_SAVED >= DEQUANTIZE_COMPILE_S:
        return CompileChoice("dequantize", "quantised weights are restored in one pass")
    return CompileChoice("no", "the training is too short, or the memory too tight, to gain")


def find_inductor_obstacle() -> str | None:
    """Return why torch.compile cannot be used on the current CUDA device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if "CC" not in environment.copy_process_environment() and not any(
        map(shutil.which, C_COMPILERS)
    ):
        return "Triton needs a C compiler"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "Triton needs a newer GPU"
    return try_inductor(torch.device("cuda"))


def try_inductor(device: torch.device) -> str | None:
    """Compile one small function; return the first line of the error, or None when it works."""
    try:
        compiled = torch.compile(lambda x: (x + 1) * x, backend="inductor")
        compiled(torch.ones(8, device=device))
    except BROKEN_COMPILER as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile does not work here: {lines[0]}"
    return None


def read_former_choice(run: RunConfig, run_dir: Path) -> str | None:
    """Return the value in the config.json of a run folder; None where it has none for this run."""
    try:
        value = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))[OPTION]
        former = with_options(run, {OPTION: value}).model.dynamo_backend
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return None if former == "auto" else former
