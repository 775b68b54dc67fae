"""Metadata in the header of exported files: modelspec and ss_* fields.

It contains no path, token or name of a machine.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from simpletuner import __version__
from simpletuner.cache.target_rules import TargetRules
from simpletuner.config import lycoris_config
from simpletuner.config.compare_configs import training_config_hash
from simpletuner.config.load import resolved_options
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import RunConfig
from simpletuner.data.sample_types import BucketedSample
from simpletuner.image_decoding import UndecodableImage, decoder_errors

THUMBNAIL_BYTES = 64 << 10  # of the whole data: URL
THUMBNAIL_PX = 512
MAX_TAGS = 200  # the most frequent ones
MAX_TAG_LENGTH = 60  # longer parts of a caption are sentences


@dataclass(frozen=True)
class RunMetadata:
    """The facts about a run that file headers and the model card contain.

    base_model: the name of the model files. samples: those that are trained on. instance_prompts:
    of the datasets. epoch_at: the epoch of a step. micro_batches_per_step: over all processes.
    run_dir: its images/ has the validation images. rules: what the samples are trained towards.
    """

    run: RunConfig
    family: str
    base_model: str
    samples: Sequence[BucketedSample]
    instance_prompts: Sequence[str]
    epoch_at: Callable[[int], int]
    micro_batches_per_step: int
    run_dir: Path
    rules: TargetRules = field(default_factory=TargetRules)

    @property
    def title(self) -> str:
        return self.run.publishing.modelspec_title or self.run_dir.name

    @property
    def base_model_name(self) -> str:
        """Return a hub id or a flavour unchanged, and only the last part of a path."""
        return public_name(self.base_model)

    @property
    def trigger(self) -> str:
        given = self.run.publishing.modelspec_trigger or self.run.data.instance_prompt
        return given or ", ".join(dict.fromkeys(self.instance_prompts))

    def file_metadata(self, step: int, weights: str) -> dict[str, str]:
        """Return the header of a file, without unknown fields. weights: "trained" or "average"."""
        fields = {**self._modelspec_fields(step), **self._training_fields(step), "weights": weights}
        return {key: value for key, value in fields.items() if value}

    def _modelspec_fields(self, step: int) -> dict[str, str]:
        options, uses_lora = self.run.publishing, self.run.model.model_type == "lora"
        sizes = Counter(sample.bucket_px for sample in self.samples).most_common(1)
        return {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{self.family}/lora" if uses_lora else self.family,
            "modelspec.implementation": "diffusers",
            "modelspec.title": self.title,
            "modelspec.author": options.modelspec_author or "",
            "modelspec.description": options.modelspec_comment or "",
            "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "modelspec.resolution": "x".join(map(str, sizes[0][0])) if sizes else "",
            "modelspec.prediction_type": "flow",
            "modelspec.trigger_phrase": self.trigger,
            "modelspec.thumbnail": thumbnail_data_url(latest_validation_image(self.run_dir, step)),
        }

    def _training_fields(self, step: int) -> dict[str, str]:
        run = self.run
        fields: dict[str, object] = {
            "software": f"simpletuner {__version__}",
            "base_model": self.base_model_name,
            "base_model_precision": run.model.base_model_precision,
            "model_family": self.family,
            "optimizer": run.optimizer.optimizer,
            "training_config_hash": training_config_hash(
                resolved_options(run), self.micro_batches_per_step
            ),
            "ss_sd_model_name": self.base_model_name,
            "ss_base_model_version": self.family,
            "ss_output_name": self.title,
            "ss_learning_rate": f"{run.optimizer.learning_rate:g}",
            "ss_lr_scheduler": run.optimizer.lr_scheduler,
            "ss_optimizer": run.optimizer.optimizer,
            "ss_steps": step,
            "ss_epoch": self.epoch_at(step),
            "ss_num_train_images": len(self.samples),
            "ss_gradient_accumulation_steps": self.micro_batches_per_step,
            "ss_seed": run.training.seed,
            "ss_tag_frequency": json.dumps(tag_frequency(self.samples), ensure_ascii=False),
        }
        if run.model.model_type == "lora":
            # The file has alpha folded into the weights, so its scale alpha / rank is 1.
            rank, alpha = run.adapter.lora_rank, run.adapter.lora_alpha or run.adapter.lora_rank
            fields |= {
                "ss_network_dim": rank,
                "ss_network_alpha": rank,
                "rank": rank,
                "alpha": alpha,
            }
            if run.adapter.lora_rank_by_module:
                ranks = {"rank_by_module": run.adapter.lora_rank_by_module}
                fields["ss_network_args"] = json.dumps(ranks)
            if run.adapter.lora_type == "lycoris":
                lycoris = lycoris_config.require_lycoris_config(run.adapter)
                fields |= {
                    "ss_network_dim": lycoris.dim,
                    "ss_network_alpha": lycoris.alpha,
                    "ss_network_args": json.dumps({"algo": lycoris.algo}),
                    "rank": lycoris.dim,
                    "alpha": lycoris.alpha,
                }
        return {key: str(value) for key, value in fields.items()}


def public_name(name: str) -> str:
    """Return a hub id or a plain name unchanged, and only the last part of a path."""
    return (
        name
        if HUB_ID_PATTERN.fullmatch(name) and not Path(name).exists()
        else re.split(r"[/\\]", name)[-1]
    )


def tag_frequency(samples: Sequence[BucketedSample]) -> dict[str, dict[str, int]]:
    """Return dataset -> tag -> number of images, as model sites show it.

    Tags are the parts of captions between commas.
    """
    counts: dict[str, Counter[str]] = {}
    for placed in samples:
        tags = {tag.strip() for caption in placed.sample.captions for tag in caption.split(",")}
        short = (tag for tag in tags if 0 < len(tag) <= MAX_TAG_LENGTH)
        counts.setdefault(public_name(placed.sample.dataset), Counter()).update(short)
    return {
        dataset: dict(counter.most_common(MAX_TAGS)) for dataset, counter in sorted(counts.items())
    }


def latest_validation_image(run_dir: Path, step: int) -> Path | None:
    """Return the first image of the last validation up to `step`, at full LoRA strength.

    None when there is no image yet.
    """
    images = sorted(
        run_dir.glob("images/step-*/*.png"), key=lambda path: (path.parent.name, path.name)
    )
    candidates = [
        path for path in images if 0 < _step_of(path) <= step and "-strength-" not in path.name
    ]
    return next((path for path in candidates if path.parent == candidates[-1].parent), None)


def _step_of(image_path: Path) -> int:
    number = image_path.parent.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def thumbnail_data_url(image_path: Path | None) -> str:
    """Return a JPEG as a data: URL of at most THUMBNAIL_BYTES; "" without a readable image."""
    if image_path is None:
        return ""
    try:
        with decoder_errors(), Image.open(image_path) as opened:
            image = opened.convert("RGB")
    except UndecodableImage:
        return ""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    for quality in (85, 60, 35, 10):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(url) <= THUMBNAIL_BYTES:
            return url
    return ""


def uses_bundled_base(run: RunConfig) -> bool:
    """Return whether the run trains the small bundled model, which other programs cannot load."""
    return run.model.model_flavour == "nano" and run.model.pretrained_model_name_or_path is None
