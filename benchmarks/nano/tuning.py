"""Does the search for the learning rate find it? Also: what the size of the change of the weights says.

    python -m benchmarks.nano.tuning              two domains, three seeds: about 45 minutes of a core
    python -m benchmarks.nano.tuning --seeds 1 --steps 100 --batch 4
    python -m benchmarks.nano --only tune            the same

Two domains on chroma-nano: a concept (the zorbo of the example) and a style (shapes in inverted colours),
whose configured rate is ten times too low. For each seed, `simpletuner tune` searches, and a full sweep
trains every rate of its grid to the end. Both measure the same held-out images on the same noise, so that
the final losses are compared in pairs: the chosen rate passes where it is at most one standard error above
the best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.nano.cell_runner import CHILD_ENVIRONMENT
from benchmarks.nano.experiment_inputs import (
    COMMON_OPTIONS,
    EXAMPLE_DIR,
    IMAGE_DATASET_FIELDS,
    RECIPES_DIR,
    ROOT,
    example_options,
    make_program_runner,
)
from PIL import Image, ImageOps

from simpletuner.cli.rate_plan import TrialResult, compare, default_rates
from simpletuner.config import environment
from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import (
    SampleLossesMeasured,
    ScoresComputed,
    WeightChangeMeasured,
)

RESULTS = ROOT / "benchmarks" / "nano" / "results"
HELD_OUT_IMAGES, STYLE_IMAGES = 16, 24
CONCEPT_RATE, STYLE_RATE = (
    3e-3,
    3e-4,
)  # of the example; the second is ten times too low for the style
# Rates that no search tries: for what the size of the change of the weights says at its extremes.
EXTREME_RATES = (1e-5, 3e-5, 9e-2)


@dataclass(frozen=True)
class SweepRun:
    """A training to the end at one rate.

    scores: "zorbo" (images with one) and "shapes" (everything said is right) -> share, its error.
    """

    rate: float
    losses: dict[str, float] | None
    weight_change: float | None
    scores: dict[str, tuple[float, float]]


def make_datasets(root: Path, env: dict[str, str]) -> dict[str, Path]:
    """Return domain -> dataset file."""
    run = make_program_runner(ROOT, env)
    made = {}
    unseen = root / "zorbo-unseen"
    if not unseen.exists():
        run([str(RECIPES_DIR / "make_zorbo_dataset.py"), "--out", str(unseen), "--first", "16",
             "--count", str(HELD_OUT_IMAGES)])  # fmt: skip
    folders = {"concept": (EXAMPLE_DIR / "zorbo", unseen)}
    style = root / "style", root / "style-unseen"
    for folder, count, seed in ((style[0], STYLE_IMAGES, 5), (style[1], HELD_OUT_IMAGES, 6)):
        if not folder.exists():
            plain = folder.with_name(f"{folder.name}-plain")
            run([str(RECIPES_DIR / "make_shapes_dataset.py"), "--out", str(plain), "--count", str(count),
                 "--seed", str(seed)])  # fmt: skip
            invert(plain, folder)
    folders["style"] = style
    for name, (taught, held_out) in folders.items():
        sets = [
            {"id": name, "dataset_type": "image", "instance_data_dir": str(taught), **IMAGE_DATASET_FIELDS},
            {"id": f"{name}-unseen", "dataset_type": "eval", "instance_data_dir": str(held_out),
             **IMAGE_DATASET_FIELDS},
        ]  # fmt: skip
        made[name] = root / f"{name}.json"
        made[name].write_text(json.dumps(sets, indent=1))
    return made


def invert(plain: Path, folder: Path) -> None:
    """Write the images in inverted colours, with captions that say so."""
    folder.mkdir()
    for path in sorted(plain.glob("*.png")):
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(folder / path.name)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        (folder / path.with_suffix(".txt").name).write_text(f"negative, {caption}")


def options_of(domain: str, dataset: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a run of one domain and seed, without its rate."""
    rate = CONCEPT_RATE if domain == "concept" else STYLE_RATE
    return {
        **example_options(), **COMMON_OPTIONS, "data_backend_config": str(dataset), "seed": seed,
        "max_train_steps": args.steps, "train_batch_size": args.batch, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "learning_rate": rate, "checkpoint_step_interval": args.steps,
        "eval_steps_interval": args.steps, "num_eval_images": HELD_OUT_IMAGES, "eval_sigma_count": 8,
        "evaluation_type": "none", "cache_dir": str(args.out / f"cache-{domain}"),
    }  # fmt: skip


def command(words: Sequence[str], config: Path, env: dict[str, str]) -> int:
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.run(
            [sys.executable, "-m", "simpletuner", *words, "--config", str(config)],
            env=env, stdout=log, stderr=log, check=False,
        ).returncode  # fmt: skip


def sweep_run(root: Path, options: dict[str, Any], rate: float, env: dict[str, str]) -> SweepRun:
    """Train one rate to the end; a finished one is read again."""
    folder = root / f"sweep-{rate:g}"
    config = root / f"sweep-{rate:g}.json"
    config.write_text(json.dumps({**options, "learning_rate": rate, "output_dir": str(folder)}))
    code = command(["train"], config, env)
    events = [record.event for record in read_events(folder / "events.jsonl")]
    losses, change, scores = None, None, {}
    for event in events:
        if isinstance(event, SampleLossesMeasured) and event.split == "eval" and code == 0:
            losses = {name: last for name, (_, last) in event.losses.items()}
        if isinstance(event, WeightChangeMeasured):
            change = event.total
        if isinstance(event, ScoresComputed) and event.step:
            share, error, _ = event.rates["all" if event.metric == "shapes" else event.metric]
            scores[event.metric] = (share, error)
    return SweepRun(rate, losses, change, scores)


def measure(
    domain: str, dataset: Path, seed: int, args: argparse.Namespace, env: dict[str, str]
) -> dict[str, Any]:
    """Search and sweep; return a row of the table."""
    root = args.out / f"{domain}-{seed}"
    root.mkdir(parents=True, exist_ok=True)
    options = options_of(domain, dataset, seed, args)
    config = root / "search.json"
    config.write_text(json.dumps({**options, "output_dir": str(root / "search")}))
    if command(["tune"], config, env):
        raise RuntimeError(f"the search failed; see {config.with_suffix('.log')}")
    found = json.loads((root / "search-tune" / "result.json").read_text())
    scored = {
        "evaluation_type": "shapes,zorbo",
        "evaluation_prompts": args.prompts,
        "disable_benchmark": True,
    }
    grid = sorted({*default_rates(options["learning_rate"]), found["rate"]})
    extremes = EXTREME_RATES if domain == "concept" else ()
    runs = [
        sweep_run(root, {**options, **(scored if domain == "concept" else {})}, rate, env)
        for rate in sorted({*grid, *extremes})
    ]
    results = [TrialResult(run.rate, args.steps, run.losses) for run in runs]
    best = min(results, key=lambda result: result.loss)
    chosen = next(result for result in results if result.rate == found["rate"])
    change, error = compare(chosen, best)
    return {
        "domain": domain, "seed": seed, "configured": options["learning_rate"], "chosen": chosen.rate,
        "best": best.rate, "difference": change, "se": error, "within": change <= error,
        "cost": found["cost"], "runs": [asdict(run) | {"losses": None, "loss": result.loss}
                                        for run, result in zip(runs, results, strict=True)],
    }  # fmt: skip


def render(rows: Sequence[dict[str, Any]], words: str) -> str:
    """Return the page of results."""
    within = sum(row["within"] for row in rows)
    lines = [
        "# Search for the learning rate, and the change of the weights", "",
        f"`python -m benchmarks.nano.tuning {words}`".replace(" `", "`") + f", {time.strftime('%Y-%m-%d')}.",
        "", f"The final loss at the chosen rate was within one standard error of the best of a full sweep in "
        f"{within} of {len(rows)} searches.", "",
        "| domain | seed | configured | chosen | best of the sweep | loss chosen - best | cost in runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    lines += [
        f"| {row['domain']} | {row['seed']} | {row['configured']:g} | {row['chosen']:g} | {row['best']:g} | "
        f"{row['difference']:+.4f} ± {row['se']:.4f} | {row['cost']:.2f} |"
        for row in rows
    ]
    lines += [
        "", "## Change of the weights", "",
        "zorbo: share of generated images with one; shapes: share in which everything said is right, which "
        "is what the base knew. `python -m benchmarks.nano.weight_change` compares them with the limits of "
        "the findings.", "",
        "| domain | seed | learning rate | norm of delta W / norm of W | held-out loss | zorbo | shapes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        for run in row["runs"]:
            scores = [f"{100 * run['scores'][name][0]:.0f} %" if name in run["scores"] else "-"
                      for name in ("zorbo", "shapes")]  # fmt: skip
            change = "-" if run["weight_change"] is None else f"{run['weight_change']:.4f}"
            lines.append(f"| {row['domain']} | {row['seed']} | {run['rate']:g} | {change} | "
                         f"{run['loss']:.4f} | {' | '.join(scores)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nano.tuning", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument(
        "--domains", nargs="+", default=["concept", "style"], choices=("concept", "style")
    )
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "benchmarks-tuning")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of tuning.md and tuning.json"
    )
    args = parser.parse_args(words)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    env = {**environment.copy_process_environment(), **CHILD_ENVIRONMENT}
    datasets = make_datasets(args.out, env)
    told = [word for word in words if not word.startswith(("/", "--out", "--results"))]
    rows = []
    for seed in range(1, args.seeds + 1):
        for domain in args.domains:
            rows.append(measure(domain, datasets[domain], seed, args, env))
            (args.results / "tuning.json").write_text(json.dumps(rows, indent=1) + "\n")
            (args.results / "tuning.md").write_text(render(rows, " ".join(told)), encoding="utf-8")
            print(
                f"{domain}, seed {seed}: chosen {rows[-1]['chosen']:g}, best {rows[-1]['best']:g}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
