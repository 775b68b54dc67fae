"""Advice after a failed training, from the exit code, the signal and the last output lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GPU_MEMORY_ADVICE = (
    "The GPU ran out of memory. Try, in this order: gradient_checkpointing = true; "
    "train_batch_size = 1 with more gradient_accumulation_steps; "
    "base_model_precision = int8, then nf4; musubi_blocks_to_swap = 0.5; "
    "a smaller resolution. The memory plan next to the form shows what fits"
)
HOST_MEMORY_ADVICE = (
    "The computer ran out of memory (RAM). Close other programs; set base_model_precision = int8 "
    "or nf4, which needs less memory while loading; musubi_blocks_to_swap = 0 and "
    "optimizer_cpu_offload_method = none need less RAM; on the CPU, also lower the resolution and "
    "set train_batch_size = 1"
)
CRASH_ADVICE = "A native library crashed. Try dynamo_backend = no, and a newer driver and torch"

# Pattern in one of the last lines -> advice; the first pattern that matches applies.
OUTPUT_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"out of host memory|Cannot allocate memory|bad_alloc|DefaultCPUAllocator"
            r"|\bMemoryError\b|Out of memory: Killed process|oom-kill"
        ),
        HOST_MEMORY_ADVICE,
    ),
    (
        re.compile(r"(?i)\bout of memory\b|OutOfMemoryError|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"),
        GPU_MEMORY_ADVICE,
    ),
    (
        re.compile(r"No space left on device|Disk quota exceeded"),
        "Free some disk space, or lower checkpoints_total_limit",
    ),
)
# Exit codes of errors.py, and the runner's own (127).
EXIT_CODE_ADVICE: Mapping[int, str] = {
    2: "The configuration is invalid: correct the options named in the message and queue it again",
    3: "Check the dataset: the message names the images or captions that cannot be trained on",
    4: "Lower learning_rate to a third, raise lr_warmup_steps, and resume from the last checkpoint",
    5: "Free some disk space, or lower checkpoints_total_limit; then resume",
    6: "The weights could not be downloaded. pretrained_model_name_or_path can be a local folder",
    7: "Wait for the other training that uses this folder, stop it, or choose another output_dir",
    8: "The base model is damaged or another model: check pretrained_model_name_or_path",
    9: "Choose another output_dir to start from scratch, or resume from the checkpoint by its name",
    10: "Delete the cache folder named in the message (cache_dir); it is rebuilt automatically",
    11: "Install the package named in the message, or set report_to = none",
    12: "Check the disk that the message names: permissions, free space, whether it is mounted",
    13: "Resume from the last checkpoint. If it happens again, see train.log and the system's log",
    127: "The training could not be started: check that simpletuner is still installed",
    # Of several processes, one was killed by SIGABRT, SIGBUS, SIGKILL or SIGSEGV.
    **dict.fromkeys((128 + 6, 128 + 7, 128 + 11), CRASH_ADVICE),
    128 + 9: HOST_MEMORY_ADVICE,
}
SIGNAL_ADVICE: Mapping[str, str] = {"SIGKILL": HOST_MEMORY_ADVICE} | dict.fromkeys(
    ("SIGSEGV", "SIGBUS", "SIGABRT"), CRASH_ADVICE
)
KILLED_MESSAGE = (
    "most likely out of memory: the system killed the training (SIGKILL) without a stop request"
)


@dataclass(frozen=True)
class FailureExplanation:
    """message: what went wrong. advice: what to change, "" if unknown."""

    message: str
    advice: str


def explain_failure(
    code: int | None, signal: str | None, lines: Sequence[str], exit_message: str = ""
) -> FailureExplanation:
    """Explain a failure.

    exit_message: the message that the training wrote to its exit.json, or "".
    """
    output = [*lines, *exit_message.splitlines()]
    for pattern, advice in OUTPUT_PATTERNS:
        match = next((line for line in reversed(output) if pattern.search(line)), None)
        if match is not None:
            return FailureExplanation(exit_message or match.strip(), advice)
    if signal is not None:
        reason = KILLED_MESSAGE if signal == "SIGKILL" else f"ended by {signal}"
        return FailureExplanation(exit_message or reason, SIGNAL_ADVICE.get(signal, ""))
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return FailureExplanation(
        exit_message or last or f"ended with exit code {code}", EXIT_CODE_ADVICE.get(code or 0, "")
    )
