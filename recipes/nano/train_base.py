"""Make chroma-nano from nothing: every part in order, with one command that resumes wherever it was
stopped.

    python recipes/nano/train_base.py --work output/nano        (CPU: days on two cores)
    python recipes/nano/train_base.py --work output/nano --minutes 10 --device cuda --workers 14
    python recipes/nano/train_base.py --work /tmp/nano --size toy  (a rehearsal, no quality)

--minutes is divided over the three trainings and what lies between them; without it each size has
its steps. Nothing is downloaded. A stage that is complete is not run again; a stage that was
stopped resumes from its own state. The result is WORK/bundle, in the layout of
src/simpletuner/models/nano, and WORK/score.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cache_latents
import make_text_encoder
import make_transformer
import pack_model
import train_transformer
import train_vae
from budget import device_named

# Shares of --minutes. The rest goes to drawing, encoding, compiling and scoring.
MINUTE_SHARES = {"vae-crops": 0.10, "vae": 0.25, "transformer": 0.45}


@dataclass(frozen=True)
class Training:
    """steps: where there is no --minutes."""

    steps: int
    batch_size: int
    learning_rate: float
    save: int


@dataclass(frozen=True)
class Size:
    crops: Training
    vae: Training
    transformer: Training
    drawings: int
    held: int
    unseen: int
    fit_steps: int
    prompts: int
    extra: tuple[str, ...] = ()


SIZES = {
    "cpu": Size(
        crops=Training(3300, 12, 1e-3, 300),
        vae=Training(6000, 4, 8e-4, 250),
        transformer=Training(20_000, 32, 8e-3, 250),
        drawings=200_000,
        held=256,
        unseen=48,
        fit_steps=2000,
        prompts=200,
    ),
    "gpu": Size(
        crops=Training(3000, 256, 2e-3, 500),
        vae=Training(6000, 64, 1e-3, 500),
        transformer=Training(20_000, 512, 8e-3, 1000),
        drawings=200_000,
        held=1024,
        unseen=48,
        fit_steps=2000,
        prompts=200,
        extra=("--compile",),
    ),
    "toy": Size(
        crops=Training(2, 2, 1e-3, 2),
        vae=Training(2, 1, 1e-3, 2),
        transformer=Training(2, 4, 1e-3, 2),
        drawings=6,
        held=4,
        unseen=3,
        fit_steps=3,
        prompts=1,
    ),
}


class Recipe:
    """The stages of one work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.args = args.work, args
        chosen = "gpu" if device_named(args.device).type == "cuda" else "cpu"
        self.size = SIZES[args.size or chosen]

    def run(self) -> None:
        for name, stage in self.stages().items():
            done = self.work / "done" / name
            if done.exists():
                print(f"{name}: complete")
                continue
            print(f"{name}: running", flush=True)
            stage()
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()

    def stages(self) -> dict[str, Callable[[], None]]:
        return {
            "text": lambda: make_text_encoder.main(["--out", str(self.work / "base")]),
            "untrained": self.untrained,
            "vae-crops": lambda: self.vae("vae-crops", self.size.crops, "--side", "64"),
            "vae": lambda: self.vae(
                "vae", self.size.vae, "--init", str(self.work / "vae-crops" / "vae")
            ),
            "latents": self.latents,
            "transformer": self.transformer,
            "bundle": self.bundle,
            "score": self.score,
        }

    def untrained(self) -> None:
        make_transformer.main(
            ["--out", str(self.work / "base"), "--fit-steps", str(self.size.fit_steps)]
        )

    def training(self, name: str, plan: Training) -> list[str]:
        """The arguments that both training programs share."""
        arguments = [
            "--out",
            str(self.work / name),
            "--batch-size",
            str(plan.batch_size),
            "--save",
            str(plan.save),
            "--learning-rate",
            str(plan.learning_rate),
            "--device",
            self.args.device,
        ]
        if self.args.minutes is None:
            return [*arguments, "--steps", str(plan.steps)]
        return [*arguments, "--minutes", str(MINUTE_SHARES[name] * self.args.minutes)]

    def vae(self, name: str, plan: Training, *more: str) -> None:
        shared = self.training(name, plan)
        train_vae.main(
            [*shared, "--workers", str(self.args.workers), "--unseen", str(self.size.unseen), *more]
        )

    def latents(self) -> None:
        shutil.copytree(self.work / "vae" / "vae", self.work / "base" / "vae", dirs_exist_ok=True)
        for name, count, seed in (
            ("latents", self.size.drawings, cache_latents.scene_scoring.TRAINED_SEED),
            ("held", self.size.held, cache_latents.HELD_SEED),
        ):
            cache_latents.main(
                [
                    "--base",
                    str(self.work / "base"),
                    "--out",
                    str(self.work / name),
                    "--count",
                    str(count),
                    "--seed",
                    str(seed),
                    "--device",
                    self.args.device,
                    "--workers",
                    str(self.args.workers),
                ]
            )

    def transformer(self) -> None:
        train_transformer.main(
            [
                *self.training("transformer", self.size.transformer),
                "--base",
                str(self.work / "base"),
                "--latents",
                str(self.work / "latents"),
                "--held",
                str(self.work / "held"),
                *self.size.extra,
            ]
        )

    def bundle(self) -> None:
        pack_model.main(
            [
                "--base",
                str(self.work / "base"),
                "--run",
                str(self.work / "transformer"),
                "--out",
                str(self.work / "bundle"),
            ]
        )

    def score(self) -> None:
        """As a process of its own: it loads the bundle as a user's program does."""
        program = Path(__file__).parent / "score.py"
        command = [
            sys.executable,
            str(program),
            "--model",
            str(self.work / "bundle"),
            "--count",
            str(self.size.prompts),
            "--sheet",
            str(self.work / "score.png"),
        ]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        (self.work / "score.json").write_text(printed, encoding="utf-8")
        print(json.dumps(json.loads(printed)["scores"], indent=1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make chroma-nano from nothing.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="wall-clock minutes for everything")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: gpu on CUDA, else cpu")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    Recipe(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    main()
