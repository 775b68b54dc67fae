"""Every field a dataset file may have: declared as options are, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from simpletuner.config.option import OptionSection, option
from simpletuner.config.option_catalog import Option, all_options, section_options

LOCAL_ONLY_REASON = "only local folders are read"
ONE_CACHE_REASON = (
    "the run keeps one cache, addressed by content; its place is cache_dir of the config"
)
NO_PAIRS_REASON = "paired pictures are not trained on yet"
PromptText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
AspectRatio = Annotated[float, Field(ge=0.01, le=100)]

# A table: name, type and default; what it means; its bounds and other values.


class CommonDatasetFields(OptionSection):
    """Every set"""

    id: str = option("", "Name of the dataset, unique in the run.")
    type: Literal["local"] = option(
        "local",
        "Where the pictures are.",
        refused_values=dict.fromkeys(
            ("aws", "csv", "huggingface", "memory", "webshart"), LOCAL_ONLY_REASON
        ),
    )
    dataset_type: Literal["image", "eval", "text_embeds", "image_embeds"] = option(
        "image",
        "image is trained on; eval is held out and measured.",
        refused_values={
            "video": "Chroma draws single pictures",
            "audio": "Chroma draws pictures",
            "caption": "sets of captions without pictures are not offered",
            "conditioning": NO_PAIRS_REASON,
            "conditioning_image_embeds": NO_PAIRS_REASON,
        },
    )
    disabled: bool = option(False, "Leave this dataset out.")
    disable: bool = option(False, "Another way to say disabled.")


class ImageDatasetFields(OptionSection):
    """Sets of pictures, image and eval; besides these they take fields of OF_THE_RUN"""

    instance_data_dir: str = option(
        "", "Folder of the pictures; it is only ever read.", path="file"
    )
    instance_prompt: list[PromptText] | None = option(
        None,
        "The captions of caption_strategy instanceprompt: a text, or a list of texts.",
        min_length=1,
    )
    disable_multiline_split: bool = option(
        False, "Take a caption file as one caption; otherwise every line is an alternative."
    )
    crop: bool = option(False, "Cut pictures; otherwise they keep their own aspect.")
    crop_style: Literal["center", "random", "corner"] = option(
        "random",
        "Which part is kept: the centre, a random place per picture, or the top left corner.",
        value_aliases={"centre": "center"},
        refused_values={"face": "faces are not looked for"},
    )
    crop_aspect: Literal["square", "preserve", "closest"] = option(
        "square",
        "Shape of the cut: square, the picture's own, or the closest of crop_aspect_buckets.",
        refused_values={"random": "a random aspect per picture is not offered"},
    )
    crop_aspect_buckets: list[AspectRatio] | None = option(
        None,
        "Ratios width / height, 0.01 to 100, for crop_aspect closest; null is the usual ones.",
        min_length=1,
    )
    repeats: int = option(
        0,
        "Extra passes over every picture in an epoch; 0 is one visit.",
        unit="extra passes",
        ge=0,
        le=10**6,
    )
    probability: float = option(
        1.0, "Share of the dataset that an epoch shows, beside the other datasets.", gt=0, le=16384
    )
    max_num_samples: int | None = option(
        None, "Take this many pictures only; null is all.", zero_is_null=True, ge=1, le=10**6
    )


class CacheDatasetFields(OptionSection):
    """Sets of type text_embeds and image_embeds"""

    default: bool = option(False, "The one that is used where several are listed.")
    cache_dir: str | None = option(
        None, "must be a folder; {env:NAME} is the only placeholder", pattern=r"^[^{]*$"
    )


COMMON_FIELDS: Mapping[str, Option] = section_options("dataset", CommonDatasetFields)
CACHE_FIELDS: Mapping[str, Option] = section_options("dataset", CacheDatasetFields)
_IMAGE_ONLY_FIELDS = section_options("dataset", ImageDatasetFields)
IMAGE_FIELDS: Mapping[str, Option] = {
    name: _IMAGE_ONLY_FIELDS.get(name) or all_options()[name]
    for name in (
        "instance_data_dir",
        "caption_strategy",
        "instance_prompt",
        "prepend_instance_prompt",
        "only_instance_prompt",
        "disable_multiline_split",
        "resolution",
        "resolution_type",
        "crop",
        "crop_style",
        "crop_aspect",
        "crop_aspect_buckets",
        "minimum_aspect_ratio",
        "maximum_aspect_ratio",
        "minimum_image_size",
        "maximum_image_size",
        "target_downsample_size",
        "repeats",
        "probability",
        "max_num_samples",
    )
}
RUN_OPTION_FIELDS = tuple(
    name for name in IMAGE_FIELDS if name not in _IMAGE_ONLY_FIELDS
)  # a set's own value goes before the run's

# Read, and without effect on what is trained: a note says why.
UNNEEDED_BY_REASON: Mapping[str, str] = {
    ONE_CACHE_REASON: "cache_dir_vae text_embeds image_embeds",
    "scans leave no files behind": "preserve_data_backend_cache metadata_update_interval",
    "folders are always looked into, and nothing unchanged is encoded again": "skip_file_discovery",
    "cache shards are sized by cache_shard_mib of the config": "write_batch_size",
    "cache entries are always named by content": "hash_filenames",
}

# Fields of other trainers that are refused, by reason; HARMLESS are values that ask for what happens anyway.
REFUSED_BY_REASON: Mapping[str, str] = {
    "pictures and captions are found by looking into the folder": "metadata_backend",
    "set it once in the config, where it holds for all datasets": "train_batch_size text_encoder_batch_size",
    "use minimum_image_size to leave out small pictures": "max_upscale_threshold",
    "buckets follow from the exact aspect and the model": "aspect_bucket_rounding aspect_bucket_alignment",
    "pictures are encoded once, before training": "vae_cache_clear_each_epoch vae_cache_ondemand vae_cache_disable",
    "captions are encoded once, before training": "text_cache_ondemand text_cache_disable",
    "nothing in a dataset folder is ever deleted; a list of rejected files is written": "delete_unwanted_images delete_problematic_images delete_nsfw_images",
    "regularisation sets are not offered yet": "is_regularisation_data is_regularization_data",
    "slider training is not offered yet": "slider_strength",
    "sigma is drawn alike for all datasets": "timestep_sampling_offset",
    "a dataset takes part in the whole run": "start_epoch start_step end_epoch end_step",
    "captions are used as written; more lines are more alternatives": "caption_shuffle caption_filter_list",
    NO_PAIRS_REASON: "conditioning conditioning_data conditioning_type conditioning_image_embeds source_dataset_id "
    "cache_dir_conditioning_image_embeds conditioning_image_embed_batch_size",
    "caption tables are not read yet": "parquet",
    "Chroma draws single pictures": "video audio bbox num_frames s2v_datasets",
    LOCAL_ONLY_REASON: "aws_bucket_name aws_data_prefix aws_region_name aws_endpoint_url aws_access_key_id "
    "aws_secret_access_key csv_file csv_caption_column csv_cache_dir csv_url_column dataset_name split "
    "revision image_column caption_column num_proc streaming huggingface "
    "memory_filesystem_path memory_filesystem_size memory_filesystem_sudo",
}
REFUSED_FIELDS, UNNEEDED_FIELDS = (
    {name: reason for reason, names in table.items() for name in names.split()}
    for table in (REFUSED_BY_REASON, UNNEEDED_BY_REASON)
)
HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "metadata_backend": ("discovery", "json"),
    "aspect_bucket_alignment": (64,),
    "timestep_sampling_offset": (0,),
    "start_epoch": (0, 1),
    "start_step": (0,),
    "conditioning": ([],),
    "caption_shuffle": ({"enable": False},),
    **{
        name: (False,)
        for name in REFUSED_FIELDS
        if name.startswith(("vae_", "text_cache", "delete_", "is_reg"))
    },
}

ALL_FIELD_NAMES = (*COMMON_FIELDS, *IMAGE_FIELDS, *CACHE_FIELDS, *UNNEEDED_FIELDS, *REFUSED_FIELDS)
