"""Files of the model that scores images: found, downloaded, and measured for the plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simpletuner.config.evaluation_models import (
    DEFAULT_EVALUATION_MODEL,
    DEFAULT_MODEL_BYTES,
    find_model_problem,
)
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.event_types import Emit
from simpletuner.models.weights.model_folder import weight_files

OPTION = "pretrained_evaluation_model_name_or_path"
WEIGHTS_STEM = "model"
WEIGHT_PATTERNS = [f"{WEIGHTS_STEM}.safetensors", f"{WEIGHTS_STEM}-?????-of-?????.safetensors"]
SMALL_PATTERNS = [
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    f"{WEIGHTS_STEM}.safetensors.index.json",
]


@dataclass(frozen=True)
class EvaluationModelSize:
    """Bytes of the weights, and how many of them are not downloaded yet.

    is_assumed: whether the size of the default model stands for one that was never downloaded.
    """

    weights: int
    download: int
    is_assumed: bool


def locate_evaluation_model(name: str | None, evaluation_type: str, emit: Emit) -> Path:
    """Return the folder of the model, downloading what is missing; offline once it is cached.

    Raises ConfigError when it is not a model that can score these metrics, or has no safetensors
    file, and DownloadError when the hub fails.
    """
    name = name or DEFAULT_EVALUATION_MODEL
    folder = Path(os.path.expanduser(name))
    check = partial(_require_usable_model, name, evaluation_type)
    if folder.is_dir():
        check(folder)
    elif HUB_ID_PATTERN.fullmatch(name):
        from simpletuner.models.weights.hub_download import download_files

        folder, _ = download_files(name, SMALL_PATTERNS, WEIGHT_PATTERNS, None, check, emit)
        check(folder)
    else:
        raise ConfigError(
            [Problem(OPTION, f"{name} is neither a folder nor a hub repository (owner/name)")]
        )
    if not _files(folder):
        raise ConfigError(
            [
                Problem(
                    OPTION,
                    f"{name} has no {WEIGHTS_STEM}.safetensors; other weight files can run code "
                    "when they are read, so they are not used",
                )
            ]
        )
    return folder


def measure_evaluation_model(name: str | None) -> EvaluationModelSize:
    """Return the size of the model without a request to the hub."""
    name = name or DEFAULT_EVALUATION_MODEL
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str) or not _files(Path(config).parent):
            is_assumed = name != DEFAULT_EVALUATION_MODEL
            return EvaluationModelSize(DEFAULT_MODEL_BYTES, DEFAULT_MODEL_BYTES, is_assumed)
        folder = Path(config).parent
    size = sum(path.stat().st_size for path in _files(folder))
    return EvaluationModelSize(size, 0, False)


def _files(folder: Path) -> list[Path]:
    """Return the weight files; empty unless at least one is there."""
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        return []
    return weight_files(folder, WEIGHTS_STEM)


def _require_usable_model(name: str, evaluation_type: str, folder: Path) -> None:
    problem = find_model_problem(name, folder, evaluation_type)
    if problem is not None:
        raise ConfigError([Problem(OPTION, problem)])
