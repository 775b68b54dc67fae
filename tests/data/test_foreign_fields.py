"""Every field of SimpleTuner's dataset examples that needed attention, and what happens to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.errors import ConfigError

IMAGES = {"id": "photos", "instance_data_dir": "photos"}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"}
BUCKET = {
    "aws_bucket_name": "mine",
    "aws_data_prefix": "photos",
    "aws_endpoint_url": "https://x/",
    "aws_access_key_id": "id",
    "aws_secret_access_key": "key",
}
HUB = {"type": "huggingface", "dataset_name": "owner/name", "caption_strategy": "huggingface"}
COMPOSITE = "composite_image_config"
FILTERS = {"collection": ["photo"], "quality_thresholds": {"clear": 0.5}, "min_width": 512}
# Entries that stand beside a dataset of masks, and beside a dataset of images that names it.
PAIRED = {**IMAGES, "caption_strategy": "filename"}
MASKS = {
    "id": "masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "photos",
}
TABLE_BLOCK = {
    "path": "photos/captions.parquet",
    "filename_column": "id",
    "caption_column": "caption",
    "fallback_caption_column": "tags",
    "width_column": "width",
    "height_column": "height",
    "identifier_includes_extension": True,
}
SINGLE = "Chroma generates single images"

# (entry, fields, outcome). outcome: "works", "noted" (a notice names the field) or a part of the
# message that refuses it.
FIELDS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (TEXTS, {"cache_dir": "cache/text/{model_family}"}, "works"),
    (TEXTS, {"type": "aws", "aws_bucket_name": "mine", "aws_endpoint_url": "https://x/"}, "noted"),
    (TEXTS, {"cache_dir": "s3://mine/texts"}, "cache_remote in the config is for copies"),
    (IMAGES, {"cache_dir_vae": "s3://mine/latents"}, "noted"),
    (TEXTS, {"type": "memory", "memory_filesystem_path": "/ram"}, "noted"),
    (TEXTS, {"dataset_type": "conditioning_image_embeds"}, "noted"),
    (IMAGES, {"type": "aws"}, "aws_bucket_name is missing"),
    (IMAGES, {"aws_bucket_name": "mine"}, "noted"),
    (IMAGES, {"type": "aws", **BUCKET}, "works"),
    (IMAGES, {"type": "aws", **BUCKET, "aws_secret_access_key": ""}, "needs both parts"),
    (IMAGES, {"type": "huggingface"}, "dataset_name is missing"),
    (IMAGES, {"dataset_name": "username/dataset-name"}, "noted"),
    (IMAGES, {**HUB, "split": "train", "revision": "main", "streaming": True}, "works"),
    (IMAGES, {**HUB, "cache_dir": "cache/hub"}, "noted"),
    (IMAGES, {**HUB, "metadata_backend": "huggingface", "num_proc": 16}, "noted"),
    (IMAGES, {**HUB, "image_column": "image", "caption_column": ["title", "tags"]}, "works"),
    (IMAGES, {**HUB, "huggingface": {"caption_column": ["title", "tags"]}}, "works"),
    (IMAGES, {**HUB, "huggingface": {"filter_func": FILTERS}}, "works"),
    (IMAGES, {**HUB, "huggingface": {"filter_func": {"age": 3}}}, "filter_func must be"),
    (IMAGES, {**HUB, "huggingface": {"colour": 3}}, "colour: unknown"),
    (IMAGES, {**HUB, "huggingface": {"file_extension": "jpg"}}, "works"),
    (IMAGES, {**HUB, "huggingface": {"dataset_name": "owner/name"}}, "works"),
    (IMAGES, {**HUB, "dataset_name": "", "huggingface": {"dataset_name": "owner/name"}}, "works"),
    (IMAGES, {**HUB, "huggingface": {"dataset_name": "owner/other"}}, "named outside"),
    (IMAGES, {**HUB, "subfolder": "data/512x512"}, "works"),
    (IMAGES, {**HUB, "subfolder": "../elsewhere"}, "must be inside the dataset"),
    (IMAGES, {**HUB, "huggingface": {COMPOSITE: {"enabled": True}}}, "not cut into parts"),
    (IMAGES, {**HUB, "huggingface": {COMPOSITE: {"enabled": False}}}, "works"),
    (IMAGES, {"type": "csv"}, "table is missing"),
    (IMAGES, {"type": "csv", "csv_file": "list.csv"}, "is not a file"),
    (IMAGES, {"type": "csv", "csv_file": "photos/list.csv", "csv_url_column": "u"}, "works"),
    (IMAGES, {"type": "csv", "csv_file": "photos/list.csv", "csv_cache_dir": "c"}, "noted"),
    (IMAGES, {"csv_caption_column": "caption"}, "noted"),
    (IMAGES, {"type": "webshart"}, "source is missing"),
    (IMAGES, {"type": "webshart", "source": "owner/shards"}, "works"),
    (IMAGES, {"type": "webshart", "source": "owner/shards", "metadata": "owner/m"}, "noted"),
    (IMAGES, {"type": "webshart", "source": "a/b", "webshart": {"cache_dir": "c"}}, "noted"),
    (IMAGES, {"type": "memory"}, "images are not read from memory"),
    (IMAGES, {"memory_filesystem_path": "/ram"}, "noted"),
    (IMAGES, {"memory_filesystem_size": "512G"}, "noted"),
    (IMAGES, {"memory_filesystem_sudo": False}, "noted"),
    (IMAGES, {"metadata_backend": "parquet"}, "noted"),
    (IMAGES, {"caption_strategy": "parquet"}, "caption_table: is missing"),
    (IMAGES, {"caption_strategy": "parquet", "parquet": {"path": "t.parquet"}}, "is not a file"),
    (IMAGES, {"caption_strategy": "parquet", "parquet": TABLE_BLOCK}, "works"),
    (IMAGES, {"parquet": {"bbox_column": "bounding_boxes"}}, "noted"),
    (IMAGES, {"vae_cache_clear_each_epoch": True}, "noted"),
    (IMAGES, {"vae_cache_ondemand": True}, "noted"),
    (IMAGES, {"cache_file_suffix": "controlnet-sdxl"}, "noted"),
    (IMAGES, {"conditioning_image_embeds": "embeds"}, "noted"),
    (IMAGES, {"delete_problematic_images": True}, "noted"),
    (IMAGES, {"delete_nsfw_images": True}, "noted"),
    (IMAGES, {"conditioning": [{"type": "canny"}]}, "noted"),
    (IMAGES, {"conditioning": {"type": "superresolution", "blur_radius": 2.0}}, "noted"),
    (IMAGES, {"conditioning": [{"type": "random_masks"}]}, "masks are read from files"),
    (IMAGES, {"conditioning": []}, "works"),
    (IMAGES, {"conditioning_data": "pairs"}, "there is no dataset of this id"),
    (IMAGES, {"conditioning_type": "mask"}, "is not a field of datasets with this dataset_type"),
    (IMAGES, {"dataset_type": "conditioning"}, "conditioning_type is missing"),
    (IMAGES, {"source_dataset_id": "preferred"}, "is not a field of datasets with this"),
    (PAIRED, {"conditioning_data": ["masks"]}, "works"),
    (PAIRED, {"conditioning_data": ["masks", "more"]}, "an image has one mask"),
    (PAIRED, {"conditioning_data": "masks", "alpha_mask": True}, "use one of them"),
    (PAIRED, {}, "these masks would not be used"),
    (MASKS, {}, "works"),
    (MASKS, {"source_dataset_id": "photos"}, "works"),
    (MASKS, {"source_dataset_id": "others"}, "use the same name"),
    (MASKS, {"resolution": 512, "crop": True, "caption_strategy": "textfile"}, "noted"),
    (MASKS, {"cache_dir_vae": "cache/masks"}, "noted"),
    (MASKS, {"conditioning_type": "controlnet"}, "noted"),
    (MASKS, {"conditioning_type": "reference_strict"}, "noted"),
    (MASKS, {"conditioning_type": "reference_loose", "instance_data_dir": "none"}, "noted"),
    (MASKS, {"conditioning_type": "segmentation"}, "use mask"),
    (MASKS, {"conditioning_type": None}, "conditioning_type is missing"),
    (MASKS, {"instance_data_dir": "none"}, "does not exist"),
    (IMAGES, {"video": {"num_frames": 125}}, SINGLE),
    (IMAGES, {"dataset_type": "video"}, SINGLE),
    (IMAGES, {"dataset_type": "audio"}, "Chroma generates images"),
    (IMAGES, {"audio": {"auto_split": True}}, SINGLE),
    (IMAGES, {"audio_column": "audio"}, SINGLE),
    (IMAGES, {"config": {"lyrics_column": "lyrics"}}, SINGLE),
    (IMAGES, {"crop_style": "random|center|corner"}, "allowed: center, random, corner"),
    (IMAGES, {"crop_aspect": "square|preserve"}, "allowed: square, preserve, closest, random"),
    (IMAGES, {"resolution_type": "area|pixel"}, "allowed: pixel, area, pixel_area"),
    (IMAGES, {"caption_strategy": "filename|parquet"}, "allowed: textfile, filename"),
    (IMAGES, {"crop": True, "crop_aspect": "random"}, "works"),
    (IMAGES, {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.5]}, "works"),
    (IMAGES, {"resolution": 1.0, "resolution_type": "area"}, "works"),
    (IMAGES, {"grounding": {"enabled": True}}, "noted"),
    (IMAGES, {"grounding": {"enabled": False}}, "works"),
    (
        IMAGES,
        {"caption_strategy": "instanceprompt", "instance_prompt": '{"subject": "a cube"}'},
        "works",
    ),
    (
        IMAGES,
        {"caption_strategy": "instanceprompt", "instance_prompt": '["a cube", "zorbo"]'},
        "works",
    ),
    (IMAGES, {"ignore_epochs": False}, "works"),
    (
        IMAGES,
        {"caption_shuffle": {"enable": True, "count": 3, "seed": 42, "split_on": "comma"}},
        "works",
    ),
    (IMAGES, {"caption_filter_list": "none.txt"}, "cannot be read"),
    (IMAGES, {"caption_filter_list": ["blurry", "s/cat/dog/"]}, "works"),
    (TEXTS, {"caption_filter_list": ["blurry"]}, "works"),
    (IMAGES, {"max_upscale_threshold": 0.2}, "works"),
    (IMAGES, {"start_step": 300}, "no dataset is active at first"),
    (IMAGES, {"start_step": 0, "end_step": 300, "start_epoch": 0, "end_epoch": 0}, "works"),
    (IMAGES, {"train_batch_size": 2, "timestep_sampling_offset": 0.5}, "works"),
    (IMAGES, {"ignore_epochs": True}, "counts in an epoch"),
    (IMAGES, {"is_regularisation_data": True}, "works"),
    (IMAGES, {"is_regularization_data": True}, "works"),
    (IMAGES, {"regularisation_target": "images"}, "noted"),
    (IMAGES, {"is_regularisation_data": True, "regularisation_target": "x"}, "allowed: base"),
    (IMAGES, {"slider_strength": 0.5}, "slider training is not supported yet"),
]


def read(folder: Path, *entries: dict[str, Any]) -> DatasetFile:
    (folder / "photos").mkdir(exist_ok=True)
    for name in ("captions.parquet", "list.csv"):
        (folder / "photos" / name).write_bytes(b"")
    path = folder / "multidatabackend.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return read_dataset_file(path, DataOptions(), {})


@pytest.mark.parametrize(("entry", "fields", "outcome"), FIELDS)
def test_every_field_has_its_outcome(
    entry: dict[str, Any], fields: dict[str, Any], outcome: str, tmp_path: Path
) -> None:
    others = [] if entry is IMAGES else [IMAGES]
    if entry is PAIRED:
        others = [MASKS]
    if entry is MASKS:
        others = [{**IMAGES, "conditioning_data": "masks"}]
    if outcome in ("works", "noted"):
        notices = read(tmp_path, *others, {**entry, **fields}).notices
        assert bool(notices) == (outcome == "noted"), notices
        return
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *others, {**entry, **fields})
    assert any(outcome in problem.message for problem in caught.value.problems)
    assert "unknown field" not in str(caught.value)
