"""The results file as Markdown: failures first, then correctness, text lengths, steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.check_catalog import plan_name
from benchmarks.gpu.checks import Check
from benchmarks.gpu.results_file import CheckResult

from simpletuner.training.memory_plan.step_time import estimate_seconds, peak_flops

Results = Mapping[str, CheckResult]
Row = Sequence[object]

DASH = "-"
STEP_COLUMNS = (
    "step",
    "s",
    "first s",
    "peak GB",
    "reserved GB",
    "plan GB",
    "tensors / peak",
    "plan s",
    "TFLOP",
    "of peak",
    "of a product",
    "kernels",
    "idle",
)
DEQUANTISE_COLUMNS = (
    "scheme",
    "bytes per weight",
    "quantise Gw/s",
    "dequantise Gw/s",
    "compiled Gw/s",
    "copy of bf16 Gw/s",
    "linear / bf16 linear",
)
STEPS_NOTE = (
    "Random weights, batch 1 and rank 16 on all linears of the blocks unless the name says"
    " otherwise. peak, reserved: of the allocator in the timed steps; plan: with the context and an"
    " allowance; tensors / peak: the bytes that the plan counts exactly over the measured peak. of"
    " peak: of the dense bf16 rate of the data sheet; of a product: of the rate that a matrix"
    " product reached in the same run."
)
# Our step, the step of diffusers and PEFT.
PAIRS = (
    ("bf16 512 px not checkpointed", "diffusers 512 px not checkpointed padded"),
    ("bf16 512 px not checkpointed", "diffusers 512 px not checkpointed trimmed"),
    ("bf16 1024 px checkpointed", "diffusers 1024 px checkpointed padded"),
    ("bf16 1024 px checkpointed", "diffusers 1024 px checkpointed trimmed"),
    ("bf16 1024 px not checkpointed", "diffusers 1024 px not checkpointed padded"),
    ("bf16 1024 px not checkpointed", "diffusers 1024 px not checkpointed trimmed"),
    ("bf16 1024 px checkpointed compiled", "diffusers 1024 px checkpointed trimmed compiled"),
)


def results_page(results: Results, checks: Sequence[Check]) -> str:
    """Return the page. checks: those that could have run, to list those that did not."""
    sections = [
        heading(results),
        failed_checks(results),
        correctness(results),
        text_lengths(results),
        attention(results),
        steps(results),
        comparison_with_diffusers(results),
        dequantisation(results),
        operations(results),
        checks_not_run(results, checks),
    ]
    return "\n".join(line for section in sections for line in section)


def section(title: str, columns: Sequence[str], rows: Sequence[Row], note: str = "") -> list[str]:
    """Return the lines of a table with its title, or none without rows."""
    if not rows:
        return []
    cells = [columns, ["---"] * len(columns), *rows]
    lines = [f"| {' | '.join(map(str, row))} |" for row in cells]
    return [f"## {title}", "", *([note, ""] if note else []), *lines, ""]


def completed(results: Results, group: str) -> list[CheckResult]:
    return [
        result for result in results.values() if result.group == group and result.ok is not None
    ]


def figures_of(results: Results, name: str) -> dict[str, Any]:
    """Return the figures of a check; none when it has no result."""
    return results[name].figures if name in results else {}


def gigabytes(size: float | None) -> str:
    return DASH if size is None else f"{size / 1e9:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def heading(results: Results) -> list[str]:
    versions = figures_of(results, "versions")
    if not versions:
        return ["# First run on a GPU", ""]
    libraries = [f"{name} {number}" for name, number in versions["libraries"].items() if number]
    text = f"{versions['date']}, Python {versions['python']}, {', '.join(libraries)}."
    if "cuda" in versions:
        text += f" CUDA {versions['cuda']}, cuDNN {versions['cudnn']}."
    else:
        text += " A rehearsal: the figures mean nothing on this device."
    rates = figures_of(results, "rates")
    if rates:
        text += (
            f" bf16 products reach {rates['square_flops'] / 1e12:.0f} TFLOP/s at"
            f" {rates['square_shape']} and {rates['step_flops'] / 1e12:.0f} at"
            f" {rates['step_shape']}; copies {rates['copy_bytes_s'] / 1e12:.2f} TB/s on the device,"
            f" {rates['to_device_bytes_s'] / 1e9:.0f} GB/s to it,"
            f" {rates['to_host_bytes_s'] / 1e9:.0f} GB/s from it."
        )
    return [f"# First run on {versions['gpu']}", "", text, ""]


def failed_checks(results: Results) -> list[str]:
    failed = [result for result in results.values() if result.ok is False]
    if not failed:
        return ["No check failed.", ""]
    return ["## Failed", "", *(f"- **{one.name}**: {one.reason}" for one in failed), ""]


def correctness(results: Results) -> list[str]:
    """List for each check how many comparisons were exact and which is nearest its tolerance."""
    rows = []
    for result in completed(results, "correctness"):
        compared = {
            label: figure
            for label, figure in result.figures.items()
            if isinstance(figure, dict) and "error" in figure
        }
        exact = sum(figure["error"] == 0 for figure in compared.values())
        used = {
            label: figure["error"] / figure["tolerance"]
            for label, figure in compared.items()
            if "tolerance" in figure
        }
        nearest = DASH
        if used:
            label = max(used, key=lambda name: used[name])
            error, tolerance = compared[label]["error"], compared[label]["tolerance"]
            nearest = f"{label}: {error:.1e} of {tolerance:.0e}"
        seconds = f"{result.seconds:.1f}"
        rows.append([result.name, result.status, len(compared), exact, nearest, seconds])
    columns = ("check", "result", "comparisons", "exact", "nearest its tolerance", "s")
    return section("Correctness", columns, rows)


def text_lengths(results: Results) -> list[str]:
    rows = []
    for result in completed(results, "text lengths"):
        if result.ok:
            figures = result.figures
            steady = list(figures["steady_s"].values())
            seconds = (figures["new_length_s"], figures["worst_s"], sum(steady) / len(steady))
            rows.append([result.name, figures["lengths"], *map(milliseconds, seconds)])
    columns = ("setting", "lengths", "cost of a new length, median ms", "worst ms", "steady ms")
    title = "New text lengths (2 + 2 blocks, forward and backward)"
    return section(title, columns, rows)


def attention(results: Results) -> list[str]:
    rows = []
    for shape, figure in figures_of(results, "attention backend").items():
        kernels = "; ".join(name[:40] for name in figure["kernels"][:3])
        rows.append([shape, figure["backend"], milliseconds(figure["seconds"]), kernels])
    return section("Attention", ("shape", "backend", "ms", "longest kernels"), rows)


def is_step(result: CheckResult) -> bool:
    return "first_peak" in result.figures or (result.ok is False and " px " in result.name)


def steps(results: Results) -> list[str]:
    rows = [
        step_row(result, results)
        for result in results.values()
        if result.ok is not None and is_step(result)
    ]
    return section("Steps at full size", STEP_COLUMNS, rows, STEPS_NOTE)


def step_row(result: CheckResult, results: Results) -> Row:
    figures = result.figures
    if "step_s" not in figures:
        return [result.name, f"**{result.status}**", *[DASH] * (len(STEP_COLUMNS) - 2)]
    plan = figures_of(results, plan_name(result.name))
    gpu_flops = peak_flops(figures_of(results, "versions").get("gpu", ""))
    product_flops = figures_of(results, "rates").get("step_flops")
    flops = figures.get("flops", plan.get("flops"))
    allocated = figures["peak"].get("allocated")

    def utilisation(rate: float | None) -> str:
        return f"{flops / figures['step_s'] / rate:.0%}" if flops and rate else DASH

    planned_s = DASH
    if plan and gpu_flops:
        planned_s = f"{estimate_seconds(plan['flops'], gpu_flops, plan['moved']):.3f}"
    return [
        result.name,
        f"{figures['step_s']:.3f}",
        f"{figures['first_s']:.1f}",
        gigabytes(allocated),
        gigabytes(figures["peak"].get("reserved")),
        gigabytes(plan.get("training")),
        f"{plan['tensors'] / allocated:.3f}" if plan and allocated else DASH,
        planned_s,
        f"{flops / 1e12:.1f}" if flops else DASH,
        utilisation(gpu_flops),
        utilisation(product_flops),
        figures["kernels"],
        f"{figures['idle_share']:.0%}",
    ]


def comparison_with_diffusers(results: Results) -> list[str]:
    rows = []
    for our_name, their_name in PAIRS:
        ours, theirs = figures_of(results, our_name), figures_of(results, their_name)
        if "step_s" not in ours or "step_s" not in theirs:
            continue
        memory = DASH
        if ours["peak"] and theirs["peak"]:
            memory = f"{ours['peak']['allocated'] / theirs['peak']['allocated']:.2f}"
        rows.append([our_name, their_name, f"{ours['step_s'] / theirs['step_s']:.2f}", memory])
    columns = ("ours", "diffusers and PEFT", "time, ours / theirs", "peak, ours / theirs")
    return section("Ours and diffusers with PEFT", columns, rows)


def dequantisation(results: Results) -> list[str]:
    rows = []
    for result in completed(results, "micro"):
        figures = result.figures
        if "dequantise_s" in figures:
            names = ("quantise", "dequantise", "dequantise_compiled", "copy")
            rates = [figures["weights"] / figures[f"{name}_s"] / 1e9 for name in names]
            size = f"{figures['bytes'] / figures['weights']:.3f}"
            ratio = f"{figures['linear_s'] / figures['plain_linear_s']:.2f}"
            rows.append([result.name, size, *(f"{rate:.2f}" for rate in rates), ratio])
    return section("Dequantising weights", DEQUANTISE_COLUMNS, rows)


def operations(results: Results) -> list[str]:
    """List 8-bit products, optimizer steps, sampler and VAE."""
    lines = [*product_lines(results), *optimizer_lines(results), *image_lines(results)]
    return ["## Operations", "", *lines, ""] if lines else []


def product_lines(results: Results) -> list[str]:
    figures = figures_of(results, "scaled product")
    if not figures:
        return []
    rates = [
        f"{name.removesuffix('_flops')} {rate / 1e12:.0f}"
        for name, rate in figures.items()
        if name.endswith("_flops")
    ]
    error = figures["error"]
    return [f"- products, TFLOP/s: {', '.join(rates)}; relative error of fp8 {error:.1%}"]


def optimizer_lines(results: Results) -> list[str]:
    return [
        f"- {result.name}, {figures['tensors']} tensors: {milliseconds(figures['step_s'])} ms,"
        f" {figures['step_kernels']} kernels; clipping {milliseconds(figures['clip_s'])} ms,"
        f" {figures['clip_kernels']} kernels"
        for result in completed(results, "micro")
        if "clip_s" in (figures := result.figures)
    ]


def image_lines(results: Results) -> list[str]:
    sampler = figures_of(results, "sampler, 1024 px")
    lines = []
    if sampler:
        lines.append(f"- sampler, 1024 px with guidance: {sampler['step_s']:.3f} s per step")
    vae = figures_of(results, "VAE, 1024 px")
    for name, figure in vae.items():
        if isinstance(figure, dict):
            peak = figure["peak"].get("allocated")
            beyond = None if peak is None else peak - vae["weights"]
            size = gigabytes(beyond)
            lines.append(f"- VAE {name}: {figure['seconds']:.3f} s, {size} GB beyond the weights")
    return lines


def checks_not_run(results: Results, checks: Sequence[Check]) -> list[str]:
    names = []
    for check in checks:
        result = results.get(check.name)
        if result is None:
            names.append(check.name)
        elif result.ok is None:
            names.append(f"{check.name} ({result.reason})")
    return [f"Not run: {'; '.join(names)}.", ""] if names else []
