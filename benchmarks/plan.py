"""The quickstart's memory table beside what is planned for the same training, at full size, without
weights.

    python benchmarks/plan.py

Writes benchmarks/results/plan.json and plan.md. Each row is a whole training step on tensors
without contents: rank-16 LoRA on all linears of the blocks (`all`: on the attention's, as is the
default), batch 1, 512 text tokens, allowances (context, fragmentation) included. About a quarter of
a CPU minute a row; what was planned before is in the cache.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from simpletuner.config.load import config_from_resolved
from simpletuner.models import registry
from simpletuner.training.memory_plan.prediction import MemoryPrediction, predict_memory

RESULTS = Path(__file__).parent / "results"
LORA = {"flux_lora_target": "all+ffs", "lora_rank": 16}
ATTENTION = {"flux_lora_target": "all", "lora_rank": 16}
KEPT = {"gradient_checkpointing": False}
AWAY = {"chroma_approximator_device": "cpu"}
SMALL = {**AWAY, "optimizer": "adamw_8bit"}
HOST = {**AWAY, "gradient_checkpointing_backend": "offload"}
SWAP = {**HOST, "musubi_blocks_to_swap": 57}
FULL = {"model_type": "full", "optimizer": "adamw_bf16", "optimizer_release_gradients": True,
        "grad_clip_method": "value"}  # fmt: skip
QUICKSTART = {"no_change": 28, "int8": 16, "int4": 11, "nf4": 8}  # GB of VRAM
# GB of tensors to reach with every linear adapted and the approximator off the GPU, by precision
# and px.
TENSORS = {("no_change", 1024): 20.1, ("int8", 1024): 11.5, ("int4", 1024): 7.8, ("nf4", 1024): 7.5,
           ("nf4", 512): 6.0}  # fmt: skip
SWAPPED = 4.0
# Name, GB to stay under (None: beside it for comparison), size in px, options.
ROWS: list[tuple[str, float | None, int, dict[str, Any]]] = [
    *((f"{name}, all kept", 28 if name == "no_change" else None, 512,
       {**LORA, **KEPT, "base_model_precision": name}) for name in QUICKSTART),
    ("no_change, all kept", 80, 1024, {**LORA, **KEPT}),
    *((f"{name}, recomputed", gb, 1024, {**LORA, "base_model_precision": name})
      for name, gb in QUICKSTART.items()),
    *((f"{name}, recomputed, approximator on the host", gb, 1024,
       {**LORA, **AWAY, "base_model_precision": name}) for name, gb in QUICKSTART.items()),
    *((f"{name}, recomputed, approximator on the host, adamw_8bit", gb, 1024,
       {**LORA, **SMALL, "base_model_precision": name}) for name, gb in QUICKSTART.items()),
    *((f"{name}, `all`, recomputed, approximator on the host", gb, 1024,
       {**ATTENTION, **AWAY, "base_model_precision": name}) for name, gb in QUICKSTART.items()),
    ("nf4, `all`, recomputed", 8, 1024, {**ATTENTION, "base_model_precision": "nf4"}),
    *((f"{name}, recomputed, approximator and inputs on the host", gb, 1024,
       {**LORA, **HOST, "base_model_precision": name}) for name, gb in QUICKSTART.items()),
    ("nf4, recomputed", 8, 512, {**LORA, "base_model_precision": "nf4"}),
    ("nf4, recomputed, approximator on the host, adamw_8bit", 8, 512,
     {**LORA, **SMALL, "base_model_precision": "nf4"}),
    ("nf4, all blocks swapped", 4, 512, {**LORA, **SWAP, "base_model_precision": "nf4"}),
    ("full rank, adamw_bf16", 48, 1024, FULL),
    ("full rank, adamw_8bit", 48, 1024, {**FULL, "optimizer": "adamw_8bit"}),
    ("full rank, adamw_bf16, states on the host", 24, 1024,
     {**FULL, "optimizer_cpu_offload_method": "states"}),
]  # fmt: skip


def row(name: str, stated: float | None, px: int, options: dict[str, Any]) -> dict[str, Any]:
    started = time.process_time()
    run = config_from_resolved({**options, "resolution": float(px)})
    plan = predict_memory(run, registry.get_family("chroma"), kind="cuda")
    cpu_s = round(time.process_time() - started, 1)
    meant = options.get("flux_lora_target") == "all+ffs" and plan.memory.approximator_on_host
    wanted = TENSORS.get((run.model.base_model_precision, px)) if meant else None
    reached = SWAPPED if wanted and plan.memory.swapped else wanted
    told = {"what": name, "px": px, "to_beat_gb": stated, "planned_gb": gb(plan.training),
            "to_reach_gb": reached, "cpu_s": cpu_s}  # fmt: skip
    print(json.dumps(told), flush=True)
    return {**told, "options": options, **split(plan)}


def split(plan: MemoryPrediction) -> dict[str, Any]:
    parts = {name: gb(size) for name, size in {**plan.parts, **plan.allowances}.items()}
    return {
        "tensors_gb": gb(plan.tensor_bytes),
        "parts_gb": parts,
        "tflop": round(plan.flops / 1e12, 1),
    }


def gb(size: float) -> float:
    return round(size / 1e9, 2)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| training | px | to beat (GB) | planned (GB) | to reach (GB) | tensors alone (GB) | TFLOP a step |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['what']} | {one['px']} | {one['to_beat_gb'] or '-'} | {one['planned_gb']}"
        f" | {one['to_reach_gb'] or '-'} | {one['tensors_gb']} | {one['tflop']} |"
        for one in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [row(*one) for one in ROWS]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "plan.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
