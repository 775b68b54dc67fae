"""Ways to train that must not change a bit: three steps of the slice with and without each.

They use torch's deterministic algorithms, because the usual backward pass of attention on a GPU
sums in any order. With these algorithms torch also fills allocated memory with NaN, so that reading
memory before it is written shows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.comparison import Comparison, Tensors
from benchmarks.gpu.cpu_stand_ins import cpu_stand_ins
from benchmarks.gpu.numerics import build_slice, forward_and_backward, make_batch
from benchmarks.gpu.simpletuner_step import StepCase, build_training
from benchmarks.gpu.timing import time_call
from benchmarks.gpu.workload import Workload

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.fingerprints import T5_TENSOR

STEPS = 3
LEARNING_RATE = 1e-2  # large, so that every step changes the next one noticeably
CASE_FIELDS = ("precision", "checkpointing", "swapped", "full_rank")
COMPILED_TOLERANCES = {"output": 5e-2, "gradients": 2e-1}  # as bf16 against float32


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch refuse every operation that has no deterministic algorithm."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@functools.cache
def train_slice(workload: Workload, options: tuple[tuple[str, Any], ...]) -> Tensors:
    """Return the trained parameters and the losses after the steps, on the CPU.

    options: fields of StepCase and options of the run. Checks with equal options share a run.
    """
    fields = {name: value for name, value in options if name in CASE_FIELDS}
    further = {name: value for name, value in options if name not in CASE_FIELDS}
    further |= {"resolution": float(workload.slice_px), "learning_rate": LEARNING_RATE}
    case = StepCase(px=workload.slice_px, **fields, options=further)
    with cpu_stand_ins(workload), deterministic_algorithms():
        run_options = case.run_options(workload, workload.slice)
        training = build_training(run_options, workload.slice, workload, workload.slice_px)
        losses = [training.step() for _ in range(STEPS)]
    tensors = {name: parameter.detach().cpu() for name, parameter in training.trained.items()}
    return {**tensors, "losses": torch.tensor(losses, dtype=torch.float64)}


def compare_runs(workload: Workload, plain: dict[str, Any], other: dict[str, Any]) -> Outcome:
    """Compare a run with the options `other` bit for bit with a run with the options `plain`."""
    comparison = Comparison()
    expected = train_slice(workload, tuple(plain.items()))
    actual = train_slice(workload, tuple(other.items()))
    comparison.expect_finite("losses of the plain run", expected["losses"])
    comparison.expect_bit_equal("after three steps", actual, expected)
    comparison.record(losses=expected["losses"].tolist())
    return comparison.outcome()


def compare_repeated_run(workload: Workload) -> Outcome:
    """Compare the plain run with itself; if it is not repeatable, no other run can be bit-equal."""
    comparison = Comparison()
    first = train_slice(workload, ())
    train_slice.cache_clear()
    comparison.expect_bit_equal("the same run again", train_slice(workload, ()), first)
    return comparison.outcome()


def compare_compiled(workload: Workload) -> Outcome:
    """Compare compiled blocks with eager ones, for several text lengths.

    One set of compiled programs must serve all lengths. first_s is a cold compilation: nothing was
    compiled before, in this process or on disk.
    """
    import torch._dynamo.utils

    comparison = Comparison()
    dtype = torch.bfloat16
    batches = [make_batch(workload, [length]) for length in workload.text_lengths[-3:]]
    eager = build_slice(workload, dtype, workload.device)
    eager_results = [forward_and_backward(eager, batch, workload) for batch in batches]
    network = build_slice(workload, dtype, workload.device)
    ChromaFamily().compile_blocks(network, ModelOptions(dynamo_backend=workload.backend))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    programs = []
    seconds = []
    for batch, expected in zip(batches, eager_results, strict=True):
        actual: dict[str, Tensors] = {}

        def call() -> None:
            actual.update(forward_and_backward(network, batch, workload))  # noqa: B023

        seconds.append(time_call(call, workload.device))
        programs.append(counters["stats"]["unique_graphs"])
        for part, tolerance in COMPILED_TOLERANCES.items():
            label = f"{part}, {batch.text.lengths[T5_TENSOR][0]} rows"
            comparison.expect_close(label, actual[part], expected[part], tolerance)
    comparison.record(first_s=seconds[0], later_s=seconds[1:], programs=programs)
    comparison.expect(programs[0] > 0, "nothing was compiled")
    comparison.expect(
        len(set(programs)) == 1, f"other text lengths were compiled again: {programs} programs"
    )
    return comparison.outcome()
