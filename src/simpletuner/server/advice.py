"""What to change after a failure: from the exit code, the signal and the last lines to one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GPU_MEMORY = (
    "The GPU's memory was too small. In this order: gradient_checkpointing = true; train_batch_size = 1 with "
    "more gradient_accumulation_steps; base_model_precision = int8, then nf4; musubi_blocks_to_swap = 0.5; "
    "a smaller resolution. The memory plan beside the form says what fits"
)
HOST_MEMORY = (
    "The computer's own memory was too small. Close other programs; base_model_precision = int8 or nf4 loads "
    "less at once; musubi_blocks_to_swap = 0 and optimizer_cpu_offload_method = none keep less in host "
    "memory; on the CPU also a smaller resolution and train_batch_size = 1"
)
CRASHED = "A native library crashed. Try dynamo_backend = no, and a newer driver and torch"

# what one of the last lines holds -> what to do; the first that is found counts
PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"out of host memory|Cannot allocate memory|bad_alloc|DefaultCPUAllocator|\bMemoryError\b"
            r"|Out of memory: Killed process|oom-kill"
        ),
        HOST_MEMORY,
    ),
    (re.compile(r"(?i)\bout of memory\b|OutOfMemoryError|CUDNN_STATUS_ALLOC_FAILED"), GPU_MEMORY),
    (
        re.compile(r"No space left on device|Disk quota exceeded"),
        "Make room on the disk, or lower checkpoints_total_limit",
    ),
)
# exit codes of errors.py, and the runner's own
CODES: Mapping[int, str] = {
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
SIGNALS: Mapping[str, str] = {"SIGKILL": HOST_MEMORY} | dict.fromkeys(
    ("SIGSEGV", "SIGBUS", "SIGABRT"), CRASHED
)
KILLED = "out of memory, most likely: the system ended the training (SIGKILL, and nobody here asked for it)"


@dataclass(frozen=True)
class Reason:
    """message: what went wrong. advice: what to change, "" where nothing is known."""

    message: str
    advice: str


def reason(code: int | None, signal: str | None, lines: Sequence[str], told: str = "") -> Reason:
    """Of a failure that nobody asked for. told: what the training itself said of its end."""
    for pattern, what in PATTERNS:
        found = next((line for line in reversed([*lines, *told.splitlines()]) if pattern.search(line)), None)
        if found is not None:
            return Reason(told or found.strip(), what)
    if signal is not None:
        known = KILLED if signal == "SIGKILL" else f"ended by {signal}"
        return Reason(told or known, SIGNALS.get(signal, ""))
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Reason(told or last or f"ended with exit code {code}", CODES.get(code or 0, ""))
