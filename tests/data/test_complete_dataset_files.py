"""Whole dataset files as SimpleTuner's users have them are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.errors import ConfigError

pytest.importorskip("pyarrow")
Entry = dict[str, Any]
FOLDER: Entry = {"id": "photos", "type": "local", "instance_data_dir": "photos"}
SQUARE: Entry = {
    "crop": True,
    "crop_style": "center",
    "crop_aspect": "square",
    "resolution": 1024,
    "resolution_type": "pixel_area",
    "minimum_image_size": 256,
    "maximum_image_size": 2048,
    "target_downsample_size": 1024,
}
AREA: Entry = {"resolution": 0.262144, "resolution_type": "area", "crop": False}
TEXTS: Entry = {
    "id": "texts",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": True,
    "cache_dir": "cache/text/{model_family}",
    "write_batch_size": 128,
}
KEYS: Entry = {
    "aws_bucket_name": "mine",
    "aws_region_name": None,
    "aws_endpoint_url": "https://storage.example/",
    "aws_access_key_id": "id",
    "aws_secret_access_key": "secret",
    "aws_data_prefix": "",
}
HUB: Entry = {
    "id": "hub",
    "type": "huggingface",
    "dataset_name": "owner/name",
    "metadata_backend": "huggingface",
    "cache_dir_vae": "cache/vae/{model_family}/hub",
}
TARS: Entry = {
    "type": "webshart",
    "dataset_type": "image",
    "caption_strategy": "webshart",
    "metadata_backend": "webshart",
    "source": "owner/shards",
    "metadata": "owner/shards-metadata",
    "disable_multiline_split": True,
    "webshart": {"cache_dir": "cache/webshart", "shard_cache_gb": 25, "caption_key": "long"},
}
BLOCK: Entry = {
    "path": "captions.parquet",
    "filename_column": "id",
    "caption_column": "caption",
    "fallback_caption_column": "tags",
    "width_column": "width",
    "height_column": "height",
    "identifier_includes_extension": False,
}
EDGES: Entry = {"type": "canny", "conditioning_type": "controlnet", "captions": ["a cube"]}
REFERENCE: Entry = {
    "id": "others",
    "dataset_type": "conditioning",
    "type": "local",
    "instance_data_dir": "others",
    "conditioning_type": "reference_strict",
    "source_dataset_id": "photos",
    **AREA,
}

# What the file is about: its entries, and the ids of the datasets that are trained on.
FILES: dict[str, tuple[list[Entry], str]] = {
    "a folder, and text embeddings in a bucket": (
        [
            {**FOLDER, **SQUARE, "caption_strategy": "textfile", "cache_dir_vae": "cache/vae"},
            {**TEXTS, "type": "aws", **KEYS, "cache_dir": ""},
        ],
        "photos",
    ),
    "one folder at two sizes": (
        [
            {**FOLDER, **SQUARE, "repeats": 2, "probability": 0.5},
            {**FOLDER, **AREA, "id": "small", "train_batch_size": 2, "text_embeds": "texts"},
            TEXTS,
        ],
        "photos small",
    ),
    "one prompt for a hub dataset": (
        [{**HUB, **SQUARE, "caption_strategy": "instanceprompt", "instance_prompt": "🟫"}, TEXTS],
        "hub",
    ),
    "a prompt that is JSON": (
        [
            {
                **HUB,
                "caption_strategy": "instanceprompt",
                "instance_prompt": '{"what": ["a cube"]}',
            },
            TEXTS,
        ],
        "hub",
    ),
    "columns of a hub dataset": (
        [
            {
                **HUB,
                **SQUARE,
                "caption_strategy": "huggingface",
                "image_column": "Image",
                "huggingface": {
                    "dataset_name": "owner/name",
                    "image_column": "Image",
                    "caption_column": "Caption",
                    "file_extension": "jpg",
                },
            },
            TEXTS,
        ],
        "hub",
    ),
    "tar files of the hub to keep what the base knows": (
        [
            {**HUB, **AREA, "caption_strategy": "instanceprompt", "instance_prompt": "🟫"},
            *(
                {**TARS, **AREA, "id": f"tars-{size}", "subfolder": f"data/{size}", "repeats": 3}
                | {"is_regularisation_data": True, "max_num_samples": 64, "probability": 0.25}
                for size in ("512x512", "384x672")
            ),
            TEXTS,
        ],
        "hub tars-512x512 tars-384x672",
    ),
    "a list of URLs": (
        [
            {
                **SQUARE,
                "id": "urls",
                "type": "csv",
                "csv_file": "list.csv",
                "csv_caption_column": "caption",
                "csv_cache_dir": "cache/csv",
                "caption_strategy": "csv",
                "image_embeds": "latents",
            },
            {"id": "latents", "type": "local"},
            TEXTS,
        ],
        "urls",
    ),
    "captions in a table": (
        [
            {**FOLDER, "caption_strategy": "parquet", "metadata_backend": "parquet"}
            | {"parquet": BLOCK, "resolution": 1.0, "resolution_type": "area", "crop": True}
            | {"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.75, 1.23]}
            | {"crop_style": "random", "vae_cache_clear_each_epoch": True, "disable": False}
        ],
        "photos",
    ),
    "a bucket with caches on this machine": (
        [
            {"id": "data", "type": "aws", **KEYS, "image_embeds": "latents"}
            | {"caption_strategy": "parquet", "metadata_backend": "parquet", "parquet": BLOCK},
            {"id": "latents", "type": "local", "dataset_type": "image_embeds"},
            TEXTS,
        ],
        "data",
    ),
    "a curriculum": (
        [
            {**FOLDER, "id": "low", "resolution": 512, "end_step": 300},
            {**FOLDER, "id": "high", "resolution": 1024, "start_step": 300},
        ],
        "low high",
    ),
    "masks": (
        [
            {**FOLDER, "conditioning_data": "masks"},
            {**FOLDER, "id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"},
        ],
        "photos",
    ),
    "edges for a ControlNet": ([{**FOLDER, "conditioning": EDGES}, TEXTS], "photos"),
    "edits and what they start from": (
        [{**FOLDER, **AREA, "conditioning_data": ["others"]}, REFERENCE, TEXTS],
        "photos",
    ),
    "a mask and a reference": (
        [
            {**FOLDER, "conditioning_data": ["others", "masks"]},
            REFERENCE,
            {**FOLDER, "id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"},
        ],
        "photos",
    ),
    "boxes": (
        [{**FOLDER, "grounding": {"enabled": True, "auto_detect": {"labels": ["dog"]}}}],
        "photos",
    ),
    "tags": (
        [
            {**FOLDER, "caption_shuffle": {"enable": True, "count": 3, "split_on": "comma"}},
            {**TEXTS, "caption_filter_list": ["arafed", "s/this/that/"]},
        ],
        "photos",
    ),
    "any shape, little enlarged": (
        [
            {**FOLDER, "crop": True, "crop_aspect": "random", "max_upscale_threshold": 0.2}
            | {"crop_aspect_buckets": [1.0, 0.5, 2.0], "delete_unwanted_images": True}
        ],
        "photos",
    ),
    "caches in memory": (
        [
            FOLDER,
            {"id": "ram", "type": "memory", "dataset_type": "image_embeds", "cache_dir": "/vae"}
            | {"memory_filesystem_path": "/ram", "memory_filesystem_size": "512G"},
        ],
        "photos",
    ),
}
REFUSED: dict[str, tuple[list[Entry], str]] = {
    "videos": (
        [{**FOLDER, "dataset_type": "video", "video": {"num_frames": 125}}],
        "Chroma generates single images",
    ),
    "a slider": ([{**FOLDER, "slider_strength": 0.5}], "slider training is not supported"),
    "captions alone": ([{**FOLDER, "dataset_type": "caption"}], "captions without images"),
    "a folder that is not there": ([{**FOLDER, "instance_data_dir": "none"}], "does not exist"),
    "all values at once": ([{**FOLDER, "crop_style": "random|center"}], "allowed: center, random"),
}


def read(folder: Path, entries: list[Entry]) -> DatasetFile:
    (folder / "photos").mkdir()
    for name in ("list.csv", "captions.parquet"):
        (folder / name).write_bytes(b"")
    file = folder / "multidatabackend.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return read_dataset_file(file, DataOptions(), {})


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_read(name: str, tmp_path: Path) -> None:
    entries, trained = FILES[name]
    datasets = read(tmp_path, entries)
    assert [dataset.id for dataset in datasets.train] == trained.split()
    masked = [dataset.id for dataset in datasets.train if dataset.masks is not None]
    assert masked == (["photos"] if "mask" in name else [])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_reason(name: str, tmp_path: Path) -> None:
    entries, reason = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, entries)
    assert any(reason in problem.message for problem in caught.value.problems)


def test_a_field_of_many_datasets_has_one_notice(tmp_path: Path) -> None:
    entries = [{**FOLDER, "id": f"set-{n}", "cache_dir_vae": "cache"} for n in range(5)]
    (notice,) = read(tmp_path, entries).notices
    assert notice.startswith("cache_dir_vae is not needed in set-0, set-1, set-2 and 2 more: a run")
