"""All fields that a dataset file may have: declared like options, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from simpletuner.config.option import OptionSection, option
from simpletuner.config.option_catalog import Option, all_options, section_options
from simpletuner.config.sections_data import CAPTION_TABLES
from simpletuner.data.source_fields import SOURCE_FIELDS, SOURCE_TYPES, SourceFields
from simpletuner.data.variation_fields import TRAINED, VariationFields

ONE_CACHE_REASON = (
    "a run has one cache, addressed by content; set cache_dir in the config, and cache_remote for "
    "copies in an object store"
)
NO_PAIRS_REASON = (
    "only ControlNet and editing models are trained on pairs; Chroma is trained on the images alone"
)
TABLE_BLOCK = "parquet"  # SimpleTuner's name of caption_table
PromptText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
AspectRatio = Annotated[float, Field(ge=0.01, le=100)]
CROPPED = {"crop": True}
BUCKETS_REASON = 'needs "crop": true and "crop_aspect": "closest" or "random"'

# Read this file as a table: name, type and default; one sentence of help; bounds, other values, and
# the relations to other fields.


class CommonDatasetFields(OptionSection):
    """All datasets."""

    id: str = option("", "Name of the dataset, unique in the run.")
    type: Literal[
        "local", "webdataset", "aws", "huggingface", "webshart", "csv", "jsonl", "parquet"
    ] = option(
        "local",
        "Images in a folder (local), in every .tar file below it (webdataset), in an S3 bucket "
        "(aws), in a dataset of the Hugging Face Hub (huggingface, webshart), or in the rows of a "
        "table (csv, jsonl, parquet).",
        refused_values={"memory": "images are not read from memory; use a folder"},
    )
    dataset_type: Literal[
        "image", "eval", "conditioning", "text_embeds", "image_embeds", "conditioning_image_embeds"
    ] = option(
        "image",
        "Images to train on (image), images for the held-out loss (eval), or masks (conditioning).",
        refused_values={
            "video": "Chroma generates single images",
            "audio": "Chroma generates images",
            "caption": "datasets of captions without images are not supported",
        },
    )
    disabled: bool = option(False, "Ignore this dataset.")
    disable: bool = option(False, "Alias for disabled.")


class ImageDatasetFields(VariationFields, SourceFields):
    """Datasets of images, image and eval; RUN_OPTION_FIELDS are theirs too."""

    instance_data_dir: str = option(
        "",
        "Folder of the images, or an address (s3://, gs://, az://); nothing in it is ever changed.",
        path="file",
    )
    instance_prompt: list[PromptText] | None = option(
        None,
        "Captions for caption_strategy instanceprompt: a text, or a list of texts.",
        needs_any={
            "caption_strategy": "instanceprompt",
            "prepend_instance_prompt": True,
            "only_instance_prompt": True,
        },
        min_length=1,
    )
    caption_table: str | dict[str, Any] | None = option(
        None,
        "Table of captions (.csv, .jsonl or .parquet) with a row per image: its path, or an object "
        "with path, filename_column, caption_column and fallback_caption_column.",
        needs={"caption_strategy": CAPTION_TABLES, "only_instance_prompt": False},
    )
    disable_multiline_split: bool = option(
        False,
        "Read a caption file as one caption; otherwise each line is an alternative caption.",
        needs={"caption_strategy": "textfile", "only_instance_prompt": False},
    )
    crop: bool = option(
        False, "Crop images to crop_aspect; otherwise they keep their aspect ratio."
    )
    crop_style: Literal["center", "random", "corner"] = option(
        "random",
        "Crop position: the centre, a random position per image, or the top left corner.",
        value_aliases={"centre": "center"},
        refused_values={"face": "face detection is not supported"},
        needs=TRAINED,
        idle_value="center",
    )
    crop_aspect: Literal["square", "preserve", "closest", "random"] = option(
        "square",
        "Shape of the crop: square, the image's own aspect ratio, the closest of "
        "crop_aspect_buckets, or a random one of them.",
        needs=CROPPED,
        idle_value="preserve",
    )
    crop_aspect_buckets: list[AspectRatio] | None = option(
        None,
        "Aspect ratios (width / height), from 0.01 to 100, for crop_aspect closest and random; "
        "null is a list of common ratios.",
        needs={**CROPPED, "crop_aspect": ("closest", "random"), "resolution_buckets": None},
        unmet_errors={"crop": BUCKETS_REASON, "crop_aspect": BUCKETS_REASON},
        min_length=1,
    )
    resolution_buckets: str | list[Any] | dict[str, Any] | None = option(
        None,
        "Sizes to crop to, in place of resolution: a list of texts such as 832x1216, an object of "
        "ratios and sizes, or a .json file with either; crop_aspect closest or random chooses.",
        needs={**CROPPED, "crop_aspect": ("closest", "random")},
        unmet_errors={"crop": BUCKETS_REASON, "crop_aspect": BUCKETS_REASON},
    )
    crops_per_image: int = option(
        1,
        "How many random crops of each image are encoded; each use of the image takes the next "
        "one, of another position and, with crop_aspect random, of another shape.",
        unit="crops",
        needs={**TRAINED, **CROPPED},
        needs_any={"crop_style": "random", "crop_aspect": "random"},
        ge=1,
        le=64,
    )
    conditioning_data: str | list[str] | None = option(
        None,
        "Dataset of masks (dataset_type conditioning), with a file of the same stem for each "
        "image.",
        needs=TRAINED,
    )
    alpha_mask: bool = option(
        False,
        "Use the transparency of each image as its mask: transparent parts are not trained.",
        needs=TRAINED,
    )
    is_regularisation_data: bool = option(
        False,
        "Images that show what must not change: they are trained towards "
        "regularisation_target, with the weight prior_loss_weight.",
        needs=TRAINED,
    )
    regularisation_target: Literal["base", "images"] = option(
        "base",
        "Target of regularisation images: the base's own prediction, or the images themselves.",
        needs={"is_regularisation_data": True},
    )
    repeats: int = option(
        0,
        "How many extra times each image is seen per epoch (0 = once).",
        unit="extra passes",
        needs=TRAINED,
        ge=0,
        le=10**6,
    )
    probability: float = option(
        1.0,
        "Fraction of the dataset that is seen per epoch, relative to the other datasets.",
        needs=TRAINED,
        gt=0,
        le=16384,
    )
    max_upscale_threshold: float | None = option(
        None,
        "Skip images that would be enlarged by more than this fraction of their size (0.2 is 20 "
        "percent); null keeps all.",
        ge=0,
        le=100,
    )
    max_num_samples: int | None = option(
        None, "Maximum number of images; null is all.", zero_is_null=True, ge=1, le=10**6
    )
    exclude: list[PromptText] | None = option(
        None,
        "Images that are not used, by their paths inside the dataset; the files stay as they are.",
    )
    crop_boxes: dict[str, Any] | None = option(
        None,
        "The part of an image that is used as if it were the whole: an object of path -> [left, "
        "top, width, height] in pixels of the upright image; the files stay as they are.",
    )


class MaskDatasetFields(OptionSection):
    """Datasets of masks, conditioning."""

    conditioning_type: Literal["mask"] | None = option(
        None,
        "Kind of the images: mask.",
        refused_values={
            "segmentation": "masks have levels of grey; use mask, with black and white images",
        },
    )
    instance_data_dir: str = option(
        "", "Folder of the masks; nothing in it is ever changed.", path="file"
    )
    source_dataset_id: str | None = option(None, "Dataset whose images the masks belong to.")


class CacheDatasetFields(OptionSection):
    """Entries of dataset_type text_embeds, image_embeds and conditioning_image_embeds."""

    default: bool = option(False, "Use this entry when several are listed.")
    cache_dir: str | None = option(
        None,
        "must be a folder of this machine (cache_remote in the config is for copies in an object "
        "store); the placeholders are {env:NAME}, {model_family}, {output_dir} and {id}",
        pattern=r"^([^{:]|:[^/{])*$",
    )
    caption_filter_list: str | list[str] | None = option(
        None, "caption_filter_list of the datasets that have none of their own."
    )


# The kinds of entries that hold a cache and no images.
CACHE_DATASET_TYPES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
CACHE_STORAGES = (
    "memory",
    *SOURCE_TYPES[1:],
)  # other values of their type; caches are always local files
COMMON_FIELDS: Mapping[str, Option] = section_options("dataset", CommonDatasetFields)
MASK_FIELDS: Mapping[str, Option] = section_options("dataset", MaskDatasetFields)
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
        "caption_table",
        "disable_multiline_split",
        *VariationFields.model_fields,
        "resolution",
        "resolution_type",
        "crop",
        "crop_style",
        "crop_aspect",
        "crop_aspect_buckets",
        "resolution_buckets",
        "crops_per_image",
        "minimum_aspect_ratio",
        "maximum_aspect_ratio",
        "minimum_image_size",
        "maximum_image_size",
        "target_downsample_size",
        "max_upscale_threshold",
        "conditioning_data",
        "alpha_mask",
        "is_regularisation_data",
        "regularisation_target",
        "repeats",
        "probability",
        "max_num_samples",
        "exclude",
        "crop_boxes",
        *SOURCE_FIELDS,
    )
}
# Options of the run that a dataset may set for itself.
RUN_OPTION_FIELDS = tuple(name for name in IMAGE_FIELDS if name not in _IMAGE_ONLY_FIELDS)

# Fields that are read without any effect on the training; a notice gives the reason.
UNNEEDED_BY_REASON: Mapping[str, tuple[str, ...]] = {
    ONE_CACHE_REASON: (
        "cache_dir_vae",
        "text_embeds",
        "image_embeds",
        "conditioning_image_embeds",
        "cache_dir_conditioning_image_embeds",
        "conditioning_image_embed_batch_size",
        "cache_file_suffix",
    ),
    "caches are files in cache_dir, which may be on a RAM disk such as /dev/shm": (
        "memory_filesystem_path",
        "memory_filesystem_size",
        "memory_filesystem_sudo",
    ),
    "images are found by scanning the source, and their sizes are read from the files": (
        "metadata_backend",
    ),
    "captions are the .txt files in the tar files, whose images are scanned": (
        "metadata",
        "webshart",
    ),
    "Chroma reads captions only, and no boxes": (
        "grounding",
        "bbox",
    ),
    NO_PAIRS_REASON: ("conditioning",),
    "downloaded files are in cache_dir of the config, up to remote_cache_gib": (
        "csv_cache_dir",
        "cache_dir",
    ),
    "files are read by as many threads as help": ("num_proc",),
    "scanning writes no files": ("preserve_data_backend_cache", "metadata_update_interval"),
    "folders are always scanned, and unchanged files are not encoded again": (
        "skip_file_discovery",
    ),
    "the size of cache files is cache_shard_mib in the config": ("write_batch_size",),
    "cache entries are always named by their content": ("hash_filenames",),
    "buckets follow from the exact aspect ratio and the model": (
        "aspect_bucket_rounding",
        "aspect_bucket_alignment",
    ),
    "images are encoded once, before training, and again where they changed; crops_per_image gives "
    "each epoch another random crop": (
        "vae_cache_clear_each_epoch",
        "vae_cache_ondemand",
        "vae_cache_disable",
    ),
    "captions are encoded once, before training": ("text_cache_ondemand", "text_cache_disable"),
    "files in a dataset folder are never deleted; a list of rejected files is written": (
        "delete_unwanted_images",
        "delete_problematic_images",
        "delete_nsfw_images",
    ),
}

# Fields of SimpleTuner that are refused.
REFUSED_BY_REASON: Mapping[str, tuple[str, ...]] = {
    "set it once in the config, for all datasets": ("text_encoder_batch_size",),
    "slider training is not supported yet": ("slider_strength",),
    "every dataset that is active counts in an epoch": ("ignore_epochs",),
    "Chroma generates single images": (
        "video",
        "audio",
        "audio_column",
        "config",
        "num_frames",
        "s2v_datasets",
    ),
}
REFUSED_FIELDS = {name: reason for reason, names in REFUSED_BY_REASON.items() for name in names}
UNNEEDED_FIELDS = {name: reason for reason, names in UNNEEDED_BY_REASON.items() for name in names}
# conditioning_type of images that belong to others in another way than masks do, and the types of
# generated masks in "conditioning", which would change what is trained.
PAIR_TYPES = ("controlnet", "reference_strict", "reference_loose")
MASK_GENERATORS = ("random_masks", "inpainting")
# Values of refused and of unneeded fields that say nothing, so that there is no notice.
HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "conditioning": ([],),
    "grounding": ({"enabled": False},),
    "ignore_epochs": (False,),
    **{name: (False,) for name in UNNEEDED_FIELDS if name.startswith("delete_")},
}


def is_harmless(key: str, raw: Any) -> bool:
    """Return whether a field that is refused or not needed asks for what is done anyway.

    False and 0 are different values.
    """
    return any(
        raw == value and isinstance(raw, type(value)) for value in HARMLESS_VALUES.get(key, ())
    )


def generates_masks(raw: Any) -> bool:
    """Return whether the field "conditioning" asks for masks that are made at random."""
    entries = raw if isinstance(raw, list) else [raw]
    return any(
        isinstance(entry, dict) and entry.get("type") in MASK_GENERATORS for entry in entries
    )


# Other names of fields.
FIELD_ALIASES: Mapping[str, str] = {
    TABLE_BLOCK: "caption_table",
    "is_regularization_data": "is_regularisation_data",
}
ALL_FIELD_NAMES = (
    *FIELD_ALIASES,
    *COMMON_FIELDS,
    *IMAGE_FIELDS,
    *MASK_FIELDS,
    *CACHE_FIELDS,
    *UNNEEDED_FIELDS,
    *REFUSED_FIELDS,
)
