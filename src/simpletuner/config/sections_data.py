"""Sections about the images and captions to train on: data and cache."""

from __future__ import annotations

from typing import ClassVar, Literal

from simpletuner.config.option import Effect, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

CAPTION_TABLES = ("csv", "jsonl", "parquet")
PER_IMAGE_CAPTIONS = {
    "caption_strategy": ("textfile", "filename", *CAPTION_TABLES, "huggingface"),
    "only_instance_prompt": False,
}


class DataOptions(OptionSection):
    """Images and captions; the fields of a dataset override these."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset({"plan"})

    data_backend_config: str | None = option(
        None,
        "File that lists the datasets; null is multidatabackend.json in the folder of the config "
        "file.",
        level="basic",
        resume_policy="free",
        path="file",
    )
    resolution: float = option(
        1024.0,
        "Training resolution, in the unit of resolution_type.",
        level="basic",
        gt=0,
        le=16384,
    )
    resolution_type: Literal["pixel", "area", "pixel_area"] = option(
        "pixel_area",
        "Unit of resolution. pixel: shorter edge in px; area: megapixels; pixel_area: edge in px "
        "of the square of that area (1024 = 1024x1024).",
        level="basic",
    )
    caption_strategy: Literal[
        "textfile", "filename", "instanceprompt", "csv", "jsonl", "parquet", "huggingface"
    ] = option(
        "textfile",
        "Source of captions: a .txt file next to each image, the image's file name, "
        "instance_prompt for all images, or the rows of a table (caption_table of a dataset, or a "
        "dataset that is a table itself).",
        level="basic",
        value_aliases={"instance_prompt": "instanceprompt", "webshart": "textfile"},
        affects=set(),
    )
    instance_prompt: str | None = option(
        None, "Caption for caption_strategy instanceprompt.", level="common", affects=set()
    )
    prepend_instance_prompt: bool = option(
        False,
        "Put instance_prompt before each caption.",
        level="common",
        needs=PER_IMAGE_CAPTIONS,
        affects=set(),
    )
    only_instance_prompt: bool = option(
        False, "Replace every caption with instance_prompt.", level="common", affects=set()
    )
    caption_dropout_probability: float = option(
        0.1,
        "Probability that an image is trained with an empty caption.",
        level="common",
        affects=set(),
        ge=0,
        le=1,
    )
    missing_caption: Literal["error", "empty", "filename", "drop"] = option(
        "error",
        "Images without a caption: stop with an error, use an empty caption, use the file name, "
        "or drop the image.",
        needs=PER_IMAGE_CAPTIONS,
        affects=set(),
    )
    minimum_image_size: float | None = option(
        None,
        "Skip smaller images, in the unit of resolution_type.",
        level="common",
        zero_is_null=True,
        gt=0,
    )
    maximum_image_size: float | None = option(
        None,
        "Shrink larger images to target_downsample_size first, in the unit of resolution_type.",
        zero_is_null=True,
        gt=0,
    )
    target_downsample_size: float | None = option(
        None,
        "Size to which images over maximum_image_size are shrunk before cropping.",
        zero_is_null=True,
        gt=0,
    )
    max_image_megapixels: float = option(
        100.0,
        "Skip images with more pixels, without decoding them.",
        unit="megapixels",
        gt=0,
        le=10000,
    )
    maximum_aspect_ratio: float = option(
        4.0, "Skip images with a larger aspect ratio (width / height).", gt=0, le=1000
    )
    minimum_aspect_ratio: float = option(
        0.25, "Skip images with a smaller aspect ratio (width / height).", gt=0, le=1000
    )
    max_bad_sample_fraction: float = option(
        0.1,
        "Refuse to train when more than this fraction of the images is unusable.",
        resume_policy="free",
        ge=0,
        le=1,
    )
    alpha_background: str = option(
        "white",
        "Background of transparent images: white, black or #rrggbb.",
        pattern="^(white|black|#[0-9a-fA-F]{6})$",
    )
    data_backend_sampling: Literal["auto-weighting", "uniform"] = option(
        "auto-weighting",
        "Sample datasets by probability times length, or by probability only (uniform).",
    )
    regularisation_ratio: float = option(
        1.0,
        "Largest number of batches per epoch that regularisation datasets have together, for each "
        "batch of the others; 0 does not limit them.",
        level="common",
        affects=set(),
        ge=0,
        le=1000,
    )


class CacheOptions(OptionSection):
    """Caches of latents and text embeddings."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset({"plan"})

    cache_dir: str | None = option(
        None,
        "Folder of the caches on this machine; null is the folder cache in output_dir.",
        level="common",
        resume_policy="free",
        path="new",
    )
    cache_remote: str | None = option(
        None,
        "Address of an object store (s3://, gs://, az://) for copies of the caches: entries that "
        "it has are fetched and not encoded again, and new ones are copied there.",
        resume_policy="free",
    )
    remote_cache_gib: float = option(
        20.0,
        "Disk space for downloaded images and tables in cache_dir; the oldest are deleted first.",
        unit="GiB",
        resume_policy="free",
        gt=0,
        le=10**6,
    )
    vae_cache_sample: Literal["mean", "draw"] = option(
        "draw",
        "Latents from the VAE's posterior: a new sample each time an image is trained (draw), or "
        "its mean.",
    )
    vae_batch_size: int = option(
        4,
        "Images that are encoded at once, at most; images above 512 px in smaller batches, of as "
        "many pixels as one of 1024 px.",
        level="common",
        unit="images",
        resume_policy="free",
        ge=1,
        le=256,
    )
    text_encoder_batch_size: int = option(
        4,
        "Batch size for encoding captions.",
        unit="captions",
        resume_policy="free",
        ge=1,
        le=256,
    )
    cache_shard_mib: int = option(
        256, "Size of one cache file.", unit="MiB", resume_policy="free", ge=1, le=8192
    )
