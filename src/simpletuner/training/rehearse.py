"""A rehearsal: the person's own dataset and options, a few steps, on the bundled model, on the CPU.

It goes through everything a real run goes through (scan, captions, caches, training, pictures, checkpoint,
stop, resume, export) and lists what would have gone wrong. It needs no weights, no network and no GPU, and
leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.config.load import Loaded, from_resolved, resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset import Backends, Dataset
from simpletuner.data.scan import scan
from simpletuner.errors import SimpleTunerError, Stopped
from simpletuner.events.report import write_report
from simpletuner.events.trackers import kinds
from simpletuner.events.types import Event, StageDone, Stepped, Warned
from simpletuner.training import loop
from simpletuner.training.build import build
from simpletuner.training.rundir import RunFolder

STEPS = 4
STOP_AFTER = 2
SAMPLES = 8
SIDE_PX = 128


@dataclass
class Findings:
    """What the rehearsal saw. problems would end a real run; warnings would be in its log."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    exit_code: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.warnings.append(event.message)

    def attempt(self, what: str, act: Callable[[], str]) -> bool:
        try:
            said = act()
        except SimpleTunerError as error:
            self.problems.append(f"{what}: {error}")
            self.exit_code = self.exit_code or error.exit_code
            return False
        self.passed.append(f"{what}: {said}" if said else what)
        return True


def rehearse(loaded: Loaded, backends: Backends) -> int:
    """Print what worked and what would have gone wrong; returns the exit code of the first problem, or 0."""
    findings = Findings()
    findings.attempt("pictures and captions, all of them", lambda: full_scan(loaded.run, backends, findings))
    report_to = loaded.run.logging.report_to
    findings.attempt(f"report_to {report_to}", lambda: "installed" if kinds(report_to) else "")
    with tempfile.TemporaryDirectory(prefix="simpletuner-rehearsal-") as folder:
        base_dir = loaded.source.parent if loaded.source else Path.cwd()
        run = reduced(loaded.run, Path(folder) / "run", findings)
        small = shrunk(backends)
        if findings.attempt(
            f"caches, pictures before, {STOP_AFTER} steps, checkpoint, stop",
            lambda: part(run, small, base_dir, STOP_AFTER, findings),
        ):
            findings.attempt(
                f"resume, steps to {STEPS}, pictures after, export read back",
                lambda: part(run, small, base_dir, None, findings),
            )
            findings.attempt("report", lambda: f"{write_report(Path(folder) / 'run').stat().st_size} bytes")
    tell(findings)
    return findings.exit_code


def full_scan(run: RunConfig, backends: Backends, findings: Findings) -> str:
    """The whole dataset at its real sizes, headers only."""
    scanned = scan([*backends.train, *backends.eval], run.data, run.training.seed, findings)
    for item in scanned.rejected:
        findings.warnings.append(f"{item.path} would not be used: {item.detail}")
    held_out = {one.id for one in backends.eval}
    train = [item for item in scanned.placed if item.sample.dataset not in held_out]
    buckets = len({item.bucket_px for item in train})
    return f"{len(train)} to train on in {buckets} buckets, {len(scanned.placed) - len(train)} held out"


def reduced(run: RunConfig, output_dir: Path, findings: Findings) -> RunConfig:
    """The same options on the bundled model, with everything that is long made short."""
    target = run.adapter.flux_lora_target
    if target in ("tiny", "nano"):
        findings.warnings.append(
            f"flux_lora_target = {target} needs blocks the small model lacks: rehearsed with all"
        )
        target = "all"
    chosen = run.adapter.lora_target_modules
    if chosen is not None:
        findings.warnings.append(
            "lora_target_modules is rehearsed as given; the small model has fewer blocks"
        )
    training = run.training
    return from_resolved(
        {
            **resolved(run),
            "model_flavour": "nano", "pretrained_model_name_or_path": None, "device": "cpu",
            "pretrained_transformer_model_name_or_path": None, "pretrained_vae_model_name_or_path": None,
            "pretrained_t5_model_name_or_path": None, "revision": None, "variant": None,
            "flux_lora_target": target, "init_lora": None, "cache_dir": None,
            "output_dir": str(output_dir), "max_train_steps": STEPS, "num_train_epochs": None,
            "train_batch_size": min(training.train_batch_size, 2),
            "gradient_accumulation_steps": min(training.gradient_accumulation_steps, 2),
            "lr_warmup_steps": min(run.optimizer.lr_warmup_steps, 1),
            "resume_from_checkpoint": "latest", "checkpoint_step_interval": STOP_AFTER,
            "checkpoint_epoch_interval": None, "validation_step_interval": STEPS,
            "eval_steps_interval": STEPS,
            "validation_num_inference_steps": 2, "validation_resolution": str(SIDE_PX),
            "evaluation_prompts": 2,
            "num_validation_images": 1, "num_eval_images": 4, "report_to": "none", "webhook_config": None,
        }
    )  # fmt: skip


def shrunk(backends: Backends) -> Backends:
    """A handful of samples of every set, at a size the CPU can carry."""

    def small(one: Dataset) -> Dataset:
        framing = dataclasses.replace(
            one.framing, resolution=float(SIDE_PX), resolution_type="pixel_area",
            minimum_image_size=None, maximum_image_size=None, target_downsample_size=None,
        )  # fmt: skip
        limit = min(one.max_num_samples or SAMPLES, SAMPLES)
        return dataclasses.replace(one, framing=framing, max_num_samples=limit)

    return dataclasses.replace(
        backends,
        train=tuple(map(small, backends.train)),
        eval=tuple(map(small, backends.eval)),
        text_cache_dir=None,
    )


def part(
    run: RunConfig, backends: Backends, base_dir: Path, stop_after: int | None, findings: Findings
) -> str:
    """Train until `stop_after` steps (as Ctrl-C would), or to the end."""
    last: list[Stepped] = []
    stages: list[str] = []

    def emit(event: Event) -> None:
        findings(event)
        if isinstance(event, Stepped):
            last.append(event)
        if isinstance(event, StageDone):
            stages.append(f"{event.stage} {event.done}")

    with RunFolder(Path(run.training.output_dir)) as folder, ExitStack() as closing:

        def stop() -> bool:
            return bool(last) and last[-1].step == stop_after

        try:
            loop.train(build(run, backends, base_dir, folder, stop, emit, closing))
        except Stopped:
            return f"{', '.join(stages)}; loss {last[-1].loss:.3f}"
    return f"loss {last[-1].loss:.3f}"


def tell(findings: Findings) -> None:
    for line in findings.passed:
        print(f"  ok       {line}")
    for line in dict.fromkeys(findings.warnings):
        print(f"  warning  {line}")
    for line in findings.problems:
        print(f"  PROBLEM  {line}")
    verdict = "would not have trained" if findings.problems else "nothing stands in the way of training"
    counts = f"problems: {len(findings.problems)}, warnings: {len(set(findings.warnings))}"
    print(f"rehearsal: {verdict} ({counts})")
