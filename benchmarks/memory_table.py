"""The memory that a training needs on a GPU, by the options of the quickstart, without weights.

    python benchmarks/memory_table.py

Writes benchmarks/results/memory_table.json and the table of docs/memory.md, between its marks. Each
row is what `simpletuner plan --device cuda` says: Chroma 1, rank 16, batch 1, 512 text tokens,
gradient_checkpointing true as in the quickstart's config, and the other options at their defaults
but for those of the row. A quarter of a CPU minute a row; what was planned before is in the cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from simpletuner.config.load import config_from_resolved
from simpletuner.models import registry
from simpletuner.training.memory_plan.prediction import MemoryPrediction, predict_memory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory_table.json"
PAGE = ROOT / "docs" / "memory.md"
MARKS = ("<!-- table: benchmarks/memory_table.py -->\n", "<!-- end of the table -->\n")
QUICKSTART: dict[str, Any] = {"gradient_checkpointing": True, "lora_rank": 16}
FULL = {
    "gradient_checkpointing": True, "model_type": "full", "optimizer": "adamw_8bit",
    "optimizer_release_gradients": True, "grad_clip_method": "value",
}  # fmt: skip
# Name, size in px, the quickstart's GB, the most GB that are allowed, options.
ROWS: list[tuple[str, int, int | None, float, dict[str, Any]]] = [
    ("bf16", 1024, 28, 20.6, QUICKSTART),
    ("`base_model_precision int8`", 1024, 16, 12.0, {**QUICKSTART, "base_model_precision": "int8"}),
    ("`base_model_precision int4`", 1024, 11, 8.3, {**QUICKSTART, "base_model_precision": "int4"}),
    ("`base_model_precision nf4`", 1024, 8, 8.0, {**QUICKSTART, "base_model_precision": "nf4"}),
    ("`base_model_precision nf4`", 512, 8, 6.5, {**QUICKSTART, "base_model_precision": "nf4"}),
    ("NF4, all blocks swapped (`musubi_blocks_to_swap 57`)", 512, None, 2.2,
     {**QUICKSTART, "base_model_precision": "nf4", "musubi_blocks_to_swap": 57}),
    *(
        (f"`{name}`, inputs of the blocks in host memory", 1024, None, limit,
         {**QUICKSTART, "base_model_precision": name, "gradient_checkpointing_backend": "offload"})
        for name, limit in (("no_change", 20.6), ("int8", 12.0), ("nf4", 8.0))
    ),
    ("full rank, `adamw_8bit` with `optimizer_release_gradients`", 1024, None, 38.0, FULL),
]  # fmt: skip


def gb(size: float) -> float:
    return round(size / 1e9, 2)


def plan_row(
    name: str, px: int, quickstart: int | None, limit: float, options: dict[str, Any]
) -> dict[str, Any]:
    """Plan one row, and print it."""
    run = config_from_resolved({**options, "resolution": float(px)})
    plan: MemoryPrediction = predict_memory(run, registry.get_family("chroma"), kind="cuda")
    row = {
        "training": name, "px": px, "quickstart_gb": quickstart, "limit_gb": limit,
        "peak_gb": gb(plan.peak), "step_gb": gb(plan.training),
        "parts_gb": {part: gb(size) for part, size in {**plan.parts, **plan.allowances}.items()},
        "before_gb": {use: gb(size) for use, size in plan.before.items()},
        "validation_gb": {use: gb(size) for use, size in plan.validation.items()},
        "tflop": round(plan.flops / 1e12, 1), "options": options,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the page."""
    lines = [
        "| training | px | quickstart | largest phase | a step | text encoder | VAE encoding |"
        " VAE decoding with it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = f"{row['quickstart_gb']} GB" if row["quickstart_gb"] else ""
        before, validation = row["before_gb"], row["validation_gb"]
        sizes = (
            row["peak_gb"],
            row["step_gb"],
            before["text encoder"],
            before["VAE"],
            validation["VAE decoding"],
        )
        cells = " | ".join(f"{size:.1f} GB" for size in sizes)
        lines.append(f"| {row['training']} | {row['px']} | {told} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [plan_row(*row) for row in ROWS]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
    PAGE.write_text(page[:start] + markdown(rows) + page[end:], encoding="utf-8")
    over = [row["training"] for row in rows if row["peak_gb"] > row["limit_gb"]]
    sys.exit(f"above the limit: {', '.join(over)}" if over else 0)


if __name__ == "__main__":
    main()
