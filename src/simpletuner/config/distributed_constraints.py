"""Rules between the options of several processes, and between them and the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from simpletuner.config import deepspeed_config
from simpletuner.config.schema import DistributedOptions, RunConfig
from simpletuner.errors import ConfigError

Finding = tuple[str, str]  # the option that is reported, and what is wrong


def find_distributed_errors(run: RunConfig) -> Iterator[Finding]:
    """Yield every reason why the options of several processes cannot be used as they are."""
    options = run.distributed
    yield from _check_machines(options)
    try:
        visible_devices(options)
    except ConfigError as error:
        yield "accelerate_visible_devices", str(error)
    if isinstance(options.num_processes, int):
        yield from check_process_count(run, options.num_processes)
    if options.fsdp_enable and options.deepspeed_config is not None:
        yield "fsdp_enable", "deepspeed_config is given too, and shards by itself; use one of them"
    if options.fsdp_enable and run.model.musubi_blocks_to_swap:
        yield (
            "fsdp_enable",
            f"cannot be combined with musubi_blocks_to_swap {run.model.musubi_blocks_to_swap:g}: "
            "each process holds a part of every block already; use one of them",
        )
    if options.fsdp_enable:
        yield from _check_sharding(run)
    for reason in deepspeed_config.find_deepspeed_errors(run):
        yield "deepspeed_config", reason


def _check_sharding(run: RunConfig) -> Iterator[Finding]:
    """Yield what cannot be used with fsdp_enable."""
    if run.model.model_type == "full" and run.optimizer.optimizer == "prodigy":
        yield (
            "optimizer",
            "prodigy estimates one rate from all weights at once, and with fsdp_enable no process "
            "has all of them; use adamw, adamw_bf16, adamw_8bit, adafactor, lion, muon or "
            "adamw_schedulefree",
        )
    if run.model.compiles_blocks:
        yield (
            "dynamo_backend",
            f"{run.model.dynamo_backend} cannot be combined with fsdp_enable, which runs code "
            "around every block to gather its weights; use no",
        )
    if run.model.chroma_approximator_device == "cpu":
        yield (
            "chroma_approximator_device",
            "cpu cannot be combined with fsdp_enable, which divides the approximator among the "
            "GPUs; leave it out",
        )


def _check_machines(options: DistributedOptions) -> Iterator[Finding]:
    machines, processes = options.num_machines, options.num_processes
    if options.machine_rank >= machines > 1:
        yield (
            "machine_rank",
            f"{options.machine_rank} is not below num_machines {machines}; machines are counted "
            "from 0",
        )
    if machines > 1 and options.main_process_ip is None:
        yield (
            "main_process_ip",
            f"num_machines {machines} needs the address of the machine with machine_rank 0. Where "
            "torchrun or srun starts the processes, leave num_machines out",
        )
    if isinstance(processes, int) and processes % machines:
        yield (
            "num_processes",
            f"{processes} counts the processes of all machines and must be a multiple of "
            f"num_machines {machines}",
        )


def check_process_count(run: RunConfig, count: int) -> Iterator[Finding]:
    """Yield what cannot be used with this number of processes."""
    if count > 1 and run.optimizer.optimizer_release_gradients:
        yield (
            "optimizer_release_gradients",
            f"gradients cannot be used and freed in the backward pass when those of {count} "
            "processes (num_processes) are summed first; use one process",
        )


def visible_devices(options: DistributedOptions) -> tuple[int, ...] | None:
    """Return the numbers of the GPUs to use, in the order of the processes; None for all.

    Raises ConfigError for anything but a list of different numbers.
    """
    written: Any = options.accelerate_visible_devices
    if written is None:
        return None
    parts = written.split(",") if isinstance(written, str) else written
    try:
        if any(isinstance(part, (bool, float)) for part in parts):
            raise ValueError
        numbers = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"{written!r} is not a list of different GPU numbers; write for example [0, 1]"
        )
    return numbers
