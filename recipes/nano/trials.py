"""Short trainings of one small transformer that differ in one thing each: what is worth its time?

    python recipes/nano/trials.py --work output/nano [--only text rate-half]

Every trial sees the same number of drawings (--samples) and is judged by the held-out loss of
train_transformer.py, which depends on the latents alone. Trials that are complete are not run
again; a trial that was stopped resumes. Prints a Markdown table. WORK is train_base.py's, with
latents and held.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import make_transformer
import train_transformer

SAMPLES, BATCH = 12_800, 32
RATE = 8e-3


@dataclass(frozen=True)
class Trial:
    """batch_size: steps are SAMPLES / batch_size. rest: further options of train_transformer.py."""

    change: str
    heads: int = 2
    single: int = 4
    batch_size: int = BATCH
    learning_rate: float = RATE
    rest: tuple[str, ...] = ()


TRIALS = {
    "baseline": Trial("width 128, 1 + 4 blocks, frozen random T5, Muon 8e-3, quadratic, batch 32"),
    "text": Trial("the text encoder is trained along", rest=("--train-text",)),
    "density-uniform": Trial("sigma uniform", rest=("--sigma-density", "uniform")),
    "density-logit-normal": Trial("sigma logit-normal", rest=("--sigma-density", "logit-normal")),
    "rate-half": Trial("learning rate 4e-3", learning_rate=RATE / 2),
    "rate-double": Trial("learning rate 1.6e-2", learning_rate=2 * RATE),
    "batch-16": Trial("batch 16, twice the steps", batch_size=BATCH // 2),
    "batch-64": Trial("batch 64, half the steps", batch_size=BATCH * 2),
    "ema-short": Trial("average over a tenth of the steps", rest=("--ema-decay", "0.98")),
    "deep": Trial("1 + 8 blocks", single=8),
    "wide": Trial("width 192, 1 + 4 blocks", heads=3),
}


def run(work: Path, name: str, samples: int, device: str) -> float:
    """Return the held-out loss at the end."""
    trial, out = TRIALS[name], work / "trials" / name
    untrained = work / "trials" / f"untrained-{trial.heads}-{trial.single}"
    if not (untrained / "transformer" / "config.json").exists():
        sizes = ["--heads", str(trial.heads), "--single", str(trial.single), "--fit-steps", "1000"]
        make_transformer.main(["--out", str(untrained), *sizes])
        shutil.copytree(
            work / "base" / "text_encoder", untrained / "text_encoder", dirs_exist_ok=True
        )
    steps = samples // trial.batch_size
    log = out / "log.jsonl"
    if losses(log).get(steps) is None:
        train_transformer.main(
            [
                *("--base", str(untrained), "--out", str(out), "--device", device),
                *("--latents", str(work / "latents"), "--held", str(work / "held")),
                *("--steps", str(steps), "--save", str(max(1, steps // 4))),
                *("--batch-size", str(trial.batch_size)),
                *("--learning-rate", str(trial.learning_rate)),
                *trial.rest,
            ]
        )
    return losses(log)[steps]


def losses(log: Path) -> dict[int, float]:
    """Held-out loss by step."""
    if not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["held_out"] for row in rows if "held_out" in row}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare small trainings by the held-out loss.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(TRIALS), default=tuple(TRIALS))
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="drawings that each trial sees"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(arguments)
    print("| trial | change | held-out loss |\n|---|---|---|", flush=True)
    for name in args.only:
        loss = run(args.work, name, args.samples, args.device)
        print(f"| {name} | {TRIALS[name].change} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
