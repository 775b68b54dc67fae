"""Compare trainings on several processes with the same training on one, on the bundled model.

    python benchmarks/distributed.py --out benchmarks/results/distributed.md

Each row is one training of a few steps, started by `simpletuner train` as a user does, on the CPU
with gloo. The differences are those between its last checkpoint and losses and the ones of the
training on one process with the same number of micro-batches per step, without DeepSpeed unless the
row says otherwise. Times on a CPU whose cores the processes share say what a
case costs to test, and nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

STEPS = 3
COMMON = {
    "example": "chroma-nano.peft-lora",
    "max_train_steps": STEPS,
    "checkpoint_step_interval": STEPS,
    "train_batch_size": 2,
    "validation_disable": True,
    "evaluation_type": "none",
    "device": "cpu",
    "torch_num_threads": 1,
}
FSDP = {"fsdp_enable": True}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed_config": json.dumps({"zero_optimization": {"stage": stage}})}


FULL = {"model_type": "full", "optimizer": "adamw", "learning_rate": 1e-4, "use_ema": False}
FULL_FLOAT32 = {**FULL, "mixed_precision": "no"}
FULL_STOCHASTIC = {**FULL, "optimizer": "adamw_bf16"}


@dataclass(frozen=True)
class Case:
    """micro_batches: of a step, over all processes. own_reference: compare it within its mode."""

    title: str
    processes: int
    micro_batches: int
    options: Mapping[str, Any]
    mode: Mapping[str, Any]
    own_reference: bool = False

    @property
    def reference(self) -> str:
        """The training on one process that this one is compared with."""
        mode = self.mode if self.own_reference else {}
        return json.dumps([self.options, mode, self.micro_batches], sort_keys=True)


def cases() -> Iterator[Case]:
    """Yield the rows of the table, the one on one process first for each training."""
    for precision in ("no_change", "int8", "nf4"):
        lora = {"base_model_precision": precision}
        for micro_batches in (2, 3, 4):
            for processes in range(1, micro_batches + 1):
                if micro_batches % processes == 0:
                    yield Case(f"LoRA on {precision}", processes, micro_batches, lora, {})
        yield Case(f"LoRA on {precision}, FSDP2", 2, 2, lora, FSDP)
    lora = {"base_model_precision": "no_change"}
    for stage in (1, 2, 3):
        yield Case(f"LoRA, ZeRO-{stage}", 2, 2, lora, zero(stage))
    for title, full in (
        ("full rank, float32", FULL_FLOAT32),
        ("full rank, bf16 with adamw", FULL),
        ("full rank, adamw_bf16", FULL_STOCHASTIC),
    ):
        # bf16 sums of more than two gradients depend on their order.
        for micro_batches in (2, 4) if full is FULL else (2,):
            yield Case(title, 1, micro_batches, full, {})
            yield Case(title, 2, micro_batches, full, {})
            yield Case(f"{title}, FSDP2", 2, micro_batches, full, FSDP)
    for stage in (2, 3):
        yield Case(f"full rank, float32, ZeRO-{stage}", 2, 2, FULL_FLOAT32, zero(stage))
    for stage in (1, 2, 3):
        title = f"full rank, bf16 with adamw, ZeRO-{stage}"
        yield Case(title, 2, 2, FULL, zero(stage))
        for processes in (1, 2):
            name = f"{title} compared with ZeRO-{stage}"
            yield Case(name, processes, 4, FULL, zero(stage), own_reference=True)


def train(case: Case, folder: Path) -> tuple[str, float]:
    """Run the command; return the last line of its errors ("" for success) and its seconds."""
    options = {
        **COMMON,
        **case.options,
        **case.mode,
        "num_processes": case.processes,
        "gradient_accumulation_steps": case.micro_batches // case.processes,
        "output_dir": folder,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", "train", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    error = "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    return error, time.perf_counter() - started


def read_run(folder: Path) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Return the losses of a run, the tensors of its last checkpoint, and its processes."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    world = next(event.get("world") for event in events if event["kind"] == "run_started")
    return losses, load_file(folder / f"checkpoint-{STEPS}" / "weights.safetensors"), world or {}


def compare(case: Case, folder: Path, reference: Path) -> list[str]:
    """Return the cells of a row that come from the two runs."""
    losses, weights, world = read_run(folder)
    losses_of_one, weights_of_one, _ = read_run(reference)
    loss = max(abs(a - b) for a, b in zip(losses, losses_of_one, strict=True))
    weight = max(
        float((tensor.double() - weights_of_one[name].double()).abs().max())
        for name, tensor in weights.items()
    )
    held = f"{world['base_bytes_per_rank'] / 1e6:.1f}" if world else ""
    return [
        world.get("mode", "one process"),
        "equal" if loss == 0 else f"{loss:.1e}",
        "equal" if weight == 0 else f"{weight:.1e}",
        held,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="train the rows with these words")
    chosen = parser.parse_args(arguments)
    header = [
        "training", "processes", "micro-batches", "mode", "max. difference of losses",
        "of weights", "MB of base per process", "seconds",
    ]  # fmt: skip
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    references: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as root:
        for number, case in enumerate(case for case in cases() if chosen.only in case.title):
            folder = Path(root) / str(number)
            error, seconds = train(case, folder)
            if case.processes == 1 and not error:
                references[case.reference] = folder
            cells = (
                [error, "", "", ""] if error else compare(case, folder, references[case.reference])
            )
            row = [
                case.title,
                str(case.processes),
                str(case.micro_batches),
                *cells,
                f"{seconds:.0f}",
            ]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    if chosen.out is not None:
        chosen.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
