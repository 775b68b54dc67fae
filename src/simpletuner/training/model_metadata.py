"""What the header of a file tells people: modelspec and ss_* fields. No path, token or name of a machine."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from simpletuner import __version__
from simpletuner.config import lycoris_config
from simpletuner.config.compare_configs import training_config_hash
from simpletuner.config.load import resolved_options
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import RunConfig
from simpletuner.data.sample_types import BucketedSample

THUMBNAIL_BYTES = 64 << 10  # of the whole data: address
THUMBNAIL_PX = 512
MAX_TAGS, MAX_TAG_LENGTH = 200, 60  # the most frequent ones; longer pieces are sentences


@dataclass(frozen=True)
class RunMetadata:
    """All that is known of a run. base: as Source.name has it. samples: that are trained on.

    prompts: instance prompts of the datasets. epoch: of a step. run_dir: where validation pictures
    lie.
    """

    run: RunConfig
    family: str
    base_model: str
    samples: Sequence[BucketedSample]
    instance_prompts: Sequence[str]
    epoch_at: Callable[[int], int]
    run_dir: Path

    @property
    def title(self) -> str:
        return self.run.publishing.modelspec_title or self.run_dir.name

    @property
    def base_model_name(self) -> str:
        """A hub id or a flavour as it is, the last part of a path."""
        return public_name(self.base_model)

    @property
    def trigger(self) -> str:
        given = self.run.publishing.modelspec_trigger or self.run.data.instance_prompt
        return given or ", ".join(dict.fromkeys(self.instance_prompts))

    def file_metadata(self, step: int, weights: str) -> dict[str, str]:
        """weights: "trained" or "average". What is not known is left out."""
        told = {**self._modelspec_fields(step), **self._training_fields(step), "weights": weights}
        return {key: value for key, value in told.items() if value}

    def _modelspec_fields(self, step: int) -> dict[str, str]:
        said, uses_lora = self.run.publishing, self.run.model.model_type == "lora"
        sizes = Counter(one.bucket_px for one in self.samples).most_common(1)
        return {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{self.family}/lora" if uses_lora else self.family,
            "modelspec.implementation": "diffusers",
            "modelspec.title": self.title,
            "modelspec.author": said.modelspec_author or "",
            "modelspec.description": said.modelspec_comment or "",
            "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "modelspec.resolution": "x".join(map(str, sizes[0][0])) if sizes else "",
            "modelspec.prediction_type": "flow",
            "modelspec.trigger_phrase": self.trigger,
            "modelspec.thumbnail": thumbnail_data_url(latest_validation_image(self.run_dir, step)),
        }

    def _training_fields(self, step: int) -> dict[str, str]:
        run = self.run
        told: dict[str, object] = {
            "software": f"simpletuner {__version__}",
            "base_model": self.base_model_name,
            "base_model_precision": run.model.base_model_precision,
            "model_family": self.family,
            "optimizer": run.optimizer.optimizer,
            "training_config_hash": training_config_hash(resolved_options(run)),
            "ss_sd_model_name": self.base_model_name,
            "ss_base_model_version": self.family,
            "ss_output_name": self.title,
            "ss_learning_rate": f"{run.optimizer.learning_rate:g}",
            "ss_lr_scheduler": run.optimizer.lr_scheduler,
            "ss_optimizer": run.optimizer.optimizer,
            "ss_steps": step,
            "ss_epoch": self.epoch_at(step),
            "ss_num_train_images": len(self.samples),
            "ss_gradient_accumulation_steps": run.training.gradient_accumulation_steps,
            "ss_seed": run.training.seed,
            "ss_tag_frequency": json.dumps(tag_frequency(self.samples), ensure_ascii=False),
        }
        if run.model.model_type == "lora":
            # As the file has it: alpha is folded in, so that its strength is 1 at any rank.
            rank, alpha = run.adapter.lora_rank, run.adapter.lora_alpha or run.adapter.lora_rank
            told |= {"ss_network_dim": rank, "ss_network_alpha": rank, "rank": rank, "alpha": alpha}
            if run.adapter.lora_type == "lycoris":
                asked = lycoris_config.require_lycoris_config(run.adapter)
                told |= {
                    "ss_network_dim": asked.dim,
                    "ss_network_alpha": asked.alpha,
                    "rank": asked.dim,
                }
                told |= {"ss_network_args": json.dumps({"algo": asked.algo}), "alpha": asked.alpha}
        return {key: str(value) for key, value in told.items()}


def public_name(name: str) -> str:
    return (
        name
        if HUB_ID_PATTERN.fullmatch(name) and not Path(name).exists()
        else re.split(r"[/\\]", name)[-1]
    )


def tag_frequency(samples: Sequence[BucketedSample]) -> dict[str, dict[str, int]]:
    """Dataset -> tag -> pictures that have it, as sites show them; the parts of captions between commas."""
    found: dict[str, Counter[str]] = {}
    for one in samples:
        tags = {tag.strip() for caption in one.sample.captions for tag in caption.split(",")}
        short = (tag for tag in tags if 0 < len(tag) <= MAX_TAG_LENGTH)
        found.setdefault(public_name(one.sample.dataset), Counter()).update(short)
    return {
        dataset: dict(counted.most_common(MAX_TAGS)) for dataset, counted in sorted(found.items())
    }


def latest_validation_image(run_dir: Path, step: int) -> Path | None:
    """The first of the last validation up to a step, of the weights at full strength; None: not drawn yet."""
    drawn = sorted(
        run_dir.glob("images/step-*/*.png"), key=lambda path: (path.parent.name, path.name)
    )
    named = [path for path in drawn if 0 < _step_of(path) <= step and "-strength-" not in path.name]
    return next((path for path in named if path.parent == named[-1].parent), None)


def _step_of(picture: Path) -> int:
    number = picture.parent.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def thumbnail_data_url(picture: Path | None) -> str:
    """A JPEG as a data: address of at most THUMBNAIL_BYTES; empty where there is no readable picture."""
    if picture is None:
        return ""
    try:
        with Image.open(picture) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # Pillow's three ways to say that a PNG is damaged
        return ""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    for quality in (85, 60, 35, 10):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        address = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(address) <= THUMBNAIL_BYTES:
            return address
    return ""
