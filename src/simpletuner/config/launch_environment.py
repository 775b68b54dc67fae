"""The variables that a launcher sets for a process: torchrun's, or Slurm's under srun."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from simpletuner.config import deepspeed_config
from simpletuner.config.distributed_constraints import check_process_count
from simpletuner.config.environment import GPU_VARIABLE
from simpletuner.config.schema import DistributedOptions, RunConfig
from simpletuner.errors import ConfigError, Problem

DEFAULT_PORT = 29500
# Ports for Slurm's jobs, below those that the kernel gives to outgoing connections.
SLURM_PORTS = range(15000, 29000)
LOOPBACK = "127.0.0.1"
# The process that has started this one, when it is a launcher of this program.
LAUNCHER_VARIABLE = "_SIMPLETUNER_LAUNCHER_PID"
PARENT_VARIABLE = "_SIMPLETUNER_PARENT_PID"  # of a training that another command has started
BRACKET_PATTERN = re.compile(r"\[([^],-]*)[^]]*\]")
TASKS_PATTERN = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class LaunchedProcess:
    """A process that a launcher has started together with others.

    rank: 0 to size - 1. local_rank, local_size: the same among the processes of this machine.
    address, port: where the processes find each other. launcher_has_store: the launcher listens
    there itself, so rank 0 must not. gpu_index: the GPU of this process among those that it sees.
    attempt: how often the launcher has started the processes again.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str
    gpu_index: int = 0
    launcher_has_store: bool = False
    attempt: str = "0"

    @property
    def on_one_machine(self) -> bool:
        return self.size == self.local_size


def read_launched_process(
    environ: Mapping[str, str], options: DistributedOptions
) -> LaunchedProcess | None:
    """Return what the launcher says; None where no launcher has started this process.

    Raises ConfigError for variables that are missing or not numbers.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _read_torchrun(environ)
    if "SLURM_STEP_ID" in environ and _slurm_tasks(environ) > 1:
        return _read_slurm(environ, options)
    return None


def _read_torchrun(environ: Mapping[str, str]) -> LaunchedProcess:
    size = _read_number(environ, "WORLD_SIZE")
    rank = _read_number(environ, "RANK")
    # Without the local numbers every process is taken to be alone on its machine.
    local_rank = _read_number(environ, "LOCAL_RANK", 0)
    local_size = _read_number(environ, "LOCAL_WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ConfigError([Problem("RANK", f"{rank} is not below WORLD_SIZE {size}")])
    if size > 1 and "MASTER_ADDR" not in environ:
        raise ConfigError(
            [Problem("MASTER_ADDR", "is not set although RANK and WORLD_SIZE are; use torchrun")]
        )
    ours = LAUNCHER_VARIABLE in environ
    return LaunchedProcess(
        rank,
        size,
        local_rank,
        local_size,
        environ.get("MASTER_ADDR", LOOPBACK),
        _read_number(environ, "MASTER_PORT", DEFAULT_PORT),
        "simpletuner train" if ours else "the launcher (RANK, WORLD_SIZE)",
        local_rank,
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _read_number(environ, name, 1)


def _read_slurm(environ: Mapping[str, str], options: DistributedOptions) -> LaunchedProcess:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    node = _read_number(environ, "SLURM_NODEID", 0)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    local_sizes = expand_task_counts(tasks)
    if node >= len(local_sizes):
        raise ConfigError(
            [Problem("SLURM_STEP_TASKS_PER_NODE", f"{tasks!r} has no number for node {node}")]
        )
    address = options.main_process_ip or first_host(nodes)
    if not address:
        raise ConfigError(
            [Problem("SLURM_STEP_NODELIST", "is empty; set main_process_ip to the first machine")]
        )
    job, step = (_read_number(environ, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    size, local_rank = _slurm_tasks(environ), _read_number(environ, "SLURM_LOCALID")
    # With --gpus-per-task a process sees its own GPU alone.
    sees_one_gpu = len(environ.get(GPU_VARIABLE, "").split(",")) == 1 and environ.get(GPU_VARIABLE)
    return LaunchedProcess(
        _read_number(environ, "SLURM_PROCID"),
        size,
        local_rank,
        local_sizes[node],
        LOOPBACK if size == local_sizes[node] else address,
        options.main_process_port or SLURM_PORTS[(job * 31 + step) % len(SLURM_PORTS)],
        "srun (SLURM_NTASKS)",
        0 if sees_one_gpu else local_rank,
    )


def first_host(nodes: str) -> str:
    """Return the first host of a list such as "gpu[07-09,12],login1"; "" for an empty list."""
    depth = 0
    for place, character in enumerate(nodes):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            nodes = nodes[:place]
            break
    return BRACKET_PATTERN.sub(lambda match: match[1], nodes).strip()


def expand_task_counts(text: str) -> list[int]:
    """Return the number of tasks on each node, from "4(x2),3"."""
    counts: list[int] = []
    for part in text.split(","):
        match = TASKS_PATTERN.fullmatch(part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _read_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    text = environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            [
                Problem(
                    name, f"{text!r} is not a whole number; the launcher of the processes sets it"
                )
            ]
        ) from None


def check_agreement(
    run: RunConfig, process: LaunchedProcess | None, origins: Mapping[str, str]
) -> None:
    """Compare the configuration with what the launcher has started.

    Raises ConfigError with both values where they contradict each other.
    """
    problems = []
    for name, reason in _find_contradictions(run, process, origins):
        location = origins.get(name, "")
        is_named = location == f"--{name}"
        problems.append(Problem(location, reason if is_named else f"{name}: {reason}"))
    if problems:
        raise ConfigError(problems)


def _find_contradictions(
    run: RunConfig, process: LaunchedProcess | None, origins: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    wanted = run.distributed.num_processes
    if process is None:
        if run.distributed.fsdp_enable and wanted == 1:
            yield (
                "fsdp_enable",
                "shards the transformer over several processes and num_processes is 1; set "
                "num_processes to the number of GPUs, or to auto",
            )
        for reason in deepspeed_config.find_batch_size_error(run, 1) if wanted == 1 else ():
            yield "deepspeed_config", reason
        return
    for reason in deepspeed_config.find_batch_size_error(run, process.size):
        yield "deepspeed_config", reason
    given = origins.get("num_processes", "default") != "default"
    if given and wanted not in ("auto", process.size):
        yield (
            "num_processes",
            f"{wanted} contradicts the {process.size} processes that {process.launcher} has "
            f"started; leave num_processes out, or start {wanted} processes",
        )
    elif not given or wanted == "auto":
        yield from check_process_count(run, process.size)


def variables_of_ranks(process: LaunchedProcess, platform: str) -> Mapping[str, str]:
    """Return the variables that keep the connections of one machine on its loopback interface.

    platform: as sys.platform.
    """
    if process.size == 1 or not process.on_one_machine:
        return {}
    interface = "lo" if platform == "linux" else "lo0"
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
