"""Memory, operations and bytes of a step on 1, 2, 4 and 8 GPUs in each mode, on paper.

    python benchmarks/scaling.py

Writes benchmarks/results/scaling.json and scaling.md. The model has its full size and no weights; the
step of one process is counted on tensors without contents, and the rest follows from its bytes
(training/memory_plan/world_layout.py and communication.py). 1024 px, batch 1, one micro-batch for
each process, 512 text tokens, every block checkpointed, rank-16 LoRA on all linears of the blocks.
Allowances (context, fragmentation) are included. Nothing here was measured on GPUs;
tests/distributed/test_communication.py compares operations and bytes with those of real processes.
About a quarter of a CPU minute for each training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simpletuner.config.load import config_from_resolved
from simpletuner.models import registry
from simpletuner.training.memory_plan.communication import sent_bytes
from simpletuner.training.memory_plan.prediction import predict_memory

RESULTS = Path(__file__).parent / "results"
GPUS = (1, 2, 4, 8)
LORA = {"flux_lora_target": "all+ffs", "lora_rank": 16}
FULL = {"model_type": "full"}
SHARDED = {"fsdp_enable": True}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed_config": {"zero_optimization": {"stage": stage}}}


ROWS: list[tuple[str, dict[str, Any]]] = [
    *(
        (f"LoRA, {name}", {**LORA, "base_model_precision": precision, **mode})
        for name, precision in (("bf16", "no_change"), ("int8", "int8"), ("nf4", "nf4"))
        for mode in ({}, SHARDED)
    ),
    *(("LoRA, bf16", {**LORA, **zero(stage)}) for stage in (1, 2, 3)),
    *(
        ("full rank, adamw_bf16", {**FULL, "optimizer": "adamw_bf16", **mode})
        for mode in ({}, SHARDED)
    ),
    *(
        ("full rank, adamw", {**FULL, "optimizer": "adamw", **mode})
        for mode in (SHARDED, zero(1), zero(2), zero(3))
    ),
]


def row(what: str, options: dict[str, Any], gpus: int) -> dict[str, Any]:
    run = config_from_resolved({**options, "resolution": 1024.0, "num_processes": gpus})
    plan = predict_memory(run, registry.get_family("chroma"), kind="cuda")
    found = {
        "training": what,
        "mode": plan.world.mode,
        "gpus": gpus,
        "memory_gb": gb(plan.training),
        "base_gb": gb(plan.base_bytes),
        "host_gb": gb(sum(plan.host.values())),
        "operations": {
            use.operation: {"calls": use.calls, "message_gb": gb(use.message_bytes)}
            for use in plan.communication
        },
        "sent_gb": gb(sent_bytes(plan.communication)),
    }
    print(json.dumps(found), flush=True)
    return found


def gb(size: float) -> float:
    return round(size / 1e9, 2)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| training | mode | GPUs | memory of each (GB) | base held by each (GB) "
        "| calls in a step: bytes of their messages (GB) | sent by each (GB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        # An engine decides by itself how often it gathers: no count.
        operations = ", ".join(
            f"{use['calls'] or ''} {name}: {use['message_gb']}".strip()
            for name, use in found["operations"].items()
        )
        lines.append(
            f"| {found['training']} | {found['mode']} | {found['gpus']} | {found['memory_gb']}"
            f" | {found['base_gb']} | {operations or '-'} | {found['sent_gb']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    # The mode of one GPU is the same for all of a training, so it is shown once.
    seen: set[str] = set()
    rows = []
    for what, options in ROWS:
        for gpus in GPUS:
            if gpus > 1 or what not in seen:
                rows.append(row(what, options, gpus))
        seen.add(what)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "scaling.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
