"""Are wrong captions found? Captions of the example's images are exchanged on purpose.

    python -m benchmarks.nano.captions              three seeds: about 3 minutes of a core
    python -m benchmarks.nano --only captions       the same

For each seed, copies of the example's images but one get two wrong captions: those of other images, in
which as many words as possible differ. A run of one step at a rate that changes nothing compares
each caption with those of other images before the step. Counted are the wrong captions that the run names,
and the right ones that it names too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.nano.cell_runner import CHILD_ENVIRONMENT
from benchmarks.nano.experiment_inputs import (
    COMMON_OPTIONS,
    EXAMPLE_DIR,
    IMAGE_DATASET_FIELDS,
    ROOT,
    example_options,
)

from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import CaptionFitMeasured

RESULTS = ROOT / "benchmarks" / "nano" / "results"
DATASETS = ("zorbo", "shapes")
WRONG_CAPTIONS, SEEDS = 2, (1, 2, 3)
IGNORED_WORDS = {
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "at",
    "near",
    "is",
    "to",
    "and",
    "background",
    "picture",
}


def differing_caption(own: str, others: Sequence[str], draw: random.Random) -> str:
    """Return one of the captions that share the fewest meaningful words with an image's own."""
    words = set(own.replace(",", " ").split()) - IGNORED_WORDS
    shared = {other: len(words & set(other.replace(",", " ").split())) for other in others}
    fewest = min(shared.values())
    return draw.choice(sorted(other for other, count in shared.items() if count == fewest))


def plant(root: Path, seed: int) -> dict[str, tuple[str, str]]:
    """Exchange captions; return sample id -> right and wrong caption."""
    draw = random.Random(seed)
    captions: dict[str, Path] = {}
    for name in DATASETS:
        captions |= {
            f"{name}/{path.with_suffix('.png').name}": path
            for path in sorted((root / name).glob("*.txt"))
        }
    texts = {sample: path.read_text(encoding="utf-8").strip() for sample, path in captions.items()}
    planted = {}
    for sample in draw.sample(sorted(captions), WRONG_CAPTIONS):
        own_set = sample.partition("/")[0]
        others = [text for name, text in texts.items() if name.startswith(own_set)]
        wrong = differing_caption(texts[sample], others, draw)
        captions[sample].write_text(wrong + "\n", encoding="utf-8")
        planted[sample] = (texts[sample], wrong)
    return planted


def run_once(root: Path, seed: int) -> dict[str, object]:
    """Plant captions, start a run, and return what it named."""
    root.mkdir(parents=True)
    for name in DATASETS:
        shutil.copytree(EXAMPLE_DIR / name, root / name)
    (root / "unseen").mkdir()
    for suffix in ("png", "txt"):
        (root / "shapes" / f"00000.{suffix}").rename(root / "unseen" / f"00000.{suffix}")
    planted = plant(root, seed)
    sets = [
        {"id": name, "dataset_type": "image", "instance_data_dir": name, **IMAGE_DATASET_FIELDS}
        for name in DATASETS
    ]
    unseen = {**sets[1], "id": "unseen", "dataset_type": "eval", "instance_data_dir": "unseen"}
    (root / "datasets.json").write_text(json.dumps([*sets, unseen]), encoding="utf-8")
    options = {
        **example_options(), **COMMON_OPTIONS, "seed": seed, "max_train_steps": 1, "lr_warmup_steps": 0,
        "lr_scheduler": "constant", "learning_rate": 1e-12, "evaluation_type": "none",
        "num_eval_images": 1, "num_train_loss_images": 64, "eval_steps_interval": 1,
        "output_dir": "run", "data_backend_config": "datasets.json",
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(options), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "simpletuner", "train", "--config", "config.json"],
        cwd=root,
        env={**os.environ, **CHILD_ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    (event,) = (
        record.event
        for record in read_events(root / "run" / "events.jsonl")
        if isinstance(record.event, CaptionFitMeasured)
    )
    middle = sorted(event.margins.values())[len(event.margins) // 2]
    right = [value for sample, value in event.margins.items() if sample not in planted]
    return {
        "seed": seed,
        "images": len(event.margins),
        "planted": {
            sample: {"right": own, "wrong": wrong, "margin": round(event.margins[sample] / middle, 3)}
            for sample, (own, wrong) in planted.items()
        },
        "found": sorted(set(event.unfit) & set(planted)),
        "named_wrongly": sorted(set(event.unfit) - set(planted)),
        "lowest_right_margin": round(min(right) / middle, 3),
    }  # fmt: skip


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "benchmarks-nano-captions")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    args = parser.parse_args(words)
    rows = []
    for seed in SEEDS[: args.seeds]:
        root = args.out.absolute() / f"seed-{seed}"
        if root.exists():
            shutil.rmtree(root)
        rows.append(run_once(root, seed))
        print(json.dumps(rows[-1]), flush=True)
    document = {"command": "python -m benchmarks.nano.captions", "rows": rows}
    (RESULTS / "captions.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
