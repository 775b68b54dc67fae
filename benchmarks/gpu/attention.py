"""Which attention kernel torch chooses for our shapes, and what a new text length costs.

As a program (`python -m benchmarks.gpu.attention toy cpu`) it prints the figures of
`time_text_lengths` as one JSON line, for `measure_text_lengths` in another environment.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.numerics import build_slice, make_batch, run_backward
from benchmarks.gpu.timing import count_kernels, time_call
from benchmarks.gpu.workload import Workload, make_workload
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SIZES_PX = (512, 1024)
STEADY_CALLS = 3
MAX_SETTING_S = 50.0  # after so long the remaining lengths of a setting are not measured
AVOID_RECOMPILE = {"TORCH_CUDNN_SDPA_AVOID_RECOMPILE": "1"}
# Added to the text lengths of each further setting: no matrix product of these shapes ran before in
# the process, and all settings have shapes of the same alignment.
LENGTH_SHIFT = 8


def list_backends(workload: Workload) -> Outcome:
    """List torch's choice for each of our shapes and the kernels of forward and backward.

    In the last block only the rows of the image are queries.
    """
    figures: dict[str, Any] = {}
    text = workload.text_rows
    for px in SIZES_PX:
        image = (workload.scaled_px(px) // 16) ** 2
        for queries, note in ((image + text, ""), (image, ", last block")):
            figures[f"{px} px{note}"] = describe_attention(workload, queries, image + text, False)
        label = f"{px} px, masked"
        figures[label] = describe_attention(workload, image + text, image + text, True)
    return Outcome(figures)


def describe_attention(workload: Workload, queries: int, keys: int, masked: bool) -> dict[str, Any]:
    """Return the backend, the seconds and the kernels of attention over so many rows.

    masked: with a (1, 1, 1, keys) mask, as in compiled blocks.
    """
    config = workload.config

    def normal(rows: int) -> Tensor:
        shape = (1, config.num_attention_heads, rows, config.attention_head_dim)
        tensor = torch.randn(shape, dtype=torch.bfloat16, device=workload.device)
        return tensor.requires_grad_()

    q, k, v = normal(queries), normal(keys), normal(keys)
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=workload.device) if masked else None
    choice = torch._fused_sdp_choice(q, k, v, mask)  # type: ignore[attr-defined]

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

    call()
    seconds = time_call(call, workload.device)
    kernels = count_kernels(call, workload.device, seconds)["top_kernels"]
    return {"backend": backend_name(choice), "seconds": seconds, "kernels": list(kernels)}


def backend_name(number: int) -> str:
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    return names.get(int(number), str(number))


def measure_text_lengths(workload: Workload, setting: str) -> Outcome:
    """Time a step of the slice for each text length, at its first call and later.

    setting: "default"; "flash" allows that backend only; "no_recompile" is the default in a process
    whose environment keeps cuDNN from building a plan for each shape.
    """
    if setting == "no_recompile":
        return Outcome(time_in_child_process(workload))
    flash = setting == "flash"
    with flash_backend_only(flash):
        return Outcome(time_text_lengths(workload, LENGTH_SHIFT if flash else 0))


@contextmanager
def flash_backend_only(wanted: bool) -> Iterator[None]:
    if wanted:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    else:
        yield


def time_text_lengths(workload: Workload, shift: int) -> dict[str, Any]:
    """Return seconds of the first and of later calls by text length.

    new_length_s, worst_s: median and maximum of their difference, the cost of a new length.
    """
    network = build_slice(workload, torch.bfloat16, workload.device)
    # Loads libraries and creates handles.
    run_backward(network, make_batch(workload, [workload.text_rows]), workload)
    started = time.monotonic()
    first_s: dict[int, float] = {}
    steady_s: dict[int, float] = {}
    for length in (length + shift for length in workload.text_lengths):
        if time.monotonic() - started > MAX_SETTING_S:
            break
        batch = make_batch(workload, [length])

        def call() -> None:
            run_backward(network, batch, workload)  # noqa: B023

        first_s[length] = time_call(call, workload.device)
        later = [time_call(call, workload.device) for _ in range(STEADY_CALLS)]
        steady_s[length] = statistics.median(later)
    costs = [first_s[length] - steady_s[length] for length in first_s]
    return {
        "new_length_s": statistics.median(costs),
        "worst_s": max(costs),
        "lengths": len(costs),
        "first_s": first_s,
        "steady_s": steady_s,
    }


def time_in_child_process(workload: Workload) -> dict[str, Any]:
    """Run `time_text_lengths` in a process that starts with the environment variable."""
    size = "toy" if workload.toy else "full"
    command = [sys.executable, "-m", "benchmarks.gpu.attention", size, workload.device.type]
    environment = {**os.environ, **AVOID_RECOMPILE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the child process ended with {done.returncode}:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main(size: str, device: str) -> None:
    workload = make_workload(size == "toy", device)
    if workload.toy:
        torch.set_num_threads(1)
    print(json.dumps(time_text_lengths(workload, 2 * LENGTH_SHIFT)))


if __name__ == "__main__":
    main(*sys.argv[1:])
