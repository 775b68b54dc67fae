"""A dry run: a few steps with the user's dataset and options on the bundled model, on the CPU.

It does everything that a real run does (scan, captions, caches, training, images, checkpoint, stop,
resume, export) and lists what would have failed. It needs no weights, no network and no GPU, and it
deletes everything that it wrote.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.config.evaluation_models import needs_evaluation_model
from simpletuner.config.image_metrics import IMAGE_METRICS, parse_metric_names
from simpletuner.config.load import LoadedConfig, config_from_resolved, resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.data.remote_store import open_remote_store
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import SimpleTunerError, TrainingStopped
from simpletuner.events.event_types import Event, StageCompleted, StepCompleted, WarningIssued
from simpletuner.events.html_report import write_report
from simpletuner.events.trackers import tracker_classes
from simpletuner.training import loop
from simpletuner.training.build import build_trainer_context
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.world import World

STEPS = 4
STOP_AFTER = 2
MAX_SAMPLES_PER_SET = 8
SIDE_PX = 128
ON_THIS_MACHINE_ALONE = {
    "device": "cpu",
    "num_processes": 1,
    "fsdp_enable": False,
    "deepspeed_config": None,
    "cache_remote": None,
}


@dataclass
class RehearsalFindings:
    """Results. problems would stop a real run; warnings would be in its log; passed checks."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    exit_code: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, WarningIssued):
            self.warnings.append(event.message)

    def check(self, name: str, run_check: Callable[[], str]) -> bool:
        """Run one check, which returns a remark or raises; return whether it passed."""
        try:
            remark = run_check()
        except SimpleTunerError as error:
            self.problems.append(f"{name}: {error}")
            self.exit_code = self.exit_code or error.exit_code
            return False
        self.passed.append(f"{name}: {remark}" if remark else name)
        return True


def rehearse(loaded: LoadedConfig, backends: DatasetFile) -> int:
    """Print what passed and what failed; return the exit code of the first problem, or 0."""
    findings = RehearsalFindings()
    report_to = loaded.config.logging.report_to
    with tempfile.TemporaryDirectory(prefix="simpletuner-rehearsal-") as folder:
        cache = Path(folder) / "cache"
        findings.check(
            "all images and captions", lambda: scan_all(loaded.config, backends, cache, findings)
        )
        findings.check(
            f"report_to {report_to}", lambda: "installed" if tracker_classes(report_to) else ""
        )
        base_dir = loaded.config_path.parent if loaded.config_path else Path.cwd()
        run = reduce_config(loaded.config, Path(folder) / "run", findings)
        small = shrink_datasets(backends)
        if findings.check(
            f"caches, images before training, {STOP_AFTER} steps, checkpoint, stop",
            lambda: train_until(run, small, base_dir, STOP_AFTER, findings),
        ):
            findings.check(
                f"resume, steps up to {STEPS}, images after training, export",
                lambda: train_until(run, small, base_dir, None, findings),
            )
            findings.check(
                "report", lambda: f"{write_report(Path(folder) / 'run').stat().st_size} bytes"
            )
    print_findings(findings)
    return findings.exit_code


def scan_all(
    run: RunConfig, backends: DatasetFile, cache: Path, findings: RehearsalFindings
) -> str:
    """Scan the whole dataset at its real sizes; only the headers of local images are read."""
    datasets = [*backends.train, *backends.eval]
    with ExitStack() as closing:
        store = open_remote_store(datasets, run.cache, cache, findings, closing)
        scanned = scan_datasets(datasets, run.data, run.training.seed, findings, store=store)
    for item in scanned.rejected:
        findings.warnings.append(f"{item.path} would not be used: {item.detail}")
    held_out = {dataset.id for dataset in backends.eval}
    train = [item for item in scanned.samples if item.sample.dataset not in held_out]
    buckets = len({item.bucket_px for item in train})
    counted = f"{buckets} bucket" if buckets == 1 else f"{buckets} buckets"
    images = sum(item.crop_index == 0 for item in train)
    return f"{images} to train on in {counted}, {len(scanned.samples) - len(train)} held out"


def reduce_config(run: RunConfig, output_dir: Path, findings: RehearsalFindings) -> RunConfig:
    """Return the same options for the bundled model, with everything that takes long reduced."""
    target = run.adapter.flux_lora_target
    if target in ("tiny", "nano"):
        findings.warnings.append(
            f"flux_lora_target = {target} needs blocks that the small model does not have; "
            "the dry run uses all"
        )
        target = "all"
    chosen = run.adapter.lora_target_modules
    if chosen is not None:
        findings.warnings.append(
            "lora_target_modules is used as it is, but the small model has fewer blocks"
        )
    metrics = [
        name
        for name in parse_metric_names(run.validation.evaluation_type)
        if not IMAGE_METRICS[name].models
    ]
    if needs_evaluation_model(run.validation.evaluation_type):
        findings.warnings.append(
            "clip, likeness and diversity are not part of the dry run, which loads no other model"
        )
    training = run.training
    return config_from_resolved(
        {
            **resolved_options(run),
            "model_flavour": "nano",
            "pretrained_model_name_or_path": None,
            **ON_THIS_MACHINE_ALONE,
            "pretrained_transformer_model_name_or_path": None,
            "pretrained_vae_model_name_or_path": None,
            "pretrained_t5_model_name_or_path": None,
            "revision": None,
            "variant": None,
            "flux_lora_target": target,
            "init_lora": None,
            "cache_dir": str(output_dir.with_name("cache")),
            "output_dir": str(output_dir),
            "max_train_steps": STEPS,
            "num_train_epochs": None,
            "train_batch_size": min(training.train_batch_size, 2),
            "gradient_accumulation_steps": min(training.gradient_accumulation_steps, 2),
            "lr_warmup_steps": min(run.optimizer.lr_warmup_steps, 1),
            "resume_from_checkpoint": "latest",
            "checkpoint_step_interval": STOP_AFTER,
            "checkpoint_epoch_interval": None,
            "validation_step_interval": STEPS,
            "eval_steps_interval": STEPS,
            "validation_num_inference_steps": 2,
            "validation_resolution": str(SIDE_PX),
            "evaluation_type": ",".join(metrics) or "none",
            "pretrained_evaluation_model_name_or_path": None,
            "evaluation_prompts": 2,
            "num_validation_images": 1,
            "num_eval_images": 4,
            "report_to": "none",
            "webhook_config": None,
        }
    )


def shrink_datasets(backends: DatasetFile) -> DatasetFile:
    """Return every dataset with a few samples, at a small size."""

    def shrink(dataset: DatasetConfig) -> DatasetConfig:
        own = dataset.resize_crop
        ratios = tuple(width / height for width, height in own.resolution_buckets)
        resize_crop = dataclasses.replace(
            own,
            resolution_buckets=(),
            # The buckets are made at the small size, in the same aspect ratios.
            crop_aspect_buckets=ratios or own.crop_aspect_buckets,
            resolution=float(SIDE_PX),
            resolution_type="pixel_area",
            minimum_image_size=None,
            maximum_image_size=None,
            target_downsample_size=None,
            train_batch_size=own.train_batch_size and min(own.train_batch_size, 2),
        )
        limit = min(dataset.max_num_samples or MAX_SAMPLES_PER_SET, MAX_SAMPLES_PER_SET)
        return dataclasses.replace(dataset, resize_crop=resize_crop, max_num_samples=limit)

    return dataclasses.replace(
        backends,
        train=tuple(map(shrink, backends.train)),
        eval=tuple(map(shrink, backends.eval)),
        text_cache_dir=None,
    )


def train_until(
    run: RunConfig,
    backends: DatasetFile,
    base_dir: Path,
    stop_after: int | None,
    findings: RehearsalFindings,
) -> str:
    """Train up to `stop_after` steps and stop as Ctrl-C does, or train to the end."""
    last: list[StepCompleted] = []
    stages: list[str] = []

    def emit(event: Event) -> None:
        findings(event)
        if isinstance(event, StepCompleted):
            last.append(event)
        if isinstance(event, StageCompleted):
            stages.append(f"{event.stage} {event.done}")

    with RunFolder(Path(run.training.output_dir)) as folder, ExitStack() as closing:

        def stop() -> bool:
            return bool(last) and last[-1].step == stop_after

        try:
            loop.train(
                build_trainer_context(run, backends, base_dir, folder, World(), stop, emit, closing)
            )
        except TrainingStopped:
            return f"{', '.join(stages)}; loss {last[-1].loss:.3f}"
    return f"loss {last[-1].loss:.3f}"


def print_findings(findings: RehearsalFindings) -> None:
    """Print one line per check, warning and problem, and a summary."""
    for line in findings.passed:
        print(f"  ok       {line}")
    for line in dict.fromkeys(findings.warnings):
        print(f"  warning  {line}")
    for line in findings.problems:
        print(f"  PROBLEM  {line}")
    summary = "the training would fail" if findings.problems else "ready to train"
    counts = f"problems: {len(findings.problems)}, warnings: {len(set(findings.warnings))}"
    print(f"dry run: {summary} ({counts})")
