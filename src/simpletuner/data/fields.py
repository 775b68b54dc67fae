"""Every field a dataset file may have: what it takes, or why it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LOCAL_ONLY = "only local folders are read"
ONE_CACHE = "the run keeps one cache, addressed by content; its place is cache_dir of the config"
NO_PAIRS = "paired pictures are not trained on yet"
WHOLE_RUN = "a dataset takes part in the whole run; activity windows are not offered yet"
NO_DELETING = "nothing in a dataset folder is ever deleted; the list of rejected files names them"


@dataclass(frozen=True)
class Field:
    """expects: the words of the error message. read: the value as used, or None when it is not allowed."""

    expects: str
    read: Callable[[Any], Any]
    hints: Mapping[str, str] | None = None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


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
    return float(value) if _is_number(value) and 0 < value <= 1e6 else None


def _size(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 <= value <= 1e6 else None


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
    return Field(
        "one of " + ", ".join(allowed),
        lambda value: spellings.get(value) if isinstance(value, str) else None,
        hints,
    )


FLAG = Field("true or false", _flag)
TEXT = Field("text", _text)
POSITIVE = Field("a number above 0", _positive)
SIZE = Field("a number, 0 for no limit", _size)

# Fields of every set.
SHARED: Mapping[str, Field] = {
    "id": TEXT,
    "type": _choice("local", hints=dict.fromkeys(("aws", "csv", "huggingface", "webshart"), LOCAL_ONLY)),
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
    "instance_prompt": Field("text or a list of texts, none of them blank", _prompts),
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
    "crop_aspect_buckets": Field("a list of ratios width / height from 0.01 to 100", _ratios),
    "minimum_aspect_ratio": POSITIVE,
    "maximum_aspect_ratio": POSITIVE,
    "minimum_image_size": SIZE,
    "maximum_image_size": SIZE,
    "target_downsample_size": SIZE,
    "repeats": Field("a whole number of EXTRA passes, 0 or more", _count),
    "probability": POSITIVE,
    "max_num_samples": Field("a whole number, 0 for all", _count),
}  # fmt: skip

# Fields of text_embeds and image_embeds sets.
CACHES: Mapping[str, Field] = {
    "default": FLAG,
    "cache_dir": Field("a folder; {env:NAME} is the only placeholder", _folder),
}

# Read, and without effect on what is trained: a note says why.
UNNEEDED: Mapping[str, str] = {
    "cache_dir_vae": ONE_CACHE,
    "text_embeds": ONE_CACHE,
    "image_embeds": ONE_CACHE,
    "write_batch_size": "cache shards are sized by cache_shard_mib of the config",
    "hash_filenames": "cache entries are always named by content",
    "preserve_data_backend_cache": "the scan keeps no cache in the dataset folder",
    "metadata_update_interval": "the scan keeps no cache in the dataset folder",
}

ELSEWHERE = (
    "aws_bucket_name aws_data_prefix aws_region_name aws_endpoint_url aws_access_key_id "
    "aws_secret_access_key csv_file csv_caption_column csv_cache_dir csv_url_column dataset_name split "
    "revision image_column caption_column num_proc streaming huggingface"
)
# Known elsewhere and refused here, unless the value is the one that asks for what happens anyway.
REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "metadata_backend": ("pictures and captions are found by looking into the folder", ("discovery",)),
    "skip_file_discovery": ("the scan reads headers only and is always done", ("",)),
    "train_batch_size": ("set train_batch_size once in the config; it holds for all datasets", ()),
    "text_encoder_batch_size": ("set text_encoder_batch_size in the config", ()),
    "max_upscale_threshold": ("use minimum_image_size to leave out small pictures", ()),
    "aspect_bucket_rounding": ("buckets follow from the exact aspect", ()),
    "aspect_bucket_alignment": ("the alignment is the model's own", (64,)),
    "vae_cache_clear_each_epoch": ("crops stay the same in every epoch", (False,)),
    "vae_cache_ondemand": ("pictures are encoded before training", (False,)),
    "vae_cache_disable": ("pictures are always encoded once and kept", (False,)),
    "text_cache_ondemand": ("captions are encoded before training", (False,)),
    "text_cache_disable": ("captions are always encoded once and kept", (False,)),
    "delete_unwanted_images": (NO_DELETING, (False,)),
    "delete_problematic_images": (NO_DELETING, (False,)),
    "delete_nsfw_images": (NO_DELETING, (False,)),
    "is_regularisation_data": ("regularisation sets are not offered yet", (False,)),
    "is_regularization_data": ("regularisation sets are not offered yet", (False,)),
    "slider_strength": ("slider training is not offered yet", ()),
    "timestep_sampling_offset": ("sigma is drawn alike for all datasets", (0,)),
    "start_epoch": (WHOLE_RUN, (0, 1)),
    "start_step": (WHOLE_RUN, (0,)),
    "end_epoch": (WHOLE_RUN, ()),
    "end_step": (WHOLE_RUN, ()),
    "caption_shuffle": ("captions are used as written; add lines to the caption file", ({"enable": False},)),
    "caption_filter_list": ("captions are used as written", ()),
    "conditioning": (NO_PAIRS, ([],)),
    "conditioning_data": (NO_PAIRS, ()),
    "conditioning_type": (NO_PAIRS, ()),
    "source_dataset_id": (NO_PAIRS, ()),
    "parquet": ("caption tables are not read yet", ()),
    "video": ("Chroma draws single pictures", ()),
    "audio": ("Chroma draws pictures", ()),
    "bbox": ("boxes are not trained on", ()),
    **dict.fromkeys(ELSEWHERE.split(), (LOCAL_ONLY, ())),
}  # fmt: skip

KNOWN = (*SHARED, *PICTURES, *CACHES, *UNNEEDED, *REFUSED)
