"""Types of the dataset file after it was checked and the defaults were filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.data.caption_variants import CaptionVariants
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.image_choices import ImageChoices
from simpletuner.data.row_filters import RowFilters


@dataclass(frozen=True)
class CaptionTable:
    """A table of captions. format: "csv", "jsonl" or "parquet".

    filename_column, caption_columns: None and empty are the usual names. fallback_column: read
    where the captions of a row are empty. url: where the table is, if not a file of this machine.
    """

    path: Path
    format: str
    filename_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    fallback_column: str | None = None
    url: str = ""


@dataclass(frozen=True)
class StoreLocation:
    """A folder of an object store, or a pattern of URLs.

    scheme: "s3", "gs", "az", "http" or "https". root: bucket and prefix, or what follows the scheme
    of a URL. endpoint_url, region: "" for the driver's own. access_key_id, secret_access_key: ""
    where the driver finds them (environment, profile, role); shown nowhere.
    """

    scheme: str
    root: str
    endpoint_url: str = ""
    region: str = ""
    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.root}"


@dataclass(frozen=True)
class HubLocation:
    """A dataset of the Hugging Face Hub. subset, revision: "" for the repository's default.

    subfolder: files outside of it are not read; "" is the whole repository.
    """

    repository: str
    revision: str = ""
    subset: str = ""
    split: str = "train"
    streaming: bool = False
    subfolder: str = ""

    @property
    def address(self) -> str:
        return f"the hub dataset {self.repository}"


@dataclass(frozen=True)
class ImageTable:
    """A table whose rows are images.

    location: an absolute path or a URL; "" for the tables of a hub dataset. format: "csv", "jsonl"
    or "parquet". Columns that are None or empty have the usual names, or are not read.
    needs_captions: the captions come from the rows.
    """

    location: str
    format: str
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    fallback_column: str | None = None
    width_column: str | None = None
    height_column: str | None = None
    weight_column: str | None = None
    filters: RowFilters = field(default_factory=RowFilters)
    needs_captions: bool = True


@dataclass(frozen=True)
class ActivePeriod:
    """When a dataset is trained on.

    From start_epoch to end_epoch, both included and counted from 1, and in the optimizer steps
    after start_step up to and including end_step; both must hold. None is the end of the run.
    """

    start_epoch: int = 1
    end_epoch: int | None = None
    start_step: int = 0
    end_step: int | None = None

    def __str__(self) -> str:
        epochs = f"epochs {self.start_epoch} to {self.end_epoch or 'the last'}"
        return f"{epochs}, steps {self.start_step + 1} to {self.end_step or 'the last'}"

    def holds(self, step: int, epoch: int) -> bool:
        """Return whether the dataset is active. step: completed steps. epoch: from 0."""
        in_epochs = self.start_epoch <= epoch + 1 <= (self.end_epoch or epoch + 1)
        return in_epochs and self.start_step <= step < (self.end_step or step + 1)


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of images.

    dataset_type: "image" is trained on; "eval" is held out: centre crop, first caption, once per
    measurement. instance_data_dir: an existing folder, absolute; nothing in it is changed.
    instance_prompts: alternatives; empty when the dataset has none. repeats: extra passes over
    every sample in an epoch; 0 is one pass. probability: fraction of the dataset per epoch,
    relative to the largest of the run (see sample_order.py). max_num_samples: a subset that depends
    only on the dataset's id and the file names. type: "local", or "webdataset" for tar files in the
    folder. caption_table: None with captions elsewhere. caption_filters: see caption_filters.py.
    caption_variants: None where captions are used as they are. caption_weights: of the first,
    second ... alternative, the last for all that follow; empty where all have the same.
    timestep_sampling_offset: added to logit(sigma). store, hub, table: where the images are, when
    they are not files of instance_data_dir. conditioning_data: the id of the dataset of masks,
    masks: that dataset; None without one. alpha_mask: the mask of an image is its own transparency.
    regularisation_target: "" for a dataset that teaches; "base" and "images" are the targets of one
    that shows what must not change. choices: about single images.
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
    caption_filters: tuple[str, ...] = ()
    caption_variants: CaptionVariants | None = None
    caption_weights: tuple[float, ...] = ()
    timestep_sampling_offset: float = 0.0
    active: ActivePeriod = ActivePeriod()
    store: StoreLocation | None = None
    hub: HubLocation | None = None
    table: ImageTable | None = None
    conditioning_data: str | None = None
    masks: DatasetConfig | None = None
    alpha_mask: bool = False
    regularisation_target: str = ""
    choices: ImageChoices = field(default_factory=ImageChoices)

    @property
    def has_folder(self) -> bool:
        """True where instance_data_dir is the folder of the images."""
        return self.store is None and self.hub is None and self.table is None

    @property
    def address(self) -> str:
        """The place of the images, for messages."""
        if self.store is not None:
            return self.store.address
        if self.hub is not None:
            return self.hub.address
        return self.table.location if self.table is not None else str(self.instance_data_dir)


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
