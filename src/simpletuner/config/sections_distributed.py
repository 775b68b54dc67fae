"""The section about several processes: their number, GPUs and machines, and what each holds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from simpletuner.config.option import Effect, Not, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

MACHINES = {"num_machines": Not(1)}
FSDP = {"fsdp_enable": True}


class DistributedOptions(OptionSection):
    """Several GPUs and machines."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    num_processes: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = option(
        1,
        "Number of training processes over all machines, one on each GPU; auto is one for each GPU "
        "of the machine. Each process computes gradient_accumulation_steps batches of a step, so "
        "more processes train more images per step; results do not depend on how they are shared "
        "out.",
        level="common",
        unit="processes",
        resume_policy="free",
        affects={"plan"},
    )
    num_machines: int = option(
        1,
        "Number of machines; the same command is started on each, with its machine_rank, and "
        "output_dir is on a file system that they share.",
        unit="machines",
        resume_policy="free",
        affects={"plan"},
        ge=1,
        le=4096,
    )
    machine_rank: int = option(
        0,
        "Number of this machine, from 0; the machine with number 0 writes the run folder.",
        resume_policy="free",
        needs=MACHINES,
        ge=0,
        le=4095,
    )
    main_process_ip: str | None = option(
        None,
        "Address of the machine with machine_rank 0, as the other machines reach it.",
        resume_policy="free",
        pattern=r"^[A-Za-z0-9_.:%-]+$",
    )
    main_process_port: int | None = option(
        None,
        "Port of the machine with machine_rank 0 where the processes find each other; null is a "
        "free port on one machine, and 29500 on several.",
        resume_policy="free",
        ge=1,
        le=65535,
    )
    max_restarts: int = option(
        3,
        "How often the processes of one machine are started again from the last checkpoint when "
        "one of them is killed or crashes; with several machines their launcher does that.",
        unit="restarts",
        resume_policy="free",
        needs_any={"num_processes": Not(1)},
        ge=0,
        le=1000,
    )
    ddp_timeout: int = option(
        1800,
        "Seconds that a process waits for another one before the run fails.",
        unit="s",
        resume_policy="free",
        ge=1,
        le=10**6,
    )
    accelerate_visible_devices: str | list[Any] | None = option(
        None,
        "GPUs to train on, as a list of their numbers, such as [0, 1]; the n-th process of the "
        "machine uses the n-th of them. null is all, or those in CUDA_VISIBLE_DEVICES.",
        resume_policy="free",
        needs={"device": ("auto", "cuda")},
        affects={"plan"},
    )
    accelerate_config: str | None = option(
        None,
        "YAML file of accelerate: its numbers of processes and machines, its address, GPUs, "
        "compiler, FSDP and DeepSpeed settings are read; the options themselves replace them.",
        resume_policy="free",
        path="file",
    )
    fsdp_enable: bool = option(
        False,
        "Shard the transformer over all processes (FSDP2), so that each GPU holds a part of it; "
        "slower than a whole copy for each process, which is the default.",
        level="common",
        resume_policy="free",
        affects={"plan"},
    )
    fsdp_version: Literal["2"] = option(
        "2",
        "Version of FSDP.",
        resume_policy="free",
        refused_values={
            "1": "torch has replaced FSDP1, which needs weights of one dtype, by FSDP2"
        },
    )
    fsdp_reshard_after_forward: bool = option(
        True,
        "Free the gathered weights of a block after its forward pass and gather them again for "
        "the backward pass; false needs the memory of the whole model and communicates less.",
        resume_policy="free",
        needs=FSDP,
        affects={"plan"},
    )
    deepspeed_config: str | dict[str, Any] | None = option(
        None,
        "DeepSpeed: its JSON file, or the object itself; trains with its engine (ZeRO 1, 2 or 3).",
        level="common",
        resume_policy="free",
        path="file",
        affects={"plan"},
    )
