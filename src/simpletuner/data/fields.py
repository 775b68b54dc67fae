"""Every field a dataset file may have: what it takes, or why it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LOCAL_ONLY = "only local folders are read"
ONE_CACHE = "the run keeps one cache, addressed by content; its place is cache_dir of the config"
LARGEST = 16384
NO_PAIRS = "paired pictures are not trained on yet"


@dataclass(frozen=True)
class Field:
    """expects: the words of the error message. read: the value as used, or None when it is not allowed.

    kind, choices: as of an option; "list" is a list, or one of its items.
    """

    expects: str
    read: Callable[[Any], Any]
    hints: Mapping[str, str] | None = None
    kind: str = "text"
    choices: tuple[str, ...] = ()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _folder(value: Any) -> str | None:
    return _text(value) if "{" not in str(value) else None


def _prompts(value: Any) -> tuple[str, ...] | None:
    listed = value if isinstance(value, list) else [value]
    prompts = tuple(prompt.strip() for prompt in listed if isinstance(prompt, str) and prompt.strip())
    return prompts if prompts and len(prompts) == len(listed) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 < value <= LARGEST else None


def _size(value: Any) -> float | None:
    return float(value) if value == 0 and _is_number(value) else _positive(value)


def _count(value: Any) -> int | None:
    return int(value) if _is_number(value) and value == int(value) and 0 <= value <= 1_000_000 else None


def _ratios(value: Any) -> tuple[float, ...] | None:
    if not isinstance(value, list) or not value or not all(_is_number(item) for item in value):
        return None
    return tuple(float(item) for item in value) if all(0.01 <= item <= 100 for item in value) else None


def _choice(
    *allowed: str, also: Mapping[str, str] | None = None, hints: Mapping[str, str] | None = None
) -> Field:
    """also: other spellings of an allowed value. hints: values refused with a reason of their own."""
    spellings = {name: name for name in allowed} | dict(also or {})
    expects = "one of " + ", ".join(allowed)
    return Field(
        expects,
        lambda value: spellings.get(value) if isinstance(value, str) else None,
        hints,
        "choice",
        allowed,
    )


FLAG = Field("true or false", lambda value: value if isinstance(value, bool) else None, kind="flag")
TEXT = Field("text", _text)
POSITIVE = Field(f"a number above 0, at most {LARGEST}", _positive, kind="number")
SIZE = Field(f"a number up to {LARGEST}, 0 for no limit", _size, kind="number")

# Fields of every set.
SHARED: Mapping[str, Field] = {
    "id": TEXT,
    "type": _choice(
        "local", hints=dict.fromkeys(("aws", "csv", "huggingface", "memory", "webshart"), LOCAL_ONLY)
    ),
    "dataset_type": _choice(
        "image", "eval", "text_embeds", "image_embeds",
        hints={
            "video": "Chroma draws single pictures", "audio": "Chroma draws pictures",
            "caption": "sets of captions without pictures are not offered",
            "conditioning": NO_PAIRS, "conditioning_image_embeds": NO_PAIRS,
        },
    ),
    "disabled": FLAG,
    "disable": FLAG,
}  # fmt: skip

# Fields of image and eval sets.
PICTURES: Mapping[str, Field] = {
    "instance_data_dir": TEXT,
    "caption_strategy": _choice(
        "textfile", "filename", "instanceprompt", also={"instance_prompt": "instanceprompt"},
        hints=dict.fromkeys(("parquet", "huggingface", "csv", "webshart"), "caption tables are not read yet"),
    ),
    "instance_prompt": Field("text or a list of texts, none of them blank", _prompts, kind="list"),
    "prepend_instance_prompt": FLAG,
    "only_instance_prompt": FLAG,
    "disable_multiline_split": FLAG,
    "resolution": POSITIVE,
    "resolution_type": _choice("pixel", "area", "pixel_area"),
    "crop": FLAG,
    "crop_style": _choice(
        "center", "random", "corner", also={"centre": "center"},
        hints={"face": "faces are not looked for"},
    ),
    "crop_aspect": _choice(
        "square", "preserve", "closest", hints={"random": "a random aspect per picture is not offered"}
    ),
    "crop_aspect_buckets": Field("a list of ratios width / height from 0.01 to 100", _ratios, kind="list"),
    "minimum_aspect_ratio": POSITIVE,
    "maximum_aspect_ratio": POSITIVE,
    "minimum_image_size": SIZE,
    "maximum_image_size": SIZE,
    "target_downsample_size": SIZE,
    "repeats": Field("a whole number of EXTRA passes, 0 or more", _count, kind="integer"),
    "probability": POSITIVE,
    "max_num_samples": Field("a whole number, 0 for all", _count, kind="integer"),
}  # fmt: skip

# Fields of text_embeds and image_embeds sets.
CACHES: Mapping[str, Field] = {
    "default": FLAG,
    "cache_dir": Field("a folder; {env:NAME} is the only placeholder", _folder),
}

# Read, and without effect on what is trained: a note says why.
NOTED: Mapping[str, str] = {
    ONE_CACHE: "cache_dir_vae text_embeds image_embeds",
    "scans leave no files behind": "preserve_data_backend_cache metadata_update_interval",
    "folders are always looked into, and nothing unchanged is encoded again": "skip_file_discovery",
    "cache shards are sized by cache_shard_mib of the config": "write_batch_size",
    "cache entries are always named by content": "hash_filenames",
}

# Fields of other trainers that are refused, by reason; HARMLESS are values that ask for what happens anyway.
REASONS: Mapping[str, str] = {
    "pictures and captions are found by looking into the folder": "metadata_backend",
    "set it once in the config, where it holds for all datasets": "train_batch_size text_encoder_batch_size",
    "use minimum_image_size to leave out small pictures": "max_upscale_threshold",
    "buckets follow from the exact aspect and the model": "aspect_bucket_rounding aspect_bucket_alignment",
    "pictures are encoded once, before training":
        "vae_cache_clear_each_epoch vae_cache_ondemand vae_cache_disable",
    "captions are encoded once, before training": "text_cache_ondemand text_cache_disable",
    "nothing in a dataset folder is ever deleted; a list of rejected files is written":
        "delete_unwanted_images delete_problematic_images delete_nsfw_images",
    "regularisation sets are not offered yet": "is_regularisation_data is_regularization_data",
    "slider training is not offered yet": "slider_strength",
    "sigma is drawn alike for all datasets": "timestep_sampling_offset",
    "a dataset takes part in the whole run": "start_epoch start_step end_epoch end_step",
    "captions are used as written; more lines are more alternatives": "caption_shuffle caption_filter_list",
    NO_PAIRS:
        "conditioning conditioning_data conditioning_type conditioning_image_embeds source_dataset_id "
        "cache_dir_conditioning_image_embeds conditioning_image_embed_batch_size",
    "caption tables are not read yet": "parquet",
    "Chroma draws single pictures": "video audio bbox num_frames s2v_datasets",
    LOCAL_ONLY:
        "aws_bucket_name aws_data_prefix aws_region_name aws_endpoint_url aws_access_key_id "
        "aws_secret_access_key csv_file csv_caption_column csv_cache_dir csv_url_column dataset_name split "
        "revision image_column caption_column num_proc streaming huggingface "
        "memory_filesystem_path memory_filesystem_size memory_filesystem_sudo",
}  # fmt: skip
REFUSED, UNNEEDED = (
    {name: reason for reason, names in table.items() for name in names.split()} for table in (REASONS, NOTED)
)
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "metadata_backend": ("discovery", "json"), "aspect_bucket_alignment": (64,),
    "timestep_sampling_offset": (0,), "start_epoch": (0, 1), "start_step": (0,), "conditioning": ([],),
    "caption_shuffle": ({"enable": False},),
    **{name: (False,) for name in REFUSED if name.startswith(("vae_", "text_cache", "delete_", "is_reg"))},
}  # fmt: skip

KNOWN = (*SHARED, *PICTURES, *CACHES, *UNNEEDED, *REFUSED)
