"""`simpletuner train`, then the average of its last checkpoints, measured like any other run.

    python -m benchmarks.nano.averaged --config PATH

The run folder of the configuration is the one that measures the average: one step at a rate at which no
weight moves. The training itself lies next to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.nano.methods import AVERAGED_CHECKPOINTS, CHECKPOINTS_OF_AVERAGED

from simpletuner.training.checkpoint import list_checkpoints

TRAIN = [sys.executable, "-m", "simpletuner", "train", "--config"]


def main(config: Path) -> None:
    options = json.loads(config.read_text(encoding="utf-8"))
    run_dir = Path(options["output_dir"])
    trained = run_dir.with_name(f"{run_dir.name}-trained")
    interval = max(1, options["max_train_steps"] // CHECKPOINTS_OF_AVERAGED)
    training = {
        **options,
        "output_dir": str(trained),
        "checkpoint_step_interval": interval,
        "checkpoints_total_limit": CHECKPOINTS_OF_AVERAGED,
        "evaluation_type": "none",
    }
    training.pop("evaluation_prompts", None)
    average = run_dir.with_name(f"{run_dir.name}-average.safetensors")
    if not average.exists():
        run_simpletuner_train(config.with_name(f"{config.stem}-trained.json"), training)
        last = [str(folder) for folder in list_checkpoints(trained)[:AVERAGED_CHECKPOINTS]]
        command = [sys.executable, "-m", "simpletuner", "export", *last, "--output", str(average)]
        subprocess.run([*command, "--average"], check=True)
    measured = {
        **options,
        "init_lora": str(average),
        "max_train_steps": 1,
        "learning_rate": 1e-12,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpoint_step_interval": 1,
        "eval_steps_interval": 1,
    }
    measured.pop("lr_end", None)
    run_simpletuner_train(config.with_name(f"{config.stem}-measured.json"), measured)


def run_simpletuner_train(path: Path, options: dict[str, object]) -> None:
    path.write_text(json.dumps(options, indent=2), encoding="utf-8")
    subprocess.run([*TRAIN, str(path)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--config") + 1]))
