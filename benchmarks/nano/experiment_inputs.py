"""The pictures and the untrained transformer that the cells need, made by recipes/nano, and their
options.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nano.experiments import Cell, ExperimentSize
from benchmarks.nano.preservation import preservation_datasets

import simpletuner
from simpletuner.config import jsonc

ROOT = Path(__file__).parents[2]
RECIPES_DIR = ROOT / "recipes" / "nano"
PACKAGE_DIR = Path(simpletuner.__file__).parent
BUNDLED_BASE_DIR, EXAMPLE_DIR = (
    PACKAGE_DIR / "models" / "nano",
    PACKAGE_DIR / "examples" / "chroma-nano.peft-lora",
)
CONSTANT_CAPTION = "a zorbo"
FIRST_OF_64 = 1000  # numbers of zorbos that no other set has
TRAINED_SEED, UNSEEN_SEED = 1, 73  # of make_shapes_dataset.py
LORA_OPTIONS = ("lora_rank", "flux_lora_target")

ProgramRunner = Callable[[Sequence[str]], None]

# What every cell has. Scores at the end only: the base's are measured once, by a cell of their own.
COMMON_OPTIONS: Mapping[str, object] = {
    "device": "cpu", "torch_num_threads": 1, "validation_disable": True, "disable_benchmark": True,
    "checkpoints_total_limit": 1, "chroma_sigma_density": "quadratic", "stratified_sigmas": True,
}  # fmt: skip
# From scratch: the recipe's own rate for muon, on a shorter cosine.
SCRATCH_OPTIONS: Mapping[str, object] = {
    "model_family": "chroma", "model_flavour": "nano", "model_type": "full", "resolution": 128,
    "resolution_type": "pixel", "caption_dropout_probability": 0.1, "mixed_precision": "bf16",
    "base_model_default_dtype": "fp32", "gradient_checkpointing": False, "optimizer": "muon",
    "learning_rate": 8e-3, "adam_beta2": 0.99, "lr_scheduler": "cosine", "lr_end": 1e-4,
    "vae_batch_size": 16, "text_encoder_batch_size": 64, "evaluation_type": "shapes",
}  # fmt: skip
IMAGE_DATASET_FIELDS: Mapping[str, object] = {
    "type": "local", "caption_strategy": "textfile", "resolution": 128, "resolution_type": "pixel",
    "crop": True, "crop_aspect": "square", "crop_style": "center",
}  # fmt: skip


@dataclass(frozen=True)
class ExperimentInputs:
    """Where everything made for the cells lies, below the folder of the runs."""

    root: Path

    @property
    def untrained_transformer(self) -> Path:
        return self.root / "untrained" / "transformer"

    def dataset_file(self, name: str) -> Path:
        return self.root / f"{name}.json"

    def make_lesson_datasets(self, size: ExperimentSize, run: ProgramRunner) -> None:
        """The example's own datasets to learn from, unseen zorbos to measure with."""
        unseen = self.root / "zorbo-unseen"
        taught = len(list((EXAMPLE_DIR / "zorbo").glob("*.png")))
        run([str(RECIPES_DIR / "make_zorbo_dataset.py"), "--out", str(unseen), "--first", str(taught),
             "--count", str(size.unseen)])  # fmt: skip
        document = jsonc.parse_jsonc(
            (EXAMPLE_DIR / "multidatabackend.json").read_text(encoding="utf-8"), "the example"
        )
        taught_sets = [
            {**one, "instance_data_dir": str(EXAMPLE_DIR / str(one["instance_data_dir"]))}
            for one in document.value
        ]
        self._write_dataset_file("lesson", taught_sets, unseen)
        for name, fields in self._make_other_concepts(run).items():
            concept, *others = taught_sets
            self._write_dataset_file(name, [{**concept, **fields}, *others], unseen)
        masked = self.root / "zorbo-masked"
        run([str(RECIPES_DIR / "make_zorbo_dataset.py"), "--out", str(masked), "--count", str(taught),
             "--masks"])  # fmt: skip
        files = preservation_datasets(taught_sets[0], taught_sets[1], str(masked))
        for name, sets in files.items():
            self._write_dataset_file(name, sets, unseen)

    def _make_other_concepts(self, run: ProgramRunner) -> dict[str, dict[str, object]]:
        """Draw sets of 4 and of 64 zorbos, none of them an unseen one; return the fields of each.

        In an epoch each set gives as many images as the example's sixteen, which are seen three times.
        """
        made: dict[str, dict[str, object]] = {
            "lesson-constant": {
                "caption_strategy": "instanceprompt",
                "instance_prompt": CONSTANT_CAPTION,
            }
        }
        for count, first, fields in (
            (4, 0, {"repeats": 11}),
            (64, FIRST_OF_64, {"repeats": 0, "probability": 0.75}),
        ):
            folder = self.root / f"zorbo-{count}"
            run([str(RECIPES_DIR / "make_zorbo_dataset.py"), "--out", str(folder), "--first", str(first),
                 "--count", str(count)])  # fmt: skip
            made[f"lesson-{count}"] = {"instance_data_dir": str(folder), **fields}
        return made

    def make_shapes_datasets(self, size: ExperimentSize, run: ProgramRunner) -> None:
        """Drawn shapes, unseen ones, and a transformer that has learned nothing."""
        drawn, unseen = self.root / "shapes", self.root / "shapes-unseen"
        for folder, count, seed in (
            (drawn, size.pictures, TRAINED_SEED),
            (unseen, size.unseen, UNSEEN_SEED),
        ):
            run(
                [
                    str(RECIPES_DIR / "make_shapes_dataset.py"),
                    "--out",
                    str(folder),
                    "--count",
                    str(count),
                    "--seed",
                    str(seed),
                ]
            )
        if not (self.untrained_transformer / "config.json").exists():
            untrained = str(self.untrained_transformer.parent)
            run([str(RECIPES_DIR / "make_transformer.py"), "--out", untrained,
                 "--fit-steps", str(size.fit_steps)])  # fmt: skip
        trained = {
            "id": "shapes",
            "dataset_type": "image",
            "instance_data_dir": str(drawn),
            **IMAGE_DATASET_FIELDS,
        }
        self._write_dataset_file("shapes", [trained], unseen)

    def _write_dataset_file(
        self, name: str, trained: list[dict[str, object]], unseen: Path
    ) -> None:
        sets = [
            *trained,
            {
                "id": f"{name.partition('-')[0]}-unseen",  # the same noise for all of a lesson
                "dataset_type": "eval",
                "instance_data_dir": str(unseen),
                **IMAGE_DATASET_FIELDS,
            },
        ]
        self.dataset_file(name).write_text(json.dumps(sets, indent=2), encoding="utf-8")

    def path_options(self, cell: Cell, run_dir: Path, lora: Path | None) -> dict[str, object]:
        """The options that are folders of this machine: no part of what is compared."""
        one = cell.variant
        told = {
            "output_dir": str(run_dir), "data_backend_config": str(self.dataset_file(one.data)),
            "cache_dir": str(self.root / f"cache-{one.cache}-{one.data}"),
        }  # fmt: skip
        if one.data == "shapes":
            told["pretrained_transformer_model_name_or_path"] = str(self.untrained_transformer)
        return {**told, **({"init_lora": str(lora)} if lora else {})}


def make_program_runner(cwd: Path, env: Mapping[str, str]) -> ProgramRunner:
    """Runs a program of this Python; RuntimeError with its last words when it fails."""

    def run(arguments: Sequence[str]) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=dict(env),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise RuntimeError(f"{Path(arguments[0]).name} ended with {done.returncode}: {last}")

    return run


def cell_options(cell: Cell, size: ExperimentSize, rate: float | None = None) -> dict[str, object]:
    """What the cell is, without folders: the data's own options, the variant's, the seed."""
    one = cell.variant
    scratch = one.data == "shapes"
    steps = size.scratch_steps if scratch else size.lesson_steps
    base = dict(SCRATCH_OPTIONS) if scratch else example_options()
    idle: tuple[str, ...] = LORA_OPTIONS if one.options.get("model_type") == "full" else ()
    idle += ("flux_lora_target",) if "lora_target_modules" in one.options else ()
    idle += ("lr_end",) if one.options.get("lr_scheduler") == "constant" else ()
    base = {name: value for name, value in base.items() if name not in idle}
    told = {
        **base, **COMMON_OPTIONS, "max_train_steps": steps, "lr_warmup_steps": min(20, steps // 10),
        "train_batch_size": size.scratch_batch if scratch else size.lesson_batch,
        "num_eval_images": size.unseen, "eval_sigma_count": size.sigmas, "evaluation_prompts": size.prompts,
        "validation_num_inference_steps": size.sampling_steps, **one.options, "seed": cell.seed,
    }  # fmt: skip
    if told["evaluation_type"] == "none":
        del told["evaluation_prompts"]
    if rate is not None:
        told["learning_rate"] = rate
    total = int(str(told["max_train_steps"]))
    return {**told, "checkpoint_step_interval": max(1, total // 2), "eval_steps_interval": total}


def example_options() -> dict[str, object]:
    """The packaged lesson as it is shipped; only what shows pictures on the way is left out."""
    path = EXAMPLE_DIR / "config.json"
    read = jsonc.parse_jsonc(path.read_text(encoding="utf-8"), str(path)).value
    left_out = ("output_dir", "data_backend_config", "user_prompt_library")
    return {**{name: value for name, value in read.items() if name not in left_out},
            "evaluation_type": "shapes,zorbo"}  # fmt: skip


def base_fingerprint() -> str:
    """12 hex digits for the bundled model: results of another base are measured again."""
    digest = hashlib.sha256()
    for path in sorted(path for path in BUNDLED_BASE_DIR.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(BUNDLED_BASE_DIR).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
