"""What to change after a failure: from the exit code, the signal and the last lines to one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GPU_MEMORY_ADVICE = (
    "The GPU's memory was too small. In this order: gradient_checkpointing = true; train_batch_size = 1 with "
    "more gradient_accumulation_steps; base_model_precision = int8, then nf4; musubi_blocks_to_swap = 0.5; "
    "a smaller resolution. The memory plan beside the form says what fits"
)
HOST_MEMORY_ADVICE = (
    "The computer's own memory was too small. Close other programs; base_model_precision = int8 or nf4 loads "
    "less at once; musubi_blocks_to_swap = 0 and optimizer_cpu_offload_method = none keep less in host "
    "memory; on the CPU also a smaller resolution and train_batch_size = 1"
)
CRASH_ADVICE = "A native library crashed. Try dynamo_backend = no, and a newer driver and torch"

# what one of the last lines holds -> what to do; the first that is found counts
OUTPUT_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"out of host memory|Cannot allocate memory|bad_alloc|DefaultCPUAllocator|\bMemoryError\b"
            r"|Out of memory: Killed process|oom-kill"
        ),
        HOST_MEMORY_ADVICE,
    ),
    (
        re.compile(r"(?i)\bout of memory\b|OutOfMemoryError|CUDNN_STATUS_ALLOC_FAILED"),
        GPU_MEMORY_ADVICE,
    ),
    (
        re.compile(r"No space left on device|Disk quota exceeded"),
        "Make room on the disk, or lower checkpoints_total_limit",
    ),
)
# exit codes of errors.py, and the runner's own
EXIT_CODE_ADVICE: Mapping[int, str] = {
    2: "The configuration does not hold: mend what the message names in a draft, and queue it again",
    3: "Look at the dataset: the message names the pictures or captions that cannot be trained on",
    4: "Lower learning_rate to a third, raise lr_warmup_steps, and resume from the last checkpoint",
    5: "Make room on the disk, or lower checkpoints_total_limit; then resume",
    6: "The weights could not be fetched. pretrained_model_name_or_path may name a folder of this computer",
    7: "Wait for the other training in this folder, stop it, or choose another output_dir",
    8: "The base's files are damaged, or of another model: see pretrained_model_name_or_path",
    9: "Another output_dir begins anew; or resume from the checkpoint by its name",
    10: "Remove the cache folder that the message names (cache_dir); it is made again",
    11: "Install what the message names beside the server, or do without: report_to = none",
    127: "The training could not be started: is the program still installed where the server found it?",
}
SIGNAL_ADVICE: Mapping[str, str] = {"SIGKILL": HOST_MEMORY_ADVICE} | dict.fromkeys(
    ("SIGSEGV", "SIGBUS", "SIGABRT"), CRASH_ADVICE
)
KILLED_MESSAGE = "out of memory, most likely: the system ended the training (SIGKILL, and nobody here asked for it)"


@dataclass(frozen=True)
class FailureExplanation:
    """message: what went wrong. advice: what to change, "" where nothing is known."""

    message: str
    advice: str


def explain_failure(
    code: int | None, signal: str | None, lines: Sequence[str], told: str = ""
) -> FailureExplanation:
    """Of a failure that nobody asked for. told: what the training itself said of its end."""
    for pattern, what in OUTPUT_PATTERNS:
        found = next(
            (line for line in reversed([*lines, *told.splitlines()]) if pattern.search(line)), None
        )
        if found is not None:
            return FailureExplanation(told or found.strip(), what)
    if signal is not None:
        known = KILLED_MESSAGE if signal == "SIGKILL" else f"ended by {signal}"
        return FailureExplanation(told or known, SIGNAL_ADVICE.get(signal, ""))
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return FailureExplanation(
        told or last or f"ended with exit code {code}", EXIT_CODE_ADVICE.get(code or 0, "")
    )
