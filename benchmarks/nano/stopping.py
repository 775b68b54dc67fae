"""Does the verdict on a run's held-out losses say what was done to the run?

    python -m benchmarks.nano.stopping                 three seeds: about 15 minutes of a core
    python -m benchmarks.nano.stopping --seeds 1
    python -m benchmarks.nano --only stopping          the same

Trainings on chroma-nano that are made to end in a known way: cut short after a few steps at a constant
rate; made to overfit, by four images, rank 64 and many steps; and the same with early_stopping. Held-out
are sixteen unseen images of the concept. Writes stopping.md and stopping.json: the verdict of each run and
its held-out loss at the best and at the last step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.nano.cell_runner import CHILD_ENVIRONMENT
from benchmarks.nano.experiment_inputs import (
    COMMON_OPTIONS,
    EXAMPLE_DIR,
    IMAGE_DATASET_FIELDS,
    example_options,
)
from benchmarks.nano.markdown_tables import render_grid
from benchmarks.nano.tuning import HELD_OUT_IMAGES, RESULTS, ROOT, command, make_datasets

from simpletuner.config import environment
from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import LossEvaluated, VerdictReached

MEASUREMENTS = 10  # of the held-out loss in a run
FEW_IMAGES = 4


@dataclass(frozen=True)
class StoppingRow:
    """A training. data: "all" or "few" images. expected: the verdicts that it was made for."""

    label: str
    data: str
    steps: int
    batch: int
    options: Mapping[str, object]
    expected: tuple[str, ...]


OVERFIT: Mapping[str, object] = {"lora_rank": 64, "lora_alpha": 64}
ROWS = (
    StoppingRow("cut short", "all", 40, 8, {}, ("learning",)),
    StoppingRow("made to overfit", "few", 400, 4, OVERFIT, ("overfitting",)),
    StoppingRow(
        "made to overfit, early_stopping", "few", 400, 4,
        {**OVERFIT, "early_stopping": True}, ("overfitting", "flat"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class StoppingResult:
    """A finished run. verdict: of VerdictReached. losses: held-out loss by step."""

    label: str
    seed: int
    verdict: str
    since_step: int
    planned_steps: int
    losses: dict[int, float]

    @property
    def best_step(self) -> int:
        return min(self.losses, key=lambda step: self.losses[step])

    @property
    def last_step(self) -> int:
        return max(self.losses)


def make_dataset_files(root: Path, env: dict[str, str]) -> dict[str, Path]:
    """Return name -> dataset file: all images of the concept, and a few of them."""
    concept = make_datasets(root, env)["concept"]
    few = root / "few"
    few.mkdir(exist_ok=True)
    for path in sorted((EXAMPLE_DIR / "zorbo").iterdir())[: 2 * FEW_IMAGES]:  # image and caption
        shutil.copy(path, few / path.name)
    sets = json.loads(concept.read_text(encoding="utf-8"))
    sets[0] = {"id": "few", "instance_data_dir": str(few), **IMAGE_DATASET_FIELDS}
    file = root / "few.json"
    file.write_text(json.dumps(sets, indent=1), encoding="utf-8")
    return {"all": concept, "few": file}


def run_options(row: StoppingRow, dataset: Path, seed: int, out: Path) -> dict[str, Any]:
    """Return the options of a row's run. out: where the run folders and the cache are."""
    return {
        **example_options(), **COMMON_OPTIONS, "data_backend_config": str(dataset), "seed": seed,
        "max_train_steps": row.steps, "train_batch_size": row.batch, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "checkpoint_step_interval": row.steps,
        "eval_steps_interval": row.steps // MEASUREMENTS, "num_eval_images": HELD_OUT_IMAGES,
        "num_train_loss_images": 0, "eval_sigma_count": 8, "evaluation_type": "none",
        "cache_dir": str(out / f"cache-{row.data}"),
        "output_dir": str(run_dir(row, seed, out)), **row.options,
    }  # fmt: skip


def run_dir(row: StoppingRow, seed: int, out: Path) -> Path:
    return out / f"{row.label.replace(', ', '-').replace(' ', '-')}-{seed}"


def read_result(row: StoppingRow, seed: int, folder: Path) -> StoppingResult:
    """Read a finished run. Raises RuntimeError where it has no verdict."""
    verdict, losses = None, dict[int, float]()
    for record in read_events(folder / "events.jsonl"):
        event = record.event
        if isinstance(event, VerdictReached):
            verdict = event
        if isinstance(event, LossEvaluated) and event.split == "eval":
            losses[event.step] = event.loss
    if verdict is None or not losses:
        raise RuntimeError(f"{row.label}: no verdict; see {folder}/train.log")
    return StoppingResult(row.label, seed, verdict.verdict, verdict.since_step, row.steps, losses)


def render(results: Sequence[StoppingResult], words: str) -> str:
    """Return the page of results."""
    expected = {row.label: row.expected for row in ROWS}
    right = sum(result.verdict in expected[result.label] for result in results)
    rows = [
        [
            result.label, str(result.seed), f"{result.verdict} (since step {result.since_step})",
            f"{result.last_step} of {result.planned_steps}",
            f"{result.losses[result.best_step]:.4f} (step {result.best_step})",
            f"{result.losses[result.last_step]:.4f}",
        ]
        for result in results
    ]  # fmt: skip
    return "\n".join(
        [
            "# When to stop", "",
            f"`python -m benchmarks.nano.stopping {words}`".replace(" `", "`")
            + f", {time.strftime('%Y-%m-%d')}.", "",
            f"The verdict is the one that the run was made for in {right} of {len(results)} runs.", "",
            render_grid(
                ["run", "seed", "verdict", "steps", "lowest held-out loss", "last held-out loss"], rows
            ), "",
        ]
    )  # fmt: skip


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nano.stopping", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "benchmarks-stopping")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of stopping.md")
    args = parser.parse_args(words)
    out = args.out.absolute()
    for folder in (out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    env = {**environment.copy_process_environment(), **CHILD_ENVIRONMENT}
    files = make_dataset_files(out, env)
    shown = [f"--seeds {args.seeds}"] if args.seeds != 3 else []
    results: list[StoppingResult] = []
    for seed in range(1, args.seeds + 1):
        for row in ROWS:
            folder = run_dir(row, seed, out)
            config = folder.with_name(f"{folder.name}.json")
            config.write_text(json.dumps(run_options(row, files[row.data], seed, out)))
            if command(["train"], config, env):
                raise RuntimeError(f"{row.label} failed; see {config.with_suffix('.log')}")
            results.append(read_result(row, seed, folder))
            text = json.dumps([asdict(result) for result in results], indent=1)
            (args.results / "stopping.json").write_text(text + "\n", encoding="utf-8")
            page = render(results, " ".join(shown))
            (args.results / "stopping.md").write_text(page, encoding="utf-8")
            print(f"{row.label}, seed {seed}: {results[-1].verdict}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
