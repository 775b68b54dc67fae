"""Types of the dataset file after it was checked and the defaults were filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.data.geometry import ResizeCropConfig


@dataclass(frozen=True)
class CaptionTable:
    """A table of captions. format: "csv", "jsonl" or "parquet".

    filename_column, caption_columns: None and empty are the usual names. fallback_column: read
    where the captions of a row are empty.
    """

    path: Path
    format: str
    filename_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    fallback_column: str | None = None


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of images.

    dataset_type: "image" is trained on; "eval" is held out: centre crop, first caption, once per
    measurement. instance_data_dir: an existing folder, absolute; nothing in it is changed.
    instance_prompts: alternatives; empty when the dataset has none. repeats: extra passes over
    every sample in an epoch; 0 is one pass. probability: fraction of the dataset per epoch,
    relative to the largest of the run (see sample_order.py). max_num_samples: a subset that depends
    only on the dataset's id and the file names. type: "local", or "webdataset" for tar files in the
    folder. caption_table: None with captions elsewhere.
    """

    id: str
    dataset_type: str
    instance_data_dir: Path
    resize_crop: ResizeCropConfig = field(default_factory=ResizeCropConfig)
    caption_strategy: str = "textfile"
    instance_prompts: tuple[str, ...] = ()
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False
    repeats: int = 0
    probability: float = 1.0
    max_num_samples: int | None = None
    type: str = "local"
    caption_table: CaptionTable | None = None


@dataclass(frozen=True)
class DatasetFile:
    """Content of the dataset file.

    text_cache_dir: absolute, from the text_embeds entry, None when not given. notices: about fields
    that have no effect, one sentence each.
    """

    train: tuple[DatasetConfig, ...]
    eval: tuple[DatasetConfig, ...]
    text_cache_dir: Path | None
    notices: tuple[str, ...] = ()
