"""The record as one Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.measurement_record import MEASURED, MeasurementRecord

from simpletuner.training.memory_plan.step_time import estimate_seconds, peak_flops

STEP_COLUMNS = ("case", "px", "peak GB", "reserved GB", "planned GB", "tensors / peak", "s a step", "planned s",
         "TFLOP", "utilisation", "first step s")  # fmt: skip
SPEED_COLUMNS = ("scheme", "bytes a weight", "quantise Gw/s", "restore Gw/s", "compiled Gw/s", "copy of bf16 Gw/s",
          "linear, over bf16's", "compiled is equal")  # fmt: skip
PAIR_COLUMNS = ("px", "blocks", "base", "time, ours / theirs", "peak, ours / theirs")
EMPTY_CELL = "-"


def format_gb(size: float | None) -> str:
    return EMPTY_CELL if size is None else f"{size / 1e9:.2f}"


def table_line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def render_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [table_line(heads), table_line(["---"] * len(heads)), *map(table_line, rows), ""]


def step_flops(row: dict[str, Any]) -> float | None:
    """The plan's for our step, counted for theirs."""
    planned = row.get("plan", {}).get("flops")
    return row["measured"].get("flops", planned)


def step_cells(row: dict[str, Any], peak: float | None) -> list[object]:
    if row["state"] != MEASURED:
        return [row["name"], row["px"], f"**{row['state']}**: {row.get('why', '')}", *[EMPTY_CELL] * 8]
    measured, plan = row["measured"], row.get("plan", {})
    bytes_, flops, taken = measured["peak"], step_flops(row), measured["step_s"]
    allocated = bytes_.get("allocated")
    return [
        row["name"], row["px"], format_gb(allocated), format_gb(bytes_.get("reserved")), format_gb(plan.get("training")),
        f"{plan['tensors'] / allocated:.3f}" if plan and allocated else EMPTY_CELL,
        f"{taken:.3f}",
        f"{estimate_seconds(plan['flops'], peak, plan['moved']):.3f}" if plan and peak else EMPTY_CELL,
        f"{flops / 1e12:.1f}" if flops else EMPTY_CELL,
        f"{flops / taken / peak:.0%}" if flops and peak else EMPTY_CELL,
        f"{measured['first_s']:.1f}",
    ]  # fmt: skip


def speed_cells(row: dict[str, Any]) -> list[object]:
    if row["state"] != MEASURED:
        return [row["precision"], f"**{row['state']}**: {row.get('why', '')}", *[EMPTY_CELL] * 6]
    one = row["measured"]
    rates = [f"{one['weights'] / one[f'{name}_s'] / 1e9:.2f}"
             for name in ("quantise", "restore", "restore_compiled", "copy")]  # fmt: skip
    ratio = one["linear_s"] / one["plain_linear_s"]
    equal = "yes" if one["compiled_is_equal"] else "no"
    return [row["precision"], f"{one['bytes'] / one['weights']:.3f}", *rates, f"{ratio:.2f}x", equal]


def pair_cells(rows: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Ours beside theirs of the same size, blocks run the same way."""
    found: list[list[object]] = []
    theirs = {(row["px"], row["recomputed"], row["compiled"]): row["measured"]
              for row in rows if row["kind"] == "theirs" and row["state"] == MEASURED}  # fmt: skip
    for row in rows:
        other = theirs.get((row["px"], row["recomputed"], row["compiled"]))
        if row["kind"] != "ours" or row["state"] != MEASURED or row["options"] or other is None:
            continue
        one, blocks = row["measured"], "recomputed" if row["recomputed"] else "kept"
        peak = EMPTY_CELL
        if one["peak"] and other["peak"]:
            peak = f"{one['peak']['allocated'] / other['peak']['allocated']:.2f}"
        blocks += ", compiled" * row["compiled"]
        found.append([row["px"], blocks, row["precision"], f"{one['step_s'] / other['step_s']:.2f}", peak])
    return found


def render_page(record: MeasurementRecord, not_reached: Sequence[str]) -> str:
    about = record.environment
    rows = list(record.rows.values())
    peak = peak_flops(about["gpu"])
    lines = [
        f"# One training step on {about['gpu']}", "",
        f"`{about['command']}`, {about['date']}. "
        + ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "cuda", "diffusers", "peft")
                    if about.get(name)), "",
        "Random weights, batch 1, rank-16 LoRA on all linears of the blocks unless the case says full rank."
        " ours: a caption of 128 rows; theirs: the same caption padded to 512 rows, masked, float32 adapters."
        " peak, reserved: the allocator's, of the timed steps. planned: with context and fragmentation"
        " allowance. tensors / peak: what the plan counts exactly, over the measured peak. Utilisation: of"
        f" {peak / 1e12:.0f} dense bf16 TFLOP/s, recomputed products included." if peak else
        "A rehearsal of the suite: the figures mean nothing on this device.", "",
        *render_table(STEP_COLUMNS, [step_cells(row, peak) for row in rows if row["kind"] != "restore"]),
        "## Ours beside theirs", "", *render_table(PAIR_COLUMNS, pair_cells(rows)),
        "## Restoring weights", "", *render_table(SPEED_COLUMNS, [speed_cells(r) for r in rows if r["kind"] == "restore"]),
    ]  # fmt: skip
    if not_reached:
        lines += [f"Not reached in the time: {', '.join(not_reached)}.", ""]
    return "\n".join(lines)
